"""Engines without a cluster: the process itself, and what is refused. With one: tests/synthesis/test_ray.py."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import pytest

from lilliput.data.engine import ENGINES, RayEngine, _tasks, _windows, engine_of
from lilliput.errors import DataError, UsageError


def test_process_maps_in_order_and_lazily() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for n in range(1_000_000):
            taken.append(n)
            yield n

    with engine_of("process") as engine:
        results = engine.map(lambda n: n * n, items())
        assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert taken == [0, 1, 2]


def test_process_raises_what_the_function_raises() -> None:
    def refuse(n: int) -> int:
        if n == 2:
            raise DataError("'output' is empty", where=f"rows.jsonl:{n}")
        return n

    results = engine_of("process", workers=1).map(refuse, range(4))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 'output' is empty"):
        next(results)


def test_tasks_are_bounded_in_items_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(task) for task in _tasks(range(10), 4)] == [4, 4, 2]
    assert list(_tasks([], 4)) == []
    monkeypatch.setattr("lilliput.data.engine._TASK_BYTES", 1000)
    assert [len(task) for task in _tasks([b"x" * 400] * 5, 4)] == [3, 2]
    assert [len(task) for task in _tasks([b"x" * 5000] * 2, 4)] == [1, 1]


def test_windows_grow_with_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [[b"x" * 100] * 4] * 12
    assert [len(window) for window in _windows(tasks, workers=2)] == [12]
    monkeypatch.setattr("lilliput.data.engine._WINDOW_ITEMS", 8)
    assert [len(window) for window in _windows(tasks, workers=2)] == [4, 4, 4]
    monkeypatch.setattr("lilliput.data.engine._WINDOW_BYTES", 500)
    assert [len(window) for window in _windows(tasks, workers=1)] == [2] * 6
    assert list(_windows([], workers=2)) == []


@pytest.mark.parametrize(
    ("name", "workers", "words"),
    [
        ("rya", None, "--engine: unknown value 'rya'; did you mean 'ray'? Known: process, ray."),
        ("process", 0, "--workers: 0 is not a number of workers from 1 up"),
        ("ray", -1, "--workers: -1 is not a number of workers from 1 up"),
        ("process", 2, "--workers: the engine 'process' has one worker. Add --engine ray."),
    ],
)
def test_wrong_options_are_refused(name: str, workers: int | None, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        engine_of(name, workers)
    assert str(caught.value) == words


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match=r'--engine ray: Ray cannot be loaded .*pip install "lilliput\[ray\]"'):
        engine_of("ray")


def test_names_are_those_of_the_engines() -> None:
    assert (engine_of("process").name, RayEngine.name) == ENGINES
