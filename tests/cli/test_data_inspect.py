"""`lilliput data inspect`: JSON, files, tables, labels in colour, and each bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_commands import answer, refusal, run
from tests.evaluation.test_comparison import not_blank
from tests.synthesis.test_near import ROWS, write_lines


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", ROWS)


def test_inspect_writes_what_it_says(rows: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    found = answer("data", "inspect", rows, "--model", tiny_model_dir, "-o", tmp_path / "out", "--near")
    assert (found["rows"], found["chats"], found["same"], found["same_question"]) == (5, 5, 0, 1)
    assert found["near"] == {"rows": 1, "same": 1, "method": "all pairs", "missed": 0.0}
    assert found["tokens"]["lengths"]["count"] == 5
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written == {key: value for key, value in found.items() if key not in ("report", "plot")}
    assert not_blank(found["plot"])


def test_without_a_model_nothing_is_said_about_tokens(rows: Path, tmp_path: Path) -> None:
    shown = run("data", "inspect", rows, "-o", tmp_path / "out")
    assert shown.exit_code == 0, shown.stderr
    assert "Chats by words" in shown.stdout
    assert "without --model nothing is known about tokens and labels" in shown.stdout
    assert not_blank(tmp_path / "out" / "portrait.png")
    assert answer("data", "inspect", rows)["tokens"] is None


def test_tables_for_people(rows: Path, tiny_model_dir: Path) -> None:
    shown = run("data", "inspect", rows, "--model", tiny_model_dir, "--examples", 1).stdout
    assert "rows.jsonl:1," in shown
    assert "<|im_start|>assistant\nVolga, Danube, Ural.<|im_end|>" in shown
    assert "Write a poem." not in shown
    assert "Chats by tokens" in shown
    assert "█" in shown
    assert "user: 5, assistant: 5" in shown
    assert "Written" not in shown


def test_bad_rows_are_shown_and_make_a_fault_unless_told(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [*ROWS, {"instruction": "Say.", "output": None}])
    shown = run("data", "inspect", path)
    assert shown.exit_code == 1
    assert "5 of the form alpaca, and 1 that cannot be used" in shown.stdout
    assert "rows.jsonl:6: 'output' is null, not text; 1 of 6 rows cannot be used" in shown.stderr.replace("\n", " ")
    assert run("data", "inspect", path, "--skip-bad-rows").exit_code == 0


def test_rows_that_are_no_chats(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "some words of a text"}, {"text": "some more"}])
    assert "--field NAME" in refusal("data", "inspect", path, status=1)
    found = answer("data", "inspect", path, "--field", "text", "--near")
    assert (found["chats"], found["form"], found["roles"]) == (2, "field", {"text": 2})


def test_a_form_that_is_said(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b", "response": "c"}])
    assert "may be of several forms" in refusal("data", "inspect", path, status=1)
    assert answer("data", "inspect", path, "--from", "dolly")["form"] == "dolly"
    found = answer("data", "inspect", path, "--columns", "user=response,assistant=instruction", "--near")
    assert (found["form"], found["chats"]) == ("columns", 1)


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--from", "alpacca"], 2, "did you mean 'alpaca'?"),
        (["--from", "alpaca", "--field", "output"], 2, "--from, --columns and --field each say what a row is"),
        (["--sample", -1], 2, "--sample: -1 is not a number from 0 up"),
        (["--examples", -1], 2, "--examples: -1 is not a number from 0 up"),
        (["--field", "outputs"], 1, "has no 'outputs'"),
        (["--model", "no/such/model"], 1, "no/such/model"),
    ],
)
def test_wrong_options(rows: Path, options: list[object], status: int, said: str) -> None:
    assert said in refusal("data", "inspect", rows, *options, status=status)


def test_wrong_places(rows: Path, tmp_path: Path) -> None:
    assert "is a file" in refusal("data", "inspect", rows, "-o", rows, status=2)
    assert "no such file" in refusal("data", "inspect", tmp_path / "none.jsonl", status=1)
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    assert "holds no rows" in refusal("data", "inspect", empty, status=1)


def test_the_help_says_columns_as_they_are_read() -> None:
    assert "PART=COLUMN" in run("data", "inspect", "--help").stdout


def test_names_with_half_a_character_are_shown_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "a", "completion": "b", "x\ud83d": ""}, {"prompt": "a", "y\ud83d": 1}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shown = run("data", "inspect", path, "--skip-bad-rows")
    assert shown.exit_code == 0, shown.stderr
    assert all(words in shown.stdout for words in ("x\\ud83d", "y\\ud83d"))
