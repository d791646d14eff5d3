"""The simulated ways of rounding: each its formula in float64, the last one our own int8 layers; their order."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lilliput.errors import FormatError, UsageError
from lilliput.evaluation import compare_int8, find_outliers, perplexity
from lilliput.evaluation.comparison import WAYS, ComparisonRow, Int8Comparison, rounded_product
from lilliput.evaluation.pictures import draw_comparison, draw_outliers
from lilliput.formats.rowwise import quantize_rows, vectorwise_product
from lilliput.layers import replace_linears
from tests.evaluation.conftest import TEXT

QUICK = {"context": 64, "segments": 2, "progress": False}


@pytest.fixture(scope="module")
def compared(learned, tiny_tokenizer):
    return compare_int8(learned, tiny_tokenizer, TEXT, **QUICK)


def of_tensor(x: np.ndarray) -> np.ndarray:
    largest = np.abs(x).max()
    return np.round(127 * x / largest) * largest / 127


def of_range(x: np.ndarray) -> np.ndarray:
    steps = 254 / (x.max() - x.min())
    return np.round(steps * x) / steps


def of_each_row(x: np.ndarray) -> np.ndarray:
    largest = np.abs(x).max(axis=1, keepdims=True)
    return np.round(127 * x / largest) * largest / 127


FORMULAS = {
    "absmax": (of_tensor, of_tensor),
    "zero-point": (of_range, of_range),
    "row-wise": (of_each_row, of_tensor),
    "vector-wise": (of_each_row, of_each_row),
}


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_each_way_is_its_formula_in_float64(way, threshold) -> None:
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((9, 24)), random.standard_normal((7, 24))
    x[:, [3, 11]] *= 30
    of_x, of_weight = FORMULAS[way.name]
    near, out = x.copy(), (np.abs(x) > threshold).any(axis=0) & (threshold > 0)
    near[:, ~out] = of_x(x[:, ~out])
    wanted = near @ of_weight(weight).T
    found = rounded_product(torch.tensor(x).float(), torch.tensor(weight).float(), way, threshold)
    assert out.sum() == (2 if threshold else 0)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_all_columns_may_be_outliers_and_nan_is_refused(way) -> None:
    x, weight = torch.full((3, 8), 7.0), torch.randn(4, 8)
    assert torch.allclose(rounded_product(x, weight, way, 6.0), x @ way.of_weight(weight).T)
    with pytest.raises(FormatError):
        rounded_product(x.index_fill(1, torch.tensor([2]), float("nan")), weight, way)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_vector_wise_is_the_product_in_whole_numbers(threshold) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 24), torch.randn(7, 24)
    x[:, [3, 11]] *= 30
    way = next(way for way in WAYS if way.name == "vector-wise")
    codes, absmax = quantize_rows(weight)
    wanted = vectorwise_product(x, codes.view(weight.shape), absmax, threshold)
    torch.testing.assert_close(rounded_product(x, weight, way, threshold), wanted, rtol=1e-5, atol=1e-5)


def test_int8_layers_are_no_further_from_float32_than_the_simulation(learned, tiny_tokenizer, compared) -> None:
    """They round x finer than the paper does."""
    small = copy.deepcopy(learned)
    assert len(replace_linears(small, "int8")) == compared.layers
    scored = perplexity(small, tiny_tokenizer, TEXT, **QUICK)
    assert abs(scored.perplexity - compared.float32) < 0.002 * compared.float32


def test_the_order_of_the_paper(compared) -> None:
    found = {(row.way, row.decomposition): row.perplexity for row in compared.rows}
    assert len(found) == 8
    best = found["vector-wise", True]
    assert best == pytest.approx(compared.float32, rel=0.01)
    assert best <= found["vector-wise", False] <= found["row-wise", False] <= found["absmax", False]
    for way in WAYS:
        assert found[way.name, True] < found[way.name, False]
    for row in compared.rows:
        assert row.difference == row.perplexity - compared.float32
    assert (compared.tokens, compared.segments) == (126, 2)


def test_the_model_is_afterwards_as_it_was(planted, tiny_tokenizer) -> None:
    model, ids = planted(), torch.arange(30)[None]
    modules = list(model.modules())
    with torch.no_grad():
        before = model(ids).logits
        compared = compare_int8(model, tiny_tokenizer, TEXT, **QUICK)
        assert torch.equal(model(ids).logits, before)
    assert list(model.modules()) == modules
    assert compared.float32 == perplexity(model, tiny_tokenizer, TEXT, **QUICK).perplexity


def test_what_cannot_be_compared_is_refused(tiny_llama, tiny_tokenizer) -> None:
    with pytest.raises(UsageError, match="threshold: 0 leaves no column"):
        compare_int8(tiny_llama(), tiny_tokenizer, TEXT, threshold=0, progress=False)
    with pytest.raises(UsageError, match="threshold=-1"):
        compare_int8(tiny_llama(), tiny_tokenizer, TEXT, threshold=-1, progress=False)
    small = tiny_llama()
    replace_linears(small, "nf4")
    with pytest.raises(UsageError, match="nf4 already"):
        compare_int8(small, tiny_tokenizer, TEXT, progress=False)


# ---- pictures ----


def not_blank(path) -> bool:
    """Whether a PNG has enough dark and coloured dots to be a plot."""
    picture = imread(path)[..., :3]
    assert min(picture.shape[:2]) > 400
    coloured = np.ptp(picture, axis=2) > 0.3
    return bool(0.002 < coloured.mean() < 0.9 and (picture.max(axis=2) < 0.3).mean() > 0.002)


def test_pictures_are_drawn(planted, tiny_tokenizer, compared, tmp_path) -> None:
    report = find_outliers(planted(), tiny_tokenizer, TEXT, context=64, progress=False)
    draw_outliers(report, tmp_path / "report.png", "planted")
    draw_comparison(compared, tmp_path / "comparison.png", "learned")
    assert not_blank(tmp_path / "report.png")
    assert not_blank(tmp_path / "comparison.png")


def test_an_infinite_perplexity_has_no_bar(tmp_path) -> None:
    rows = [ComparisonRow(way.name, d, p, p - 20) for way in WAYS for d, p in ((False, float("inf")), (True, 20.5))]
    draw_comparison(Int8Comparison(20.0, 6.0, 100, 1, 14, rows), tmp_path / "c.png", "broken")
    assert not_blank(tmp_path / "c.png")
