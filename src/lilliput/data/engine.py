"""Where the work of a data command runs: in this process, or on the workers of a Ray cluster; the results are the same.

A command cuts its work into items (chunks of lines, of texts), and has a plain function for one of them; `Engine.map`
gives the results in the order of the items. With "ray", Ray Data does it: a window of items becomes a `Dataset`, whose
blocks of a few items are mapped by tasks on the workers, and read here in their order while later ones are made.
Windows, since a `Dataset` knows all its blocks when it starts, and a file of 10 GB is not to be held.

Nothing of Ray is imported before somebody asks for it. Not here: what the functions do (`conversion.py`,
`synthesis/near.py`), and teachers on workers (`synthesis/ray_teacher.py`).
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow

from lilliput.errors import LilliputError, UsageError, nearest

if TYPE_CHECKING:
    from ray.data import Dataset

T = TypeVar("T")
U = TypeVar("U")

ENGINES = ("process", "ray")

# A task takes Ray Data some 35 ms of its own; a Dataset takes it a second until all workers are at work (2.60 learns
# once a second what the cluster has). So a worker is handed several items at a time, and windows are large.
_TASK_ITEMS, _TASK_BYTES = 4, 8 << 20  # of a task, at most, unless a single item weighs more
_WINDOW_ITEMS, _WINDOW_BYTES = 1024, 64 << 20  # of a Dataset, at most, for each worker
_RETRIES = 2  # of a task whose worker died; Ray Data's own number is infinite, which is what a full memory would take


class Engine(Protocol):
    """Something that maps a function over items."""

    @property
    def name(self) -> str:
        """One of ENGINES."""
        ...

    def map(self, function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
        """`function(item)` for each, in the order of `items`, which are taken as they are needed.

        A bounded number of items and results is held at a time. What the function raises for an item is raised here,
        after the results before it. Function, items, results and errors must be picklable.
        """
        ...

    def __enter__(self) -> Engine:
        """Keep what the engine starts until the end of the `with` block, instead of starting it for each `map`."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def engine_of(name: str, workers: int | None = None) -> Engine:
    """The engine called `name`; nothing is started yet.

    Args:
        name: "process" or "ray".
        workers: how many items are worked on at the same time; None means all CPUs of the cluster. For "ray" only.

    Raises:
        UsageError: no such engine; a number of workers that is none, or where there are none; Ray is not installed.
    """
    if name not in ENGINES:
        known = f"Known: {', '.join(ENGINES)}."
        raise UsageError(f"unknown value {name!r}{nearest(name, ENGINES)}", where="--engine", todo=known)
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} is not a number of workers from 1 up", where="--workers")
    if name == "ray":
        return RayEngine(workers)
    if workers not in (None, 1):
        raise UsageError("the engine 'process' has one worker", where="--workers", todo="Add --engine ray.")
    return ProcessEngine()


