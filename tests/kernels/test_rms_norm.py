"""`rms_norm` on both backends against float64 and transformers' LlamaRMSNorm, its gradients, and what it keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lilliput.errors import FormatError
from lilliput.kernels import rms_norm
from tests.nasty import NASTY, NOT_FINITE

WIDTHS = [1, 7, 63, 65, 1536]
EPS = 1e-5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llama(weight: Tensor, eps: float = EPS) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(weight.shape[0], eps)
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    return norm


def assert_close(got: Tensor, expected: Tensor, magnitude: Tensor, ulps: float) -> None:
    """To so many roundings of float32 at this magnitude, and of subnormals, which r = 1 / sqrt(EPS) may multiply."""
    assert got.shape == expected.shape
    assert bool(((got.double() - expected).abs() <= ulps * (1.2e-7 * magnitude + 5e-43)).all())


def assert_right(x: Tensor, weight: Tensor, eps: float = EPS) -> None:
    """Result and both gradients against the formula in float64."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = rms_norm(x, weight, eps)
    grad = draw(*y.shape, seed=3)
    to_x, to_weight = torch.autograd.grad(y, (x, weight), grad)
    x, weight, grad = (t.detach().double() for t in (x, weight, grad))
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    few = 12 + x.shape[-1] / 32  # sums of n terms, in at least 16 partial sums
    assert_close(y, weight * (x * r), (weight * (x * r)).abs(), few)
    first, terms = r * weight * grad, weight * grad * (x * r)
    expected = first - (x * r) * r * terms.mean(-1, keepdim=True)
    assert_close(to_x, expected, first.abs() + (x * r).abs() * r * terms.abs().mean(-1, keepdim=True), few)
    rows = grad * (x * r)
    flat = rows.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    assert_close(to_weight, flat.sum(0), flat.abs().sum(0), few + flat.shape[0])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 40, 1025])
def test_random_numbers_of_every_width(backend: str, rows: int, width: int) -> None:
    assert_right(draw(rows, width), draw(width, seed=1))


@pytest.mark.parametrize("name", [name for name, make in NASTY.items() if make().dim() > 0])
def test_nasty_inputs(backend: str, name: str) -> None:
    x = NASTY[name]()
    assert_right(x, draw(x.shape[-1], seed=1))
    if x.numel():
        assert_right(draw(3, x.numel()), x.flatten())


@pytest.mark.parametrize("size", [1e17, 1e10, 1e-3, 1e-10, 1e-30, 1e-41])
def test_huge_tiny_and_subnormal_rows(backend: str, size: float) -> None:
    x = draw(5, 65)
    x[1::2] *= size
    assert_right(x, draw(65, seed=1))
    assert_right(x, size * draw(65, seed=1))


def test_a_row_whose_squares_overflow_is_zero_as_llamas_is(backend: str) -> None:
    x, weight = draw(3, 65), draw(65, seed=1)
    x[1, 3] = 1e25
    y = rms_norm(x, weight, EPS)
    assert not y[1].any()
    assert not llama(weight)(x)[1].any()
    assert torch.equal(y[::2], rms_norm(x[::2], weight, EPS))


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_number_that_is_none_spoils_its_own_row_only(backend: str, value: float) -> None:
    x, weight = draw(5, 65), draw(65, seed=1)
    clean = rms_norm(x, weight, EPS)
    x[1, 7] = value
    y = rms_norm(x, weight, EPS)
    assert y[1, 7].isnan()
    torch.testing.assert_close(y, llama(weight)(x), equal_nan=True)
    others = torch.arange(5) != 1
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("width", WIDTHS)
def test_as_llamas_norm_with_autograd(backend: str, width: int) -> None:
    x, grad = draw(2, 9, width).requires_grad_(), draw(2, 9, width, seed=2)
    norm = llama(draw(width, seed=1))
    y, theirs = rms_norm(x, norm.weight, EPS), norm(x)
    torch.testing.assert_close(y, theirs, rtol=1e-6, atol=1e-7)
    got, expected = (torch.autograd.grad(out, (x, norm.weight), grad) for out in (y, theirs))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_roundings_are_llamas(backend: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = draw(6, 1300).to(dtype), draw(1300, seed=1).to(weight_dtype)
    y, theirs = rms_norm(x, weight, EPS), llama(weight)(x)
    assert y.dtype == theirs.dtype
    if dtype == torch.float32:
        torch.testing.assert_close(y, theirs, rtol=1e-6, atol=1e-7)
    else:  # equal, but where the statistics' last bit moves the normed number over an edge: one unit of it
        assert (y != theirs).float().mean() < 0.005
        torch.testing.assert_close(y.float(), theirs.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_are_rounded_once(backend: str, dtype: torch.dtype) -> None:
    half = [draw(20, 65).to(dtype).requires_grad_(), draw(65, seed=1).to(dtype).requires_grad_()]
    wide = [t.detach().float().requires_grad_() for t in half]
    grad = draw(20, 65, seed=2).to(dtype)
    expected = torch.autograd.grad(rms_norm(*wide, EPS), wide, grad.float())
    for got, want in zip(torch.autograd.grad(rms_norm(*half, EPS), half, grad), expected, strict=True):
        assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("shape", [(7,), (0, 7), (3, 0), (0,), (2, 0, 7), (2, 3, 65), (1, 1, 12, 7)])
def test_any_shape(backend: str, shape: tuple[int, ...]) -> None:
    assert_right(draw(*shape), draw(shape[-1], seed=1))


def test_tensors_that_are_not_contiguous(backend: str) -> None:
    weight = draw(65, seed=1)
    for x in (draw(65, 40).t(), draw(20, 130)[:, 65:], draw(65).expand(9, 65), draw(4, 65, 5).mT):
        if backend == "core":  # torch sums in another order where strides are others
            assert torch.equal(rms_norm(x, weight, EPS), rms_norm(x.contiguous(), weight, EPS))
        assert_right(x, weight)
    strided = draw(130, seed=1)[::2]
    assert torch.equal(rms_norm(x, strided, EPS), rms_norm(x, strided.contiguous(), EPS))
    x = draw(3, 65).requires_grad_()
    (summed,) = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), x)  # an expanded gradient
    (plain,) = torch.autograd.grad(rms_norm(x, weight, EPS), x, torch.ones(3, 65))
    assert torch.equal(summed, plain)


