"""Outlier features are found where they were planted, and a layer's error is that of the formula in float64."""

from __future__ import annotations

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lilliput.errors import DataError, FormatError, UsageError
from lilliput.evaluation import find_outliers, watched
from lilliput.evaluation.outliers import block_of, kind_of
from lilliput.layers import replace_linears
from tests.evaluation.conftest import PLANTED, TEXT
from tests.models.conftest import make_model

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # of what comes out of a norm


@pytest.fixture
def report(planted, tiny_tokenizer):
    return find_outliers(planted(), tiny_tokenizer, TEXT, context=64, progress=False)


def formula(x: np.ndarray, weight: np.ndarray, threshold: float) -> tuple[float, float]:
    """LLM.int8() in float64: the squared error of the product, and the squared product."""
    exact = x @ weight.T
    out = (np.abs(x) > threshold).any(axis=0) if threshold else np.zeros(x.shape[1], dtype=bool)
    of_weight = np.abs(weight).max(axis=1, keepdims=True)
    stored = np.round(127 * weight / of_weight) * of_weight / 127
    usual = np.where(out, 0.0, x)
    of_rows = np.maximum(np.abs(usual).max(axis=1, keepdims=True), 1e-30)
    near = np.where(out, x, np.round(127 * usual / of_rows) * of_rows / 127)
    return float(((near @ stored.T - exact) ** 2).sum()), float((exact**2).sum())


def test_exactly_the_planted_features_are_found(report) -> None:
    assert [feature.feature for feature in report.features] == PLANTED
    assert all(feature.by_paper and feature.blocks_share == 1 for feature in report.features)
    for layer in report.layers:
        assert layer.outlier_features == (PLANTED if layer.name.endswith(READERS) else [])
        assert (layer.largest > 6) == bool(layer.outlier_features)
    assert (report.width, report.blocks, report.positions) == (256, 2, 128)
    assert report.hidden_states == 2 * 3  # q, k and v share one, gate and up another; o has its own
    assert report.unreached == []


def test_shares_are_counts(planted, tiny_tokenizer) -> None:
    model, seen = planted(), []
    target = model.model.layers[1].mlp.up_proj
    target.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    report = find_outliers(model, tiny_tokenizer, TEXT, context=50, segments=3, progress=False)
    x = torch.cat(seen)
    layer = next(layer for layer in report.layers if layer.name.endswith("1.mlp.up_proj"))
    assert layer.positions_share == pytest.approx(float((x.abs() > 6).any(dim=1).double().mean()))
    assert layer.values_share == pytest.approx(float((x.abs() > 6).double().mean()))
    assert layer.largest == float(x.abs().max())


def test_the_papers_criterion_leaves_out_what_is_rare(tiny_llama, tiny_tokenizer) -> None:
    model = tiny_llama(num_hidden_layers=5)
    with torch.no_grad():
        model.model.layers[3].input_layernorm.weight[9] *= 100  # one block of five: less than 25 %
    report = find_outliers(model, tiny_tokenizer, TEXT, context=64, segments=1, progress=False)
    found = next(feature for feature in report.features if feature.feature == 9)
    assert (found.blocks_share, found.by_paper) == (0.2, False)


def test_errors_are_those_of_the_formula_in_float64(planted, tiny_tokenizer) -> None:
    model, seen = planted(), []
    target = model.model.layers[0].self_attn.v_proj
    target.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0].double().numpy()))
    report = find_outliers(model, tiny_tokenizer, TEXT, context=64, threshold=6.0, progress=False)
    layer = next(layer for layer in report.layers if layer.name.endswith("0.self_attn.v_proj"))
    for threshold, error in zip(report.thresholds, layer.errors, strict=True):
        parts = [formula(x, target.weight.detach().double().numpy(), threshold) for x in seen]
        assert error == pytest.approx((sum(e for e, _ in parts) / sum(y for _, y in parts)) ** 0.5, rel=1e-3)
    assert (layer.error, layer.error_without) == (layer.errors[report.thresholds.index(6.0)], layer.errors[0])


def test_without_the_decomposition_the_planted_layers_are_far_off(report) -> None:
    for layer in report.layers:
        if layer.outlier_features:
            assert layer.error_without > 3 * layer.error
        else:
            assert layer.error_without == layer.error < 0.03


