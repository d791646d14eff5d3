"""A whole run on the tiny model: what is in its folder, what it learns, and how it ends when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lilliput.data import Example
from lilliput.errors import CheckFailed, DataError, DiskError, LilliputError, UsageError
from lilliput.layers import identity_of
from lilliput.lora import load_adapter, read_passport
from lilliput.models import load_model
from lilliput.training import check_data, load_recipe, tune
from lilliput.training.checks import CheckResult
from lilliput.training.recipe import Recipe
from lilliput.training.report import read_journal
from lilliput.training.run import split
from tests.training.conftest import quick, write_rows


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(result, folder) of a QLoRA run with its checks."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_rows(folder / "rows.jsonl")
    recipe = quick("model.format=nf4", "train.epochs=6")
    return tune(str(tiny_model_dir), rows, folder / "run", recipe, progress=False), folder / "run"


def test_it_learns(finished: tuple[Any, Path]) -> None:
    result, _ = finished
    assert result.eval_loss < 0.9 * result.eval_loss_before
    assert result.train_loss < 0.9 * result.eval_loss_before
    assert result.steps == 42
    assert result.tokens > result.labels > 0
    assert result.examples + result.eval_examples == 30
    assert json.dumps(result.to_json())


def test_the_folder_holds_what_is_promised(finished: tuple[Any, Path]) -> None:
    result, out = finished
    assert {path.name for path in out.iterdir()} == {
        "adapter", "checkpoints", "loss.png", "metrics.jsonl", "recipe.yaml", "report.md", "run.json", "versions.json",
    }  # fmt: skip
    assert load_recipe(out / "recipe.yaml").settings() == quick("model.format=nf4", "train.epochs=6").settings()
    assert json.loads((out / "versions.json").read_text())["torch"] == torch.__version__
    assert matplotlib.image.imread(out / "loss.png").shape[2] in (3, 4)
    report = (out / "report.md").read_text()
    for said in (
        f"{result.eval_loss:.4f}",
        "loss.png",
        "30 examples",
        "one BOS: passed",
        "lilliput chat",
        "2 held out",
    ):
        assert said in report, said


def test_the_journal_has_every_step_once(finished: tuple[Any, Path]) -> None:
    result, out = finished
    lines = read_journal(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(result.steps + 1))
    wanted = {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "epoch", "seconds"}
    assert all(wanted <= line.keys() for line in lines[1:])
    assert [line["step"] for line in lines if "eval_loss" in line] == list(range(0, result.steps + 1, 3))
    assert lines[-1]["tokens"] == result.tokens
    assert lines[-1]["epoch"] == 6


def test_the_adapter_is_the_one_with_the_best_evaluation_and_knows_its_base(
    finished: tuple[Any, Path], tiny_model_dir: Path
) -> None:
    result, out = finished
    evals = {line["step"]: line["eval_loss"] for line in read_journal(out / "metrics.jsonl") if "eval_loss" in line}
    del evals[0]
    assert result.best_step == min(evals, key=lambda step: evals[step])
    passport = read_passport(out)
    assert passport is not None
    assert passport.format == "nf4"
    assert passport.data_sha256
    assert passport.chat_template_sha256
    model = load_model(tiny_model_dir, format="nf4", progress=False)
    load_adapter(model, out)


def test_keep_best_can_keep_an_earlier_step(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    """A rate that only harms: the first evaluation is the best one, and early stop ends the run."""
    harmful = recipe(
        "train.learning_rate=3", "train.early_stop=2", "train.eval_every=1", "train.schedule=constant", "train.warmup=2"
    )
    result = tune(str(tiny_model_dir), rows, tmp_path / "run", harmful, check=False, progress=False)
    assert result.best_step < result.steps < 21
    assert (tmp_path / "run" / "checkpoints" / f"step-{result.best_step:06d}").is_dir()


def test_packing_makes_fewer_rows_and_learns(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    packed = recipe(
        "data.packing=true", "data.max_length=200", "train.batch_size=1", "train.accumulation=1", "train.epochs=6"
    )
    result = tune(str(tiny_model_dir), rows, tmp_path / "run", packed, progress=False)
    assert result.steps < 6 * 28 / 2
    assert result.eval_loss < 0.9 * result.eval_loss_before


def test_evaluation_rows_of_their_own(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "eval.jsonl", 5)
    result = tune(
        str(tiny_model_dir),
        rows,
        tmp_path / "run",
        quick("train.max_steps=2"),
        check=False,
        progress=False,
        eval_data=other,
    )
    assert (result.examples, result.eval_examples) == (30, 5)
    assert f"--data {rows} --eval-data {other} --recipe" in (tmp_path / "run" / "report.md").read_text()
    assert result.eval_loss is not None


def test_without_held_out_rows(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    recipe = quick("train.max_steps=3", "data.eval_fraction=0")
    result = tune(str(tiny_model_dir), rows, tmp_path / "run", recipe, check=False, progress=False)
    assert (result.eval_loss, result.best_step) == (None, 3)


def test_skipped_rows_are_listed(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    with rows.open("a") as file:
        file.write('{"prompt": "", "completion": "x"}\nno json\n')
    with pytest.raises(DataError, match=r"rows.jsonl:3[12]"):
        tune(str(tiny_model_dir), rows, tmp_path / "run", quick("train.max_steps=1"), check=False, progress=False)
    recipe = quick("train.max_steps=1", "data.skip_bad_rows=true")
    tune(str(tiny_model_dir), rows, tmp_path / "run", recipe, check=False, progress=False)
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [row["origin"] for row in skipped] == ["rows.jsonl:31", "rows.jsonl:32"]
    assert "2 bad rows skipped" in (tmp_path / "run" / "report.md").read_text()


def test_a_broken_promise_stops_the_run_before_it_trains(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [CheckResult("one BOS", False, "wrong in 3", "Correct the template.")]
    with monkeypatch.context() as patched:
        patched.setattr("lilliput.training.run.run_checks", lambda *_, **__: bad)
        with pytest.raises(CheckFailed, match=r"'one BOS' is broken: wrong in 3. Correct the template"):
            tune(str(tiny_model_dir), rows, tmp_path / "run", quick(), progress=False)
    assert not (tmp_path / "run" / "adapter").exists()
    tune(
        str(tiny_model_dir), rows, tmp_path / "run", quick("train.max_steps=1"), check=False, progress=False
    )  # nothing to lose


def test_a_disk_that_is_full_stops_the_run_with_its_checkpoints_whole(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    def full(path: Path, *_: Any) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise DiskError("could not be written (No space left on device)", where=str(path))
        write(path, *_)

    from lilliput.training import trainer

    write = trainer.write_safetensors
    with monkeypatch.context() as patched, pytest.raises(DiskError, match="No space left"):
        patched.setattr(trainer, "write_safetensors", full)
        tune(str(tiny_model_dir), rows, tmp_path / "run", quick(), check=False, progress=False)
    result = tune(str(tiny_model_dir), rows, tmp_path / "run", quick(), check=False, progress=False, resume=True)
    assert result.steps == 21


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        (["lora.target_modules=[q_prj]"], UsageError, "q_proj"),
        (["data.max_length=8"], DataError, "max_length"),
        (["train.early_stop=1", "data.eval_fraction=0.01"], None, ""),
    ],
)
def test_a_recipe_that_does_not_fit(
    settings: list[str], kind: type[Exception] | None, said: str, tiny_model_dir: Path, rows: Path, tmp_path: Path
) -> None:
    recipe = quick("train.max_steps=1", *settings)
    if kind is None:
        tune(str(tiny_model_dir), rows, tmp_path / "run", recipe, check=False, progress=False)
        return
    with pytest.raises(kind, match=said):
        tune(str(tiny_model_dir), rows, tmp_path / "run", recipe, check=False, progress=False)


def test_rows_longer_than_the_models_positions_are_refused(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "word " * 600, "completion": "x"}) + "\n")
    recipe = quick("train.max_steps=1", "data.max_length=9999")
    with pytest.raises(UsageError, match=r"rows.jsonl:31: .* tokens, and the model has 512 pos.*data.max_length=512"):
        tune(str(tiny_model_dir), rows, tmp_path / "run", recipe, check=False, progress=False)
    with pytest.raises(UsageError, match=r"rows.jsonl:31"):
        check_data(str(tiny_model_dir), rows, recipe, progress=False)


def test_missing_data_leaves_no_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.jsonl: no such file"):
        tune(str(tiny_model_dir), tmp_path / "nothing.jsonl", tmp_path / "run", quick(), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_missing_model_is_said(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(LilliputError, match="no-such-model"):
        tune("no-such-model", rows, tmp_path / "run", quick(), progress=False)
    assert not (tmp_path / "run").exists()


def test_checks_alone(tiny_model_dir: Path, rows: Path) -> None:
    assert all(result.passed for result in check_data(str(tiny_model_dir), rows, quick(), progress=False))


def test_the_report_runs_as_it_stands(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Its Python block and its commands, for a folder with a space and block constants that are not the default."""
    out = tmp_path / "my run"
    recipe = quick("train.max_steps=1", "model.format=nf4", "model.double_quant=false")
    tune(str(tiny_model_dir), rows, out, recipe, check=False, progress=False)
    report = (out / "report.md").read_text()
    names: dict[str, Any] = {}
    exec(compile(report.split("```python")[1].split("```")[0], "report.md", "exec"), names)
    passport = read_passport(out)
    assert passport is not None
    assert identity_of(names["model"]).quantized_sha256 == passport.base_quantized_sha256
    assert f"lilliput chat {tiny_model_dir} --adapter '{out}'" in report
    assert f"--recipe '{out}/recipe.yaml'" in report


def test_split_is_random_seeded_and_keeps_twins_together() -> None:
    rows = [Example([number, number], [False, True], f"row {number}") for number in range(50)] * 2
    train, held_out = split(rows, 0.2, 100, 0)
    assert len(held_out) == 20
    assert not {row.origin for row in train} & {row.origin for row in held_out}
    assert split(rows, 0.2, 100, 0)[1] == held_out != split(rows, 0.2, 100, 1)[1]
    assert len(split(rows, 0.2, 3, 0)[1]) == 6
    assert split(rows[:19], 0.2, 3, 0) == (rows[:19], [])


def test_real_model_and_rows_pass_their_checks(smollm2: str, shared_data: Path) -> None:
    results = check_data(smollm2, shared_data / "alpaca-en-1k.json", load_recipe("qlora"), progress=False)
    assert all(result.passed for result in results), results
    assert all(result.seconds > 0 for result in results)  # they are fit to be shown


def test_tokenizer_fixture_has_no_bos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert tiny_tokenizer.bos_token_id is None  # test_checks builds on it
