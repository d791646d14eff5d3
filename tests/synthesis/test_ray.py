"""`--engine ray` on two workers of this machine: the same results as one process, for each that uses it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from lilliput.cli.teachers import TeacherOptions
from lilliput.data.conversion import convert
from lilliput.data.engine import RayEngine, engine_of
from lilliput.errors import DataError, LilliputError, TeacherError, UsageError
from lilliput.synthesis.dedupe import dedupe
from lilliput.synthesis.growing import Plan
from lilliput.synthesis.near import find_near
from lilliput.synthesis.ray_teacher import RayTeacher
from lilliput.synthesis.run import Run
from lilliput.synthesis.seeds import read_seeds
from lilliput.synthesis.self_instruct import METHOD, self_instruct
from lilliput.synthesis.teacher import Decoding, Reply, Request, Teacher
from tests.synthesis.brains import Scripted
from tests.synthesis.endpoint_server import FakeEndpoint

ray = pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayEngine]:
    """Two workers on this machine, for all tests here."""
    with RayEngine(workers=2) as engine:
        yield engine


def last_of_all(folder: Path, n: int) -> tuple[int, int]:
    """The first item waits until another process has done some other, however long that takes to begin."""
    if n:
        (folder / f"{n}-{os.getpid()}").touch()
        return n * n, os.getpid()
    end = time.monotonic() + 120
    while time.monotonic() < end and all(file.name.endswith(f"-{os.getpid()}") for file in folder.iterdir()):
        time.sleep(0.05)
    time.sleep(1.5)  # the other's task has more items than one
    return 0, os.getpid()


def refuse_seven(n: int) -> int:
    if n == 7:
        raise DataError("'output' is empty", where="rows.jsonl:7", todo="Fix it.")
    return n


def die(n: int) -> None:
    os._exit(1)


def divide(n: int) -> float:
    return 1 / n


# ---- the engine ----


def test_results_come_in_order_from_two_processes(cluster: RayEngine, tmp_path: Path) -> None:
    results = list(cluster.map(partial(last_of_all, tmp_path), range(100)))
    assert [square for square, _ in results] == [n * n for n in range(100)]
    assert len({process for _, process in results} - {os.getpid()}) >= 2


def test_or_as_they_come(cluster: RayEngine, tmp_path: Path) -> None:
    results = [square for square, _ in cluster.map(partial(last_of_all, tmp_path), range(16), in_order=False)]
    assert results != sorted(results)
    assert sorted(results) == [n * n for n in range(16)]


def test_items_are_taken_as_they_are_needed(cluster: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lilliput.data.engine._WINDOW_ITEMS", 16)
    taken: list[int] = []
    results = cluster.map(len, (taken.append(n) or "x" * n for n in range(10_000)))  # type: ignore[func-returns-value]
    assert [next(results), next(results)] == [0, 1]
    results.close()  # type: ignore[attr-defined]
    assert len(taken) == 32
    assert ray.is_initialized()


def test_an_error_arrives_as_itself_and_in_its_place(cluster: RayEngine) -> None:
    results = cluster.map(refuse_seven, range(20))
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(DataError) as caught:
        next(results)
    assert type(caught.value) is DataError
    assert str(caught.value) == "rows.jsonl:7: 'output' is empty. Fix it."
    assert (caught.value.where, caught.value.todo) == ("rows.jsonl:7", "Fix it.")


def test_nothing_in_nothing_out(cluster: RayEngine) -> None:
    assert list(cluster.map(len, [])) == []


def test_any_other_error_too_with_its_traceback_behind_it(cluster: RayEngine) -> None:
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        list(cluster.map(divide, [1, 0]))
    assert "in divide" in str(caught.value.__cause__)


def test_a_worker_that_dies_is_told_in_a_line(cluster: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lilliput.data.engine._RETRIES", 0)
    with pytest.raises(
        LilliputError, match=r"^--engine ray: a worker of the Ray cluster failed \(.*died.*\)\. With fewer --workers"
    ) as caught:
        list(cluster.map(die, [0]))
    assert "\n" not in str(caught.value)


# ---- who uses it ----


def write_alpaca(path: Path, rows: int = 5_000) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for n in range(rows):
            row = {"instruction": f"Say {n % 997} in the {n % 7}. language of é.", "input": "", "output": f"{n} " * 40}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def test_convert_writes_the_same_bytes(cluster: RayEngine, tmp_path: Path) -> None:
    rows = write_alpaca(tmp_path / "rows.jsonl")
    here = convert(rows, tmp_path / "here.jsonl", progress=False)
    there = convert(rows, tmp_path / "there.jsonl", engine=cluster, progress=False)
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    assert (there.rows, there.chats, there.dropped) == (here.rows, here.chats, here.dropped) == (5000, 5000, {})


def test_convert_says_the_same_of_a_bad_row(cluster: RayEngine, tmp_path: Path) -> None:
    rows = write_alpaca(tmp_path / "rows.jsonl", rows=100)
    rows.write_text(rows.read_text().replace("Say 41 ", "").replace('"output": "77 ', '"wrong": "'))
    said = []
    for engine in (None, cluster):
        with pytest.raises(DataError) as caught:
            convert(rows, tmp_path / "out.jsonl", engine=engine, progress=False)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "rows.jsonl:78" in said[0]
    assert not (tmp_path / "out.jsonl").exists()


def test_dedupe_finds_the_same(cluster: RayEngine, tmp_path: Path) -> None:
    rows = write_alpaca(tmp_path / "rows.jsonl")
    found = [
        dedupe(rows, tmp_path / f"{name}.jsonl", exact=False, engine=engine, progress=False)
        for name, engine in (("here", None), ("there", cluster))
    ]
    assert found[0].duplicates == found[1].duplicates
    assert found[0].kept < 5000
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()


def test_signatures_are_made_on_workers_in_the_order_of_texts(cluster: RayEngine) -> None:
    texts = [f"the {n // 2}th of so many texts that nobody reads them all" for n in range(4_500)]
    found = find_near(texts, exact=False, threshold=0.95, engine=cluster)
    assert found.first.tolist() == find_near(texts, exact=False, threshold=0.95).first.tolist()


class Counting(Scripted):
    """A scripted teacher that leaves a file behind where it is built."""

    def __init__(self, folder: Path, breath: int = 1_000_000) -> None:
        super().__init__()
        (folder / f"{os.getpid()} {time.monotonic_ns()}").touch()
        self.breath = breath

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for number, reply in super().complete(requests):
            if self.breath == 0:
                raise TeacherError("is away", where="http://there", todo="Start it.")
            self.breath -= 1
            yield number, reply


def grow(out: Path, teacher: Teacher) -> list[dict[str, Any]]:
    """A small generation; its rows without times."""
    seeds, plan = read_seeds(), Plan(target=12, batch=6)
    with Run(out, teacher, plan.settings(METHOD, seeds), progress=False) as run:
        self_instruct(run, seeds, plan)
        rows = run.rows()
    return [{**row, "provenance": {**row["provenance"], "time": ""}} for row in rows]


def test_a_generation_ends_in_the_same_data_set(cluster: RayEngine, tmp_path: Path) -> None:
    built = tmp_path / "built"
    built.mkdir()
    there = grow(tmp_path / "there", RayTeacher(partial(Counting, built), cluster, batch=2))
    assert there == grow(tmp_path / "here", Scripted())
    assert len(there) == 12
    assert 1 <= len(list(built.iterdir())) <= 3  # once in a process, however many rounds there were


def test_a_teacher_that_breaks_on_a_worker_breaks_the_run_and_its_replies_stand(
    cluster: RayEngine, tmp_path: Path
) -> None:
    teacher = RayTeacher(partial(Counting, tmp_path, breath=2), cluster, batch=3)
    replies = teacher.complete([Request(f"{n}", "x" * n) for n in range(3)])
    assert sorted(number for number, _ in (next(replies), next(replies))) == [1, 2]
    with pytest.raises(TeacherError, match="http://there: is away. Start it."):
        next(replies)


def test_options_open_a_teacher_on_each_worker(cluster: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(f"{n}", "word " * n) for n in range(12)]
    with FakeEndpoint() as fake:
        options = TeacherOptions(model=fake.url, engine="ray", workers=2, concurrency=4, retries=0)
        teacher = options.open()
        assert isinstance(teacher, RayTeacher)
        assert teacher.name == replace(options, engine="process", workers=None).open().name
        there = sorted(teacher.complete(requests), key=itemgetter(0))
        here = sorted(replace(options, engine="process", workers=None).open().complete(requests), key=itemgetter(0))
        teacher.close()
    assert fake.most <= 4
    assert [(number, reply.text, reply.error) for number, reply in there] == [
        (number, reply.text, reply.error) for number, reply in here
    ]


def test_a_model_of_this_machine_answers_the_same_on_workers(cluster: RayEngine, tiny_model_dir: Path) -> None:
    decoding = Decoding(temperature=0.8, max_tokens=8)
    requests = [Request(f"{n}", f"Count to {n}.", decoding, seed=n) for n in range(5)]
    options = TeacherOptions(model=str(tiny_model_dir), engine="ray", workers=2)
    teachers = (options.open(), replace(options, engine="process", workers=None).open())
    assert teachers[0].name == teachers[1].name
    there, here = ([reply.text for _, reply in sorted(one.complete(requests), key=itemgetter(0))] for one in teachers)
    assert there == here
    assert len(set(there)) > 1


def test_what_is_wrong_with_a_teacher_is_said_as_without_workers(cluster: RayEngine) -> None:
    with pytest.raises(UsageError, match="--rpm: goes with the URL of an endpoint"):
        _ = TeacherOptions(model="no-such-model", engine="ray", workers=2, rpm=5).open().name
    with pytest.raises(TeacherError, match="127.0.0.1:1"):
        _ = TeacherOptions(model="http://127.0.0.1:1/v1", engine="ray", workers=2, retries=0).open().name


# ---- clusters, last: these end the one above ----


def test_the_engine_ends_only_what_it_started() -> None:
    with RayEngine(workers=2) as outer:
        assert list(engine_of("ray").map(len, ["abc"])) == [3]
        assert ray.is_initialized()
        assert list(outer.map(len, ["ab"])) == [2]


@pytest.mark.parametrize(("reason", "todo"), [("nobody", "Start one"), ("InvalidAuthToken", "RAY_AUTH_MODE=token")])
def test_a_cluster_that_lets_nobody_in_is_told(monkeypatch: pytest.MonkeyPatch, reason: str, todo: str) -> None:
    def init(address: str, **_: Any) -> None:
        raise ConnectionError(f"Failed to connect to {address}") from RuntimeError(reason)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UsageError, match=f"^RAY_ADDRESS: no Ray cluster lets us in at 'auto'.*{todo}"):
        list(engine_of("ray").map(len, ["a"]))


def test_a_dead_address_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UsageError, match="no Ray cluster lets us in at '127.0.0.1:1'"):
        next(engine_of("ray").map(len, ["a"]))
