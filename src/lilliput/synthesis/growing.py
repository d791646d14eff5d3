"""A pool of tasks that grows: what Self-Instruct and its Alpaca variant have in common, around their rounds.

Source: Self-Instruct, arXiv 2212.10560, section 2.2: tasks of people and of the model are sampled, new ones come back,
and those that pass the filter are sampled in their turn. `grow` runs the rounds of a method until there are enough
rows, and says why it ended. A round is a function that asks and decides through `Growth`, in a fixed order and with
dice that depend on the seed and a key alone, so that the run can be killed and begun again (`run.py`).
Not here: the rounds (`self_instruct.py`, `alpaca.py`), prompts (`prompts.py`), what is good (`filters.py`).
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lilliput import files
from lilliput.data.forms import form_named
from lilliput.data.reading import Reading
from lilliput.errors import UsageError
from lilliput.progress import warn
from lilliput.synthesis.filters import Refusal, Rules, refuse_instruction
from lilliput.synthesis.rouge import THRESHOLD, RougePool, split_words
from lilliput.synthesis.run import Run, dice, seed_of
from lilliput.synthesis.seeds import SeedTask, SeedTasks
from lilliput.synthesis.teacher import Decoding, Reply, Request

_SAVE_EVERY = 60.0  # seconds between two writings of the rows so far


@dataclass(frozen=True)
class Plan:
    """What is wanted of a generation.

    target: rows. max_requests: to the teacher, those of earlier runs in the same directory counted; None: any number.
    patience: rounds in a row without a row before it gives up. These three only say when to end: a directory may
    be gone on with under others. What follows the result depends on:
    seed: of all draws. batch: requests in one step of a round. instances: rows of one task, at most.
    max_tokens: of an answer that holds instances. temperature: of the step that invents tasks. None: the method's own.
    rouge: an instruction with a higher ROUGE-L to any in the pool is refused. unicode: other languages than English.
    """

    target: int = 100
    max_requests: int | None = None
    patience: int = 10
    seed: int = 0
    batch: int = 8
    instances: int = 5
    max_tokens: int | None = None
    temperature: float | None = None
    rouge: float = THRESHOLD
    unicode: bool = False

    def __post_init__(self) -> None:
        for name in ("target", "patience", "batch", "instances", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{value} is not a number from 1 up", where=_option(name))
        if self.max_requests is not None and self.max_requests < self.batch:
            what = f"{self.max_requests} requests are fewer than one step of a round needs (--batch {self.batch})"
            raise UsageError(what, where="--max-requests", todo="Give more requests, or a smaller --batch.")
        if not 0 <= self.rouge <= 1:
            raise UsageError(f"{self.rouge:g} is not a ROUGE-L from 0 to 1", where="--rouge")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise UsageError(f"{self.temperature:g} is not a temperature from 0 to 2", where="--temperature")

    def settings(self, method: str, seeds: SeedTasks) -> dict[str, Any]:
        """What a journal remembers: a run with other settings is another run."""
        names = ("seed", "batch", "instances", "max_tokens", "temperature", "rouge", "unicode")
        return {"method": method, "seeds": seeds.sha256, **{name: getattr(self, name) for name in names}}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Task:
    """A task that the model wrote: the key that it was decided under, its instruction, and what it came from."""

    key: str
    instruction: str
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a generation.

    rows, instructions: accepted and kept, earlier starts included. requests: that it took, likewise. rounds: begun.
    ended: "target", "max-requests" or "patience". refused: (step, reason) -> how many.
    """

    rows: int
    instructions: int
    requests: int
    rounds: int
    ended: str
    refused: Mapping[tuple[str, str], int]

    def most_refused(self, most: int = 3) -> str:
        """The reasons that came most often, in words."""
        counts = Counter(self.refused).most_common(most)
        return ", ".join(f"{count:,} x {reason}" for (_, reason), count in counts) or "nothing was refused"


class _Ended(Exception):
    """`why` is Outcome.ended."""

    def __init__(self, why: str) -> None:
        self.why = why


