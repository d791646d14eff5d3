"""A run over a base in int8: its checks, its passport, resuming, and reuse of the frozen layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lilliput.layers import QuantizedLinear, identity_of, quantized_layers
from lilliput.lora import read_passport
from lilliput.models import load_model
from lilliput.training import Interrupted, check_data, tune
from tests.training.conftest import quick
from tests.training.test_resume import press_ctrl_c

INT8 = ("model.format=int8", "model.threshold=2.0", "train.epochs=2")
UPPER = "lora.layers_to_transform=[1]"


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_it_learns_and_remembers_its_base(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    result = tune(str(tiny_model_dir), rows, tmp_path / "run", quick(*INT8, "train.epochs=6"), progress=False)
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss < 0.9 * result.eval_loss_before
    passport = read_passport(tmp_path / "run")
    assert passport is not None
    base = load_model(tiny_model_dir, format="int8", progress=False)
    assert (passport.format, passport.base_quantized_sha256) == ("int8", identity_of(base).quantized_sha256)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "format='int8', threshold=2.0)" in report
    assert "packed loss = unpacked loss: passed" in report


def test_every_promise_holds_and_thresholds_are_as_before(
    tiny_model_dir: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(
        "lilliput.training.run.load_model", lambda *a, **k: loaded.append(load_model(*a, **k)) or loaded[-1]
    )
    results = check_data(str(tiny_model_dir), rows, quick(*INT8), progress=False)
    assert [result.name for result in results if not result.passed] == []
    layers = [layer for _, layer in quantized_layers(loaded[0]) if isinstance(layer, QuantizedLinear)]
    assert {layer.threshold for layer in layers} == {2.0}


def test_an_interrupted_run_goes_on_bit_for_bit(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"check": False, "progress": False}
    tune(str(tiny_model_dir), rows, tmp_path / "whole", quick(*INT8), **options)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, {9})
        with pytest.raises(Interrupted):
            tune(str(tiny_model_dir), rows, tmp_path / "halves", quick(*INT8), **options)
    tune(str(tiny_model_dir), rows, tmp_path / "halves", quick(*INT8), resume=True, **options)
    whole, halves = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_frozen_layers_are_reused_and_rows_alone_come_to_the_same(
    tiny_model_dir: Path, rows: Path, tmp_path: Path
) -> None:
    for reuse in ("off", "on"):
        settings = (*INT8, UPPER, "train.batch_size=1", "train.accumulation=4", f"train.reuse_prefix={reuse}")
        result = tune(str(tiny_model_dir), rows, tmp_path / reuse, quick(*settings), check=False, progress=False)
    assert result.prefix is not None
    assert "run once a row" in result.prefix or "layers" in result.prefix
    off, on = adapter_of(tmp_path / "off"), adapter_of(tmp_path / "on")
    assert all(torch.equal(off[name], on[name]) for name in off)


def test_a_tied_head_in_int8_is_trained_beside(tiny_llama, tiny_tokenizer, rows: Path, tmp_path: Path, capsys) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    recipe = quick(*INT8, "model.embeddings=true", "train.max_steps=3")
    result = tune(str(tmp_path / "tied"), rows, tmp_path / "run", recipe, progress=False)
    assert result.steps == 3
    assert "computes its logits in int8" in " ".join(capsys.readouterr().err.split())
