"""FLAN: rows of tables as instructions, through templates.

    survey   read each file once: labels counted, bad rows found, some rows kept to show as examples
    draw     which rows: balanced over labels, at most `cap`, files mixed in proportion to their rows
    write    read each file again: a template drawn for each drawn row, with options and solved examples or without

Source: FLAN (arXiv 2109.01652): templates, section 2.1; options, 2.3; at most 30,000 rows of a data set, mixed in
proportion to their number with a maximum of 3,000, 2.4; solved examples before the question, 4.4. The mixing scheme is
T5's (arXiv 1910.10683, section 3.5.2).
In memory are four bytes and a bit a row of each file, and the examples to show; all else is read twice instead. Every
draw depends on the seed, the file's name and the row's number alone: the same files and the same seed, the same bytes.
Not here: what a task is (`flan_tasks.py`), how files are read (`flan_rows.py`).
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar

import orjson

from lilliput.data.chats import Chat, Turn
from lilliput.data.forms import form_named
from lilliput.data.labelled import in_order
from lilliput.data.records import SkippedRow, settle
from lilliput.data.reservoir import Reservoir
from lilliput.errors import DataError, UsageError
from lilliput.files import replace
from lilliput.progress import track
from lilliput.synthesis.flan_rows import Part, TaskFile, TaskRow
from lilliput.synthesis.flan_tasks import Task, Template, render
from lilliput.synthesis.run import dice

CAP = 30_000  # rows of one file that are drawn from when files are mixed: the paper's number
MAX_RATE = 3_000  # rows beyond it give a file no more weight in a mix: the paper's number
_POOL = 200  # rows a label that are kept to be shown as examples
_MOST_LABELS = 200  # a column with more different values holds no labels
_SAMPLES = 3
T = TypeVar("T")


@dataclass(frozen=True)
class Wording:
    """How a row is put into words.

    templates: draw from the first N of a task, in the order of its file; None: from all.
    each: write every row through all of these, instead of one drawn for it.
    turned: also those that ask for the input and give the answer.
    options: answers to choose from "written" as each template says, "always" where there are some, or "never".
    shuffled: options in an order drawn for each row; False: as the task or the row has them.
    shots: solved examples before the question. few_shot_share: of the rows that get them; the others get none.
    """

    templates: int | None = None
    each: bool = False
    turned: bool = True
    options: Literal["written", "always", "never"] = "written"
    shuffled: bool = True
    shots: int = 0
    few_shot_share: float = 1.0

    def of(self, task: Task) -> list[tuple[int, Template]]:
        """The templates of a task that may be drawn, with their numbers from 1. Raises UsageError for too few."""
        fit = [
            (number, template)
            for number, template in enumerate(task.templates, start=1)
            if (self.turned or not template.turned) and not (self.options == "never" and template.inline)
        ]
        wanted = len(fit) if self.templates is None else self.templates
        if not 0 < wanted <= len(fit):
            why = "" if len(fit) == len(task.templates) else " that go with the other options"
            what = f"the task {task.name} has {len(fit)} templates{why}, not {wanted}"
            raise UsageError(what, where="--templates")
        return fit[:wanted]


@dataclass(frozen=True)
class Sample:
    """One written row: what is asked and answered, and how it came about."""

    prompt: str
    answer: str
    task: str
    template: int
    source: str
    label: str = ""
    turned: bool = False
    options: bool = False
    shots: int = 0

    def provenance(self) -> dict[str, Any]:
        """The keys that stand beside the words in a written row."""
        return {"task": self.task, "template": self.template, "shots": self.shots, "source": self.source}


@dataclass
class PartReport:
    """What became of one file: rows read, skipped as bad, left out by cap and balance, and drawn (again)."""

    file: str
    task: str
    read: int
    skipped: int
    left_out: int
    drawn: int
    rows: int = 0  # written: those drawn, times the templates where each is written through all
    labels: Counter[str] = field(default_factory=Counter)
    templates: Counter[int] = field(default_factory=Counter)


@dataclass
class FlanReport:
    """What was written, counted."""

    parts: list[PartReport]
    notes: list[str]
    shots: Counter[int] = field(default_factory=Counter)  # solved examples -> rows
    turned: int = 0
    with_options: int = 0
    samples: list[Sample] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows written in all."""
        return sum(part.rows for part in self.parts)

    def count(self, part: PartReport, sample: Sample) -> None:
        """Take one written row of a part."""
        part.rows += 1
        part.templates[sample.template] += 1
        if sample.label:
            part.labels[sample.label] += 1
        self.shots[sample.shots] += 1
        self.turned += sample.turned
        self.with_options += sample.options

    def to_json(self) -> dict[str, Any]:
        """The numbers and three rows, as plain values."""
        parts = [
            {
                **vars(part),
                "labels": dict(sorted(part.labels.items())),
                "templates": dict(sorted(part.templates.items())),
            }
            for part in self.parts
        ]
        few = sum(rows for shots, rows in self.shots.items() if shots)
        return {
            "rows": self.rows, "zero_shot": self.shots[0], "few_shot": few, "shots": dict(sorted(self.shots.items())),
            "turned": self.turned, "with_options": self.with_options, "parts": parts, "notes": self.notes,
            "samples": [_row(sample, "messages") for sample in self.samples],
        }  # fmt: skip


