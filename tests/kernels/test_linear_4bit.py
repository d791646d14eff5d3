"""`linear_4bit` on both backends against float64, its gradients, and what it keeps for backward."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from lilliput import formats
from lilliput.errors import FormatError
from lilliput.formats import QuantizedTensor
from lilliput.kernels import exact, linear_4bit, quantize
from tests.kernels import fixed_point
from tests.nasty import NOT_FINITE

# (out, in): whole tiles; rows that end inside a block; odd rows (they start inside a byte); thin; deeper than a tile.
SHAPES = [(64, 128), (33, 96), (7, 33), (31, 130), (5, 1), (1, 320), (200, 576), (24, 640)]
ROWS = [1, 2, 5, 8, 9, 16, 29]


def make(out: int, columns: int, double_quant: bool = True, format: str = "nf4") -> tuple[QuantizedTensor, Tensor]:
    """A quantized random matrix, and it dequantized in float64."""
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(out))
    q = quantize(weight, format, double_quant)
    return q, formats.dequantize(q, torch.float64)


def assert_right(
    got: Tensor, left: Tensor, right: Tensor, added: Tensor | None = None, more: Tensor | float = 0.0
) -> None:
    """`got` equals left @ right + added to float32's rounding of a sum of its terms' magnitudes, and to `more`."""
    expected = left.double() @ right + (0 if added is None else added.double())
    magnitude = left.double().abs() @ right.abs() + (0 if added is None else added.double().abs())
    assert bool(((got.double() - expected).abs() <= 1.2e-7 * (right.shape[0] + 4) * magnitude + more).all())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradients(backend: str, shape: tuple[int, int], double_quant: bool) -> None:
    q, weight = make(*shape, double_quant)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], requires_grad=True)
        bias = torch.randn(shape[0], requires_grad=True)
        y = linear_4bit(x, q, bias)
        assert_right(y, x, weight.t(), bias, fixed_point.bound(x, q, backend))
        grad = torch.randn(rows, shape[0])
        to_x, to_bias = torch.autograd.grad(y, (x, bias), grad)
        assert_right(to_x, grad, weight)
        torch.testing.assert_close(to_bias, grad.sum(0))
        assert torch.allclose(linear_4bit(x, q), y - bias, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-30, 1e-26, 1e-20, 1.0, 1e20, 1e26])
def test_one_row_of_any_size(backend: str, factor: float) -> None:
    """In fixed point or not, the error is relative to the block's greatest number."""
    q, weight = make(33, 256)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)) * factor
    x[0, 64:128] = 0
    x[0, 200] *= 300  # one huge value in its block
    more = fixed_point.bound(x, q, backend)
    assert_right(linear_4bit(x, q), x, weight.t(), more=more)
    error = (linear_4bit(x, q).double() - x.double() @ weight.t()).norm() / (x.double() @ weight.t()).norm()
    assert error < 1e-4


@pytest.mark.parametrize("columns", [64, 576, 100])
def test_one_row_in_float32_where_that_is_asked_for(backend: str, columns: int) -> None:
    q, weight = make(33, columns)
    x = torch.randn(1, columns)
    with exact():
        assert_right(linear_4bit(x, q), x, weight.t())
        both = linear_4bit(x.expand(2, columns), q)
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
def test_one_row_with_a_number_that_is_none(backend: str, value: float) -> None:
    q, _ = make(33, 256)
    x = torch.randn(1, 256)
    x[0, 77] = value
    assert not linear_4bit(x, q).isfinite().any()


def test_fp4(backend: str) -> None:
    q, weight = make(40, 96, format="fp4")
    for rows in (1, 20):
        x = torch.randn(rows, 96)
        assert_right(linear_4bit(x, q), x, weight.t(), more=fixed_point.bound(x, q, backend))


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64), (2, 0, 64), (1, 1, 1, 64)])
def test_leading_sizes_are_kept(backend: str, shape: tuple[int, ...]) -> None:
    q, weight = make(10, 64)
    x = torch.randn(shape, requires_grad=True)
    y = linear_4bit(x, q, torch.zeros(10, requires_grad=True))
    assert y.shape == (*shape[:-1], 10)
    flat = x.detach().reshape(-1, 64)
    assert_right(y.reshape(-1, 10), flat, weight.t(), more=fixed_point.bound(flat, q, backend))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).float().expand(shape), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 64), (2, 3, 64)])
def test_the_result_can_be_changed_in_place(backend: str, shape: tuple[int, ...]) -> None:
    """As Falcon does, which adds what attention gave to what its MLP gave; autograd forbids it where y is a view."""
    q, weight = make(10, 64)
    for bias in (None, torch.zeros(10)):
        x = torch.randn(shape, requires_grad=True)
        y = linear_4bit(x, q, bias)
        y += 1.0
        y *= 2.0
        torch.testing.assert_close(y, (2 * (x.double() @ weight.t() + 1)).float(), atol=1e-4, rtol=1e-4)
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, 2 * weight.sum(0).float().expand(shape), atol=1e-4, rtol=1e-4)