def test_the_curve_falls_and_its_price_rises(report) -> None:
    curve = report.curve()
    assert [row["threshold"] for row in curve] == [0, 12, 8, 6, 4, 2, 1]
    columns = [row["float32_columns"] for row in curve]
    assert columns[0] == 0
    assert columns == sorted(columns)
    errors = [row["error"] for row in curve]
    assert all(later <= 1.01 * earlier for earlier, later in pairwise(errors))
    assert errors[-1] < errors[0] / 3


def test_totals_and_the_order_of_the_worst(report) -> None:
    totals = report.totals()
    assert (totals["layers"], totals["layers_with_outliers"]) == (14, 10)
    assert totals["outlier_features"] == totals["outlier_features_by_paper"] == 2
    assert totals["mean_error"] == pytest.approx(sum(layer.error for layer in report.layers) / 14)
    errors = [layer.error for layer in report.worst_first()]
    assert errors == sorted(errors, reverse=True)


def test_conv1d_weights_are_read_the_right_way_round(tiny_tokenizer) -> None:
    report = find_outliers(make_model("gpt2"), tiny_tokenizer, TEXT, context=64, segments=1, progress=False)
    sizes = {kind_of(layer.name): (layer.out_features, layer.in_features) for layer in report.layers}
    assert sizes["mlp.c_fc"] == (256, 64)
    assert all(layer.error < 0.03 for layer in report.layers)


def test_models_that_continue_no_text_are_inspected_too(tiny_tokenizer) -> None:
    sizes = {"vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    report = find_outliers(model, tiny_tokenizer, TEXT, context=32, segments=1, progress=False)
    assert {layer.name.split(".")[0] for layer in report.layers} == {"encoder", "decoder"}
    assert report.unreached == []


def test_any_module_can_be_watched_and_is_left_as_it_was() -> None:
    model, names = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Linear(4, 4)), []
    with watched(model, after_layer=names.append) as watch:
        model[:3](torch.randn(5, 8))
    assert names == ["0", "2"]
    assert watch.report().unreached == ["3"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_more_than_one_input_is_kept(tiny_llama) -> None:
    model, inputs = tiny_llama(num_hidden_layers=4), []
    with torch.no_grad(), watched(model):
        for block in model.model.layers:
            block.mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
        model(torch.arange(20)[None])
        assert sum(kept() is not None for kept in inputs) <= 1
    assert len(inputs) == 4
    assert not any(kept() is not None for kept in inputs)


def test_names_of_blocks_and_kinds() -> None:
    assert block_of("model.layers.12.mlp.up_proj") == "model.layers.12"
    assert kind_of("model.layers.12.mlp.up_proj") == "mlp.up_proj"
    assert (block_of("3"), kind_of("3")) == ("3", "3")
    assert block_of("pooler.dense") == kind_of("pooler.dense") == "pooler.dense"


def test_models_without_dense_linear_layers_are_refused(tiny_llama) -> None:
    with pytest.raises(UsageError, match="has no linear layers"), watched(nn.Sequential(nn.ReLU())):
        pass
    model = tiny_llama()
    replace_linears(model, "int8")
    with pytest.raises(UsageError, match="int8 already"), watched(model):
        pass


def test_an_input_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(FormatError, match="0: its input has NaN or Inf"), watched(model):
        model(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]))


def test_nothing_seen_is_said() -> None:
    with watched(nn.Sequential(nn.Linear(4, 4))) as watch:
        pass
    with pytest.raises(UsageError, match="nothing went through"):
        watch.report()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"threshold": -1.0}, "threshold=-1"),
        ({"thresholds": [2.0, -3.0]}, "threshold=-3"),
        ({"segments": 0}, "segments"),
        ({"context": 1}, "context"),
        ({"context": 1000}, "512 positions"),
    ],
)
def test_impossible_numbers_are_refused(tiny_llama, tiny_tokenizer, wrong, named) -> None:
    with pytest.raises(UsageError, match=named):
        find_outliers(tiny_llama(), tiny_tokenizer, TEXT, progress=False, **wrong)


def test_a_short_text_is_refused(tiny_llama, tiny_tokenizer) -> None:
    with pytest.raises(DataError, match="fewer than one segment of 512"):
        find_outliers(tiny_llama(), tiny_tokenizer, "The quick brown fox", progress=False)
