"""`swiglu` on both backends against float64 on every kind of number, its gradients, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.kernels import core, swiglu, use
from tests.nasty import NASTY

WIDTHS = [1, 7, 63, 65, 1536]
INF, NAN = float("inf"), float("nan")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, expected: Tensor, magnitude: Tensor, more: Tensor) -> None:
    """To a few roundings of float32 at this magnitude, and `more` from subnormal numbers on the way."""
    assert got.shape == expected.shape
    rounded = expected.to(got.dtype)
    off = (got.double() - expected).abs() > 1e-6 * magnitude.abs() + more
    assert not (off & ~(got == rounded) & ~(got.isnan() & rounded.isnan())).any()


def assert_right(gate: Tensor, up: Tensor, backend: str) -> None:
    """Product and both gradients against the formula in float64."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    out = swiglu(gate, up)
    grad = draw(*out.shape, seed=3)
    to_gate, to_up = torch.autograd.grad(out, (gate, up), grad)
    g, u, y = gate.detach().double(), up.detach().double(), grad.double()
    s, rest = torch.sigmoid(g), torch.sigmoid(-g)
    # What torch's float32 silu loses below -87, where exp(-g) is no float32: up to 88 * 2^-126 of silu.
    lost = 1e-44 if backend == "core" else 1e-36
    more = lost * (1 + g.abs().clamp(max=200)) * (1 + u.abs()) * (1 + y.abs())
    assert_close(out, g * s * u, g * s * u, more)
    assert_close(to_up, y * g * s, y * g * s, more)
    assert_close(to_gate, y * s * (1 + g * rest) * u, y * s * (1 + g.abs() * rest) * u, more)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_random_numbers_of_every_width(backend: str, rows: int, width: int) -> None:
    assert_right(4 * draw(rows, width), draw(rows, width, seed=1), backend)


@pytest.mark.parametrize("name", NASTY)
def test_nasty_inputs(backend: str, name: str) -> None:
    x = NASTY[name]()
    assert_right(x, draw(*x.shape), backend)
    assert_right(draw(*x.shape), x, backend)
    assert_right(x, x, backend)


def test_huge_tiny_and_subnormal_numbers(backend: str) -> None:
    sizes = torch.tensor([0.0, 1e-45, 1e-40, 1e-30, 1e-3, 1.0, 17.0, 80.0, 87.5, 89.0, 95.0, 104.0, 200.0, 1e10, 3e38])
    both = torch.cat([sizes, -sizes])
    gate, up = (t.flatten() for t in torch.meshgrid(both, both, indexing="ij"))
    assert_right(gate, up, backend)


@pytest.mark.skipif(not core.status().loaded, reason="the compiled core is not loaded")
def test_the_core_knows_gates_below_minus_88() -> None:  # where torch's float32 silu is zero
    gate = torch.tensor([-89.0, -95.0])
    expected = torch.nn.functional.silu(gate.double())
    with use("core"):
        torch.testing.assert_close(swiglu(gate, torch.ones(2)).double(), expected, rtol=1e-4, atol=0)


def test_what_is_no_number_stays_where_it_is(backend: str) -> None:
    gate = torch.tensor([INF, INF, -INF, NAN, 1.0, 1.0, 0.0, -1.0]).repeat_interleave(3)
    up = torch.tensor([2.0, -2.0, 2.0, 2.0, NAN, INF, INF, INF]).repeat_interleave(3)
    gate[2::3], up[2::3] = 0.5, 0.25  # neighbours in the same vector
    out = swiglu(gate, up)
    assert torch.equal(out[2::3], swiglu(gate[2::3], up[2::3]))
    expected = torch.tensor([INF, -INF, NAN, NAN, NAN, INF, NAN, -INF])
    torch.testing.assert_close(out[0::3], expected, equal_nan=True)
    torch.testing.assert_close(out[0::3], torch.nn.functional.silu(gate[0::3]) * up[0::3], equal_nan=True)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 64), (2, 3, 65), (1, 1, 12, 7)])
def test_any_shape(backend: str, shape: tuple[int, ...]) -> None:
    assert_right(draw(*shape), draw(*shape, seed=1), backend)


