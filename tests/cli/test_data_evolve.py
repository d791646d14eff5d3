"""`lilliput data evolve` and `data report` against a fake endpoint and a tiny model: files, JSON, tables, bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lilliput.synthesis.evol_instruct import NO_ANSWER
from tests.cli.test_commands import answer, refusal, run
from tests.evaluation.test_comparison import not_blank
from tests.synthesis.endpoint_server import FakeEndpoint
from tests.synthesis.evol_brain import ROWS
from tests.synthesis.evol_brain import answer as brain


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with FakeEndpoint(brain=brain) as fake:
        yield fake


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def rows_of(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_rows_of_somebody_else_are_not_overwritten(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "data.jsonl"
    mine.parent.mkdir()
    mine.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    before = mine.read_bytes()
    said = refusal("data", "evolve", mine.parent, "-o", mine.parent, "--model", endpoint.url, status=2)
    assert "is there, but no journal.jsonl" in said
    assert mine.read_bytes() == before


def test_evolve_writes_what_it_says(endpoint: FakeEndpoint, file: Path, tmp_path: Path) -> None:
    endpoint.always = {"Add up the numbers": "filter"}  # what the endpoint refuses is a refusal like any other
    found = answer("data", "evolve", file, "--model", endpoint.url, "--rounds", 3, "--price-out", 2)
    place = tmp_path / "rows-evolved"
    assert found["data"] == str(place / "data.jsonl")
    rows = rows_of(found["data"])
    assert found["rows"] == len(rows) == found["originals"] + found["evolved"]
    assert found["originals"] == len(ROWS)
    assert sum(row["accepted"] for row in found["rounds"]) == found["evolved"] > 0
    assert found["refused"][NO_ANSWER] >= 3
    assert sum(found["refused"].values()) + found["evolved"] == 3 * len(ROWS)
    assert found["cost"] == pytest.approx(2e-6 * found["completion_tokens"], abs=1e-6)
    assert json.loads((place / "report.json").read_text())["rows"] == len(rows)
    assert not_blank(place / "report.png")
    assert "rows.jsonl, evolved" in (place / "report.md").read_text().replace("\\", "")
    asked = len(endpoint.seen)
    again = answer("data", "evolve", file, "--model", endpoint.url, "--rounds", 3, "--price-out", 2)
    assert (again["rows"], again["refused"]) == (found["rows"], found["refused"])
    assert [seen.path for seen in endpoint.seen[asked:] if "completions" in seen.path] == []  # nothing is asked twice
    assert "seed 0 then" in refusal("data", "evolve", file, "--model", endpoint.url, "--seed", 7, status=2)


def test_a_run_s_folder_evolves_inside_itself(endpoint: FakeEndpoint, file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    file.rename(tmp_path / "out" / "data.jsonl")
    words = (
        "data",
        "evolve",
        tmp_path / "out",
        "--model",
        endpoint.url,
        "--rounds",
        2,
        "--operations",
        "deepen,breadth",
    )
    found = answer(*words, "--limit", 3, "--only-last", "--no-shuffle")
    assert found["data"] == str(tmp_path / "out" / "evolved" / "data.jsonl")
    rows = rows_of(found["data"])
    assert [row["provenance"]["root"] for row in rows] == ["1/0", "2/0", "3/0"]
    assert {row["operation"] for row in found["operations"]} <= {"deepen", "breadth"}
    shown = run(*words, "--limit", 5, "--to", "messages")
    assert shown.exit_code == 0, shown.stderr
    assert "round 2" in shown.stdout
    assert all("messages" in row for row in rows_of(found["data"]))


def test_a_tiny_model_survives_nothing_and_the_report_says_so(tiny_model_dir: Path, file: Path, tmp_path: Path) -> None:
    words = ("data", "evolve", file, "--model", tiny_model_dir, "--rounds", 1, "--limit", 2, "--max-tokens", 8)
    done = run(*words, "-o", tmp_path / "tiny", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["rows"], found["evolved"], sum(found["refused"].values())) == (2, 0, 2)
    assert "no instruction was evolved" in done.stderr
    assert "Samples of what was refused" in (tmp_path / "tiny" / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rounds", 0], "--rounds"),
        (["--batch", 0], "--batch"),
        (["--limit", 0], "--limit"),
        (["--max-tokens", 0], "--max-tokens"),
        (["--temperature", 3], "--temperature"),
        (["--top-p", 0], "--top-p"),
        (["--operations", "deepn"], "did you mean 'deepen'"),
        (["--operations", ","], "--operations"),
        (["--to", "csv"], "--to"),
        (["--round", 2], "--rounds"),
    ],
    ids=lambda option: "-".join(map(str, option)) if isinstance(option, list) else "",
)
def test_wrong_options(options: list, said: str, file: Path) -> None:
    assert said in refusal("data", "evolve", file, "--model", "nowhere", *options, status=2)


def test_wrong_files(file: Path, tmp_path: Path) -> None:
    words = ("data", "evolve", "--model", "nowhere")
    assert "no such file" in refusal(*words, tmp_path / "none.jsonl")
    assert "no data.jsonl" in refusal(*words, tmp_path)
    assert "is a file" in refusal(*words, file, "-o", file, status=2)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "is empty" in refusal(*words, tmp_path / "empty.jsonl")
    (tmp_path / "odd.jsonl").write_text('{"question": "Why?"}\n')
    assert "odd.jsonl:1" in refusal(*words, tmp_path / "odd.jsonl")
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Go", "instances": [{"input": "", "output": "Gone"}]}\n')
    assert "lilliput data convert" in refusal(*words, tmp_path / "seeds.jsonl")
    assert "--model" in refusal("data", "evolve", file, status=2)


def test_what_is_left_out_is_said(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} says so."} for role in ("system", "user", "assistant")]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + '\n{"messages": []}\n')
    words = ("data", "evolve", tmp_path / "chats.jsonl", "--model", endpoint.url, "--rounds", 1, "--skip-bad-rows")
    done = run(*words)
    assert "1 of 1 chats have more than a question and an answer" in done.stderr
    assert "1 bad rows are left out" in done.stderr


# ---- report ----------------------------------------------------------------------------------------------------------


def test_report_of_a_file(file: Path, tmp_path: Path) -> None:
    found = answer("data", "report", file, "--seeds", file)
    assert (found["rows"], found["journal"]) == (len(ROWS), None)
    assert found["nearest"]["a seed"]["median"] == 1.0
    assert found["report"] == str(tmp_path / "rows-report" / "report.md")
    assert not_blank(found["plot"])
    shown = run("data", "report", file, "-o", tmp_path / "here")
    assert "5 rows" in shown.stdout
    assert (tmp_path / "here" / "report.json").is_file()


def test_report_of_nothing(file: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in refusal("data", "report", tmp_path / "none")
    assert "no data.jsonl" in refusal("data", "report", tmp_path)
    assert "is a file" in refusal("data", "report", file, "-o", file, status=2)
