"""Evol-Instruct: a teacher rewrites instructions into harder and rarer ones, round after round, and answers them.

Source: WizardLM, arXiv 2304.12244, section 3 and appendices. Each round takes every instruction of the pool, draws one
of six operations (five in depth, one in breadth, equally likely), asks for the evolved instruction and for a response
to it, and judges both (elimination evolving, section 3.1). What passes takes its parent's place in the pool; what fails
leaves the parent there, to be evolved anew in the next round. The result is all that passed in all rounds, with the
originals, shuffled.

    pool    1/0 ── breadth ──> 1/1 ── deepen ──> refused        ── input ──> 1/3
            2/0 ── deepen ───> refused           ── breadth ──> 2/2 …

An id is "row/round": the number of the original's row, and the round that made this form of it; 0 is the original.
Not here: the prompts (`evol_prompts.py`), near-duplicates (`near.py`), who answers (`teacher.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lilliput.data import SkippedRow
from lilliput.errors import UsageError, nearest
from lilliput.synthesis.cost import Price
from lilliput.synthesis.evol_prompts import (
    EVOLVE_STOPS,
    LEAKS,
    OPERATIONS,
    OTHER,
    SAME,
    VERDICT,
    Operation,
    comparing_prompt,
    evolving_prompt,
)
from lilliput.synthesis.filters import Refusal
from lilliput.synthesis.growing import write_rows
from lilliput.synthesis.pairs import RESULT, Pair, read_pairs
from lilliput.synthesis.run import Run, dice, seed_of
from lilliput.synthesis.teacher import Decoding, Reply, Request, Teacher

METHOD = "evol-instruct"
DECODING = Decoding(temperature=1.0, top_p=0.9, max_tokens=2048)  # of the paper, section 4.2
_JUDGING = Decoding(temperature=0.0, max_tokens=64)  # one word is wanted; some write a sentence around it
_SORRY_WORDS = 80  # an answer with "sorry" in it that is shorter says that the teacher could not (section 3.1)

# Function words alone are no answer. "yes" and "no" are left out of the list: they may be one.
STOP_WORDS = frozenset(
    word
    for words in (
        "a an the this that these those such i me my mine myself we us our ours you your yours he him his she her hers",
        "it its itself they them their theirs who whom whose which what there here one and or but nor so yet if then",
        "than because while although as of at by for with about against between into through during before after above",
        "below to from up down in out on off over under again further once when where why how all any both each few",
        "more most other some own same only too very not can could will would shall should may might must do does did",
        "doing am is are was were be been being have has had having just now also s t d ll m re ve don",
    )
    for word in words.split()
)
_WORD = re.compile(r"[^\W_]+")
_VERDICT = re.compile(
    rf"(?:(\bnot|n't)[ _-]+(?:\w+[ _-]+)?)?(?<![^\W_])(unequal|{OTHER}|{SAME})\b", re.IGNORECASE
)  # a "not" before it, perhaps with a word between, turns it around

# Why an evolved instruction is not taken; the first four are elimination evolving's.
NOTHING_NEW = "no information gained"
SORRY = "the response says sorry"
ONLY_STOP_WORDS = "the response is only punctuation and stop words"
LEAKED = "words of the prompt leaked"
NO_VERDICT = "unclear whether it is new"
NO_ANSWER = "no answer of the teacher"
EMPTY = "empty"
CUT = "cut at the longest answer"


@dataclass(frozen=True)
class Plan:
    """What the result depends on, beside the data and the teacher; all but `rounds` and `batch` must stay when a run
    is gone on with.

    rounds: how often the pool is evolved. operations: names of OPERATIONS to draw from, each equally likely.
    decoding: of evolved instructions and of responses; the verdict whether something is new is asked at temperature 0.
    batch: instructions that go through the steps together, so that requests may be in flight at once.
    """

    rounds: int = 4
    operations: tuple[str, ...] = tuple(OPERATIONS)
    seed: int = 0
    decoding: Decoding = field(default=DECODING)
    batch: int = 64

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.batch < 1:
            name = "rounds" if self.rounds < 1 else "batch"
            raise UsageError(f"{name}={getattr(self, name)} is not a number from 1 up")
        if not self.operations:
            raise UsageError("no operation is named", todo=f"Known: {', '.join(OPERATIONS)}.")
        for name in self.operations:
            if name not in OPERATIONS:
                todo = f"Known: {', '.join(OPERATIONS)}."
                raise UsageError(f"unknown operation {name!r}{nearest(name, OPERATIONS)}", todo=todo)

    def settings(self, data_sha256: str) -> dict[str, Any]:
        """What a journal remembers: a run with other settings is another run."""
        return {
            "method": METHOD,
            "data": data_sha256,
            "operations": list(self.operations),
            "seed": self.seed,
            "decoding": asdict(self.decoding),
        }


@dataclass(frozen=True)
class Pooled:
    """One member of the pool: the original's row (from 1), the round that made it (0: the original), its words."""

    root: int
    round: int
    text: str

    @property
    def id(self) -> str:
        """`"17/2"`: row 17 as round 2 left it."""
        return f"{self.root}/{self.round}"


