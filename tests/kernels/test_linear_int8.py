"""`linear_int8` against the reference product and float64, its gradients, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput import formats
from lilliput.errors import FormatError, UsageError
from lilliput.formats import QuantizedTensor, rowwise
from lilliput.kernels import linear, linear_4bit, linear_int8, quantize
from tests.nasty import NASTY, NOT_FINITE

# (out, in); the last is deeper than float32's sums of codes are exact
SHAPES = [(64, 128), (33, 96), (7, 33), (5, 1), (200, 576), (24, 1100)]
ROWS = [1, 2, 9, 29]


def make(out: int, columns: int) -> tuple[QuantizedTensor, Tensor]:
    """A quantized random matrix, and it dequantized in float64."""
    q = quantize(torch.randn(out, columns, generator=torch.Generator().manual_seed(out)), "int8")
    return q, formats.dequantize(q, torch.float64)


def expected(x: Tensor, q: QuantizedTensor, threshold: float) -> Tensor:
    largest = rowwise.largest_input(q.shape[1])
    return rowwise.vectorwise_product(x.detach(), q.codes.view(q.shape), q.absmax, threshold, largest)


def assert_same(got: Tensor, x: Tensor, q: QuantizedTensor, threshold: float) -> None:
    """Equal to the reference product, to float32's rounding of a sum of its terms' magnitudes."""
    magnitude = x.double().abs() @ formats.dequantize(q, torch.float64).abs().T
    error = (got.double() - expected(x, q, threshold).double()).abs()
    assert bool((error <= 1.2e-7 * (x.shape[1] + 8) * magnitude + 1e-30).all())


@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradients(backend: str, shape: tuple[int, int], threshold: float) -> None:
    q, weight = make(*shape)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], requires_grad=True)
        bias = torch.randn(shape[0], requires_grad=True)
        y = linear_int8(x, q, bias, threshold)
        torch.testing.assert_close(y, expected(x, q, threshold) + bias, rtol=1e-5, atol=1e-5 * shape[1] ** 0.5)
        step = x.detach().abs().amax(dim=1, keepdim=True) / rowwise.largest_input(
            shape[1]
        )  # half of it is the most that rounding moves a number
        moved = 0.5001 * step @ weight.abs().sum(dim=1)[None].float() + 1e-4
        assert bool(((y - bias).double() - x.double() @ weight.T).abs().le(moved).all())
        grad = torch.randn(rows, shape[0])
        to_x, to_bias = torch.autograd.grad(y, (x, bias), grad)
        torch.testing.assert_close(to_x.double(), grad.double() @ weight, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(to_bias, grad.sum(0))


@pytest.mark.parametrize("name", [name for name, make in NASTY.items() if make().dim() == 2])
def test_nasty_inputs(backend: str, name: str) -> None:
    x = NASTY[name]()
    q, _ = make(40, x.shape[1])
    for threshold in (0.0, 1.0):
        assert_same(linear_int8(x, q, None, threshold), x, q, threshold)
    if x.numel():
        q = quantize(x, "int8")
        row = torch.randn(12, x.shape[1])
        assert_same(linear_int8(row, q), row, q, 6.0)


def test_all_columns_may_be_outliers(backend: str) -> None:
    q, weight = make(10, 64)
    x = torch.randn(5, 64)
    y = linear_int8(x, q, threshold=1e-30)
    torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_threshold_of_zero_makes_rows_independent(backend: str) -> None:
    q, _ = make(10, 64)
    x = torch.randn(20, 64) * 5
    one_by_one = torch.cat([linear_int8(row[None], q, threshold=0.0) for row in x])
    torch.testing.assert_close(linear_int8(x, q, threshold=0.0), one_by_one, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("rows", [3, 20])
def test_a_number_that_is_none_makes_its_row_nan_and_no_other(backend: str, value: float, rows: int) -> None:
    q, _ = make(20, 64)
    x = torch.randn(rows, 64) * 3
    x[1] *= 0.1  # the row makes no column an outlier
    clean = linear_int8(x, q)
    x[1, 5] = value
    y = linear_int8(x, q)
    others = torch.arange(rows) != 1
    assert bool(y[1].isnan().all())
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64), (2, 0, 64), (1, 1, 1, 64)])
def test_leading_sizes_are_kept(backend: str, shape: tuple[int, ...]) -> None:
    q, weight = make(10, 64)
    x = torch.randn(shape, requires_grad=True)
    y = linear_int8(x, q, torch.zeros(10, requires_grad=True))
    assert y.shape == (*shape[:-1], 10)
    flat = x.detach().reshape(-1, 64) if x.numel() else x.detach().new_empty(0, 64)
    assert torch.equal(y.flatten(), linear_int8(flat, q).flatten())
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).float().expand(shape), atol=1e-4, rtol=1e-4)


def test_empty_matrices(backend: str) -> None:
    for out, columns in ((0, 64), (5, 0), (0, 0)):
        q = quantize(torch.zeros(out, columns), "int8")
        for rows in (1, 20):
            x = torch.randn(rows, columns, requires_grad=True)
            y = linear_int8(x, q, torch.ones(out))
            assert torch.equal(y, torch.ones(rows, out))
            assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros(rows, columns))


def test_a_row_that_is_not_contiguous(backend: str) -> None:
    q, _ = make(10, 64)
    x = torch.randn(64, 12).t()
    assert torch.equal(linear_int8(x, q), linear_int8(x.contiguous(), q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_compute_in_float32(backend: str, dtype: torch.dtype) -> None:
    q, _ = make(33, 128)
    x = (torch.randn(20, 128) * 3).to(dtype).requires_grad_()
    bias = torch.randn(33).to(dtype)
    y = linear_int8(x, q, bias)
    assert y.dtype == dtype
    assert torch.equal(y, linear_int8(x.detach().float(), q, bias.float()).to(dtype))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.dtype == dtype


def test_autocast_changes_nothing(backend: str) -> None:
    q, _ = make(33, 128)
    x = torch.randn(20, 128, requires_grad=True)
    plain = linear_int8(x, q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_int8(x, q)
        (grad,) = torch.autograd.grad(cast.sum(), x)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)
    assert torch.equal(grad, torch.autograd.grad(plain.sum(), x)[0])


def test_float64_is_not_rounded_and_its_gradient_is_exact() -> None:
    q, weight = make(5, 33)
    x = torch.randn(3, 33, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(linear_int8(x, q, bias), x @ weight.T + bias)
    assert torch.autograd.gradcheck(lambda x, bias: linear_int8(x, q, bias), (x, bias))


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_opcheck(backend: str, threshold: float) -> None:
    q, _ = make(10, 33)
    codes = q.codes.view(q.shape)
    x, bias = torch.randn(2, 3, 33, requires_grad=True), torch.randn(10, requires_grad=True)
    torch.library.opcheck(torch.ops.lilliput.linear_int8.default, (x, codes, q.absmax, bias, threshold))
    torch.library.opcheck(torch.ops.lilliput.linear_int8_backward.default, (torch.randn(4, 10), codes, q.absmax))


def test_backward_keeps_only_codes_and_absmax(backend: str) -> None:
    q, _ = make(64, 128)
    kept: list[Tensor] = []
    x = torch.randn(20, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_int8(x, q, torch.randn(64, requires_grad=True))
    assert {t.data_ptr() for t in kept} == {q.codes.data_ptr(), q.absmax.data_ptr()}


def test_frozen_input_gets_no_gradient(backend: str) -> None:
    q, _ = make(8, 64)
    bias = torch.zeros(8, requires_grad=True)
    linear_int8(torch.randn(3, 64), q, bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [3.0] * 8


def test_linear_is_the_product_of_the_format(backend: str) -> None:
    x = torch.randn(3, 64) * 4
    q, _ = make(10, 64)
    assert torch.equal(linear(x, q, None, 2.0), linear_int8(x, q, None, 2.0))
    small = quantize(torch.randn(10, 64), "nf4")
    assert torch.equal(linear(x, small), linear_4bit(x, small))


def test_what_does_not_fit_is_refused(backend: str) -> None:
    q, _ = make(10, 64)
    x = torch.randn(3, 64)
    with pytest.raises(FormatError, match=r"x is \[3, 63\], the quantized matrix \[10, 64\]"):
        linear_int8(x[:, :63], q)
    with pytest.raises(FormatError, match=r"bias is \[9\]"):
        linear_int8(x, q, torch.zeros(9))
    with pytest.raises(FormatError, match="must be its second"):
        linear_int8(x, quantize(torch.randn(64), "int8"))
    with pytest.raises(FormatError, match="the matrix is in nf4, by blocks; this product takes rows"):
        linear_int8(x, quantize(torch.randn(10, 64), "nf4"))
    with pytest.raises(FormatError, match="the matrix is in int8, by rows; this product takes blocks"):
        linear_4bit(x, q)
    with pytest.raises(FormatError, match=r"x is torch\.int64"):
        linear_int8(torch.ones(3, 64, dtype=torch.int64), q)
    with pytest.raises(UsageError, match=r"threshold=-1"):
        linear_int8(x, q, threshold=-1.0)
