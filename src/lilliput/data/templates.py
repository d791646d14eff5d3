"""A chat as the text a model knows, and which characters of it are the assistant's.

The text is the model's own chat template, rendered by its tokenizer; a model without one gets the Alpaca prompt
(Stanford Alpaca; line breaks as in Alpaca-LoRA). Which characters are whose is our own bookkeeping: the chat is
rendered twice, once as it is and once with a mark on either side of every turn's words. The marked text gives what
the template writes of its own around the words; laid over the plain text it must fit in exactly one way, words
trimmed at their ends allowed. Where it does not, the chat is refused, never guessed at.

A turn of the assistant is labelled from the end of the generation prompt to its end-of-turn token:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    ------------------------------------------------------LLLLLLLLLLLLLLLL--

Words that hold the text of a control token (`<|im_end|>`) are cut inside it, so that it stays text and cannot forge
a turn. A tool's turn and the list of tools are handed to the template, which writes them or refuses; the tool's words
are no labels, the assistant's call is. Not here: tokens (`examples.py`), images, templates chosen by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from lilliput.data.chats import Chat, Turn
from lilliput.errors import DataError
from lilliput.progress import warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_PROBE = Chat((Turn("user", "Hello"), Turn("assistant", "Hi")), "a trial chat of two words")
_TOOLS_TODO = "Choose a model whose chat template knows tools, or take the row out."
_TODO = "Choose a simpler chat template for the tokenizer, or take the row out."


@dataclass(frozen=True)
class Rendering:
    """A chat as text: `frame[0] words[0] frame[1] … words[n-1] frame[n]`; `roles[i]` says whose `words[i]` are."""

    frame: list[str]
    words: list[str]
    roles: list[str]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(own + said for own, said in zip(self.frame, [*self.words, ""], strict=True))


@dataclass(frozen=True)
class Segment:
    """A stretch of text that begins at a token boundary, all of it labelled or none of it.

    `control` counts the control tokens that the template writes in it. `closes`: the template ends this turn of the
    assistant with no token of its own, so EOS stands behind it.
    """

    text: str
    label: bool
    control: int = 0
    closes: bool = False


@dataclass(frozen=True)
class Layout:
    """What holds for all chats of a tokenizer.

    Attributes:
        control: finds the tokens that structure a chat: the special ones, and added ones that its template writes.
        control_ids: their ids; without the one for unknown letters, which words become as well.
        lead: white space between the generation prompt and the assistant's words (Llama-2: a space); labelled.
        ending: the token that ends the assistant's turn, or None where the template has none (EOS is put there).
        eos, unk: the tokens for the end and for unknown letters, as texts.
        bos: the id that the tokenizer puts before every text, or None.
    """

    control: re.Pattern[str]
    control_ids: frozenset[int]
    lead: str
    ending: str | None
    eos: str | None
    unk: str | None
    bos: int | None


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Rendering:
    """The chat as the model's template writes it, or as the Alpaca prompt when it has none.

    Raises DataError when the template refuses the chat or it cannot be said exactly which words are whose.
    """
    return _template(chat, tokenizer) if tokenizer.chat_template else _alpaca(chat)


def segments(rendering: Rendering, layout: Layout, origin: str) -> list[Segment]:
    """Cut a rendering where labels begin and end, and inside words that look like control tokens."""
    pieces = _Pieces(layout)
    frame = rendering.frame[0]
    for index, (role, words) in enumerate(zip(rendering.roles, rendering.words, strict=True)):
        following = rendering.frame[index + 1]
        if role != "assistant":
            pieces.add(frame, label=False)
            pieces.add_words(words, label=False)
            frame = following
            continue
        lead = layout.lead if frame.endswith(layout.lead) else ""
        pieces.add(frame.removesuffix(lead), label=False)
        pieces.add(lead, label=True)
        pieces.add_words(words, label=True)
        ending = _ending(following, layout, index == len(rendering.roles) - 1, origin)
        if ending is None:
            pieces.close()
        else:
            pieces.add(ending, label=True)
        frame = following.removeprefix(ending or "")
    pieces.add(frame, label=False)
    return pieces.done


class _Pieces:
    """Joins neighbours of the same label, unless one was cut on purpose."""

    def __init__(self, layout: Layout) -> None:
        self.done: list[Segment] = []
        self._layout = layout

    def add(self, text: str, *, label: bool) -> None:
        """Text that the template writes."""
        self._add(Segment(text, label, control=sum(token != self._layout.unk for token in self._control(text))))

    def add_words(self, words: str, *, label: bool) -> None:
        """Words of a turn; where they spell a control token, a cut behind its first character keeps it text."""
        start, cut = 0, False
        while found := self._layout.control.search(words, start):
            self._add(Segment(words[start : found.start() + 1], label), cut=cut)
            start, cut = found.start() + 1, True
        self._add(Segment(words[start:], label), cut=cut)

    def close(self) -> None:
        """The turn that was just added needs EOS behind it."""
        self.done[-1] = replace(self.done[-1], closes=True)

    def _control(self, text: str) -> list[str]:
        return self._layout.control.findall(text)

    def _add(self, new: Segment, cut: bool = False) -> None:
        if not new.text:
            return
        last = self.done[-1] if self.done else None
        if last and last.label == new.label and not cut and not last.closes:
            self.done[-1] = Segment(last.text + new.text, new.label, last.control + new.control)
        else:
            self.done.append(new)


def _ending(following: str, layout: Layout, last: bool, origin: str) -> str | None:
    """What ends the assistant's turn in the text that follows its words; None where EOS must be put."""
    space = len(following) - len(following.lstrip())
    found = layout.control.match(following, space)
    if found and found.group() in (layout.ending, layout.eos):
        return following[: found.end()]
    if layout.ending is None:
        return None
    what = f"the chat template ends {'the last' if last else 'an earlier'} turn of the assistant without "
    raise DataError(f"{what}'{layout.ending}', with which it ends a single answer", where=origin or None, todo=_TODO)


