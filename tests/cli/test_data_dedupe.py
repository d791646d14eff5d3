"""`lilliput data dedupe`: JSON, files, tables, and each bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lilliput.synthesis import near
from tests.cli.test_commands import answer, refusal, run
from tests.synthesis.test_near import ROWS, write_lines


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", ROWS)


def test_rows_that_stay_are_written_beside_the_file(rows: Path, tmp_path: Path) -> None:
    found = answer("data", "dedupe", rows, "--report", tmp_path / "gone.json")
    assert found["out"] == str(tmp_path / "rows.deduped.jsonl")
    assert (found["rows"], found["kept"], found["same"], found["near"], found["method"]) == (5, 3, 1, 1, "all pairs")
    assert len((tmp_path / "rows.deduped.jsonl").read_text().splitlines()) == 3
    report = json.loads((tmp_path / "gone.json").read_text())
    assert [one["of_row"] for one in report["duplicates"]] == [1, 2]


def test_options_reach_the_work(rows: Path, tmp_path: Path) -> None:
    def kept(*options: object) -> int:
        return int(answer("data", "dedupe", rows, "-o", tmp_path / "b.jsonl", *options)["kept"])

    assert kept("--rouge", 0.95) == 4
    assert kept("--whole-chat", "--rouge", 0.8) == 5
    assert kept("--field", "output") == 5
    assert kept("--minhash") == kept("--exact") == kept("--words", "rouge") == 3


def test_the_table_tells_the_narrowest_decisions(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("data", "dedupe", rows)
    assert shown.exit_code == 0, shown.stderr
    assert "0.889" in shown.stdout
    assert "rows.jsonl:3: Name three large rivers" in shown.stdout
    assert "all pairs" in shown.stdout
    monkeypatch.setattr(near, "EXACT_UP_TO", 2)
    shown = run("data", "dedupe", rows)
    assert "79 bands of 4; at most 0.10% of near pairs are missed" in shown.stdout
    assert shown.stdout.count("0.889") == 1


def test_the_report_overwrites_neither_the_input_nor_the_result(rows: Path, tmp_path: Path) -> None:
    before = rows.read_bytes()
    for report in (rows, tmp_path / "rows.deduped.jsonl"):
        assert "is the file that is read or written" in refusal("data", "dedupe", rows, "--report", report, status=2)
    assert rows.read_bytes() == before


def test_half_a_character_is_reported_and_refused_by_tables(tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text('{"prompt":"one two \\ud83d three four","completion":"x"}\n' * 2)
    assert answer("data", "dedupe", path, "--report", tmp_path / "gone.json")["same"] == 1
    assert "half.jsonl:1: holds half a character" in refusal("data", "dedupe", path, "-o", tmp_path / "h.csv")


def test_a_quote_that_swallows_lines_of_a_tsv_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "films.tsv"
    path.write_text('sentence\tlabel\n"Great film\t1\nquite dull\t0\nso bad"\t0\nlovely thing here\t1\n')
    line = refusal("data", "dedupe", path, "--field", "sentence", "-o", tmp_path / "o.tsv")
    assert "films.tsv:2: a double quote swallows the lines up to 4" in line


def test_rows_without_words_are_told(tmp_path: Path) -> None:
    rows = write_lines(
        tmp_path / "rows.jsonl", [{"prompt": text, "completion": "x"} for text in ("写排序", "写搜索", "?")]
    )
    shown = run("data", "dedupe", rows, "--words", "rouge")
    assert "in 3 rows ROUGE-L sees no words" in shown.stderr.replace("\n", " ")
    assert "--words unicode" in shown.stderr
    assert "in 1 rows ROUGE-L sees no words" in run("data", "dedupe", rows).stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--rouge", 1.5], 2, "--rouge: 1.5 is not between 0 and 1"),
        (["--rouge", 0.01, "--minhash"], 2, "--rouge: 0.01 is too low for MinHash"),
        (["--words", "unicod"], 2, "--words: unknown value 'unicod'; did you mean 'unicode'?"),
        (["--engine", "rai"], 2, "--engine: unknown value 'rai'; did you mean 'ray'?"),
        (["--field", "output", "--whole-chat"], 2, "--field and --whole-chat each say what is compared"),
        (["--field", "instructon"], 1, "did you mean 'instruction'?"),
        (["-o", "b.bin"], 2, "'b.bin' is of no kind that is written here"),
    ],
)
def test_wrong_options(rows: Path, options: list[object], status: int, said: str) -> None:
    assert said in refusal("data", "dedupe", rows, *options, status=status)
    assert not rows.with_name("rows.deduped.jsonl").exists()


def test_wrong_files(tmp_path: Path) -> None:
    assert "no such file" in refusal("data", "dedupe", tmp_path / "none.jsonl", status=1)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "is empty" in refusal("data", "dedupe", empty, status=1)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    assert "broken.jsonl:2: broken JSON" in refusal("data", "dedupe", broken, status=1)
    assert answer("data", "dedupe", broken, "--skip-bad-rows")["skipped"] == 1