@dataclass(frozen=True)
class Outcome:
    """What became of it: rows in the data set, how many of them are evolved, and the refusals by reason; all rounds."""

    rows: int
    evolved: int
    refused: Counter[str]


def evol_instruct(
    out: str | Path,
    teacher: Teacher,
    originals: Originals,
    plan: Plan | None = None,
    *,
    only_last: bool = False,
    shuffle: bool = True,
    to: str = "alpaca",
    progress: bool = True,
    price: Price | None = None,
) -> Outcome:
    """Evolve rows into `out/data.jsonl`; it has what passed so far, too, when the run is stopped.

    Args:
        out: the directory of the run; one that was stopped is gone on with, also with more rounds or more originals.
        originals: from `read_originals`.
        only_last, shuffle: see `merge`. to: the form of the rows, one of `growing.FORMS`.
        progress, price: see `Run`.

    Raises:
        UsageError: the directory holds a run with other settings.
        TeacherError: the teacher is out of reach; what was answered is kept.
        DiskError: something cannot be written.
    """
    plan, out = plan or Plan(), Path(out)
    with Run(out, teacher, plan.settings(originals.sha256), progress=progress, price=price) as run:
        rows: list[dict[str, Any]] = []
        try:
            evolve(run, originals.instructions, plan)
        finally:
            rows = merge(
                originals.rows, run.rows(), rounds=plan.rounds, only_last=only_last, shuffle=shuffle, seed=plan.seed
            )
            write_rows(out / RESULT, rows, to)
        refused = Counter(decision["reason"] for decision in run.state.decisions.values() if "reason" in decision)
    return Outcome(len(rows), sum(row["provenance"]["round"] > 0 for row in rows), refused)


def evolve(run: Run, instructions: Sequence[str], plan: Plan) -> list[Pooled]:
    """Evolve all instructions `plan.rounds` times; accepted rows are in `run.rows()`, see `merge`.

    Returns the pool after the last round: of each instruction the last form that passed.

    Raises TeacherError, DiskError: as `Run.ask`; begun again, it goes on there.
    """
    pool = [Pooled(number, 0, text) for number, text in enumerate(instructions, start=1)]
    for number in range(1, plan.rounds + 1):
        pool = _round(run, pool, plan, number)
    run.progress(plan.rounds * len(pool), plan.rounds * len(pool))
    return pool


def _round(run: Run, pool: list[Pooled], plan: Plan, number: int) -> list[Pooled]:
    """Every member of the pool tries to evolve once; the pool afterwards, in the same order."""
    after: list[Pooled] = []
    for start in range(0, len(pool), plan.batch):
        attempts = [_Attempt(parent, number, plan) for parent in pool[start : start + plan.batch]]
        note = f"round {number} of {plan.rounds}, {sum(member.round == number for member in after):,} evolved"
        for turn, step in enumerate(_STEPS):
            done = (number - 1) * len(pool) + start + turn * len(attempts) // len(_STEPS)
            run.progress(done, plan.rounds * len(pool), note)
            step(run, attempts)
        after += [_settle(run, attempt) for attempt in attempts]
    return after


class _Attempt:
    """One instruction in one round, on its way through the steps; `refuse` ends it."""

    def __init__(self, parent: Pooled, number: int, plan: Plan) -> None:
        self.parent, self.round, self.plan = parent, number, plan
        self.key = f"round {number}/row {parent.root}"
        choice = dice(plan.seed, f"{self.key}/operation")
        self.operation: Operation = OPERATIONS[choice.choice(plan.operations)]
        prompt = evolving_prompt(parent.text, self.operation, choice)
        stopping = Decoding(**{**asdict(plan.decoding), "stop": EVOLVE_STOPS})
        self.evolving = self._request("evolve", prompt, stopping)
        self.evolved = Reply("")
        self.text = ""
        self.response = Reply("")
        self.refused: tuple[str, Refusal] | None = None

    def _request(self, step: str, prompt: str, decoding: Decoding, schema: Mapping[str, Any] | None = None) -> Request:
        key = f"{self.key}/{step}"
        return Request(key, prompt, decoding, seed=seed_of(self.plan.seed, key), schema=schema)

    @property
    def comparing(self) -> Request:
        return self._request("compare", comparing_prompt(self.parent.text, self.text), _JUDGING, VERDICT)

    @property
    def responding(self) -> Request:
        return self._request("respond", self.text, self.plan.decoding)

    def refuse(self, step: str, reason: str, detail: str = "") -> None:
        self.refused = (step, Refusal(reason, detail))


