"""int8 by rows against the definition in exact arithmetic, and LLM.int8()'s product against float64."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lilliput.errors import FormatError, UsageError
from lilliput.formats import dequantize, quantize, rowwise
from tests.nasty import NASTY, NOT_FINITE

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=60)
@given(st.lists(float32s, min_size=1, max_size=40))
def test_every_number_gets_a_nearest_code(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    q = quantize(x, "int8")
    absmax = max(abs(Fraction(value)) for value in x.tolist())
    assert q.absmax.item() == absmax
    assert int(q.codes.int().abs().max()) <= 127
    for code, value in zip(q.codes.tolist(), x.tolist(), strict=True):
        # in float32 127 / c and the product round; a number in the middle of two codes may get either
        error = abs(Fraction(code) * absmax / 127 - Fraction(value))
        assert error <= absmax / 127 * (Fraction(1, 2) + Fraction(1, 10**4)) or absmax < Fraction(1, 10**36)


@pytest.mark.parametrize("nasty", NASTY)
def test_the_error_is_within_half_a_step_of_the_row(nasty: str) -> None:
    x = NASTY[nasty]()
    got = dequantize(quantize(x, "int8"))
    assert got.shape == x.shape
    steps = rowwise.row_absmax(rowwise.rows_of(x)) / 127
    error = rowwise.rows_of((got - x).abs())
    assert bool((error <= steps[:, None] * 0.5001 + 1e-36).all())


def test_half_way_goes_to_the_even_code() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    assert quantize(x, "int8").codes.tolist() == [127, 0, 2, 2, 0, -2, 126]


def test_rows_do_not_see_each_other() -> None:
    x = torch.randn(3, 40)
    x[1] *= 1e6
    q = quantize(x, "int8")
    for row in range(3):
        assert torch.equal(quantize(x[row], "int8").codes, q.codes.view(3, 40)[row])


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-37, 1e-35, 3.4e38])
def test_very_small_and_very_large_rows(largest: float) -> None:
    x = torch.tensor([[largest, -largest, largest / 2]])
    got = dequantize(quantize(x, "int8"))
    assert bool(got.isfinite().all())
    assert bool(((got - x).abs() <= largest / 127 + 1e-36).all())


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(
    "quantizer", [lambda x: quantize(x, "int8"), rowwise.quantize_absmax, rowwise.quantize_zeropoint]
)
def test_what_is_not_finite_is_refused_with_its_place(value: str, quantizer) -> None:
    x = torch.zeros(5, 40)
    x[3, 7] = NOT_FINITE[value]
    with pytest.raises(FormatError, match=r"the number at \[3, 7\] of shape \[5, 40\] is -?(nan|inf)"):
        quantizer(x)


# ---- whole tensors ----


@pytest.mark.parametrize("nasty", NASTY)
def test_absmax_and_zeropoint_of_a_whole_tensor(nasty: str) -> None:
    x = NASTY[nasty]()
    codes, absmax = rowwise.quantize_absmax(x)
    assert bool(((codes.float() * absmax / 127 - x).abs() <= absmax / 127 * 0.5001 + 1e-36).all())
    codes, steps, zero = rowwise.quantize_zeropoint(x)
    assert codes.shape == x.shape
    span = x.max() - x.min() if x.numel() else torch.zeros(())
    step = span / 254 if span >= 1e-36 else (x.abs().max() if x.numel() else span) / 127
    got = rowwise.dequantize_zeropoint(codes, steps, zero)
    assert bool(((got - x).abs() <= step * 1.001 + 1e-36).all())  # half a step each for code and zero


def test_zeropoint_uses_the_whole_range_of_an_asymmetric_tensor() -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 3  # absmax leaves half of the codes unused
    codes, steps, zero = rowwise.quantize_zeropoint(x)
    assert (int(codes.min()), int(codes.max())) == (-127, 127)
    finer = (rowwise.dequantize_zeropoint(codes, steps, zero) - x).abs().mean()
    plain, absmax = rowwise.quantize_absmax(x)
    assert float(finer) < 0.6 * float((plain.float() * absmax / 127 - x).abs().mean())


# ---- the product ----


def exact(x: Tensor, codes: Tensor, absmax: Tensor, threshold: float) -> Tensor:
    """The definition of section 3, one sum at a time, in float64."""
    x, y = x.double(), torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64)
    beyond = [k for k in range(x.shape[1]) if threshold and bool((x[:, k].abs() > threshold).any())]
    usual = [k for k in range(x.shape[1]) if k not in beyond]
    for i in range(x.shape[0]):
        largest = max((abs(x[i, k].item()) for k in usual), default=0.0)
        for k in usual:
            code = (x[i, k].float() * (127 / torch.tensor(largest))).round() if largest else x[i, k]
            y[i] += code.double() * codes[:, k].double() * largest * absmax.double() / 127**2
        for k in beyond:
            y[i] += x[i, k] * codes[:, k].double() * absmax.double() / 127
    return y


@pytest.mark.parametrize("threshold", [0.0, 1.5, 6.0, 1e-9])
def test_the_product_is_the_definition(threshold: float) -> None:
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 37, generator=draw), torch.randn(9, 37, generator=draw)
    x[2, 11] = 40.0
    q = quantize(w, "int8")
    y = rowwise.vectorwise_product(x, q.codes.view(9, 37), q.absmax, threshold)
    torch.testing.assert_close(y.double(), exact(x, q.codes.view(9, 37), q.absmax, threshold), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [0, 1, 1040, 1041, 5000])
def test_integer_products_are_exact(columns: int) -> None:
    draw = torch.Generator().manual_seed(1)
    left, right = (torch.randint(-127, 128, (n, columns), generator=draw, dtype=torch.int8) for n in (3, 4))
    left[0], right[0] = 127, -127  # the largest sums there are
    expected = left.long() @ right.long().T
    assert torch.equal(rowwise.integer_product(left, right).long(), expected)


def test_planted_outliers_spoil_the_plain_product_and_not_the_decomposed_one() -> None:
    draw = torch.Generator().manual_seed(2)
    x, w = torch.randn(64, 512, generator=draw), torch.randn(128, 512, generator=draw) * 0.05
    for column, size in ((3, 20.0), (100, 60.0), (400, 100.0)):  # few columns, 20 to 100 times the rest
        x[:, column] = size * (1 + 0.1 * torch.randn(64, generator=draw))
    q = quantize(w, "int8")
    codes, dense = q.codes.view(w.shape), dequantize(q).double()
    errors = {}
    for threshold in (0.0, 6.0):
        y = rowwise.vectorwise_product(x, codes, q.absmax, threshold)
        usual = x.double().clone()
        usual[:, [3, 100, 400]] = 0  # the outliers' own share is large: compare with what the usual columns say
        errors[threshold] = float((y.double() - x.double() @ dense.T).norm() / (usual @ dense.T).norm())
    assert errors[6.0] < 0.01
    assert errors[0.0] > 0.2


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_a_number_that_is_none_makes_its_row_nan_and_no_other(value: float, threshold: float) -> None:
    x, w = torch.randn(4, 40), torch.randn(7, 40)
    x[2, 5] = 50.0
    q = quantize(w, "int8")
    clean = rowwise.vectorwise_product(x, q.codes.view(7, 40), q.absmax, threshold)
    for column in (5, 9):  # one that is an outlier anyway, and one that is not
        spoilt = x.clone()
        spoilt[1, column] = value
        y = rowwise.vectorwise_product(spoilt, q.codes.view(7, 40), q.absmax, threshold)
        assert bool(y[1].isnan().all())
        assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), float("inf")])
def test_thresholds_that_mean_nothing_are_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="threshold="):
        rowwise.check_threshold(threshold)
