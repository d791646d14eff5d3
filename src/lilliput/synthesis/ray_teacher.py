"""A teacher on each worker of a Ray cluster: the requests of a round are spread over them, the replies are the same.

A teacher does not travel (it holds connections, or a model); a recipe does: a function without arguments that builds
it. A worker builds its teacher once, at its first requests, and keeps it as long as the cluster lives.
Not here: the cluster itself (`data/engine.py`), and which recipe (`cli/teachers.py`).
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from lilliput.data.engine import RayEngine
from lilliput.errors import TeacherError
from lilliput.synthesis.teacher import Reply, Request, Teacher

_Batch = tuple[int, tuple[Request, ...]]  # number of the first request; requests that a worker is given at a time
_Replies = tuple[list[tuple[int, Reply]], TeacherError | None]  # what came, and why no more did


class RayTeacher:
    """The teachers of all workers, as one.

    Args:
        recipe: builds one; picklable. What it raises is raised here.
        engine: whose workers they are; started here, and ended by `close` or with the program.
        batch: requests that a worker is given at a time. It answers those side by side, if it can, and their replies
            arrive when all of them are there: what a killed run has to ask again.
    """

    def __init__(self, recipe: Callable[[], Teacher], engine: RayEngine, batch: int = 1) -> None:
        self._recipe, self._engine, self._batch = pickle.dumps(recipe), engine, batch
        engine.__enter__()

    @functools.cached_property
    def name(self) -> str:
        """The name that each of them has; a worker is asked, since only there one is built."""
        return next(self._engine.map(_name_of, [self._recipe]))

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Answer all requests, as `Teacher` has it. Raises TeacherError when the teacher of a worker does."""
        starts = range(0, len(requests), self._batch)
        batches = ((start, tuple(requests[start : start + self._batch])) for start in starts)
        ask = functools.partial(_ask, self._recipe)
        with closing(self._engine.map(ask, batches, in_order=False, together=1)) as answered:
            for replies, error in answered:
                yield from replies
                if error is not None:
                    raise error

    def close(self) -> None:
        """End the cluster, if it was started here; the workers' teachers go with it."""
        self._engine.__exit__()


def _ask(recipe: bytes, batch: _Batch) -> _Replies:
    """On a worker: the replies to one batch. An error travels beside the replies before it, so that these stand."""
    start, requests = batch
    replies: list[tuple[int, Reply]] = []
    try:
        for number, reply in _teacher_of(recipe).complete(requests):
            replies.append((start + number, reply))
    except TeacherError as error:
        return replies, error
    return replies, None


def _name_of(recipe: bytes) -> str:
    return _teacher_of(recipe).name


@functools.lru_cache(maxsize=1)
def _teacher_of(recipe: bytes) -> Teacher:
    """The teacher of this worker's process. Ray hands tasks to processes that live on, so it is built once in each."""
    teacher: Teacher = pickle.loads(recipe)()
    return teacher
