"""A chat becomes an example: token ids with a label mask; a file becomes a set of them, counted.

Each segment of a chat (`templates.py`) is tokenized as if it stood behind what comes before it, so that a token
boundary lies wherever labels begin or end. Two promises follow by construction and need no care elsewhere: the prompt
used for generation is exactly the beginning of the training example, and no token is half label and half prompt.
Not here: packing (`packing.py`), what a row means (`chats.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lilliput.data.chats import Chat, Turn, check_chat
from lilliput.data.forms import to_chat
from lilliput.data.records import Records, SkippedRow, gather, settle
from lilliput.data.templates import Layout, Segment, layout_of, render, segments, token_id
from lilliput.errors import DataError, UsageError, nearest
from lilliput.progress import say, track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["drop", "truncate", "error"]
_ANCHORS = ("\x01", "\n", "|", "=")  # texts that seldom merge with what follows them


@dataclass(frozen=True)
class Example:
    """Token ids of one chat; `label_mask[t]` is True where token t is a label: the assistant's words and the token
    that ends its turn. White space that the template puts between those two is a label too, since the model has to
    write it to get from one to the other."""

    input_ids: list[int]
    label_mask: list[bool]
    origin: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> int:
        """How many tokens can be learned: labels that have a token before them."""
        return sum(self.label_mask[1:])


@dataclass(frozen=True)
class ExampleSet:
    """The examples of a file and what became of its rows.

    Attributes:
        examples: in the order of the file.
        overlong: origins of the rows longer than `max_length`, which were dropped or truncated.
        unlabelled: origins of those of them that truncation left without a label; they are dropped.
        skipped: bad rows that were left out.
        sha256: fingerprint of the file's rows.
        records: the rows.
    """

    examples: list[Example]
    overlong: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    skipped: list[SkippedRow] = field(default_factory=list)
    sha256: str = ""
    records: Records | None = None
    overlong_rule: Overlong = "drop"

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def report(self) -> str:
        """One line: how many examples there are, and how many rows went another way."""
        parts = [f"{len(self.examples):,} examples"]
        if self.overlong:
            fate = "dropped" if self.overlong_rule == "drop" else "truncated"
            parts.append(f"{len(self.overlong):,} over-long rows {fate}")
        if self.unlabelled:
            parts.append(f"{len(self.unlabelled):,} of them dropped because no label was left")
        if self.skipped:
            parts.append(f"{len(self.skipped):,} bad rows skipped")
        return ", ".join(parts)


def make_example(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The training example of a chat that ends with the assistant's turn.

    There is one BOS where the template or the tokenizer puts one, none otherwise, never two.

    Raises DataError: the chat is none, its template refuses it, or its label mask cannot be known exactly.
    """
    check_chat(chat, answered=True)
    layout = layout_of(tokenizer)
    pieces = segments(render(chat, tokenizer), layout, chat.origin)
    ids, label_mask = _encode(pieces, tokenizer, layout, chat.origin)
    return Example(ids, label_mask, chat.origin)


