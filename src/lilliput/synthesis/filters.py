"""What is not taken into a pool of tasks, and the words that say why. Self-Instruct, arXiv 2212.10560, section 2.2
("Filtering and Postprocessing"), with the heuristics of its released code; what is ours says so.

An instruction is refused when it is too short or too long, names what a text model cannot see or make (a picture, a
graph), begins with a punctuation mark or a letter that is not ASCII, says the same again and again (ours), or is too
near to one that is there (ROUGE-L, `rouge.py`). An instance is refused when its output is missing or only repeats the
input, when it is unfinished, or when another one contradicts or repeats it. Every check is a row of a table.
Not here: near-duplicates in a whole file (`near.py`), the elimination of Evol-Instruct (`evol_instruct.py`).
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lilliput.data.chats import is_whole
from lilliput.synthesis.rouge import split_words

# Section 2.2 names image, picture and graph; the released code the others up to "go to"; the rest are the later lists'.
KEYWORDS = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot"),
    *("go to", "video", "videos", "audio", "music", "flowchart", "flowcharts", "diagram", "diagrams"),
)
# Models put this before tasks that they have seen, and then it is open whether a program or its result is wanted.
OPENINGS = ("write a program",)
_ENOUGH_TO_REPEAT = 8  # runs of three words; in a shorter text a repetition means nothing


class Refusal(NamedTuple):
    """Why something is not taken: `reason` is the same for all of its kind, `detail` tells about this one."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Rules:
    """What an instruction must be like.

    words: the fewest and the most. keywords, openings: what must not be in it, and not at its beginning.
    unicode: letters of any script may begin it, and words are counted in scripts that write no spaces too.
    repetition: the share of its runs of three words that it may have said before (ours).
    """

    words: tuple[int, int] = (4, 150)
    keywords: tuple[str, ...] = KEYWORDS
    openings: tuple[str, ...] = OPENINGS
    unicode: bool = False
    repetition: float = 0.5

    def count(self, text: str) -> int:
        """Words in `text`."""
        return len(split_words(text, "unicode")) if self.unicode else len(text.split())


RULES = Rules()


def refuse_instruction(text: str, rules: Rules = RULES) -> Refusal | None:
    """The first reason not to take an instruction, judged by itself; None when there is none."""
    return _first(INSTRUCTION_CHECKS, text, rules)


def refuse_instance(instruction: str, given: str, output: str, rules: Rules = RULES) -> Refusal | None:
    """The first reason not to take an instance, judged by itself. `given` is its input, "" for none."""
    return _first(INSTANCE_CHECKS, (instruction, given, output), rules)


def sift(
    instruction: str, pairs: Sequence[tuple[str, str]], *, classification: bool, most: int, rules: Rules = RULES
) -> list[Refusal | None]:
    """A verdict on each instance (input, output) of one task, in their order.

    Those that stand alone are compared: of a repeated one the first stays; none of those stays that give the same
    input different outputs (where a task is no classification, no input at all is not "the same input": there may be
    many poems). Of a classification no label stays more than once more than the rarest (ours; one that is the only
    label stays once). The first `most` of what is left stay.
    """
    verdicts = [refuse_instance(instruction, given, output, rules) for given, output in pairs]
    sound = [number for number, verdict in enumerate(verdicts) if verdict is None]
    for judge in (
        _contradictions(classification),
        _repetitions,
        *((_unbalanced,) if classification else ()),
        _more_than(most),
    ):
        refused = judge([(number, *pairs[number]) for number in sound])
        for number, refusal in refused.items():
            verdicts[number] = refusal
        sound = [number for number in sound if number not in refused]
    return verdicts


def repeated_share(text: str) -> float:
    """The share of a text's runs of three words that occurred in it before: 0 says nothing twice, near 1 is a loop."""
    words = text.lower().split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(runs)) / len(runs) if len(runs) >= _ENOUGH_TO_REPEAT else 0.0


# ---- an instruction by itself ------------------------------------------------------------------------------------


def _too_short(text: str, rules: Rules) -> str | None:
    return f"{rules.count(text)} words" if rules.count(text) < rules.words[0] else None


def _too_long(text: str, rules: Rules) -> str | None:
    return f"{rules.count(text)} words" if rules.count(text) > rules.words[1] else None


