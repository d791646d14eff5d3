"""What an instruction asks for, as a verb and the noun it acts on: "Write a short story about a fox" is (write, story).

Self-Instruct (arXiv 2212.10560, section 3.1 and figure 3) shows the variety of instructions by the verb closest to the
root of their parse and its first direct noun object, found by a neural parser. There is no parser here: a request in
English names its verb early, mostly first, so a list of verbs and some rules about where the noun phrase behind it
ends do for a picture. How often they find something, and how often that is right, stands in docs/evol-instruct.md.
Not here: other languages (nothing is found, and the report says how often), questions that name no deed ("What is …?").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_WORD = re.compile(r"[a-z]+(?:['’\-][a-z]+)*|\d[\d.,:/]*\d|\d|[^\sa-z\d]")
_SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")
_LOOKED_AT = 4  # sentences: the request stands among the first, behind them come texts to work on


@dataclass(frozen=True)
class Deed:
    """What is asked for: the verb in its plain form, and the noun in the singular; "" where none was found."""

    verb: str = ""
    noun: str = ""


def deed_of(instruction: str) -> Deed:
    """The first verb in the instruction that asks for something, with the noun it acts on.

    The first sentence with both wins; without one, the first with a verb.
    """
    found = [_deed_in(_WORD.findall(text)) for text in _SENTENCE.split(instruction.strip().lower())[:_LOOKED_AT]]
    return next((deed for deed in found if deed.noun), next((deed for deed in found if deed.verb), Deed()))


@dataclass(frozen=True)
class Variety:
    """Verbs and nouns over a set of instructions.

    instructions: how many were looked at. with_verb, with_noun: in how many a verb, and a noun too, was found.
    pairs: (verb, noun) with their numbers, the commonest first; of these alone the other two are made.
    """

    instructions: int
    with_verb: int
    with_noun: int
    pairs: tuple[tuple[str, str, int], ...]

    @staticmethod
    def of(instructions: Iterable[str]) -> Variety:
        """Count the deeds of all instructions."""
        deeds = [deed_of(text) for text in instructions]
        counts = Counter((deed.verb, deed.noun) for deed in deeds if deed.noun)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        pairs = tuple((verb, noun, count) for (verb, noun), count in ranked)
        return Variety(
            len(deeds), sum(bool(deed.verb) for deed in deeds), sum(bool(deed.noun) for deed in deeds), pairs
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; all pairs."""
        return {
            "instructions": self.instructions,
            "with_verb": self.with_verb,
            "with_noun": self.with_noun,
            "verbs": len({verb for verb, _, _ in self.pairs}),
            "distinct_pairs": len(self.pairs),
            "pairs": [list(pair) for pair in self.pairs],
        }


def rings(
    pairs: Iterable[tuple[str, str, int]], verbs: int = 20, nouns: int = 4
) -> list[tuple[str, int, list[tuple[str, int]]]]:
    """The commonest verbs, each with its number and its commonest nouns: (verb, number, [(noun, number), …]).

    Args:
        pairs: of `Variety`, the commonest first. verbs, nouns: how many, as in figure 3 of the paper.
    """
    by_verb: dict[str, list[tuple[str, int]]] = {}
    for verb, noun, count in pairs:
        by_verb.setdefault(verb, []).append((noun, count))
    found = [(verb, sum(count for _, count in its), its[:nouns]) for verb, its in by_verb.items()]
    return sorted(found, key=lambda item: (-item[1], item[0]))[:verbs]


# ---- the rules -----------------------------------------------------------------------------------------------------


def _deed_in(words: list[str]) -> Deed:
    """The deed of one sentence, in lower case: the first place where a verb of the list stands as a request."""
    for start in _places(words):
        if verb := _verb_at(words, start):
            return Deed(verb, _object_behind(words, start + 1, verb))
    return Deed()


def _places(words: list[str]) -> list[int]:
    """Where a request may begin: at the start, behind a phrase that leads to one, behind the comma of a preface."""
    starts = [0]
    for i, word in enumerate(words):
        starts += [i + len(lead) for lead in _LEADS.get(word, ()) if words[i : i + len(lead)] == lead]
    if words and (words[0] in _PREFACES or words[0].endswith("ing")):
        starts += [i + 1 for i, word in enumerate(words) if word in {",", "–", "—", "then"}]
    return sorted({_skip(words, start) for start in starts})


def _skip(words: list[str], at: int) -> int:
    """Past "please", "carefully", a bullet or an opening quote."""
    while at < len(words) and (words[at] in _POLITE or words[at].endswith("ly") or not words[at][0].isalnum()):
        at += 1
    return at