def test_autocast_changes_nothing(backend: str) -> None:
    x, weight = draw(20, 65).requires_grad_(), draw(65, seed=1).requires_grad_()
    plain = rms_norm(x, weight, EPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rms_norm(x, weight, EPS)
        grads = torch.autograd.grad(cast.sum(), (x, weight))
    assert torch.equal(plain, cast)
    for got, expected in zip(grads, torch.autograd.grad(plain.sum(), (x, weight)), strict=True):
        assert torch.equal(got, expected)


def test_gradcheck_of_the_reference() -> None:
    x, weight = draw(4, 7).double().requires_grad_(), draw(7, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight.detach(), 0.1), (1e-3 * x.detach()).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    x, weight = draw(2, 65, 3).mT.to(dtype).requires_grad_(), draw(65).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.lilliput.rms_norm.default, (x, weight, EPS))
    for wants_weight in (False, True):
        given = (draw(2, 3, 65).to(dtype), x.detach(), weight.detach(), EPS, wants_weight)
        torch.library.opcheck(torch.ops.lilliput.rms_norm_backward.default, given)


def test_backward_keeps_x_and_weight_and_nothing_else(backend: str) -> None:
    x, weight = draw(20, 65).requires_grad_(), draw(65, seed=1).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]


def test_only_what_asks_gets_a_gradient(backend: str) -> None:
    x, weight = draw(20, 65).requires_grad_(), draw(65, seed=1).requires_grad_()
    both = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), (x, weight))
    (to_x,) = torch.autograd.grad(rms_norm(x, weight.detach(), EPS).sum(), x)
    (to_weight,) = torch.autograd.grad(rms_norm(x.detach(), weight, EPS).sum(), weight)
    assert torch.equal(to_x, both[0])
    assert torch.equal(to_weight, both[1])
    assert not rms_norm(x.detach(), weight.detach(), EPS).requires_grad


@pytest.mark.parametrize("rows", [1, 40, 700])
def test_threads_change_nothing(rows: int) -> None:
    x, weight = draw(rows, 1531).requires_grad_(), draw(1531, seed=1).requires_grad_()
    grad = draw(rows, 1531, seed=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = rms_norm(x, weight, EPS)
            results.append((y, *torch.autograd.grad(y, (x, weight), grad)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_what_does_not_fit_is_refused(backend: str) -> None:
    with pytest.raises(FormatError, match=r"x is \[3, 7\], weight \[8\]"):
        rms_norm(torch.ones(3, 7), torch.ones(8), EPS)
    with pytest.raises(FormatError, match=r"x is \[3, 7\], weight \[1, 7\]"):
        rms_norm(torch.ones(3, 7), torch.ones(1, 7), EPS)
    with pytest.raises(FormatError, match=r"x is \[\], weight \[1\]"):
        rms_norm(torch.tensor(1.0), torch.ones(1), EPS)
    with pytest.raises(FormatError, match=r"x is torch.int64"):
        rms_norm(torch.ones(3, dtype=torch.int64), torch.ones(3), EPS)
    with pytest.raises(FormatError, match=r"weight is torch.int32"):
        rms_norm(torch.ones(3), torch.ones(3, dtype=torch.int32), EPS)