def test_tensors_that_are_not_contiguous(backend: str) -> None:
    whole = draw(64, 130)
    for gate, up in ((whole[:, :65], whole[:, 65:]), (whole.t()[:65], draw(65, 64)), (draw(1, 7).expand(9, 7),) * 2):
        if backend == "core":  # torch's own silu differs in its last bit with the strides
            assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
        assert_right(gate, up, backend)
    gate = draw(3, 65).requires_grad_()
    (summed,) = torch.autograd.grad(swiglu(gate, gate).sum(), gate)  # an expanded gradient
    (plain,) = torch.autograd.grad(swiglu(gate, gate), gate, torch.ones(3, 65))
    assert torch.equal(summed, plain)


@pytest.mark.parametrize("up_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_rounded_once(backend: str, dtype: torch.dtype, up_dtype: torch.dtype) -> None:
    gate, up = (4 * draw(5, 1300)).to(dtype), draw(5, 1300, seed=1).to(up_dtype)
    grad = draw(5, 1300, seed=2).to(dtype)
    half = [gate.requires_grad_(), up.requires_grad_()]
    wide = [t.detach().float().requires_grad_() for t in half]
    y, exact = swiglu(*half), swiglu(*wide)
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))
    expected = torch.autograd.grad(exact, wide, grad.float())
    for got, want in zip(torch.autograd.grad(y, half, grad), expected, strict=True):
        assert torch.equal(got, want.to(got.dtype))


def test_autocast_changes_nothing(backend: str) -> None:
    gate, up = draw(20, 65).requires_grad_(), draw(20, 65, seed=1).requires_grad_()
    plain = swiglu(gate, up)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = swiglu(gate, up)
        grads = torch.autograd.grad(cast.sum(), (gate, up))
    assert torch.equal(plain, cast)
    for got, expected in zip(grads, torch.autograd.grad(plain.sum(), (gate, up)), strict=True):
        assert torch.equal(got, expected)


def test_gradcheck_of_the_reference() -> None:
    gate, up = ((3 * draw(4, 7, seed=seed)).double().requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    assert torch.equal(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    gate, up = draw(2, 3, 65).to(dtype).requires_grad_(), draw(2, 65, 3).mT.to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.lilliput.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.lilliput.swiglu_backward.default, (draw(2, 3, 65), gate.detach(), up.detach()))


def test_backward_keeps_gate_and_up_and_nothing_else(backend: str) -> None:
    gate, up = draw(20, 65).requires_grad_(), draw(20, 65, seed=1).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_only_what_asks_gets_a_gradient(backend: str) -> None:
    gate, up = draw(3, 7).requires_grad_(), draw(3, 7, seed=1).requires_grad_()
    both = torch.autograd.grad(swiglu(gate, up).sum(), (gate, up))
    (to_gate,) = torch.autograd.grad(swiglu(gate, up.detach()).sum(), gate)
    (to_up,) = torch.autograd.grad(swiglu(gate.detach(), up).sum(), up)
    assert torch.equal(to_gate, both[0])
    assert torch.equal(to_up, both[1])
    assert not swiglu(gate.detach(), up.detach()).requires_grad


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_threads_change_nothing(backend: str, rows: int) -> None:
    gate, up = draw(rows, 1536).requires_grad_(), draw(rows, 1536, seed=1).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = swiglu(gate, up)
            results.append((out, *torch.autograd.grad(out.sum(), (gate, up))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_what_does_not_fit_is_refused(backend: str) -> None:
    with pytest.raises(FormatError, match=r"gate is \[3, 7\] and up \[3, 8\]"):
        swiglu(torch.ones(3, 7), torch.ones(3, 8))
    with pytest.raises(FormatError, match=r"gate is \[3, 7\] and up \[7\]"):
        swiglu(torch.ones(3, 7), torch.ones(7))
    with pytest.raises(FormatError, match=r"gate is torch.int64"):
        swiglu(torch.ones(3, dtype=torch.int64), torch.ones(3))
    with pytest.raises(FormatError, match=r"up is torch.complex64"):
        swiglu(torch.ones(3), torch.ones(3, dtype=torch.complex64))
