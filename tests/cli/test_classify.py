"""`tune --task classify` and `eval classify` as a person types them: results, tables, each bad input as one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from tests.classifiers import opinions, save_encoder, write_tsv
from tests.cli.test_commands import answer, refusal, run

QUICK = ["--task", "classify", "--set", "train.max_steps=30", "--set", "train.batch_size=8", "--set", "lora.r=4",
         "--set", "train.learning_rate=1e-2", "--set", "data.max_length=32"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tsv(tmp_path_factory.mktemp("opinions") / "train.tsv", opinions(80, ("neg", "pos")))


@pytest.fixture(scope="module")
def tuned(tiny_encoder_dir: Path, data: Path) -> tuple[dict, Path]:
    """(what tune said, the run's folder) over an NF4 base; do not write into it."""
    out = data.parent / "run"
    words = ("tune", tiny_encoder_dir, "--data", data, "--format", "nf4", "-o", out, "--eval-data", data, *QUICK)
    return answer(*words), out


def test_tune_says_how_good_it_is(tuned: tuple[dict, Path]) -> None:
    said, _ = tuned
    assert said["accuracy"] > 0.9 > said["majority_accuracy"] == 0.5
    assert said["classes"]["neg"]["rows"] == said["train_counts"]["neg"] == 40
    assert said["macro_f1"] > 0.9


def test_eval_gives_the_same_numbers_again(tuned: tuple[dict, Path], tiny_encoder_dir: Path, data: Path) -> None:
    said, out = tuned
    found = answer("eval", "classify", tiny_encoder_dir, "--adapter", out, "--data", data)
    for key in ("accuracy", "majority_accuracy", "macro_f1", "confusion", "classes"):
        assert found[key] == said[key]
    assert found["loss"] == pytest.approx(said["eval_loss"], rel=1e-4)
    assert (found["format"], found["labels"], found["rows"]) == ("nf4", ["neg", "pos"], 80)
    shown = run("eval", "classify", tiny_encoder_dir, "--adapter", out, "--data", data).stdout
    assert "accuracy" in shown
    assert "true \\ predicted" in shown


def test_a_text_gets_a_label_and_a_probability(tuned: tuple[dict, Path], tiny_encoder_dir: Path) -> None:
    words = ("eval", "classify", tiny_encoder_dir, "--adapter", tuned[1])
    found = answer(*words, "--text", "film superb good good", "--text", "film awful [bold] bad bad")["texts"]
    assert [one["label"] for one in found] == ["pos", "neg"]
    assert all(one["probability"] == one["probabilities"][one["label"]] > 0.5 for one in found)
    shown = run(*words, "--text", "film awful [bold] bad bad").stdout
    assert "neg" in shown
    assert "[bold]" in shown  # a text is never markup


def test_tune_shows_accuracy_and_what_to_try(tiny_encoder_dir: Path, data: Path, tmp_path: Path) -> None:
    done = run("tune", tiny_encoder_dir, "--data", data, "-o", tmp_path / "run", *QUICK, "--set", "train.max_steps=2")
    assert done.exit_code == 0, done.stderr
    for said in ("accuracy", "most frequent class", "macro F1", "lilliput eval classify"):
        assert said in done.stdout
    assert "format: none" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_check_takes_the_task_too(tiny_encoder_dir: Path, data: Path) -> None:
    found = answer("check", tiny_encoder_dir, "--task", "classify", "--data", data)
    assert found["passed"] is True
    assert found["checks"][0]["name"] == "padded rows = rows alone"


def test_columns_and_recipes_by_option(tiny_encoder_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("review,stars\n" + "".join(f"{text},{label}\n" for text, label in opinions(24)))
    mine = tmp_path / "mine.yaml"
    mine.write_text("like: classify\nlora:\n  r: 2\ntrain:\n  max_steps: 2\n")
    words = ("tune", tiny_encoder_dir, "--data", rows, "--recipe", mine, "--no-check")
    assert "no column 'text' or 'sentence'" in refusal(*words, "-o", tmp_path / "a")
    columns = ("--text-column", "review", "--label-column", "stars")
    said = answer(*words, *columns, "-o", tmp_path / "run")
    assert said["train_counts"].keys() == {"0", "1"}
    written = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "text_column: review" in written
    assert "r: 2 " in written
    found = answer("eval", "classify", tiny_encoder_dir, "--adapter", tmp_path / "run", "--data", rows, *columns)
    assert found["rows"] == 24


def test_a_model_that_is_a_classifier_needs_no_adapter(tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label={0: "neg", 1: "pos"})
    model.save_pretrained(base)
    found = answer("eval", "classify", base, "--text", "film good")
    assert found["labels"] == ["neg", "pos"]
    assert found["adapter"] is None


def test_long_and_broken_rows_are_counted(tuned: tuple[dict, Path], tiny_encoder_dir: Path, tmp_path: Path) -> None:
    rows = write_tsv(tmp_path / "rows.tsv", [("good " * 60, "pos"), ("bad", "neg"), ("", "neg")])
    words = ("eval", "classify", tiny_encoder_dir, "--adapter", tuned[1], "--data", rows)
    assert "rows.tsv:3: 'text' is empty" in refusal(*words)
    found = answer(*words, "--skip-bad-rows")
    assert (found["rows"], found["truncated_rows"], found["skipped_rows"]) == (2, 1, 1)
    assert "1 cut at 32 tokens, 1 broken ones left out" in run(*words, "--skip-bad-rows").stdout


def test_wrong_use_is_told(
    tuned: tuple[dict, Path], tiny_encoder_dir: Path, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    words = ("eval", "classify", tiny_encoder_dir)
    assert "nothing to classify" in refusal(*words, "--adapter", tuned[1], status=2)
    assert "has no classifier's head" in refusal(*words, "--data", data, status=2)
    assert "no such directory" in refusal(*words, "--adapter", tmp_path / "nowhere", "--data", data)
    assert "no such file" in refusal(*words, "--adapter", tuned[1], "--data", tmp_path / "nowhere.tsv")
    assert "batch-size" in refusal(*words, "--adapter", tuned[1], "--data", data, "--batch-size", "0", status=2)
    assert "did you mean 'classify'" in refusal("tune", tiny_encoder_dir, "--task", "clasify", "--data", data, "-o",
                                                tmp_path / "run", status=2)  # fmt: skip
    other = write_tsv(tmp_path / "other.tsv", [("film good", "so-so")])
    assert "other.tsv:1: the label 'so-so' is none" in refusal(*words, "--adapter", tuned[1], "--data", other)
    chats = ("tune", tiny_model_dir, "--data", data, "-o", tmp_path / "run")
    assert "rows are chats" in refusal(*chats, "--text-column", "text", status=2)


def test_an_adapter_of_another_base_is_refused(tuned: tuple[dict, Path], tmp_path: Path) -> None:
    from tests.classifiers import make_encoder

    base = save_encoder(tmp_path / "base")
    make_encoder("bert", seed=1).save_pretrained(base)
    words = ("eval", "classify", base, "--adapter", tuned[1], "--text", "film good")
    assert "trained over" in refusal(*words)
    assert answer(*words, "--allow-other-base")["texts"]


def test_a_chat_adapter_is_no_classifier(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": "yes"}) + "\n" for n in range(4)))
    quick = ["--set", "train.max_steps=1", "--set", "data.max_length=64", "--no-check"]
    answer("tune", tiny_model_dir, "--data", rows, "-o", tmp_path / "run", *quick)
    line = refusal("eval", "classify", tiny_model_dir, "--adapter", tmp_path / "run", "--text", "hi")
    assert "is no classifier's adapter" in line