TARGETS = ("messages", "prompt-completion", "p3")  # the forms in which rows are written


def _row(sample: Sample, target: str) -> dict[str, Any]:
    """A written row in one of TARGETS."""
    write = form_named(target).write
    assert write is not None, "each of TARGETS is written"
    chat = Chat((Turn("user", sample.prompt), Turn("assistant", sample.answer)))
    return {**write(chat), **sample.provenance()}


def flan(
    parts: Sequence[Part],
    out: str | Path,
    wording: Wording | None = None,
    *,
    seed: int = 0,
    target: str = "messages",
    rows: int | None = None,
    max_rate: int | None = None,
    skip_bad_rows: bool = False,
    progress: bool = True,
) -> FlanReport:
    """Write the rows of tables as instructions, one JSON object a line.

    Rows of one file are written in its order; those of several are mixed at random.

    Args:
        parts: the files, each with its task.
        out: the JSONL file, written beside and renamed.
        wording: templates, options and solved examples.
        seed: of all draws.
        target: one of TARGETS.
        rows: how many rows are drawn in all; more than there are: some are drawn again. None: see `max_rate`.
        max_rate: the most rows of a file that count when files are mixed (`proportional`). None: all of them.
        skip_bad_rows: leave out rows that cannot be used, and count them, instead of refusing the file.
        progress: draw a bar.

    Raises:
        DataError: a file or a row that cannot be used; too few rows for the solved examples.
        UsageError: a column, a constant or a number of templates that a task does not have; no label to balance by;
            `out` is one of the files.
    """
    wording = wording or Wording()
    if Path(out).resolve() in [part.path.resolve() for part in parts]:
        raise UsageError("is the file that is read", where=str(out), todo="Write to another one.")
    surveys = [survey(part, wording, seed=seed, skip_bad_rows=skip_bad_rows, progress=progress) for part in parts]
    pools = [draw_pool(found, dice(seed, f"flan/pool/{found.key}")) for found in surveys]
    counts = proportional([sum(pool) for pool in pools], rows, max_rate)
    report = FlanReport([_begin(*each) for each in zip(surveys, pools, counts, strict=True)], _notes(surveys))
    streams = [
        _write_rows(found, _rounds(found, pool, count, seed), wording, seed)
        for found, pool, count in zip(surveys, pools, counts, strict=True)
    ]
    mixed = interleave(streams, counts, dice(seed, "flan/order"))
    shown = Reservoir[Sample](_SAMPLES, dice(seed, "flan/samples"))
    with replace(out) as temporary, open(temporary, "wb") as file:
        for place, samples in track(mixed, "writing", sum(counts), shown=progress):
            for sample in samples:
                file.write(orjson.dumps(_row(sample, target)) + b"\n")
                report.count(report.parts[place], sample)
                shown.offer(sample)
    report.samples = shown.kept
    return report


def _begin(found: Survey, pool: bytearray, count: int) -> PartReport:
    skipped, usable = len(found.skipped), len(found.labels)
    return PartReport(found.part.path.name, found.task.name, usable + skipped, skipped, usable - sum(pool), count)