# ---- the steps, each over the attempts that are still alive ----------------------------------------------------------


def _alive(attempts: list[_Attempt]) -> list[_Attempt]:
    return [attempt for attempt in attempts if attempt.refused is None]


def _evolve_instructions(run: Run, attempts: list[_Attempt]) -> None:
    """Ask for the evolved instructions."""
    for attempt, reply in zip(attempts, run.ask([attempt.evolving for attempt in attempts]), strict=True):
        attempt.evolved, attempt.text = reply, _unquoted(reply.text.strip())
        if fault := _fault_of(reply):
            attempt.refuse("evolve", *fault)
        elif not attempt.text:
            attempt.refuse("evolve", EMPTY)


def _eliminate_leaks(run: Run, attempts: list[_Attempt]) -> None:
    """Elimination (4): the evolved instruction has words of the evolving prompt that its parent did not have."""
    for attempt in _alive(attempts):
        text, before = attempt.text.lower(), attempt.parent.text.lower()
        found = next((leak for leak in LEAKS if leak in text and leak not in before), None)
        if found:
            attempt.refuse("eliminate", LEAKED, f"'{found}'")


def _eliminate_what_is_not_new(run: Run, attempts: list[_Attempt]) -> None:
    """Elimination (1): no information is gained; the teacher is asked unless the words are equal."""
    for attempt in _alive(attempts):
        if _WORD.findall(attempt.text.lower()) == _WORD.findall(attempt.parent.text.lower()):
            attempt.refuse("eliminate", NOTHING_NEW, "the same words")
    asked = _alive(attempts)
    for attempt, reply in zip(asked, run.ask([attempt.comparing for attempt in asked]), strict=True):
        verdict = verdict_of(reply.text)
        if reply.error:
            attempt.refuse("eliminate", NO_ANSWER, reply.error)
        elif verdict is None:
            attempt.refuse("eliminate", NO_VERDICT, f"the teacher said {reply.text.strip()[:60]!r}")
        elif verdict == SAME:
            attempt.refuse("eliminate", NOTHING_NEW, "so the teacher says")


def _respond(run: Run, attempts: list[_Attempt]) -> None:
    """Ask for the responses; the prompt is the instruction itself."""
    asked = _alive(attempts)
    for attempt, reply in zip(asked, run.ask([attempt.responding for attempt in asked]), strict=True):
        attempt.response = reply
        if fault := _fault_of(reply):
            attempt.refuse("respond", *fault)


def _eliminate_poor_responses(run: Run, attempts: list[_Attempt]) -> None:
    """Elimination (2) and (3): the teacher could not do it, or said nothing."""
    for attempt in _alive(attempts):
        response = attempt.response.text
        length = len(response.split())
        if "sorry" in response.lower() and length < _SORRY_WORDS:
            attempt.refuse("eliminate", SORRY, f"in {length} words")
        elif says_nothing(response):
            attempt.refuse("eliminate", ONLY_STOP_WORDS, repr(response.strip()[:60]))


_STEPS = (
    _evolve_instructions,
    _eliminate_leaks,
    _eliminate_what_is_not_new,
    _respond,
    _eliminate_poor_responses,
)


def _settle(run: Run, attempt: _Attempt) -> Pooled:
    """Write the decision down; who stands in the pool from now on."""
    decision = run.decide(attempt.key, lambda: _decision(run, attempt))
    return Pooled(attempt.parent.root, attempt.round, attempt.text) if "row" in decision else attempt.parent


def _decision(run: Run, attempt: _Attempt) -> dict[str, Any]:
    lineage = {"root": f"{attempt.parent.root}/0", "parent": attempt.parent.id}
    about = {"operation": attempt.operation.name, "round": attempt.round, **lineage}
    if attempt.refused:
        step, (reason, detail) = attempt.refused
        return {"step": step, "reason": reason, "detail": detail, "text": attempt.text, **about}
    made_by = run.provenance(attempt.evolving, attempt.evolved)
    child = Pooled(attempt.parent.root, attempt.round, attempt.text)
    more = {"method": METHOD, "id": child.id, **about, "instruction": made_by}
    provenance = run.provenance(attempt.responding, attempt.response, **more)
    output = attempt.response.text.strip()
    row = {"instruction": attempt.text, "input": "", "output": output, "provenance": provenance}
    return {"step": "accept", "operation": attempt.operation.name, "round": attempt.round, "row": row}


