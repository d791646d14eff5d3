"""What a data set looks like: lengths, duplicates, languages, roles; one example coloured by label; a few figures.

Not here: judging the data. The figures are there so that a person sees a mistake before an hour of training does. Near
duplicates are found in `synthesis/near.py`, pictures are drawn in `portrait_plot.py`.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from heapq import heappush, heappushpop
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from lilliput.data.chats import Chat, Turn, check_chat
from lilliput.data.conversion import characters, detect
from lilliput.data.examples import Example, make_example
from lilliput.data.forms import Form, check_whole, printable
from lilliput.data.languages import language_of
from lilliput.data.oasst import MessageFile
from lilliput.data.reading import Fields, Reading, in_words, text
from lilliput.data.records import Record, SkippedRow, stream_records
from lilliput.data.reservoir import Reservoir
from lilliput.errors import DataError, UsageError
from lilliput.progress import bar, track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABEL_STYLE = "bold green"
OTHER_STYLE = "dim"
SAMPLE = 10_000  # chats that are tokenized and whose language is told
QUANTILES = (0.5, 0.9, 0.95, 0.99)
_BINS = 15  # of a histogram, about
_LONGEST = 5  # chats named as the longest
_SHOWN = 5  # bad rows told


def show_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The example's text, control tokens included: labels in LABEL_STYLE, all else in OTHER_STYLE."""
    text = Text()
    written = ""
    for end in _run_ends(example.label_mask):
        so_far = str(
            tokenizer.decode(example.input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        text.append(so_far[len(written) :], style=LABEL_STYLE if example.label_mask[end - 1] else OTHER_STYLE)
        written = so_far
    return text


def _run_ends(label_mask: list[bool]) -> list[int]:
    """Where runs of labels and of others end (one past the last token of each)."""
    return [
        end for end in range(1, len(label_mask) + 1) if end == len(label_mask) or label_mask[end] != label_mask[end - 1]
    ]


@dataclass(frozen=True)
class Figures:
    """Counts over examples; lengths in tokens."""

    examples: int
    tokens: int
    labels: int
    shortest: int
    median: float
    longest: int
    duplicates: int  # examples whose tokens an earlier one has already

    def __str__(self) -> str:
        repeats = f"{self.duplicates:,} duplicate{'' if self.duplicates == 1 else 's'}"
        share = self.labels / self.tokens if self.tokens else 0.0
        return (
            f"{self.examples:,} examples, {self.tokens:,} tokens, {share:.0%} of them labels; "
            f"lengths {self.shortest:,} to {self.longest:,}, median {self.median:,.0f}; {repeats}"
        )


def figures(examples: Sequence[Example]) -> Figures:
    """Lengths, labels and duplicates of a set of examples; all zero for an empty one."""
    lengths = [len(example) for example in examples]
    return Figures(
        examples=len(examples),
        tokens=sum(lengths),
        labels=sum(example.labels for example in examples),
        shortest=min(lengths, default=0),
        median=median(lengths) if lengths else 0,
        longest=max(lengths, default=0),
        duplicates=len(examples) - len({tuple(example.input_ids) for example in examples}),
    )


# ---- a whole file ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """`count` lengths from `low` up to, but not including, `high`; None where there is no end."""

    low: int
    high: int | None
    count: int


@dataclass(frozen=True)
class Lengths:
    """How lengths are spread; `quantiles` are lengths that occur, for each of QUANTILES. All zero for no lengths."""

    count: int
    total: int
    least: int
    most: int
    mean: float
    quantiles: tuple[int, ...]
    bins: tuple[Bin, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """Bins of equal width up to the 99 % quantile, and one for all that is longer."""
        if not len(lengths):
            return cls(0, 0, 0, 0, 0.0, (0,) * len(QUANTILES), ())
        values = np.asarray(lengths, dtype=np.int64)
        quantiles = np.quantile(values, QUANTILES, method="inverted_cdf")
        return cls(
            count=len(values),
            total=int(values.sum()),
            least=int(values.min()),
            most=int(values.max()),
            mean=round(float(values.mean()), 2),
            quantiles=tuple(map(int, quantiles)),
            bins=_bins(values, int(quantiles[-1])),
        )


def _bins(values: np.ndarray[Any, Any], top: int) -> tuple[Bin, ...]:
    """Bins whose width is 1, 2 or 5 times a power of ten."""
    width = next(
        step * 10**power for power in range(20) for step in (1, 2, 5) if step * 10**power * _BINS >= top
    )  # fmt: skip
    low = int(values.min()) // width * width
    edges = list(range(low, top + width + 1, width))
    counts, _ = np.histogram(values, bins=[*edges, max(int(values.max()), edges[-1]) + 1])
    bins = [Bin(edge, edge + width, int(count)) for edge, count in zip(edges[:-1], counts, strict=False)]
    more = int(counts[len(edges) - 1])
    return (*bins, Bin(edges[-1], None, more)) if more else tuple(bins)


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer makes of the sampled chats.

    Attributes:
        lengths: tokens a chat, in the model's own template.
        labels: tokens that are learned.
        refused: chats that the template cannot write, by reason.
    """

    lengths: Lengths
    labels: int
    refused: dict[str, int]


@dataclass(frozen=True)
class Portrait:
    """What a file of rows looks like.

    Attributes:
        file: its name; form: what its rows are.
        rows: rows that could be read; chats: in them. bad: rows that could not; faults: the first of these.
        dropped, changed: what reading left out and mended, by reason.
        roles: turns of each role; turns: chats by their number of turns.
        words, characters: lengths of chats, all turns together; by_role: words of each role's turns. A word is what
            stands between white space.
        same: chats that an earlier one has already, word for word; same_question: of whose first user turn this is so.
        empty: rows in which a field is blank, null or missing, by field.
        longest: (characters, place) of the longest chats.
        languages: chats of the sample by language; a text whose language is not clear is "unsure".
        sampled: chats in the sample.
        tokens: of the sample; None without a tokenizer.
        examples: of the sample's beginning, to be shown.
    """

    file: str
    form: str
    rows: int
    chats: int
    bad: int
    faults: list[SkippedRow]
    dropped: dict[str, int]
    changed: dict[str, int]
    roles: dict[str, int]
    turns: dict[int, int]
    words: Lengths
    characters: Lengths
    by_role: dict[str, Lengths]
    same: int
    same_question: int
    empty: dict[str, int]
    longest: list[tuple[int, str]]
    languages: dict[str, int]
    sampled: int
    tokens: Tokens | None
    examples: list[Example]

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the examples."""
        plain = asdict(self)
        del plain["examples"]
        return plain


def portrait(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    form: Form | None = None,
    sample: int = SAMPLE,
    examples: int = 2,
    progress: bool = True,
) -> Portrait:
    """Look at a file of rows, one after the other; of each a few numbers are kept, and a sample of chats.

    Args:
        path: JSON, JSONL, CSV, TSV or Parquet, in any form of `forms.FORMS`.
        tokenizer: the model's; without it nothing is said about tokens and labels.
        form: of the rows, see `form_of_field` too; by default told by the first of them.
        sample: chats that are tokenized and whose language is told, drawn evenly, the same ones each time; 0 takes all.
        examples: how many chats to keep as examples.

    A bad row is counted, not refused.

    Raises:
        UsageError: a sample or a number of examples below 0.
        DataError: the file cannot be read, its form is not known, or no row of it can be used.
    """
    if sample < 0 or examples < 0:
        raise UsageError(f"{min(sample, examples)} is not a number of chats from 0 up", where="sample or examples")
    path = Path(path)
    seen = _Seen(form or _detected(path), sample or None)
    with bar(f"reading {path.name}", None, shown=progress) as advance:
        messages = MessageFile(path) if seen.form.name == "oasst-messages" else None
        for row in messages.trees() if messages else stream_records(path):
            seen.take(row)
            advance()
    if messages:
        seen.reading.dropped["messages whose tree does not begin in the file"] += len(messages.orphans)
    _check_left(path, seen)
    chats = seen.sample()
    told = Counter(language_of(_told(chat)) for chat in track(chats, "languages", shown=progress))
    made, refused = _tokenized(chats, tokenizer, progress) if tokenizer is not None else ([], {})
    return seen.portrait(
        file=str(path),
        languages=dict(told.most_common()),
        sampled=len(chats),
        tokens=_tokens(made, refused) if tokenizer is not None else None,
        examples=made[:examples],
    )


def form_of_field(name: str) -> Form:
    """A form in which a row is one text under `name`, of nobody's."""

    def read(fields: Fields, reading: Reading) -> list[Chat]:
        words = text(fields, name)
        check_whole(words, name)
        return [Chat((Turn("text", words),))]

    return Form("field", (name,), read)


def _detected(path: Path) -> Form:
    try:
        return detect(path)
    except DataError as error:
        if error.todo is None or "--" not in error.todo:  # the file itself is at fault
            raise
        todo = "Say what a row is with --from FORM or --columns, or look at one field with --field NAME."
        raise DataError(error.what, where=error.where, todo=todo) from error


def _check_left(path: Path, seen: _Seen) -> None:
    """Raise DataError when there is no chat to look at."""
    if seen.chats:
        return
    if seen.faults and not seen.rows:
        first = seen.faults[0]
        raise DataError(f"{first.reason}; no row can be used", where=first.origin)
    reasons = in_words(seen.reading.dropped)
    raise DataError(f"no chat is left; dropped were {reasons}" if reasons else "holds no rows", where=str(path))


def _told(chat: Chat) -> str:
    return "\n".join(turn.content for turn in chat.turns)


class _Seen:
    """The rows so far: counts, two numbers and two digests a chat, and a sample."""

    def __init__(self, form: Form, sample: int | None) -> None:
        self.form = form
        self.records = self.rows = self.chats = self.bad = self.same = self.same_question = 0
        self.faults: list[SkippedRow] = []
        self.reading = Reading()
        self.roles: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        self.empty: Counter[str] = Counter()
        self.fields: dict[str, int] = {}  # how many rows have it
        self.words, self.characters = array("q"), array("q")
        self.by_role: dict[str, array[int]] = {}
        self.longest: list[tuple[int, int, str]] = []  # a heap of (characters, minus the chat's number, place)
        self._digests: set[bytes] = set()
        self._questions: set[bytes] = set()
        self._sample: Reservoir[tuple[int, Chat]] = Reservoir(sample, random.Random(0))

    def take(self, row: Record | SkippedRow) -> None:
        """Look at the next row."""
        if isinstance(row, SkippedRow):
            self._fault(row)
            return
        self.records += 1
        for name, value in row.fields.items():
            self.fields[name] = self.fields.get(name, 0) + 1
            self.empty[name] += value is None or value == [] or (isinstance(value, str) and not value.strip())
        try:
            chats = self.form.read(row.fields, self.reading)
            for chat in chats:
                if self.form.name != "field":
                    check_chat(chat, answered=True)
        except DataError as error:
            self._fault(SkippedRow(row.origin, error.what, row.row))
            return
        self.rows += 1
        for chat in chats:
            self._chat(Chat(chat.turns, row.origin, chat.input, chat.tools))

    def _fault(self, fault: SkippedRow) -> None:
        self.bad += 1
        if len(self.faults) < _SHOWN:
            self.faults.append(replace(fault, reason=printable(fault.reason)))

    def _chat(self, chat: Chat) -> None:
        number = self.chats
        self.chats += 1
        self.turns[len(chat.turns)] += 1
        words = 0
        for turn in chat.turns:
            count = len(turn.content.split())
            words += count
            self.roles[turn.role] += 1
            self.by_role.setdefault(turn.role, array("q")).append(count)
        self.words.append(words)
        self.characters.append(characters(chat))
        keep = heappush if len(self.longest) < _LONGEST else heappushpop
        keep(self.longest, (self.characters[-1], -number, chat.origin))
        question = next((turn.content for turn in chat.turns if turn.role == "user"), "")
        self.same += _repeats(self._digests, "\0".join(f"{turn.role}\0{turn.content}" for turn in chat.turns))
        self.same_question += bool(question) and _repeats(self._questions, question)
        self._sample.offer((number, chat))

    def sample(self) -> list[Chat]:
        """The sampled chats in the order of the file."""
        return [chat for _, chat in sorted(self._sample.kept, key=lambda drawn: drawn[0])]

    def portrait(self, **more: Any) -> Portrait:
        for name, rows in self.fields.items():
            self.empty[name] += self.records - rows
        return Portrait(
            form=self.form.name,
            rows=self.rows,
            chats=self.chats,
            bad=self.bad,
            faults=self.faults,
            dropped={reason: count for reason, count in self.reading.dropped.items() if count},
            changed={reason: count for reason, count in self.reading.changed.items() if count},
            roles=dict(self.roles.most_common()),
            turns=dict(sorted(self.turns.items())),
            words=Lengths.of(self.words),
            characters=Lengths.of(self.characters),
            by_role={role: Lengths.of(lengths) for role, lengths in self.by_role.items()},
            same=self.same,
            same_question=self.same_question,
            empty={printable(name): count for name, count in self.empty.items() if count},
            longest=[(length, place) for length, _, place in sorted(self.longest, reverse=True)],
            **more,
        )


def _repeats(seen: set[bytes], words: str) -> bool:
    """Whether a text was seen before; from now on it was."""
    digest = hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    before = len(seen)
    seen.add(digest)
    return len(seen) == before


def _tokenized(
    chats: Iterable[Chat], tokenizer: PreTrainedTokenizerBase, progress: bool
) -> tuple[list[Example], dict[str, int]]:
    """The training examples of the chats, and why some have none. A text of nobody's has no labels."""
    made: list[Example] = []
    refused: Counter[str] = Counter()
    for chat in track(chats, "tokenizing", shown=progress):
        if chat.turns[0].role == "text":
            ids = list(tokenizer(chat.turns[0].content, verbose=False)["input_ids"])
            made.append(Example(ids, [False] * len(ids), chat.origin))
            continue
        try:
            made.append(make_example(chat, tokenizer))
        except DataError as error:
            refused[error.what] += 1
    return made, dict(refused.most_common())


def _tokens(made: list[Example], refused: dict[str, int]) -> Tokens:
    return Tokens(Lengths.of([len(example) for example in made]), sum(e.labels for e in made), refused)