def test_empty_matrices(backend: str) -> None:
    for out, columns in ((0, 64), (5, 0), (0, 0)):
        q = quantize(torch.zeros(out, columns))
        for rows in (1, 20):
            x = torch.randn(rows, columns, requires_grad=True)
            y = linear_4bit(x, q, torch.ones(out))
            assert torch.equal(y, torch.ones(rows, out))
            assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros(rows, columns))


def test_a_row_that_is_not_contiguous(backend: str) -> None:
    q, weight = make(10, 64)
    x = torch.randn(64, 12).t()
    assert_right(linear_4bit(x, q), x, weight.t())
    assert_right(linear_4bit(x[:, :].expand(3, 12, 64)[1], q), x, weight.t())


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_compute_in_float32(backend: str, dtype: torch.dtype, rows: int) -> None:
    q, _ = make(33, 128)
    x = torch.randn(rows, 128).to(dtype).requires_grad_()
    bias = torch.randn(33).to(dtype)
    y = linear_4bit(x, q, bias)
    assert y.dtype == dtype
    exact = linear_4bit(x.detach().float(), q, bias.float())
    assert torch.equal(y, exact.to(dtype))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.dtype == dtype


def test_autocast_changes_nothing(backend: str) -> None:
    q, _ = make(33, 128)
    x = torch.randn(20, 128, requires_grad=True)
    plain = linear_4bit(x, q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_4bit(x, q)
        (grad,) = torch.autograd.grad(cast.sum(), x)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)
    assert torch.equal(grad, torch.autograd.grad(plain.sum(), x)[0])


def test_gradcheck_of_the_reference() -> None:
    q, _ = make(5, 33)
    x = torch.randn(3, 33, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: linear_4bit(x, q, bias), (x, bias))


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(backend: str, double_quant: bool) -> None:
    q, _ = make(10, 33, double_quant)
    packed = (q.codes, q.absmax, q.absmax_scale, q.absmax_offset)
    x, bias = torch.randn(2, 3, 33, requires_grad=True), torch.randn(10, requires_grad=True)
    torch.library.opcheck(torch.ops.lilliput.linear_4bit.default, (x, *packed, bias, "nf4", 10))
    torch.library.opcheck(torch.ops.lilliput.linear_4bit_backward.default, (torch.randn(4, 10), *packed, "nf4", 33))


def test_backward_keeps_only_the_packed_tensors(backend: str) -> None:
    q, _ = make(64, 128)
    kept: list[Tensor] = []
    x = torch.randn(20, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_4bit(x, q, torch.randn(64, requires_grad=True))
    packed = {t.data_ptr() for t in (q.codes, q.absmax, q.absmax_scale, q.absmax_offset) if t is not None}
    assert {t.data_ptr() for t in kept} == packed


def test_frozen_input_gets_no_gradient(backend: str) -> None:
    q, _ = make(8, 64)
    bias = torch.zeros(8, requires_grad=True)
    linear_4bit(torch.randn(3, 64), q, bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [3.0] * 8


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_the_result_does_not_depend_on_threads(backend: str, rows: int) -> None:
    if backend == "reference":
        pytest.skip("torch's own products may round differently on another number of threads")
    q, _ = make(500, 1536)
    x = torch.randn(rows, 1536)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear_4bit(x, q))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_computes_too(backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch's own OpenMP threads do not survive a fork")
    q, _ = make(500, 1536)
    x = torch.randn(20, 1536)
    expected = linear_4bit(x, q)  # the parent's threads exist
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear_4bit(x, q), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_sizes_that_do_not_fit_are_refused(backend: str) -> None:
    q, _ = make(10, 64)
    with pytest.raises(FormatError, match=r"x is \[3, 63\], the quantized matrix \[10, 64\]"):
        linear_4bit(torch.randn(3, 63), q)
    with pytest.raises(FormatError, match=r"bias is \[9\]"):
        linear_4bit(torch.randn(3, 64), q, torch.zeros(9))
    with pytest.raises(FormatError, match="must be its second"):
        linear_4bit(torch.randn(3, 64), quantize(torch.randn(64)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_numbers_that_are_no_reals_are_refused(backend: str, dtype: torch.dtype) -> None:
    q, _ = make(10, 64)
    with pytest.raises(FormatError, match=f"x is {dtype}"):
        linear_4bit(torch.ones(3, 64, dtype=dtype), q)
