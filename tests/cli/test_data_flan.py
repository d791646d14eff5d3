"""`lilliput data flan`: what it writes and shows, its JSON, and what people get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lilliput.data import load_examples
from tests.cli.test_commands import answer, refusal, run

ROWS = "".join(f"sentence {n},{n % 2}\n" for n in range(20))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + ROWS)
    return path


def test_it_writes_what_tune_reads(rows: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    out = tmp_path / "flan.jsonl"
    found = answer("data", "flan", rows, "--task", "sentiment", "-o", out, "--templates", 10)
    assert (found["rows"], found["zero_shot"], found["few_shot"], found["out"]) == (20, 20, 0, str(out))
    assert {"parts", "shots", "turned", "with_options", "samples", "notes", "seed", "seconds"} <= found.keys()
    assert found["parts"][0]["labels"] == {"negative": 10, "positive": 10}
    assert len(found["samples"]) == 3
    assert len(out.read_text().splitlines()) == 20
    examples = load_examples(out, tiny_tokenizer, max_length=512, progress=False)
    assert len(examples) == 20
    assert all(0 < example.labels < len(example) for example in examples)


def test_tables_for_people(rows: Path, tmp_path: Path) -> None:
    words = ("data", "flan", rows, "--task", "sentiment", "-o", tmp_path / "flan.jsonl")
    done = run(*words, "--shots", 1, "--balance")
    assert done.exit_code == 0, done.stderr
    for said in ("few-shot", "negative 10, positive 10", "### Example 1", "answer: ", "rows.csv:"):
        assert said in done.stdout
    assert done.stdout.count("turned around") == 1 + 3
    headless = tmp_path / "headless.tsv"
    headless.write_text("fine\t1\ndull\t0\n")
    done = run("data", "flan", headless, "--task", "sentiment", "-o", tmp_path / "flan.jsonl")
    assert "headless.tsv has no header" in done.stderr


def test_columns_labels_and_forms(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "flan.jsonl"
    answer(
        "data", "flan", rows, "--task", "classification", "-o", out, "--columns", "text=text,label=label",
        "--labels", "0=even", "--labels", "1=odd", "--constants", "kind=line,what=kind of number", "--each",
        "--option-order", "fixed", "--to", "prompt-completion", "--templates", 1,
    )  # fmt: skip
    first = json.loads(out.read_text().splitlines()[0])
    assert first["completion"] == "even"
    assert first["prompt"] == (
        "Which kind of number does this line belong to?\n\nsentence 0\n\nAnswer with one of these:\n- even\n- odd"
    )
    text = tmp_path / "rows.txt"
    text.write_text("1\tfine\n0\tdull\n")
    found = answer(
        "data", "flan", text, "--task", "sentiment", "-o", out, "--separator", r"\t", "--names", "label, sentence"
    )
    assert found["parts"][0]["labels"] == {"negative": 1, "positive": 1}


def test_a_mix(rows: Path, tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text("max_rate: 5\nparts: [{file: rows.csv, task: sentiment}, {file: rows.csv, task: classification}]")
    found = answer("data", "flan", "--mix", mix, "-o", tmp_path / "flan.jsonl")
    assert [part["drawn"] for part in found["parts"]] == [5, 5]
    found = answer("data", "flan", "--mix", mix, "-o", tmp_path / "flan.jsonl", "--rows", 90)
    assert [part["drawn"] for part in found["parts"]] == [45, 45]
    done = run("data", "flan", "--mix", mix, "-o", tmp_path / "flan.jsonl")
    assert "classification" in done.stdout


def test_show_lists_tasks_and_prints_one_to_begin_with(rows: Path, tmp_path: Path) -> None:
    assert [task["name"] for task in answer("data", "flan", "--show")["tasks"]][:2] == [
        "classification",
        "closed-book-qa",
    ]
    assert "summarisation" in run("data", "flan", "--show").stdout
    (tmp_path / "mine.yaml").write_text(run("data", "flan", "--task", "sentiment", "--show").stdout)
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    answer("data", "flan", rows, "--task", tmp_path / "mine.yaml", "-o", ours)
    answer("data", "flan", rows, "--task", "sentiment", "-o", theirs)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "sentimnt"], "did you mean 'sentiment'"),
        (["--task", "sentiment", "--templates", 0], "--templates"),
        (["--task", "sentiment", "--templates", 99], "the task sentiment has 12 templates, not 99"),
        (["--task", "sentiment", "--columns", "sentence"], "'sentence' is not of the form NAME=VALUE"),
        (["--task", "sentiment", "--columns", "text=sentence"], "sentence=text"),
        (["--task", "sentiment", "--labels", "0=bad,0=worse"], "'0' is given twice"),
        (["--task", "summarisation", "--labels", "0=bad"], "has no labels"),
        (["--task", "sentiment", "--options", "sometimes"], "--options"),
        (["--task", "sentiment", "--option-order", "random"], "--option-order"),
        (["--task", "sentiment", "--to", "prompt"], "did you mean 'prompt-completion'"),
        (["--task", "sentiment", "--few-shot-share", 2], "--few-shot-share"),
        (["--task", "sentiment", "--few-shot-share", 0.5], "--shots N too"),
        (["--task", "sentiment", "--count-from", 2], "--count-from"),
        (["--task", "sentiment", "--mix", "mix.yaml"], "is given beside --mix"),
        ([], "--task: is missing"),
    ],
)
def test_wrong_options(options: list[object], said: str, rows: Path, tmp_path: Path) -> None:
    assert said in refusal("data", "flan", rows, "-o", tmp_path / "flan.jsonl", *options, status=2)
    assert not (tmp_path / "flan.jsonl").exists()


def test_what_is_missing(rows: Path, tmp_path: Path) -> None:
    assert "-o FILE is missing" in refusal("data", "flan", rows, "--task", "sentiment", status=2)
    out = tmp_path / "flan.jsonl"
    assert "a FILE of rows is missing" in refusal("data", "flan", "--task", "sentiment", "-o", out, status=2)
    assert "is the file that is read" in refusal("data", "flan", rows, "--task", "sentiment", "-o", rows, status=2)
    mix = tmp_path / "mix.yaml"
    mix.write_text("parts: [{file: rows.csv, task: sentiment}]")
    for words, said in ((["--cap", 3], "--cap: belongs to one file"), (["--each"], "--each and --mix exclude")):
        assert said in refusal("data", "flan", "--mix", mix, "-o", out, *words, status=2)
    assert "cannot be read" in refusal("data", "flan", "--mix", tmp_path / "no.yaml", "-o", out, status=2)


def test_wrong_rows(rows: Path, tmp_path: Path) -> None:
    words = ("--task", "sentiment", "-o", tmp_path / "flan.jsonl")
    assert "no such file" in refusal("data", "flan", tmp_path / "none.csv", *words)
    (tmp_path / "empty.csv").write_text("")
    assert "is empty" in refusal("data", "flan", tmp_path / "empty.csv", *words)
    (tmp_path / "only.csv").write_text("text,label\n")
    assert "holds no rows" in refusal("data", "flan", tmp_path / "only.csv", *words)
    rows.write_text("text,label\n" + ROWS + "odd,7\n")
    assert "rows.csv:22: the label '7' is none of" in refusal("data", "flan", rows, *words)
    assert answer("data", "flan", rows, *words, "--skip-bad-rows")["parts"][0]["skipped"] == 1