def _verb_at(words: list[str], at: int) -> str:
    """The verb at this place, or "": a noun that looks like one ("Answer: …", "Order of the …") is none."""
    behind = words[at + 1] if at + 1 < len(words) else ""
    verb = words[at].replace("re-", "re") if at < len(words) else ""
    return verb if verb in VERBS and behind not in _NOT_BEHIND_A_VERB else ""


def _object_behind(words: list[str], at: int, verb: str) -> str:
    """The head of the noun phrase behind the verb: the last word before what ends such a phrase; "" for none."""
    while at < len(words) and (words[at] in _SMALL_WORDS or words[at].endswith("ly")):
        at += 1
    if verb == "come" and words[at : at + 1] == ["with"]:  # come up with
        at += 1
    head = ""
    for i in range(at, len(words)):
        if _ends_phrase(words[i], words[i - 1], head):
            inside = _object_behind(words, i + 1, "") if singular(head) in _MEASURES and words[i] == "of" else ""
            return inside or _as_noun(head)
        head = words[i] if words[i][0].isalpha() else head
    return _as_noun(head)


def _ends_phrase(word: str, before: str, head: str) -> bool:
    if word in {"and", "or", ","}:  # "a short, funny and true story" goes on; "a poem and a song" does not
        return not (before in _ADJECTIVES or before.endswith(_ADJECTIVE_ENDINGS))
    if not word[0].isalnum() or word in _ENDERS:
        return True
    named = head and head not in _DETERMINERS and head not in _ADJECTIVES
    return bool(named) and (word in _DETERMINERS or word in _BEFORE_OR_BEHIND or word.endswith("ly"))


def _as_noun(head: str) -> str:
    """The head's singular, or "" when what was found is no noun."""
    is_none = not head or any(head in words for words in (_NO_NOUNS, _DETERMINERS, _ADJECTIVES, _BEFORE_OR_BEHIND))
    return "" if is_none else singular(head)


def singular(noun: str) -> str:
    """A noun's singular by English spelling: stories to story, boxes to box, men to man."""
    noun = noun.removesuffix("'s").removesuffix("'")
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    for ending, put in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if noun.endswith(ending) and len(noun) > len(ending) + 1:
            return noun.removesuffix(ending) + put
    is_plural = noun.endswith("s") and not noun.endswith(("ss", "us", "is")) and len(noun) > 3
    return noun[:-1] if is_plural else noun


# ---- the words -----------------------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What people ask of a language model, in the plain form. A word that is a noun more often than a request is left out.
VERBS = _words(
    """
    abbreviate accept act adapt add address adjust advise align analyse analyze annotate announce answer anticipate
    append apply appraise approximate argue arrange articulate ask assemble assess assign assume attach balance bake
    brainstorm break brief build buy calculate capitalize caption capture categorise categorize cast change
    characterize chart check choose cite clarify classify clean close cluster code collect color combine come comment
    compare compile complete compose compress compute conceive condense conduct configure connect consider consolidate
    construct contrast convert convince cook copy correct count craft create critique crop cut debate debug decide
    decipher declare decode decompose decorate deduce define delete deliver demonstrate derive describe design detail
    detect determine develop devise diagnose diagram dictate differentiate direct discover discuss display distinguish
    divide do document draft draw edit elaborate eliminate email embed emphasize enumerate encode encourage encrypt
    enhance ensure enter establish estimate evaluate examine exchange execute expand explain explore express extend
    extract fetch figure fill filter find finish fix follow forecast form format formulate gather generate get give go
    grade greet group guess guide handle help highlight hypothesize identify illustrate imagine imitate implement
    imply improve include incorporate increase indicate infer inform insert inspect integrate interpret introduce
    invent investigate invite join judge justify keep label learn let link list locate look make manage map mark match
    measure mention merge minimize mix model modify multiply name narrate negotiate normalize note number obtain offer
    omit open optimize order organise organize outline output paint paraphrase parse perform persuade pick place plan
    play plot point pose post practice predict prepare prescribe present print prioritize probe process produce
    program promote prompt pronounce proofread propose prove provide pull punctuate put query quantify quote randomize
    rank rate rationalize read rearrange recall recite recognise recognize recommend reconstruct record rectify reduce
    refactor reflect refine reformat reformulate rephrase relate remember remove rename render reorder reorganize
    repair repeat replace reply report represent reproduce request research resolve respond restate restructure
    retell retrieve return reverse review revise rewrite rhyme round run sample save say scan schedule score search
    segment select send separate set share shorten show shuffle simplify simulate sing sketch solve sort specify speak
    spell split spot standardize start state structure study substitute subtract suggest sum summarise summarize
    supply support synthesize tabulate tag take talk teach tell test think title trace track transcribe transform
    translate transliterate turn type understand unscramble update use utilize validate verify visualize vote weigh
    wish work write
    """
)


