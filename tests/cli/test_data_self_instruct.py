"""`lilliput data self-instruct` against the fake endpoint: what it writes, how it goes on, and each bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lilliput.cli import data_self_instruct
from lilliput.data import read_records, to_chat
from tests.cli.test_commands import answer, refusal, run
from tests.synthesis.brains import answer as brain
from tests.synthesis.endpoint_server import FakeEndpoint

COMMAND = ("data", "self-instruct")


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeEndpoint]:
    with FakeEndpoint(brain) as server:
        yield server


@pytest.fixture(scope="module")
def done(fake: FakeEndpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The results of a run, and its directory; do not write into it."""
    out = tmp_path_factory.mktemp("self-instruct") / "out"
    return answer(*COMMAND, "--model", fake.url, "-o", out, "--target", 30, "--price-in", 1, "--price-out", 2), out


def test_it_writes_what_it_says(done: tuple[dict, Path]) -> None:
    results, out = done
    assert (results["rows"], results["target"], results["complete"], results["ended"]) == (30, 30, True, "target")
    assert results["requests"] == sum(line["kind"] == "answer" for line in lines(out / "journal.jsonl"))
    assert results["cost"] == pytest.approx((results["prompt_tokens"] + 2 * results["completion_tokens"]) / 1e6)
    assert results["data"] == str(out / "data.jsonl")
    assert len(lines(out / "data.jsonl")) == 30
    assert {path.name for path in out.iterdir()} == {
        "journal.jsonl",
        "data.jsonl",
        "report.md",
        "report.json",
        "report.png",
    }
    steps = json.loads((out / "report.json").read_text(encoding="utf-8"))["journal"]["steps"]
    assert {step["step"]: step["refused"] for step in steps if step["refused"]} == results["refused"]


def test_tune_takes_it(done: tuple[dict, Path]) -> None:
    chats = [to_chat(record) for record in read_records(done[1] / "data.jsonl")]
    assert len(chats) == 30
    assert all([turn.role for turn in chat.turns] == ["user", "assistant"] for chat in chats)


def test_a_larger_target_goes_on_and_asks_nothing_again(fake: FakeEndpoint, tmp_path: Path) -> None:
    words = (*COMMAND, "--model", fake.url, "-o", tmp_path / "out", "--variant", "alpaca", "--batch", 2)
    first = answer(*words, "--target", 5)
    before = (tmp_path / "out" / "data.jsonl").read_text(encoding="utf-8")
    asked = len(fake.seen)
    second = answer(*words, "--target", 20)
    assert (
        len([one for one in fake.seen[asked:] if one.path.endswith("completions")])
        == second["requests"] - first["requests"]
    )
    assert (tmp_path / "out" / "data.jsonl").read_text(encoding="utf-8").startswith(before)
    assert second["rows"] == 20


def test_tables_for_people(fake: FakeEndpoint, tmp_path: Path) -> None:
    words = (*COMMAND, "--model", fake.url, "-o", tmp_path / "out", "--target", 1000, "--max-requests", 30)
    shown = run(*words, "--to", "messages")
    assert shown.exit_code == 0, shown.stderr
    said = " ".join(shown.stdout.split())
    assert "of 1,000: another step would be more requests than --max-requests allows" in said
    assert "Refused" in said
    assert "too short" in said
    assert "messages" in lines(tmp_path / "out" / "data.jsonl")[0]


