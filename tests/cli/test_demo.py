"""The demo, whole but tiny: a random model, a few rows. What the real model learns is measured in docs/demo.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lilliput.cli import demo as command
from lilliput.cli.main import app
from lilliput.data.demo import demo_rows
from lilliput.training import load_recipe

REPORT = {"rows", "base_exact", "tuned_exact", "base_footprint_bytes", "train_tokens_per_second", "seconds", "adapter"}


@pytest.fixture
def tiny(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(command, "MODEL", str(tiny_model_dir))
    monkeypatch.setattr(command, "TRAIN_ROWS", 12)
    monkeypatch.setattr(command, "LONGEST_ANSWER", 4)


def _demo(out: Path, *options: str):
    return CliRunner().invoke(app, ["demo", "-o", str(out), "--rows", "5", *options])


def test_the_demo_leaves_an_adapter_a_report_and_all_answers_and_runs_again(tiny, tmp_path):
    out = tmp_path / "runs" / "demo"
    for seed in ("0", "1"):
        result = _demo(out, "--json", "--seed", seed)
        assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert json.loads(result.stdout.strip().splitlines()[-1]) == report
    assert set(report) >= REPORT
    assert (report["rows"], report["train_rows"]) == (5, 12)
    assert 0 <= report["tuned_exact"] <= 5
    assert report["base_footprint_bytes"] > 0
    assert (Path(report["adapter"]) / "adapter_model.safetensors").is_file()
    lines = [json.loads(line) for line in (out / "heldout.jsonl").read_text().splitlines()]
    assert [(line["message"], line["right"]) for line in lines] == [
        (row.message, row.answer) for row in demo_rows("heldout", 5, seed=1)
    ]
    assert sum(line["exact"] for line in lines) == report["tuned_exact"]
    assert len((tmp_path / "runs" / "demo-train.jsonl").read_text().splitlines()) == 12


def test_people_see_the_table_and_three_examples(tiny, tmp_path):
    result = _demo(tmp_path / "demo")
    assert result.exit_code == 0, result.output
    for words in ("base, exact answers", "tuned, exact answers", "memory of the base", "tokens/s", "heldout.jsonl"):
        assert words in result.stdout
    assert all(row.message[:20] in result.stdout for row in demo_rows("heldout", 3))


def test_the_base_may_stay_in_its_own_numbers_and_a_wrong_format_is_refused(tiny, tmp_path):
    result = _demo(tmp_path / "demo", "--format", "none")
    assert result.exit_code == 0, result.output
    assert "float32" in result.stdout
    assert json.loads((tmp_path / "demo" / "report.json").read_text())["format"] == "none"
    assert "did you mean 'nf4'" in _demo(tmp_path / "other", "--format", "nf3").stderr


def test_a_folder_with_something_else_is_left_alone(tiny, tmp_path):
    (tmp_path / "report.json").write_text("mine")
    result = _demo(tmp_path)
    assert result.exit_code == 2
    assert (tmp_path / "report.json").read_text() == "mine"


def test_ctrl_c_says_how_to_go_on(tiny, tmp_path, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lilliput.training.tune", stopped)
    result = _demo(tmp_path / "demo")
    assert result.exit_code == 1
    assert "--resume" in result.stderr
    assert "Traceback" not in result.output


def test_the_recipe_is_qlora_on_all_linear_layers_with_packing():
    recipe = load_recipe("demo")
    assert (recipe.model.format, recipe.model.double_quant) == ("nf4", None)  # null: yes, as the format has it
    assert recipe.lora.target_modules == "all-linear"
    assert recipe.data.packing
