"""The rows that a run held out are found again, and rows that it was trained on are never taken for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lilliput.data import load_examples
from lilliput.errors import DataError
from lilliput.training import held_out_rows, load_recipe, rows_to_compare, tune
from lilliput.training.loop import split

QUICK = ["train.max_steps=1", "train.batch_size=2", "data.max_length=64", "data.eval_fraction=0.2"]


def write_rows(path: Path, count: int = 30, plus: int = 1) -> Path:
    rows = [{"prompt": f"What is {n} + {plus}?", "completion": f"It is {n + plus}."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my.jsonl`, `other.jsonl` and the run `run`; do not write into it."""
    folder = tmp_path_factory.mktemp("runs")
    data, recipe = write_rows(folder / "my.jsonl"), load_recipe("qlora", QUICK)
    tune(str(tiny_model_dir), data, folder / "run", recipe, check=False, progress=False)
    write_rows(folder / "other.jsonl", plus=3)
    return folder


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, dirs_exist_ok=True)
    content = json.loads((to / "run" / "run.json").read_text())
    content["files"]["data"] = str(to / "my.jsonl")
    (to / "run" / "run.json").write_text(json.dumps(content))
    return to


def test_they_are_those_of_the_run(run: Path, tiny_tokenizer) -> None:
    examples = load_examples(run / "my.jsonl", tiny_tokenizer, max_length=64, progress=False).examples
    trained, apart = split(examples, 0.2, 100, 0)
    assert len(apart) == 6
    for adapter in (run / "run", run / "run" / "adapter"):
        assert held_out_rows(adapter, tiny_tokenizer) == apart
    named = rows_to_compare(run / "my.jsonl", tiny_tokenizer, adapter=run / "run", max_length=64)
    assert named == apart
    assert not any(row in trained for row in named)


def test_evaluation_rows_of_their_own_are_all_held_out(run: Path, tiny_model_dir, tiny_tokenizer, tmp_path) -> None:
    recipe = load_recipe("qlora", QUICK)
    tune(str(tiny_model_dir), run / "my.jsonl", tmp_path / "run", recipe, check=False, progress=False,
         eval_data=run / "other.jsonl")  # fmt: skip
    wanted = load_examples(run / "other.jsonl", tiny_tokenizer, max_length=64, progress=False).examples
    assert held_out_rows(tmp_path / "run", tiny_tokenizer) == wanted


def test_other_rows_are_taken_whole(run: Path, tiny_tokenizer) -> None:
    for adapter in (run / "run", None):
        rows = rows_to_compare(run / "other.jsonl", tiny_tokenizer, adapter=adapter, max_length=32)
        assert len(rows) == 30
        assert max(len(row) for row in rows) == 32


def test_rows_that_have_changed_or_gone_are_refused(run: Path, tiny_tokenizer, tmp_path) -> None:
    there = copied(run, tmp_path)
    write_rows(there / "my.jsonl", plus=2)
    with pytest.raises(DataError, match="my.jsonl: has changed since.*--text"):
        held_out_rows(there / "run", tiny_tokenizer)
    (there / "my.jsonl").unlink()
    with pytest.raises(DataError, match="not at .*my.jsonl any more.*--text"):
        held_out_rows(there / "run", tiny_tokenizer)


def test_an_adapter_without_its_run_is_told_so(run: Path, tiny_tokenizer, tmp_path) -> None:
    adapter = tmp_path / "alone"
    shutil.copytree(run / "run" / "adapter", adapter)
    with pytest.raises(DataError, match="is no run's folder.*--text"):
        held_out_rows(adapter, tiny_tokenizer)
    with pytest.raises(DataError, match="trained on these rows, and the run that held some out is not here"):
        rows_to_compare(run / "my.jsonl", tiny_tokenizer, adapter=adapter, max_length=64)


def test_a_run_that_held_nothing_out_says_so(tiny_model_dir, tiny_tokenizer, tmp_path) -> None:
    data = write_rows(tmp_path / "few.jsonl", count=6)
    recipe = load_recipe("qlora", QUICK)
    tune(str(tiny_model_dir), data, tmp_path / "run", recipe, check=False, progress=False)
    with pytest.raises(DataError, match="held none of these rows out.*--text"):
        held_out_rows(tmp_path / "run", tiny_tokenizer)


def test_a_run_from_before_does_not_say_where_its_rows_are(run: Path, tiny_tokenizer, tmp_path) -> None:
    there = copied(run, tmp_path)
    content = json.loads((there / "run" / "run.json").read_text())
    del content["files"]
    (there / "run" / "run.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="does not say where its rows lie"):
        held_out_rows(there / "run", tiny_tokenizer)