# ---- what holds for a tokenizer ----------------------------------------------------------------------------------


def layout_of(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """The layout of a tokenizer's chats, found with a chat of two words; kept until the tokenizer changes.

    Raises DataError when the template cannot write that chat, or when nothing can end the assistant's turn.
    """
    template = repr(tokenizer.chat_template)
    return _layout(tokenizer, (template, len(tokenizer), repr(tokenizer.special_tokens_map), _bos(tokenizer)))


@lru_cache(maxsize=8)
def _layout(tokenizer: PreTrainedTokenizerBase, state: tuple[str, int, str, int | None]) -> Layout:
    rendering = render(_PROBE, tokenizer)
    tokens = _control_tokens(tokenizer, "".join(rendering.frame))
    control = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
    tail = rendering.frame[-1]
    found = control.match(tail, len(tail) - len(tail.lstrip()))
    if found is None and tokenizer.eos_token is None:
        what = "nothing ends the assistant's turn: the chat template writes no token behind it, and there is no EOS"
        raise DataError(what, where=_name(tokenizer), todo="Set the tokenizer's eos_token.")
    return Layout(
        control=control,
        control_ids=frozenset(token_id(token, tokenizer) for token in tokens if token != tokenizer.unk_token),
        lead=_lead(rendering, tokenizer),
        ending=found.group() if found else None,
        eos=tokenizer.eos_token,
        unk=tokenizer.unk_token,
        bos=_bos(tokenizer),
    )


def token_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), f"{token!r} is a special or added token, so it has one id"
    return found


def _control_tokens(tokenizer: PreTrainedTokenizerBase, frame: str) -> set[str]:
    """Special tokens, and added ones that the template writes (some tokenizers do not call their markers special)."""
    tokens = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or (token.content in frame and not token.content.isspace()):
            tokens.add(token.content)
    return {token for token in tokens if token}


def _lead(rendering: Rendering, tokenizer: PreTrainedTokenizerBase) -> str:
    """White space that stands between the generation prompt and the words, and that the model therefore writes."""
    if not tokenizer.chat_template:
        return ""
    prompt = _apply(_PROBE.prompt, tokenizer, generation_prompt=True)
    before = rendering.frame[0] + rendering.words[0] + rendering.frame[1]
    lead = before.removeprefix(prompt)
    return lead if before.startswith(prompt) and lead.isspace() else ""


def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id when the tokenizer puts it before a text by itself."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokenizer {tokenizer.name_or_path}" if tokenizer.name_or_path else "tokenizer"


# ---- the model's template ----------------------------------------------------------------------------------------


def _template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Rendering:
    plain = _apply(chat, tokenizer)
    if any(turn.role == "tool" for turn in chat.turns) and not _knows_tools(tokenizer, repr(tokenizer.chat_template)):
        what = "the chat template writes a tool's words as those of another"
        raise DataError(what, where=chat.origin or None, todo=_TOOLS_TODO)
    frame = _frame(chat, tokenizer)
    ways = _fits(plain, frame, [turn.content for turn in chat.turns])
    if len(ways) != 1:
        what = "changes the words of a turn" if not ways else "can be read in several ways"
        raise DataError(
            f"the chat template {what}, so the label mask is not known", where=chat.origin or None, todo=_TODO
        )
    return Rendering(frame, ways[0], [turn.role for turn in chat.turns])


def _apply(chat: Chat, tokenizer: PreTrainedTokenizerBase, generation_prompt: bool = False) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in chat.turns]
    tools = _tools(chat, tokenizer) if chat.tools else None
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
        )
    except (TemplateError, ValueError, TypeError) as error:
        what = f"the model's chat template refuses this chat: {error}"
        raise DataError(what, where=chat.origin or None, todo="Change the turns, or the template.") from error
    assert isinstance(text, str)
    return text