def _half_character(text: str, rules: Rules) -> str | None:
    """A lone surrogate cannot be written as UTF-8."""
    return None if is_whole(text) else "a lone surrogate"


def _key_word(text: str, rules: Rules) -> str | None:
    found = (
        re.search(rf"\b({'|'.join(map(re.escape, rules.keywords))})\b", text, re.IGNORECASE) if rules.keywords else None
    )
    return found[0].lower() if found else None


def _opening(text: str, rules: Rules) -> str | None:
    return next((opening for opening in rules.openings if text.lower().startswith(opening)), None)


def _punctuation(text: str, rules: Rules) -> str | None:
    return text[0] if text[:1] and text[0] in string.punctuation else None


def _not_ascii(text: str, rules: Rules) -> str | None:
    return text[0] if not rules.unicode and not text[:1].isascii() else None


def _loop(text: str, rules: Rules) -> str | None:
    share = repeated_share(text)
    return f"{share:.0%} of its runs of three words" if share > rules.repetition else None


INSTRUCTION_CHECKS: tuple[tuple[str, Callable[[str, Rules], str | None]], ...] = (
    ("too short", _too_short),  # the empty one too, so that the checks of the first letter find one
    ("too long", _too_long),
    ("half a character", _half_character),
    ("key word", _key_word),
    ("unclear program", _opening),
    ("starts with punctuation", _punctuation),
    ("starts with a letter that is not ASCII", _not_ascii),
    ("repeats itself", _loop),
)

# ---- an instance by itself ---------------------------------------------------------------------------------------

_Case = tuple[str, str, str]  # instruction, input, output


def _same(first: str, second: str) -> bool:
    return first.split() == second.split()


INSTANCE_CHECKS: tuple[tuple[str, Callable[[_Case, Rules], str | None]], ...] = (
    ("no output", lambda case, rules: None if case[2].strip() else "nothing was written"),
    ("half a character", lambda case, rules: _half_character(case[1] + case[2], rules)),
    ("output equals input", lambda case, rules: "word for word" if _same(case[1], case[2]) else None),
    ("output equals instruction", lambda case, rules: "word for word" if _same(case[0], case[2]) else None),
    ("unfinished", lambda case, rules: "ends with a colon" if any(t.strip().endswith(":") for t in case[1:]) else None),
    ("output repeats itself", lambda case, rules: _loop(case[2], rules)),
)


def _first(checks: Iterable[tuple[str, Callable[..., str | None]]], thing: str | _Case, rules: Rules) -> Refusal | None:
    for reason, check in checks:
        detail = check(thing, rules)
        if detail is not None:
            return Refusal(reason, detail)
    return None


# ---- instances beside each other: (number, input, output) --------------------------------------------------------

_Judge = Callable[[list[tuple[int, str, str]]], dict[int, Refusal]]


def _contradictions(classification: bool) -> _Judge:
    def judge(instances: list[tuple[int, str, str]]) -> dict[int, Refusal]:
        outputs = defaultdict(set)
        for _, given, output in instances:
            outputs[given].add(output)
        return {
            number: Refusal("same input, different outputs", f"{len(outputs[given])} outputs")
            for number, given, _ in instances
            if len(outputs[given]) > 1 and (given or classification)
        }

    return judge


def _repetitions(instances: list[tuple[int, str, str]]) -> dict[int, Refusal]:
    seen: dict[tuple[str, str], int] = {}
    return {
        number: Refusal("duplicate instance", f"of instance {seen[given, output] + 1}")
        for number, given, output in instances
        if seen.setdefault((given, output), number) != number
    }


def _unbalanced(instances: list[tuple[int, str, str]]) -> dict[int, Refusal]:
    counts = Counter(output for _, _, output in instances)
    most = (min(counts.values()) if len(counts) > 1 else 0) + 1
    taken: Counter[str] = Counter()
    refused = {}
    for number, _, output in instances:
        taken[output] += 1
        if taken[output] > most:
            refused[number] = Refusal("more of one label", f"{counts[output]} of {sum(counts.values())} are {output!r}")
    return refused


def _more_than(most: int) -> _Judge:
    def judge(instances: list[tuple[int, str, str]]) -> dict[int, Refusal]:
        return {number: Refusal("more instances than wanted", f"{most} are kept") for number, _, _ in instances[most:]}

    return judge