class ProcessEngine:
    """This process alone, one item after the other."""

    name = "process"

    def map(self, function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
        """`function(item)` for each, in order, one at a time."""
        return map(function, items)

    def __enter__(self) -> ProcessEngine:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""


class RayEngine:
    """The workers of a Ray cluster: the one that runs in this process already, or that RAY_ADDRESS names, or a new one.

    A new one is on this machine alone and has no dashboard; it ends with the `with` block, or with the `map` outside
    of one. A cluster that was there before goes on. Lilliput must be installed on each machine of a cluster.

    Raises:
        UsageError: Ray is not installed.
    """

    name = "ray"

    def __init__(self, workers: int | None = None) -> None:
        _import_ray()
        self.workers = workers
        self._users = 0  # `with` blocks and maps that are not over
        self._ours: bool | None = None  # whether the cluster was started or joined by this engine; None: not yet

    def map(
        self, function: Callable[[T], U], items: Iterable[T], *, in_order: bool = True, together: int = _TASK_ITEMS
    ) -> Generator[U, None, None]:
        """`function(item)` for each.

        Args:
            in_order: as in `Engine`; False yields results as they come.
            together: items that a worker is handed at a time, at most; their results come back together.
        """
        with self:
            self.start()
            workers = self.size
            for window in _windows(_tasks(items, together), workers):
                with closing(_map_window(function, window, workers, in_order)) as results:
                    yield from results

    @property
    def size(self) -> int:
        """Workers that are at work at the same time; the engine must have been started."""
        return self.workers or max(int(_import_ray().cluster_resources().get("CPU", 1)), 1)

    def start(self) -> None:
        """Join or start a cluster now, not with the first `map`. It ends with the last `with` block.

        Raises:
            UsageError: RAY_ADDRESS names a cluster that cannot be reached.
        """
        if self._ours is None:
            self._ours = _start(self.workers)

    def __enter__(self) -> RayEngine:
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if not self._users and self._ours is not None:
            if self._ours:
                _import_ray().shutdown()
            self._ours = None


# ---- a window of items -------------------------------------------------------------------------------------------


def _tasks(items: Iterable[T], together: int) -> Iterator[list[bytes]]:
    """The items, pickled, in lists of at most `together` and about _TASK_BYTES."""
    task: list[bytes] = []
    weight = 0
    for item in items:
        task.append(pickle.dumps(item, protocol=5))
        weight += len(task[-1])
        if len(task) == together or weight >= _TASK_BYTES:
            yield task
            task, weight = [], 0
    if task:
        yield task


def _windows(tasks: Iterable[list[bytes]], workers: int) -> Iterator[list[list[bytes]]]:
    """The tasks in lists of about _WINDOW_ITEMS and _WINDOW_BYTES for each worker."""
    window: list[list[bytes]] = []
    count = weight = 0
    for task in tasks:
        window.append(task)
        count, weight = count + len(task), weight + sum(map(len, task))
        if count >= _WINDOW_ITEMS * workers or weight >= _WINDOW_BYTES * workers:
            yield window
            window, count, weight = [], 0, 0
    if window:
        yield window


def _map_window(
    function: Callable[[T], U], tasks: list[list[bytes]], workers: int, in_order: bool
) -> Generator[U, None, None]:
    """The results of some tasks, which are one Dataset."""
    from ray.data import TaskPoolStrategy, from_arrow

    size = TaskPoolStrategy(min(workers, len(tasks)))
    tasks.reverse()  # handed over one by one, so that a window is in memory once, not three times
    items = from_arrow([pyarrow.table({"item": tasks.pop()}) for _ in range(len(tasks))])  # a table becomes a task
    _settle(items, in_order)
    work = partial(_work, function)
    how: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "compute": size, "max_retries": _RETRIES}
    with warnings.catch_warnings():  # `max_retries` goes with Ray 2.64, which says of nothing that takes its place
        warnings.filterwarnings("ignore", message=".*ray_remote_args")
        outcomes = items.map_batches(work, **how)
    for table in _told(outcomes.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)):
        for outcome in table["outcome"]:
            result, error, trace = pickle.loads(outcome.as_buffer())  # written by our own workers
            if error is not None:
                raise error from _OnWorker(trace)
            yield result


class _OnWorker(Exception):
    """The traceback of an error on a worker, which does not travel with it; shown with --debug."""


def _work(function: Callable[[Any], Any], items: pyarrow.Table) -> pyarrow.Table:
    """On a worker: the outcome of each item, a pickled (result, error, traceback).

    Errors travel as values, so that they arrive as themselves, and in their place in the order.
    """
    outcomes = []
    for item in items["item"]:
        result, error, trace = None, None, ""
        try:
            result = function(pickle.loads(item.as_buffer()))
        except Exception as fault:  # noqa: BLE001 - whatever it is, it is raised where `map` was called
            error, trace = fault, traceback.format_exc()
        outcomes.append(pickle.dumps((result, error, trace), protocol=5))
    return pyarrow.table({"outcome": pyarrow.array(outcomes, pyarrow.large_binary())})


# ---- Ray itself --------------------------------------------------------------------------------------------------


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(
            f"Ray cannot be loaded ({error})", where="--engine ray", todo='Install it: pip install "lilliput[ray]".'
        ) from error
    return ray


_START = "Start one (`ray start --head`), or unset the variable: then one is started on this machine."


def _start(workers: int | None) -> bool:
    """Join the cluster of RAY_ADDRESS, or start one here; False if this process has one already."""
    ray = _import_ray()
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    here = {} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        _knock(address or "")
        ray.init(address or "local", logging_level=logging.ERROR, **here)
    except OSError as error:  # a ConnectionError is one
        token = "InvalidAuthToken" in str(error.__cause__)
        todo = "It asks for a token: set RAY_AUTH_MODE=token, and the token as Ray's pages say." if token else _START
        raise UsageError(f"no Ray cluster lets us in at {address!r}", where="RAY_ADDRESS", todo=todo) from error
    return True


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _settle(data: Dataset, in_order: bool) -> None:
    """Settings of this Dataset alone: results in order, and no bars and lines of Ray's own beside ours."""
    data.context.execution_options.preserve_order = in_order
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would say is in the error that is raised


def _told(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; what goes wrong with a worker itself, not on it, becomes an error for people."""
    from ray.exceptions import RayError

    try:
        yield from batches
    except RayError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        todo = "With fewer --workers each has more memory; --engine process needs no cluster."
        raise LilliputError(
            f"a worker of the Ray cluster failed ({reason})", where="--engine ray", todo=todo
        ) from error