# ---- survey ------------------------------------------------------------------------------------------------------


@dataclass
class Survey:
    """What one reading of a part has found.

    task: the part's, with the labels of the file where it names none itself.
    labels: int [usable rows], the number of each row's label in `names`; 0 where the task has no labels.
    exemplars: label -> rows to show as solved examples; empty where none are asked for.
    """

    part: Part
    file: TaskFile
    task: Task
    names: list[str]
    labels: array[int]
    skipped: list[SkippedRow]
    exemplars: dict[str, list[TaskRow]]

    @property
    def key(self) -> str:
        """What the draws of this part depend on, besides the seed."""
        return f"{self.part.path.name}/{self.task.name}"


def survey(part: Part, wording: Wording, *, seed: int, skip_bad_rows: bool, progress: bool = True) -> Survey:
    """Read a part once. Raises as `flan` does."""
    templates = wording.of(part.task)
    file = TaskFile(part)
    numbers: dict[str, int] = {}
    labels, skipped = array("i"), list[SkippedRow]()
    pools: dict[str, Reservoir[TaskRow]] = {}
    for row in track(_fitting(file, templates), f"reading {part.path.name}", shown=progress):
        if isinstance(row, SkippedRow):
            skipped.append(row)
            continue
        labels.append(numbers.setdefault(row.label, len(numbers)))
        if wording.shots:
            if row.label not in pools:
                pools[row.label] = Reservoir(_POOL, dice(seed, f"flan/exemplars/{part.path.name}/{row.label}"))
            pools[row.label].offer(row)
    _check_header(file, skipped, numbers, labels)
    total = len(labels) + len(skipped)
    if not total:
        raise DataError("holds no rows", where=str(part.path))
    settle(part.path, skipped, total, skip=skip_bad_rows)
    _check_rows(part, wording, list(numbers), len(labels))
    found = {name: pool.kept for name, pool in sorted(pools.items())}
    return Survey(part, file, _named(part.task, numbers), list(numbers), labels, skipped, found)


def _fitting(file: TaskFile, templates: Sequence[tuple[int, Template]]) -> Iterator[TaskRow | SkippedRow]:
    """The rows of a file; one that has too little for any of the templates is a bad row."""
    asks = [template.asks for _, template in templates]
    for row in file:
        if isinstance(row, TaskRow) and not any(asked <= row.values.keys() for asked in asks):
            missing = min((sorted(asked - row.values.keys()) for asked in asks), key=len)[0]
            what = f"has no '{missing}', and no template goes without"
            yield SkippedRow(row.origin, what, row.row)
        else:
            yield row


def _named(task: Task, found: Iterable[str]) -> Task:
    """The task with the file's labels, where it has none of its own."""
    if task.labels or not task.column_of("label"):
        return task
    return task.model_copy(update={"labels": dict.fromkeys(in_order(found), ())})


def _check_header(file: TaskFile, skipped: list[SkippedRow], numbers: Mapping[str, int], labels: array[int]) -> None:
    """Raise DataError when the first line of a file that seems to have no header looks like one after all."""
    if not file.headless:
        return
    first_is_bad = bool(skipped) and skipped[0].row == 1 and len(skipped) <= len(labels)
    alone = not file.task.labels and len(numbers) > 2 and labels.count(0) == 1
    if first_is_bad or alone:
        what = skipped[0].reason if first_is_bad else f"the label '{next(iter(numbers))}' stands nowhere else"
        todo = "This line may be a header: then name its columns, as in --columns " + ",".join(
            f"{name}=NAME" for name in file.names
        )
        todo += f". If it is none, correct it, or say --names {','.join(file.names)}."
        raise DataError(what, where=f"{file.part.path.name}:1", todo=todo)


def _check_rows(part: Part, wording: Wording, names: Sequence[str], usable: int) -> None:
    """Raise for more labels than a task can have, too few rows for the solved examples, no label to balance by."""
    if len(names) > _MOST_LABELS and not part.task.labels:
        raise DataError(
            f"has {len(names):,} different labels in {usable:,} rows, so these are hardly labels",
            where=str(part.path), todo=f"Name another column with --columns {part.task.column_of('label')}=NAME.",
        )  # fmt: skip
    if usable <= wording.shots:
        raise DataError(
            f"{usable} usable rows are too few for --shots {wording.shots}",
            where=str(part.path),
            todo="Take fewer examples.",
        )
    if part.balance and not part.task.column_of("label"):
        raise UsageError(f"the task {part.task.name} has no labels to balance by", where="--balance")
    if part.balance and part.cap is not None and part.cap < len(names):
        raise UsageError(f"{part.cap} rows are too few for {len(names)} labels", where="--cap")