class Growth:
    """One generation under way: the pool of tasks, and what was asked and decided so far.

    Attributes:
        run, seeds, plan: as given.
        tasks: the model's tasks that have at least one row, in the order in which they came.
    """

    def __init__(self, run: Run, seeds: SeedTasks, plan: Plan) -> None:
        self.run, self.seeds, self.plan = run, seeds, plan
        self.tasks: list[Task] = []
        self.rows = self.instructions = self.requests = self._round = 0
        self.refused: Counter[tuple[str, str]] = Counter()
        self.rules = Rules(unicode=plan.unicode)
        self.words = "unicode" if plan.unicode else "rouge"
        self._pool = RougePool(words=self.words)
        self._known = [task.instruction for task in seeds]
        for text in self._known:
            self._pool.add(text)
        if self._pool.wordless:
            what = (
                f"{self._pool.wordless:,} of {len(seeds):,} seed tasks have no words in a-z, so nothing is near to them"
            )
            warn(f"{what}; --unicode compares words of any script")

    def begin(self, number: int) -> None:
        """Draw how far round `number` is."""
        self._round = number
        note = f"round {number}, {self.instructions:,} instructions kept"
        self.run.progress(min(self.rows, self.plan.target), self.plan.target, note)

    def request(self, key: str, prompt: str, decoding: Decoding) -> Request:
        """A request whose seed depends on the run's seed and the key."""
        return Request(key, prompt, decoding, seed=seed_of(self.plan.seed, key))

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """All replies, unless more requests would be made than are allowed: then the generation ends."""
        if self.plan.max_requests is not None and self.requests + len(requests) > self.plan.max_requests:
            raise _Ended("max-requests")
        self.requests += len(requests)
        return self.run.ask(requests)

    def sample(self, key: str, people: int, model: int) -> list[tuple[str, str]]:
        """(name, instruction) of tasks to show, shuffled: `model` of the model's, the others from people.

        As long as the model has fewer, people's tasks fill the places (as in the released code).
        """
        draw = dice(self.plan.seed, key)
        own = draw.sample(self.tasks, min(model, len(self.tasks)))
        theirs = draw.sample(list(self.seeds), min(people + model - len(own), len(self.seeds)))
        shown = [(task.key, task.instruction) for task in own] + [(task.name, task.instruction) for task in theirs]
        draw.shuffle(shown)
        return shown

    def sample_seeds(self, key: str, count: int) -> list[SeedTask]:
        """Tasks of people, drawn."""
        return dice(self.plan.seed, key).sample(list(self.seeds), min(count, len(self.seeds)))

    def consider(self, key: str, instruction: str, step: str, about: Mapping[str, Any]) -> Task | None:
        """Decide about a new instruction: a task, known to the pool from now on, or None where it is refused."""

        def make() -> dict[str, Any]:
            refusal = refuse_instruction(instruction, self.rules)
            nearest, score = "", 0.0
            if refusal is None and not split_words(instruction, self.words):
                refusal = Refusal("no words to compare", "none in a-z; --unicode compares those of any script")
            if refusal is None:
                score, index = self._pool.nearest(instruction)
                nearest = self._known[index] if index >= 0 else ""
                if score > self.plan.rouge:
                    refusal = Refusal("too near to another", f"ROUGE-L {score:.3f} to: {nearest}")
            if refusal is not None:
                return _refused(step, refusal, instruction)
            return {"step": step, "instruction": instruction, "rouge": round(score, 4), "nearest": nearest}

        decision = self.run.decide(key, make)
        if self._is_refused(decision):
            return None
        self.instructions += 1
        self._pool.add(instruction)
        self._known.append(instruction)
        return Task(key, instruction, {**about, "rouge": decision["rouge"]})

    def decoding(self, own: Decoding) -> Decoding:
        """The method's `own` decoding of an answer that holds instances, with the plan's `max_tokens`."""
        return own if self.plan.max_tokens is None else replace(own, max_tokens=self.plan.max_tokens)

    def inventing(self, own: Decoding) -> Decoding:
        """The method's `own` decoding of an answer with new tasks, at the plan's temperature."""
        return own if self.plan.temperature is None else replace(own, temperature=self.plan.temperature)

    def note(self, key: str, step: str, **found: Any) -> None:
        """Write down what was found out: a decision that neither accepts nor refuses."""
        self.run.decide(key, lambda: {"step": step, **found})

    def refuse(self, key: str, step: str, refusal: Refusal, text: str) -> None:
        """Write down that `text` is refused."""
        self._is_refused(self.run.decide(key, lambda: _refused(step, refusal, text)))

    def accept(self, key: str, step: str, row: Mapping[str, Any]) -> None:
        """Write down a row. With the last one that is wanted the generation ends."""
        decision = self.run.decide(key, lambda: {"step": step, "row": dict(row)})
        assert "row" in decision, f"{key} names two decisions"
        self.rows += 1
        self.begin(self._round)
        if self.rows >= self.plan.target:
            raise _Ended("target")

    def _is_refused(self, decision: Mapping[str, Any]) -> bool:
        if "reason" in decision:
            self.refused[decision["step"], decision["reason"]] += 1
        return "reason" in decision


def _refused(step: str, refusal: Refusal, text: str) -> dict[str, Any]:
    return {"step": step, "reason": refusal.reason, "text": text, "detail": refusal.detail}


def no_answer(reply: Reply) -> Refusal | None:
    """Why a reply says nothing, or None where it says something."""
    if reply.error:
        return Refusal("no answer", reply.error)
    return None if reply.text.strip() else Refusal("no answer", "an empty one")


Round = Callable[[Growth, int], None]


def grow(run: Run, seeds: SeedTasks, plan: Plan, one_round: Round, save: Callable[[], None] | None = None) -> Outcome:
    """Rounds of a method until the plan is fulfilled, or nothing new comes; the rows are in `run.rows()`.

    Args:
        one_round: asks and decides; called with the growth and the round's number, from 1.
        save: called between two rounds, at most once a minute: writes the rows so far.

    Raises TeacherError, DiskError: as `Run.ask`; begun again, it goes on there.
    """
    growth, ended, number = Growth(run, seeds, plan), "patience", 0
    saved, last_row = time.monotonic(), 0
    try:
        for number in itertools.count(1):
            before = growth.rows
            growth.begin(number)
            one_round(growth, number)
            last_row = number if growth.rows > before else last_row
            if number - last_row >= plan.patience:
                break
            if save and time.monotonic() - saved > _SAVE_EVERY:
                save()
                saved = time.monotonic()
    except _Ended as end:
        ended = end.why
    return Outcome(growth.rows, growth.instructions, growth.requests, number, ended, dict(growth.refused))


# ---- rows out ----------------------------------------------------------------------------------------------------


FORMS = ("alpaca", "messages")


def _in_form(row: Mapping[str, Any], form: str) -> Mapping[str, Any]:
    """A row of instruction, input, output and provenance in one of FORMS."""
    if form == "alpaca":
        return row
    (chat,) = form_named("alpaca").read(dict(row), Reading())
    write = form_named(form).write
    assert write is not None, "each of FORMS is written"
    return {**write(chat), "provenance": row["provenance"]}


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]], to: str = "alpaca") -> None:
    """Write rows of instruction, input, output and provenance as JSONL, beside and then renamed, in a form of FORMS."""
    with files.replace(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_in_form(row, to), ensure_ascii=False) + "\n")