def prompt_ids(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids to generate an answer from: exactly how the training example of chat and answer begins.

    Args:
        chat: ends with the user's turn (`Chat.prompt` of one that has an answer).

    Raises DataError as `make_example` does.
    """
    check_chat(chat, answered=False)
    layout = layout_of(tokenizer)
    answered = replace(chat, turns=(*chat.turns, Turn("assistant", "Hi")))
    pieces = segments(render(answered, tokenizer), layout, chat.origin)
    answer = max(place for place, piece in enumerate(pieces) if piece.label)
    ids, _ = _encode(pieces[:answer], tokenizer, layout, chat.origin)
    return ids


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends the assistant's turn, at which generation stops. Raises DataError if none does."""
    layout = layout_of(tokenizer)
    return token_id(str(layout.ending or layout.eos), tokenizer)


# ---- tokens ------------------------------------------------------------------------------------------------------


def _encode(
    pieces: list[Segment], tokenizer: PreTrainedTokenizerBase, layout: Layout, origin: str
) -> tuple[list[int], list[bool]]:
    """Ids and label mask of the segments, with BOS in front where the tokenizer puts one."""
    ids: list[int] = []
    label_mask: list[bool] = []
    context = ""
    for piece in pieces:
        new = _ids_after(context, piece.text, tokenizer, origin) if context else _ids(piece.text, tokenizer)
        if sum(token in layout.control_ids for token in new) != piece.control:
            what = f"words and control tokens cannot be kept apart in {_short(piece.text)}"
            raise DataError(what, where=origin or None, todo="Take such text out of the row.")
        if piece.closes:
            new.append(token_id(str(layout.eos), tokenizer))
        ids += new
        label_mask += [piece.label] * len(new)
        context = str(layout.eos) if piece.closes else _context(piece.text, layout)
    if layout.bos is not None and ids[:1] != [layout.bos]:
        ids, label_mask = [layout.bos, *ids], [False, *label_mask]
    if layout.bos is not None and ids[:2] == [layout.bos] * 2:
        raise DataError("the chat template writes BOS twice", where=origin or None, todo="Correct the template.")
    return ids, label_mask


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _context(text: str, layout: Layout) -> str:
    """The end of a text that decides how the next one is tokenized: from its last control token on."""
    start = max((found.start() for found in layout.control.finditer(text)), default=0)
    return text[start:]


def _ids_after(context: str, text: str, tokenizer: PreTrainedTokenizerBase, origin: str) -> list[int]:
    """Ids of `text` as it stands behind `context`, or behind another text where the two would share a token.

    Tokenized alone it could get a space in front that nobody wrote (tokenizers of the SentencePiece kind).
    """
    for before in (context, *_ANCHORS):
        head = _ids(before, tokenizer)
        both = _ids(before + text, tokenizer)
        if head and head[-1] != tokenizer.unk_token_id and both[: len(head)] == head:
            return both[len(head) :]
    what = f"no token boundary can be put before {_short(text)}, so the label mask is not known"
    raise DataError(what, where=origin or None, todo="Take the row out, or use another tokenizer.")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


# ---- files -------------------------------------------------------------------------------------------------------


def load_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: Overlong = "drop",
    skip_bad_rows: bool = False,
    progress: bool = True,
) -> ExampleSet:
    """The examples of a file of rows (JSON, JSONL, CSV, Parquet).

    Args:
        path: the file.
        tokenizer: the model's.
        max_length: the most tokens an example may have.
        overlong: what happens to a longer one: "drop" it, "truncate" it to its first `max_length` tokens (dropped
            when no label is left), or "error". All are counted.
        skip_bad_rows: leave out rows that cannot be used and list them in `.skipped`.
        progress: show a bar and say what was left out.

    Raises:
        DataError: the file or a row cannot be used, nothing is left, or no token is a label.
        UsageError: an unknown `overlong`, or a `max_length` below 2.
    """
    _check_options(max_length, overlong)
    path = Path(path)
    records = gather(path)
    made, bad = _make_all(records, tokenizer, progress)
    bad += records.skipped
    settle(path, bad, len(records) + len(records.skipped), skip=skip_bad_rows)
    long = [example for example in made if len(example) > max_length]
    if long and overlong == "error":
        raise _too_long(long[0], max_length, f"{len(long):,} of {len(made):,} rows are longer")
    cut = [_fit(example, max_length, overlong) for example in made]
    examples = [example for example in cut if example.labels]
    if not examples:
        raise _nothing_left(path, long, made, max_length)
    found = ExampleSet(
        examples=examples,
        overlong=[example.origin for example in long],
        unlabelled=[e.origin for e in cut if e.input_ids and not e.labels],
        skipped=sorted(bad, key=lambda row: row.row),
        sha256=records.sha256,
        records=records,
        overlong_rule=overlong,
    )
    if progress:
        say(f"{path.name}: {found.report()}")
    return found


def _check_options(max_length: int, overlong: str) -> None:
    known = get_args(Overlong)
    if overlong not in known:
        raise UsageError(f"unknown overlong '{overlong}' (known: {', '.join(known)}){nearest(overlong, known)}")
    if max_length < 2:
        raise UsageError(f"max_length is {max_length}; an example needs at least 2 tokens")


def _make_all(
    records: Records, tokenizer: PreTrainedTokenizerBase, progress: bool
) -> tuple[list[Example], list[SkippedRow]]:
    made: list[Example] = []
    bad: list[SkippedRow] = []
    layout_of(tokenizer)  # a tokenizer that cannot do it at all is no row's fault
    for record in track(records, "tokenizing", shown=progress):
        try:
            made.append(make_example(to_chat(record), tokenizer))
        except DataError as error:
            bad.append(SkippedRow(record.origin, error.what, record.row))
    return made, bad


def _fit(example: Example, max_length: int, overlong: str) -> Example:
    """The example itself, its first tokens, or an empty one where it is dropped."""
    if len(example) <= max_length:
        return example
    keep = max_length if overlong == "truncate" else 0
    return Example(example.input_ids[:keep], example.label_mask[:keep], example.origin)


def _too_long(example: Example, max_length: int, count: str) -> DataError:
    what = f"{len(example):,} tokens, and max_length is {max_length:,}; {count}"
    return DataError(what, where=example.origin, todo="Raise max_length, or set overlong to drop or truncate.")


def _nothing_left(path: Path, long: list[Example], made: list[Example], max_length: int) -> DataError:
    if long:
        shortest = min(len(example) for example in made)
        what = f"no example with a label is left within {max_length:,} tokens; the shortest row has {shortest:,}"
        return DataError(what, where=str(path), todo="Raise max_length.")
    return DataError("no token of the data set is a label, so nothing can be learned", where=str(path))