def _notes(surveys: Iterable[Survey]) -> list[str]:
    """What is to be said: a header that was found missing, and labels that no row has."""
    notes = []
    for found in surveys:
        if found.file.note:
            notes.append(found.file.note)
        unseen = [name for name in found.task.labels if name not in found.names]
        if unseen:
            notes.append(
                f"no row of {found.part.path.name} has the label {', '.join(unseen)}, which is offered as an option"
            )
    return notes


# ---- draw --------------------------------------------------------------------------------------------------------


def draw_pool(found: Survey, rng: random.Random) -> bytearray:
    """Which usable rows of a part are drawn from: 1 for those, uint8 [usable rows].

    Without a cap all of them. With `balance` equally many of each label: as many as the rarest has, and no more in all
    than the cap.
    """
    part, usable = found.part, len(found.labels)
    cap = usable if part.cap is None else min(part.cap, usable)
    if not part.balance:
        return _draw([range(usable)], cap, usable, rng)
    groups = _groups(found.labels, range(usable))
    return _draw(groups, len(groups) * min(min(map(len, groups)), cap // len(groups)), usable, rng)


def _groups(labels: Sequence[int], rows: Iterable[int]) -> list[array[int]]:
    """The numbers of the rows of each label."""
    groups: dict[int, array[int]] = {}
    for row in rows:
        groups.setdefault(labels[row], array("i")).append(row)
    return [groups[label] for label in sorted(groups)]


def _draw(groups: Sequence[Sequence[int]], wanted: int, usable: int, rng: random.Random) -> bytearray:
    """`wanted` rows, as many from each group; where that cannot be, some groups, drawn, give one more."""
    marks = bytearray(usable)
    share, more = divmod(wanted, len(groups))
    extra = set(rng.sample(range(len(groups)), more))
    for place, group in enumerate(groups):
        some = share + (place in extra)
        for index in range(len(group)) if some == len(group) else rng.sample(range(len(group)), some):
            marks[group[index]] = 1
    return marks


def proportional(sizes: Sequence[int], rows: int | None = None, max_rate: int | None = None) -> list[int]:
    """How many rows each file gives to a mix: examples-proportional mixing with a maximum.

    File m with e_m rows has the weight r_m = min(e_m, K) / sum_n min(e_n, K), where K is `max_rate`; of `rows` rows it
    gives r_m, rounded so that the sum is right (largest remainders first). With K = 3,000 and files of 500, 3,000 and
    30,000 rows, 1,300 rows are 100, 600 and 600.

    Args:
        sizes: rows of each file that may be drawn.
        rows: in all; None takes sum_n min(e_n, K), where each file gives min(e_m, K) and no row comes twice.
        max_rate: K; None: files count with all their rows.
    """
    weights = [min(size, max_rate or size) for size in sizes]
    total = sum(weights) if rows is None else rows
    counts = [total * weight // sum(weights) for weight in weights]
    by_remainder = sorted(range(len(sizes)), key=lambda place: (-(total * weights[place] % sum(weights)), place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts


def _rounds(found: Survey, pool: bytearray, count: int, seed: int) -> list[bytearray]:
    """`count` rows as rounds through the file: the whole pool as often as it fits, then a draw of what is left."""
    size = sum(pool)
    times, rest = divmod(count, size)
    if not rest:
        return [pool] * times
    rows = array("i", (row for row, drawn in enumerate(pool) if drawn))
    groups = _groups(found.labels, rows) if found.part.balance else [rows]
    return [pool] * times + [_draw(groups, rest, len(pool), dice(seed, f"flan/rest/{found.key}"))]


def interleave(streams: Sequence[Iterator[T]], counts: Sequence[int], rng: random.Random) -> Iterator[tuple[int, T]]:
    """All things of several streams, each stream in its own order, mixed at random: (place of the stream, a thing)."""
    left = list(counts)
    places = range(len(streams))
    while any(left):
        place = rng.choices(places, weights=left)[0] if len(left) > 1 else 0
        left[place] -= 1
        yield place, next(streams[place])


# ---- write -------------------------------------------------------------------------------------------------------


def _write_rows(found: Survey, rounds: Sequence[bytearray], wording: Wording, seed: int) -> Iterator[list[Sample]]:
    """The drawn rows of a part, put into words; a row that is drawn again gets another draw of everything."""
    templates = wording.of(found.task)
    for number, drawn in enumerate(rounds):
        rows = (row for row in _fitting(found.file, templates) if isinstance(row, TaskRow))
        for mark, row in zip_longest(drawn, rows):
            if mark is None or row is None:
                raise DataError("has changed while it was read", where=str(found.part.path), todo="Run again.")
            if mark:
                rng = dice(seed, f"flan/{found.key}/{row.row}/{number}")
                fit = [pair for pair in templates if pair[1].asks <= row.values.keys()]
                yield [_put(row, *pair, found, wording, rng) for pair in (fit if wording.each else [rng.choice(fit)])]


def _put(row: TaskRow, number: int, template: Template, found: Survey, wording: Wording, rng: random.Random) -> Sample:
    """One row through one template."""
    options = bool(row.options or found.task.column_of("label"))
    listed = (
        options
        and not template.inline
        and not template.turned
        and (wording.options == "always" or (template.options and wording.options == "written"))
    )

    def said(one: TaskRow) -> tuple[str, str]:
        order = list(one.options or found.task.labels)
        if wording.shuffled:
            rng.shuffle(order)
        return render(template, one.values, order, listed=listed, label=found.task.column_of("label"))

    prompt, answer = said(row)
    examples: list[tuple[str, str]] = []
    if wording.shots and rng.random() < wording.few_shot_share:
        examples = [said(other) for other in exemplars(row, template, found, wording.shots, rng)]
        prompt = with_examples(prompt, examples)
    return Sample(
        prompt, answer, found.task.name, number, row.origin, row.label, template.turned,
        options and (listed or template.inline), len(examples),
    )  # fmt: skip


def exemplars(row: TaskRow, template: Template, found: Survey, shots: int, rng: random.Random) -> list[TaskRow]:
    """Other rows to show as solved examples, one label after another so that none has more than one more.

    Never the row itself, nor another with the same input (or, turned around, the same answer): it would be given
    away. Fewer than `shots` where the file has no more.
    """
    labels = list(found.exemplars)
    rng.shuffle(labels)
    hidden = found.task.answer
    told = render(template, row.values)[1] if template.turned else None
    shown = {name: words for name, words in row.values.items() if name != hidden}

    def differs(other: TaskRow) -> bool:
        theirs = {name: words for name, words in other.values.items() if name != hidden}
        if other.row == row.row or theirs == shown or not template.asks <= other.values.keys():
            return False
        return told is None or render(template, other.values)[1] != told

    streams = [filter(differs, _in_any_order(found.exemplars[label], rng)) for label in labels]
    chosen: list[TaskRow] = []
    while streams and len(chosen) < shots:
        drawn = [(stream, next(stream, None)) for stream in streams[: shots - len(chosen)]]
        chosen += [other for _, other in drawn if other is not None]
        streams = [stream for stream in streams if (stream, None) not in drawn]
    rng.shuffle(chosen)
    return chosen


def _in_any_order(things: Sequence[T], rng: random.Random) -> Iterator[T]:
    """All of `things` in a drawn order, a few draws if only a few are taken."""
    seen: set[int] = set()
    while len(seen) < len(things):
        place = rng.randrange(len(things))
        if place not in seen:
            seen.add(place)
            yield things[place]


def with_examples(prompt: str, examples: Sequence[tuple[str, str]]) -> str:
    """A question with solved ones before it, each under a line of its own."""
    if not examples:
        return prompt
    solved = [f"### Example {n}\n{asked}\n\nAnswer: {told}" for n, (asked, told) in enumerate(examples, start=1)]
    return "\n\n".join([*solved, f"### Your turn\n{prompt}\n\nAnswer:"])