def _by_first_word(phrases: str) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {}
    for phrase in map(str.split, phrases.split("|")):
        found.setdefault(phrase[0], []).append(phrase)
    return found


# Behind these a request begins, wherever they stand in the sentence.
_LEADS = _by_first_word(
    """
    can you|could you|would you|will you|i want you to|i need you to|i would like you to|i'd like you to|
    you are asked to|you are required to|you need to|you have to|you should|you must|your task is to|your job is to|
    your goal is to|the task is to|the goal is to|task is to|help me to|help me|help us|let's|let us|you will|you'll|
    you are to|we want to|we need to|i want to|i need to|i'd like to|i would like to|how do i|how do you|how can i|
    how can we|how can you|how to|how should i|how would you|how could i|how does one|is it possible to|want me to|
    be able to|are supposed to|are going to|try to|i am trying to|what is the best way to|ways to|asked to|you to
    """
)
# A sentence that begins like this names its request behind a comma.
_PREFACES = _words(
    """
    given based for in if using from with when suppose assume imagine consider assuming after before as to considering
    let on without within at by here you i the this there these there's below and is it while once since because
    """
)
_POLITE = _words("please kindly now then first second third next finally also just simply pls hey hello ok okay")
_NOT_BEHIND_A_VERB = _words(": of is are was were = ) / ? , has have had will can")
# Between the verb and its object: for whom it is done, and the small words of phrasal verbs.
_SMALL_WORDS = _words("me us him them out up down off over through back please also")
_DETERMINERS = _words(
    """
    a an the this that these those my your his her its our their some any each every all both either another such no
    one two three four five six seven eight nine ten eleven twelve fifteen twenty thirty fifty hundred several many few
    most more other various multiple at least what which whose same own
    """
)
_ADJECTIVES = _words(
    """
    short long brief new good bad simple complex following given big small large different similar creative funny
    original main unique possible interesting important clear concise detailed right wrong correct appropriate best
    better great high low old young first second third last next sad happy fun nice formal common basic odd even real
    full single whole complete specific general suitable persuasive convincing professional friendly catchy random
    compelling engaging short-term long-term well-written positive negative quick polite proper personal fictional
    """
)
_ADJECTIVE_ENDINGS = ("ful", "ous", "ive", "able", "ible", "ical", "less", "ish")
# What ends a noun phrase: prepositions, words that open a clause, verbs and participles behind a noun.
_ENDERS = _words(
    """
    about above across after against along among around as at before behind below beneath beside between beyond by
    during except for from in inside into like near of off on onto out outside over per since through throughout till to
    toward towards under until up upon via with within without that which who whom whose where when while why how what
    whether if because so such then than but and/or using containing including based called named describing
    explaining outlining detailing involving showing consisting regarding concerning starting beginning ending
    according related written made used found listed mentioned shown needed required is are was were be has have had
    can could should would will may might must do does did correctly accordingly below above here there they you i
    we he she it not also only instead again together please each yourself titled entitled comparing discussing
    highlighting summarizing focusing featuring representing expressing inspired versus vs who's that's caused
    formed arranged
    """
)
_BEFORE_OR_BEHIND = _words("given following provided")  # "the given list", "a reply given the list"
# A container says less than what is in it: "a list of five birds" is about birds, "a kind of" about what it is.
_MEASURES = _words("kind type sort pair couple set number lot piece series variety")
_NO_NOUNS = _words(
    """
    it them me us you him her this that these those one ones following given provided something anything everything true
    false yes no neutral positive negative abc largest smallest odd
    """
)
# Plurals that the endings do not tell, and words that end like a plural and are none.
_IRREGULAR = {
    "men": "man", "women": "woman", "people": "person", "children": "child", "criteria": "criterion", "feet": "foot",
    "phenomena": "phenomenon", "analyses": "analysis", "hypotheses": "hypothesis", "theses": "thesis", "lives": "life",
    "leaves": "leaf", "knives": "knife", "wolves": "wolf", "halves": "half", "movies": "movie", "cookies": "cookie",
    "calories": "calorie", "ties": "tie", "axes": "axis", "heroes": "hero", "potatoes": "potato", "teeth": "tooth",
    "tomatoes": "tomato", "vertices": "vertex", "matrices": "matrix", "indices": "index", "mice": "mouse",
    "biases": "bias",
    **{
        word: word
        for word in _words("series species news physics mathematics politics lens gas bus bias canvas atlas pros")
    },
}  # fmt: skip
