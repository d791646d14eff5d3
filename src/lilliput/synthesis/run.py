"""A generation that may be stopped at any moment: what was asked, answered and decided is never asked or decided twice.

A method (self_instruct.py, evol_instruct.py) is a plain program over two verbs. `ask` hands requests to the teacher
and returns all replies; `decide` makes a decision. Both are remembered in the journal under their keys. When a run
is begun again in the same directory, the same program runs from its start, and finds each answer and each decision
that the journal has; only what is missing is asked. So the program must depend on nothing but its settings, its seed
and what these two return: no clock, no global random numbers, no order of arrival.

A reply that a teacher yields is final, its `error` included, and is remembered; what may be better tomorrow (no
network, no credit) is a TeacherError, which ends the run and leaves it to be gone on with.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from lilliput.errors import DataError, TeacherError
from lilliput.progress import Advance, bar, say
from lilliput.synthesis.cost import Price, Spent
from lilliput.synthesis.journal import JOURNAL, Journal, State, hash_of, json_bytes
from lilliput.synthesis.teacher import Reply, Request, Teacher

_HALF = re.compile("[\ud800-\udfff]")  # half a character, where an answer was cut; no file can hold it


def seed_of(seed: int, key: str) -> int:
    """The seed of one request: 31 bits that depend on the run's seed and the request's key alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:4], "big") >> 1


def dice(seed: int, key: str) -> random.Random:
    """Random numbers for one choice of a method, the same whenever the run is repeated."""
    return random.Random(f"{seed}/{key}")