def test_no_row_is_a_failure_that_says_why(tmp_path: Path) -> None:
    with FakeEndpoint(lambda prompt: "I would rather not.") as fake:
        done = run(*COMMAND, "--model", fake.url, "-o", tmp_path / "out", "--patience", 2, "--json")
    assert done.exit_code == 1
    assert "no row was accepted: 2 rounds in a row brought no new row" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 0
    assert "too near to another" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_random_model_runs_through_the_loop_and_nothing_survives(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The tiny model's context of 512 tokens is too short for most prompts, and what it says is noise."""
    words = ("--batch", 1, "--patience", 2, "--max-tokens", 8, "--instances", 1)
    done = run(*COMMAND, "--model", tiny_model_dir, "-o", tmp_path / "out", *words, "--json")
    results = json.loads(done.stdout.splitlines()[-1])
    assert (done.exit_code, results["rows"], results["ended"]) == (1, 0, "patience"), done.stderr
    assert results["rounds"] == 2
    assert sum(sum(step.values()) for step in results["refused"].values()) >= 2
    assert "0 rows" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_ctrl_c_says_how_to_go_on(fake: FakeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lilliput.synthesis import self_instruct

    steps = self_instruct.one_round

    def interrupted(growth: object, number: int) -> None:
        steps(growth, number)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(self_instruct, "one_round", interrupted)
    stopped = refusal(*COMMAND, "--model", fake.url, "-o", tmp_path / "out", "--target", 1000)
    assert "give the same command again to go on" in stopped
    assert lines(tmp_path / "out" / "data.jsonl")  # the rows so far are there


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


BAD = {
    "variant": (["--variant", "paperr"], 2, "did you mean 'paper'"),
    "form": (["--to", "sharegpt"], 2, "Known: alpaca, messages"),
    "target": (["--target", 0], 2, "--target: 0 is not a number from 1 up"),
    "requests": (["--max-requests", 3], 2, "--max-requests: 3 requests are fewer"),
    "rouge": (["--rouge", 70], 2, "--rouge: 70 is not a ROUGE-L from 0 to 1"),
    "temperature": (["--temperature", -1], 2, "--temperature"),
    "no seeds": (["--seeds", "none.jsonl"], 1, "none.jsonl: no such file"),
    "option": (["--targets", 5], 2, "No such option"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_wrong_is_said_before_anything_is_asked(fault: str, fake: FakeEndpoint, tmp_path: Path) -> None:
    options, status, said = BAD[fault]
    asked = len(fake.seen)
    assert said in refusal(*COMMAND, "--model", fake.url, "-o", tmp_path / "out", *options, status=status)
    assert len(fake.seen) == asked
    assert not (tmp_path / "out").exists()


def test_wrong_seeds_say_where(fake: FakeEndpoint, tmp_path: Path) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Say hello to a cat.", "output": ""}\n')
    words = (*COMMAND, "--model", fake.url, "-o", tmp_path / "out", "--seeds", tmp_path / "seeds.jsonl")
    assert "seeds.jsonl:1: 'output' is empty" in refusal(*words)
    (tmp_path / "seeds.jsonl").write_text("")
    assert "is empty" in refusal(*words)


def test_places_that_are_taken(fake: FakeEndpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(*COMMAND, "--model", fake.url, "-o", tmp_path / "file", status=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.jsonl").write_text("{}\n")
    said = refusal(*COMMAND, "--model", fake.url, "-o", tmp_path / "other", status=2)
    assert "these rows were made by something else" in said
    assert (tmp_path / "other" / "data.jsonl").read_text() == "{}\n"


def test_another_plan_in_the_same_place(fake: FakeEndpoint, done: tuple[dict, Path]) -> None:
    words = (*COMMAND, "--model", fake.url, "-o", done[1], "--target", 30)
    assert "seed 0 then, 1 now" in refusal(*words, "--seed", 1, status=2)
    assert answer(*words)["rows"] == 30  # the same plan again: nothing to do


def test_an_endpoint_that_is_away(tmp_path: Path) -> None:
    words = ("--model", "http://127.0.0.1:9/v1", "--name", "x", "--retries", 0, "-o", tmp_path / "out")
    assert "cannot be reached" in refusal(*COMMAND, *words)
    assert lines(tmp_path / "out" / "data.jsonl") == []


def test_variants_are_said_once() -> None:
    assert set(data_self_instruct.VARIANTS) == {"paper", "alpaca"}