# ---- what a reply says -----------------------------------------------------------------------------------------------


def verdict_of(text: str) -> str | None:
    """SAME or OTHER, or None when an answer says neither. A verdict at the very beginning counts, else the last one."""
    found = list(_VERDICT.finditer(text))
    if not found:
        return None
    chosen = found[0] if found[0].start() == len(text) - len(text.lstrip()) else found[-1]
    return SAME if (chosen[2].lower() == SAME) != bool(chosen[1]) else OTHER


def says_nothing(response: str) -> bool:
    """Whether a response has no word but stop words."""
    return all(word in STOP_WORDS for word in _WORD.findall(response.lower()))


def _fault_of(reply: Reply) -> tuple[str, str] | None:
    """Reason and detail where a reply is none, or only the beginning of one."""
    if reply.error:
        return NO_ANSWER, reply.error
    return (CUT, f"{reply.completion_tokens} tokens") if reply.finish == "length" else None


def _unquoted(text: str) -> str:
    """Without the quotation marks that some teachers put around the whole of an instruction."""
    inside = text[1:-1]
    for left, right in ('""', "“”"):
        if len(text) > 2 and text[0] == left and text[-1] == right and left not in inside and right not in inside:
            return inside.strip()
    return text


# ---- rows in and out -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Originals:
    """The rows that are evolved.

    rows: as they will stand in the result: Alpaca rows with the provenance of an original, id "row/0".
    instructions: what is evolved; an Alpaca row's instruction and input joined by a blank line, as in the data set
    that was released with the paper. sha256: of the file's rows. read: how many there were. cut: of these, how many
    had more than a question and an answer (a system turn, tools, further turns): their first two are taken. skipped:
    bad rows that were left out.
    """

    rows: list[dict[str, Any]]
    instructions: list[str]
    sha256: str
    read: int = 0
    cut: int = 0
    skipped: Sequence[SkippedRow] = ()


def read_originals(path: str | Path, *, skip_bad_rows: bool = False, limit: int | None = None) -> Originals:
    """Read the rows to evolve: a file in any form that `lilliput.data` reads, or a run's folder with a data.jsonl.

    Args:
        skip_bad_rows: leave out rows that cannot be used instead of refusing the file.
        limit: take the first so many rows only.

    Raises:
        DataError: no such file or folder, no rows, or a bad row (unless skipped).
        UsageError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit} is not a number from 1 up")
    read = read_pairs(path, skip_bad_rows=skip_bad_rows)
    pairs = read.pairs[:limit]
    rows = [_original(number, pair) for number, pair in enumerate(pairs, start=1)]
    return Originals(rows, [pair.question for pair in pairs], read.sha256, len(read.pairs), read.cut, read.skipped)


def _original(number: int, pair: Pair) -> dict[str, Any]:
    name = f"{number}/0"
    birth: dict[str, Any] = {"id": name, "root": name, "round": 0, "origin": pair.origin}
    if pair.provenance:
        birth["before"] = dict(pair.provenance)
    return {"instruction": pair.instruction, "input": pair.input, "output": pair.output, "provenance": birth}


def merge(
    originals: Sequence[Mapping[str, Any]],
    evolved: Sequence[Mapping[str, Any]],
    *,
    rounds: int,
    only_last: bool = False,
    shuffle: bool = True,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The data set: originals and all evolved rows of the first `rounds` rounds, shuffled by `seed`.

    Args:
        originals: `Originals.rows`.
        evolved: `Run.rows()`; rows of other originals or later rounds are left out.
        only_last: of each original the last form only, which is the original itself where nothing passed.
        shuffle: without it the rows stand by original and round.
    """
    roots = {row["provenance"]["root"]: number for number, row in enumerate(originals)}
    born = [row for row in evolved if row["provenance"]["root"] in roots and row["provenance"]["round"] <= rounds]
    rows = sorted((*originals, *born), key=lambda row: (roots[row["provenance"]["root"]], row["provenance"]["round"]))
    if only_last:
        rows = list({row["provenance"]["root"]: row for row in rows}.values())
    if shuffle:
        dice(seed, "shuffle").shuffle(rows)
    return [dict(row) for row in rows]
