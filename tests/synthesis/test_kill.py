"""A generation that is killed, again and again, ends in what it would have been: kill -9 at twenty random moments.

The killed process is forked from a server that has imported everything, so that a start costs milliseconds.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from lilliput.synthesis import growing
from lilliput.synthesis.endpoint import Endpoint, EndpointSettings
from lilliput.synthesis.growing import Plan, write_rows
from lilliput.synthesis.journal import read_journal
from lilliput.synthesis.run import Run
from lilliput.synthesis.seeds import read_seeds
from lilliput.synthesis.self_instruct import METHOD, self_instruct
from tests.synthesis.brains import answer
from tests.synthesis.endpoint_server import FakeEndpoint, faults

KILLS = 20
CONCURRENCY = 4
PLAN = Plan(target=80, batch=4, seed=5)


def generate(out: str, url: str) -> None:
    """What is killed: a generation that also writes its rows after each round."""
    growing._SAVE_EVERY = 0.0
    seeds = read_seeds()
    settings = EndpointSettings(url, "fake-1", concurrency=CONCURRENCY, first_wait=0.01, longest_wait=0.02)
    with Run(out, Endpoint(settings), PLAN.settings(METHOD, seeds), progress=False) as run:

        def save() -> None:
            write_rows(Path(out) / "data.jsonl", run.rows())

        self_instruct(run, seeds, PLAN, save)
        save()


def start(out: Path, url: str) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=generate, args=(str(out), url), daemon=True)
    process.start()
    return process


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a data.jsonl, without times; each line of it must be whole."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        del row["provenance"]["time"]
    return rows


def accepted(out: Path) -> list[dict[str, Any]]:
    """The rows that the journal has whole lines of."""
    rows = read_journal(out).rows if (out / "journal.jsonl").exists() else []
    return [timeless(row) for row in rows]


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "provenance": {**row["provenance"], "time": None}}


def wait_for(out: Path, size: int, process: ForkServerProcess) -> None:
    """Return when the journal has `size` bytes, or the process has ended."""
    journal = out / "journal.jsonl"
    until = time.monotonic() + 60
    while process.is_alive() and (not journal.exists() or journal.stat().st_size < size):
        assert time.monotonic() < until, "the generation stands still"
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with FakeEndpoint(answer) as fake:
        process = start(out, fake.url)
        process.join(120)
    assert process.exitcode == 0
    return out


def test_kill_at_twenty_random_moments(uninterrupted: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    kept: list[list[dict[str, Any]]] = []
    whole = (uninterrupted / "journal.jsonl").stat().st_size
    moments = sorted(draw.randrange(whole) for _ in range(KILLS))
    with FakeEndpoint(answer, faults=faults("good x9, 429 x3, good x20, die, 500 x2")) as fake:
        for number, size in enumerate(moments):
            process = start(tmp_path, fake.url)
            wait_for(tmp_path, size, process)
            time.sleep(draw.random() * 0.004)
            assert process.is_alive(), "nothing was left to be killed"
            process.kill()
            process.join()
            if number % 3 == 0:
                tear(tmp_path / "journal.jsonl", draw)
            kept.append(accepted(tmp_path))
            check_so_far(tmp_path, kept[-1])
        last = start(tmp_path, fake.url)
        last.join(120)
        asked = len(fake.seen)
    assert last.exitcode == 0
    rows = rows_of(tmp_path / "data.jsonl")
    assert 0 == len(kept[0]) < len(kept[-1])
    assert all(early == [timeless(row) for row in rows[: len(early)]] for early in kept)  # what was accepted stays
    assert rows == rows_of(uninterrupted / "data.jsonl")  # none lost, none twice, none other
    assert len({(row["instruction"], row["input"], row["output"]) for row in rows}) == PLAN.target
    needed = len(read_journal(uninterrupted).answers)
    assert (
        asked <= needed + 6 + (KILLS + KILLS // 3 + 1) * CONCURRENCY
    )  # faults; what was under way or torn at each kill


def tear(journal: Path, draw: random.Random) -> None:
    """Cut the last line in half, as a full disk or a power cut may leave it."""
    if journal.exists() and journal.stat().st_size:
        last = journal.read_bytes().splitlines(keepends=True)[-1]
        with open(journal, "ab") as file:
            file.truncate(journal.stat().st_size - draw.randrange(1, len(last)))


def check_so_far(out: Path, kept: list[dict[str, Any]]) -> None:
    """Whatever the moment: data.jsonl is whole, and a beginning of what the journal has accepted."""
    if not (out / "data.jsonl").exists():
        return
    rows = [timeless(row) for row in rows_of(out / "data.jsonl")]
    assert rows[: len(kept)] == kept[: len(rows)]