class Run:
    """A directory with a journal, and a teacher. Use it in a `with` block, or close it.

    Args:
        out: the directory; made if missing. `journal.jsonl` lies in it.
        teacher: who answers.
        settings: whatever the result depends on (method, seed, hash of the seed tasks, …), plain values; the
            teacher's name is added as "teacher". A run in a directory with answers to other settings is refused, with
            the names of those that differ.
        progress: draw a bar.
        price: of a million tokens; for the bar and the report.

    Raises:
        UsageError: the directory has answers to other settings, or another program writes it.
        DataError: a journal that is broken elsewhere than in its last line.
        DiskError: the journal cannot be written (here and later).
    """

    def __init__(
        self,
        out: str | Path,
        teacher: Teacher,
        settings: Mapping[str, Any],
        *,
        progress: bool = True,
        price: Price | None = None,
    ) -> None:
        self.out, self.teacher, self.price = Path(out), teacher, price or Price()
        self._journal = Journal(self.out / JOURNAL, {"teacher": teacher.name, **settings}, self.price)
        self._spent = self.state.spent
        self._bar = _Bar(shown=progress)
        if progress and self.state.answers:
            counts = f"{len(self.state.answers):,} answers and {len(self.state.decisions):,} decisions"
            say(f"{self._journal.path}: goes on; {counts} are there already")

    @property
    def state(self) -> State:
        """All that the journal says, as it stands now."""
        return self._journal.state

    @property
    def spent(self) -> Spent:
        """Requests, tokens and retries so far, earlier starts included."""
        return self._spent

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """All replies, in the order of the requests: from the journal, or from the teacher, written down as they come.

        Raises:
            TeacherError: the teacher is out of reach; what it answered is kept.
            DataError: the journal has the answer to another request under one of the keys.
        """
        replies = {request.key: self._remembered(request) for request in requests}
        assert len(replies) == len(requests), "two requests of one key"
        missing = [request for request in requests if replies[request.key] is None]
        if missing:
            self._bar.begin(self._spent.line(self.price))
            for request, reply in self._answers(missing):
                replies[request.key] = reply
        return [reply for reply in replies.values() if reply is not None]

    def decide(self, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The decision under `key`: from the journal, or made by calling `make` and written down. Plain JSON values.

        A decision with `"row"` in it accepts a row: `rows()` returns these, in the order of decisions. A decision
        with `"reason"` refuses something; the report counts by `"step"` and `"reason"`.
        """
        if key not in self.state.decisions:
            made = json.loads(
                json_bytes(dict(make()))
            )  # what a later start will read: tuples are lists, keys are texts
            self._journal.decision(key, made)
        return self.state.decisions[key]

    def provenance(self, request: Request, reply: Reply, **more: Any) -> dict[str, Any]:
        """What a row remembers of its birth: key of the answer in the journal, prompt's SHA-256, model, decoding, seed,
        time of the answer; and `more` (parents, operation, round …)."""
        return {
            "request": request.key,
            "prompt_sha256": hashlib.sha256(request.prompt.encode("utf-8", "surrogatepass")).hexdigest(),
            "model": reply.model or self.teacher.name,
            "decoding": json.loads(json_bytes(asdict(request.decoding))),
            "seed": request.seed,
            "time": self.state.answers[request.key].time,
            **more,
        }

    def rows(self) -> list[dict[str, Any]]:
        """All accepted rows so far; the disk holds them in the journal when this returns."""
        self._journal.sync()
        return self.state.rows

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Draw how far the method is: `done` of `total` rows. Nothing is drawn while answers come from the journal.

        note: a few words of the method's own, put before the counts of requests, tokens and cost.
        """
        self._bar.goal = (done, total, note)
        self._bar.draw(self._spent.line(self.price))

    def close(self) -> None:
        """End the bar, put the journal on the disk and let others have it."""
        self._bar.close()
        self._journal.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _remembered(self, request: Request) -> Reply | None:
        answered = self.state.answers.get(request.key)
        if answered is None:
            return None
        if answered.sha256 != hash_of(request):
            what = f"the answer under {request.key!r} belongs to another request than the one that is asked now"
            todo = "The program changed since (or its settings or seeds did): begin anew in another directory."
            raise DataError(what, where=str(self._journal.path), todo=todo)
        return answered.reply

    def _answers(self, requests: list[Request]) -> list[tuple[Request, Reply]]:
        """Ask the teacher, write each answer down as it comes."""
        done: dict[int, tuple[Request, Reply]] = {}
        try:
            for number, reply in self.teacher.complete(requests):
                assert number not in done, f"{self.teacher.name} answered request {number} twice"
                done[number] = requests[number], _whole(reply)
                self._journal.answer(*done[number])
                self._spent.add(reply)
                self._bar.draw(self._spent.line(self.price))
        except TeacherError as error:
            todo = f"{error.todo or ''} What was answered is kept in {self.out}: run the same command again to go on."
            raise TeacherError(error.what, where=error.where, todo=todo.strip()) from error
        finally:
            self._journal.sync()
        if len(done) != len(requests):
            what = f"answered {len(done)} of {len(requests)} requests"
            raise TeacherError(what, where=self.teacher.name, todo="Run the same command again to go on.")
        return list(done.values())


def _whole(reply: Reply) -> Reply:
    """The reply with whole characters only, so that each file can hold it."""
    return replace(reply, text=_HALF.sub("\ufffd", reply.text), error=_HALF.sub("\ufffd", reply.error))


class _Bar:
    """The bar of a run: begins with the first question, so that what came from the journal does not count as fast."""

    def __init__(self, shown: bool) -> None:
        self.goal: tuple[int, int, str] | None = None
        self._shown, self._begun, self._drawn = shown, False, 0
        self._stack = ExitStack()
        self._advance: Advance | None = None

    def begin(self, counts: str) -> None:
        self._begun = True
        self.draw(counts)

    def draw(self, counts: str) -> None:
        if not self._begun or self.goal is None:
            return
        done, total, note = self.goal
        if self._advance is None:
            self._advance = self._stack.enter_context(bar("rows", total, done=done, shown=self._shown))
            self._drawn = done
        self._advance(max(done - self._drawn, 0), "  ".join(filter(None, (note, counts))))
        self._drawn = max(done, self._drawn)

    def close(self) -> None:
        self._stack.close()