def _tools(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The tools that a chat names, as templates take them: a list of objects."""
    try:
        tools = json.loads(chat.tools)
    except ValueError as error:
        raise DataError(f"'tools' is no JSON ({error})", where=chat.origin or None, todo=_TODO) from error
    tools = tools if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise DataError("'tools' is no list of objects", where=chat.origin or None, todo=_TODO)
    if "tools" not in repr(tokenizer.chat_template):
        _say_no_tools(f"the chat template of {_name(tokenizer)}")
    return tools


@lru_cache(maxsize=8)
def _knows_tools(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the template writes a tool's turn in another way than a user's and the assistant's.

    Some write whoever is not the user as the assistant: what a tool found would stand there as the assistant's words.
    """

    def written(role: str) -> str | None:
        try:
            return _apply(Chat((*_PROBE.turns, Turn(role, "42"), Turn("assistant", "Hi"))), tokenizer)
        except DataError:
            return None  # refused: not written as a tool's turn is

    return written("tool") not in (written("user"), written("assistant"))


@lru_cache(maxsize=8)
def _say_no_tools(name: str) -> None:
    """Once for each tokenizer."""
    warn(f"{name} writes no list of tools, so those that rows name are not learned")


def _frame(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the template writes around the words, read off a rendering with marks on either side of them."""
    sign = next(sign for sign in _signs() if not any(sign in turn.content for turn in chat.turns))
    marked = tuple(
        Turn(turn.role, f"{sign}{number}<{turn.content}{sign}{number}>") for number, turn in enumerate(chat.turns)
    )
    parts = re.split(f"{sign}([0-9]+[<>])", _apply(replace(chat, turns=marked), tokenizer))
    marks = parts[1::2]
    for number, turn in enumerate(chat.turns):
        if marks.count(f"{number}<") != 1 or marks.count(f"{number}>") != 1:
            fate = "drops" if f"{number}<" not in marks and f"{number}>" not in marks else "repeats or rewrites"
            what = f"the chat template {fate} turn {number + 1} ({turn.role})"
            raise DataError(what, where=chat.origin or None, todo=_TODO)
    expected = [f"{number}{side}" for number in range(len(chat.turns)) for side in "<>"]
    if marks != expected or parts[2::4] != [turn.content for turn in chat.turns]:
        raise DataError("the chat template reorders or rewrites the turns", where=chat.origin or None, todo=_TODO)
    return parts[0::4]


def _signs() -> Iterator[str]:
    """Marks made of a private-use character, which no template treats as white space or as text of its own."""
    number = 0
    while True:
        yield f"\ue17a{number}\ue17b"
        number += 1


def _fits(plain: str, frame: list[str], words: list[str]) -> list[list[str]]:
    """All ways to read `plain` as the frame with the words in it, the words whole or trimmed at their ends."""
    ways: list[tuple[int, list[str]]] = [(len(frame[0]), [])] if plain.startswith(frame[0]) else []
    for content, following in zip(words, frame[1:], strict=True):
        ways = [
            (at + len(form) + len(following), [*chosen, form])
            for at, chosen in ways
            for form in _trims(content)
            if plain.startswith(form + following, at)
        ]
    return [chosen for at, chosen in ways if at == len(plain)]


def _trims(content: str) -> list[str]:
    """What templates make of the ends of a turn's words."""
    trims = (str.strip, str.lstrip, str.rstrip)
    forms = [content, *(trim(content) for trim in trims), *(trim(content, "\n") for trim in trims)]
    return list(dict.fromkeys(forms))


# ---- without a template ------------------------------------------------------------------------------------------


def _alpaca(chat: Chat) -> Rendering:
    """The Alpaca prompt; further turns repeat its headings, and a system turn takes the place of its preamble.

    <preamble> ### Instruction: <user> [### Input: <input>] ### Response: <assistant>EOS ### Instruction: …
    """
    if any(turn.role == "tool" for turn in chat.turns):
        what = "has a tool's turn, which the Alpaca prompt cannot say"
        raise DataError(what, where=chat.origin or None, todo=_TOOLS_TODO)
    if chat.tools:
        _say_no_tools("the Alpaca prompt")
    frame, words, roles = [""], [], []

    def put(role: str, text: str, then: str = "") -> None:
        words.append(text)
        roles.append(role)
        frame.append(then)

    for number, turn in enumerate(chat.turns):
        if turn.role == "system":
            put("system", turn.content)
        elif turn.role == "assistant":
            put("assistant", turn.content)
        else:
            if number == 0:
                frame[-1] += ALPACA_PREAMBLE_WITH_INPUT if chat.input else ALPACA_PREAMBLE
            frame[-1] += "\n\n### Instruction:\n"
            asked = turn.content
            first_user = "user" not in roles
            if first_user and chat.input:
                put("user", chat.without_input(asked), "\n\n### Input:\n")
                asked = chat.input
            put("user", asked, "\n\n### Response:\n")
    return Rendering(frame, words, roles)
