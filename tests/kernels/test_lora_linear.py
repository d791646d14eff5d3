"""`lora_linear` on both backends against float64, its gradients, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput import formats
from lilliput.errors import FormatError, UsageError
from lilliput.formats import QuantizedTensor
from lilliput.kernels import linear, lora_linear, quantize
from tests.kernels import fixed_point
from tests.nasty import NASTY, NOT_FINITE

# (out, in, r): whole tiles; rows that end inside a block; odd rows; r above in and out; one; r = 0
SHAPES = [(64, 128, 16), (33, 96, 4), (7, 33, 3), (5, 1, 8), (200, 576, 16), (31, 130, 1), (9, 64, 0)]
ROWS = [1, 2, 8, 9, 29, 300]
S = 1.75


def make(out: int, columns: int, r: int, double_quant: bool = True) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """A quantized random matrix, and A and B that ask for gradients."""
    draw = torch.Generator().manual_seed(out)
    q = quantize(torch.randn(out, columns, generator=draw), "nf4", double_quant)
    a, b = torch.randn(r, columns, generator=draw), torch.randn(out, r, generator=draw)
    return q, a.requires_grad_(), b.requires_grad_()


def assert_close(got: Tensor, expected: Tensor, magnitude: Tensor, terms: int, more: Tensor | float = 0.0) -> None:
    """To float32's rounding of sums of so many terms, of which the sum of magnitudes is given (and of subnormals)."""
    assert got.shape == expected.shape
    assert bool(((got.double() - expected).abs() <= (terms + 8) * (1.2e-7 * magnitude + 1e-44) + more).all())


def assert_right(x: Tensor, q: QuantizedTensor, a: Tensor, b: Tensor, bias: Tensor | None, backend: str) -> None:
    """Output and all gradients against the formula in float64."""
    more = fixed_point.bound(x, q, backend)
    y = lora_linear(x, q, a, b, S, bias)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    wanted = [t for t in (x, a, b, bias) if t is not None]
    got = dict(zip("xabc", torch.autograd.grad(y, wanted, grad), strict=False))
    w, x, a, b, g = (t.detach().double() for t in (formats.dequantize(q, torch.float64), x, a, b, grad))
    c = torch.zeros(w.shape[0]).double() if bias is None else bias.detach().double()
    (out, k), r, rows = w.shape, a.shape[0], x.shape[0]
    of = [(w, x, a, b, g, c), tuple(t.abs() for t in (w, x, a, b, g, c))]  # the value, and the sum of magnitudes
    assert_close(y, *(x @ w.T + S * x @ a.T @ b.T + c for w, x, a, b, g, c in of), k + r, more)
    assert_close(got["x"], *(g @ w + S * g @ b @ a for w, x, a, b, g, c in of), out + r)
    assert_close(got["a"], *(S * (g @ b).T @ x for w, x, a, b, g, c in of), out + rows)
    assert_close(got["b"], *(S * g.T @ (x @ a.T) for w, x, a, b, g, c in of), k + rows)
    if bias is not None:
        assert_close(got["c"], *(g.sum(0) for w, x, a, b, g, c in of), rows)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradients(backend: str, shape: tuple[int, int, int], double_quant: bool) -> None:
    q, a, b = make(*shape, double_quant)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], requires_grad=True)
        assert_right(x, q, a, b, torch.randn(shape[0], requires_grad=True), backend)
        assert_right(x, q, a, b, None, backend)


@pytest.mark.parametrize("name", [name for name, make in NASTY.items() if make().dim() == 2])
def test_nasty_inputs(backend: str, name: str) -> None:
    x = NASTY[name]().requires_grad_()
    q, a, b = make(40, x.shape[1], 4)
    assert_right(x, q, a, b, None, backend)
    if x.numel():
        q = quantize(x.detach())
        row = torch.randn(12, x.shape[1], requires_grad=True)
        assert_right(
            row, q, torch.randn_like(a).requires_grad_(), torch.randn(x.shape[0], 4, requires_grad=True), None, backend
        )


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_number_that_is_none_spoils_its_own_row_only(backend: str, value: float) -> None:
    q, a, b = make(20, 64, 4)
    for rows in (3, 20):
        x = torch.randn(rows, 64)
        clean = lora_linear(x, q, a, b, S)
        x[1, 5] = value
        y = lora_linear(x, q, a, b, S)
        assert not y[1].isfinite().any()
        assert torch.equal(y[torch.arange(rows) != 1], clean[torch.arange(rows) != 1])


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64), (2, 0, 64), (1, 1, 12, 64)])
def test_leading_sizes_are_kept(backend: str, shape: tuple[int, ...]) -> None:
    q, a, b = make(10, 64, 3)
    x = torch.randn(shape, requires_grad=True)
    y = lora_linear(x, q, a, b, S)
    flat = lora_linear(x.detach().reshape(-1, 64) if x.numel() else x.detach().new_empty(0, 64), q, a, b, S)
    assert y.shape == (*shape[:-1], 10)
    assert torch.equal(y.flatten(), flat.flatten())
    grads = torch.autograd.grad(y.sum(), (x, a, b))
    assert [g.shape for g in grads] == [x.shape, a.shape, b.shape]


@pytest.mark.parametrize("shape", [(6, 96), (2, 3, 96)])
def test_the_result_can_be_changed_in_place(backend: str, shape: tuple[int, ...]) -> None:
    q, a, b = make(33, 96, 4)
    x = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad((lora_linear(x, q, a, b, S) * 2).sum(), (x, a, b))
    y = lora_linear(x, q, a, b, S)
    y += 1.0
    y *= 2.0
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, a, b)), expected)


def test_empty_matrices(backend: str) -> None:
    for out, columns in ((0, 64), (5, 0), (0, 0)):
        q, a, b = make(out, columns, 2)
        for rows in (1, 20):
            x = torch.randn(rows, columns, requires_grad=True)
            y = lora_linear(x, q, a, b, S, torch.ones(out))
            assert torch.equal(y, torch.ones(rows, out))
            to_x, to_a, to_b = torch.autograd.grad(y.sum(), (x, a, b))
            assert not any(gradient.any() for gradient in (to_x, to_a, to_b))


def test_tensors_that_are_not_contiguous(backend: str) -> None:
    q, a, b = make(20, 64, 4)
    tall = torch.randn(64, 24).t().requires_grad_()
    assert_right(tall, q, a, b, None, backend)
    turned = a.detach().t().contiguous().t().requires_grad_()
    assert_right(torch.randn(24, 64, requires_grad=True), q, turned, b, None, backend)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_rounded_once(backend: str, dtype: torch.dtype, rows: int) -> None:
    q, a, b = make(33, 128, 4)
    x = torch.randn(rows, 128).to(dtype).requires_grad_()
    y = lora_linear(x, q, a, b, S)
    wide = x.detach().float().requires_grad_()
    exact = lora_linear(wide, q, a, b, S)
    assert torch.equal(y, exact.to(dtype))
    grad = torch.randn(rows, 33).to(dtype)
    for got, expected in zip(
        torch.autograd.grad(y, (x, a, b), grad), torch.autograd.grad(exact, (wide, a, b), grad.float()), strict=True
    ):
        assert torch.equal(got, expected.to(got.dtype))


def test_autocast_changes_nothing(backend: str) -> None:
    q, a, b = make(33, 128, 4)
    x = torch.randn(20, 128, requires_grad=True)
    plain = lora_linear(x, q, a, b, S)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = lora_linear(x, q, a, b, S)
        grads = torch.autograd.grad(cast.sum(), (x, a, b))
    assert torch.equal(plain, cast)
    for got, expected in zip(grads, torch.autograd.grad(plain.sum(), (x, a, b)), strict=True):
        assert torch.equal(got, expected)


def test_gradcheck_of_the_reference() -> None:
    q, _, _ = make(5, 33, 3)
    tensors = [torch.randn(shape).double().requires_grad_() for shape in ((4, 33), (3, 33), (5, 3), (5,))]
    assert torch.autograd.gradcheck(lambda x, a, b, bias: lora_linear(x, q, a, b, S, bias), tensors)


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(backend: str, double_quant: bool) -> None:
    q, a, b = make(10, 33, 3, double_quant)
    packed = (q.codes, q.absmax, q.absmax_scale, q.absmax_offset)
    x, bias = torch.randn(2, 3, 33, requires_grad=True), torch.randn(10, requires_grad=True)
    torch.library.opcheck(torch.ops.lilliput.lora_linear.default, (x, *packed, bias, a, b, S, "nf4", 0.0))
    grad, low = torch.randn(2, 3, 10), torch.randn(6, 3)
    torch.library.opcheck(torch.ops.lilliput.lora_linear_backward.default, (grad, *packed, low, a.detach(), "nf4"))


def kept_by(x: Tensor, q: QuantizedTensor, a: Tensor, b: Tensor) -> dict[int, Tensor]:
    """The tensors that backward keeps, by address."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, q, a, b, S)
    return {t.data_ptr(): t for t in kept}


def test_backward_keeps_what_was_given_and_r_numbers_a_row(backend: str) -> None:
    q, a, b = make(64, 128, 4)
    x = torch.randn(20, 128, requires_grad=True)
    given = [t for t in (x, a, b, q.codes, q.absmax, q.absmax_scale, q.absmax_offset) if t is not None]
    kept = kept_by(x, q, a, b)
    [low] = [t for address, t in kept.items() if address not in {t.data_ptr() for t in given}]
    assert len(kept) == len(given) + 1
    torch.testing.assert_close(low, S * x.detach() @ a.detach().T)
    frozen = kept_by(x, q, a.detach(), b.detach())
    assert frozen.keys() == {t.data_ptr() for t in given[1:]}


def test_only_what_asks_gets_a_gradient(backend: str) -> None:
    q, a, b = make(8, 64, 4)
    x = torch.randn(12, 64)
    expected = torch.autograd.grad(lora_linear(x, q, a, b, S).sum(), (a, b))
    for tensor, gradient, y in (
        (a, expected[0], lora_linear(x, q, a, b.detach(), S)),
        (b, expected[1], lora_linear(x, q, a.detach(), b, S)),
    ):
        (got,) = torch.autograd.grad(y.sum(), tensor)
        assert torch.equal(got, gradient)
    assert not lora_linear(x, q, a.detach(), b.detach(), S).requires_grad


@pytest.mark.parametrize("rows", [1, 7, 40, 1000])
def test_threads_change_no_more_than_torchs_rounding_of_the_update(backend: str, rows: int) -> None:
    # The base's product does not depend on threads; torch divides a thin product with A otherwise on more of them.
    q, a, b = make(500, 1536, 16)
    x, grad = torch.randn(rows, 1536, requires_grad=True), torch.randn(rows, 500)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = lora_linear(x, q, a, b, S)
            results.append((y, *torch.autograd.grad(y, (x, a, b), grad)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert (one - two).abs().max() <= 1e-6 * one.abs().max()


def test_sizes_that_do_not_fit_are_refused(backend: str) -> None:
    q, a, b = make(10, 64, 3)
    x = torch.randn(3, 64)
    with pytest.raises(FormatError, match=r"x is \[3, 63\], the quantized matrix \[10, 64\]"):
        lora_linear(x[:, :63], q, a, b, S)
    with pytest.raises(FormatError, match=r"bias is \[9\]"):
        lora_linear(x, q, a, b, S, torch.zeros(9))
    with pytest.raises(FormatError, match=r"A is \[3, 63\] and B \[10, 3\]; a quantized matrix \[10, 64\] needs"):
        lora_linear(x, q, a[:, :63], b, S)
    with pytest.raises(FormatError, match=r"\[r, 64\] and \[10, r\]"):
        lora_linear(x, q, a, b[:, :2], S)
    with pytest.raises(FormatError, match=r"B \[9, 3\]"):
        lora_linear(x, q, a, b[:9], S)


# ---- int8: the base's product rounds x, the update and all gradients do not ----


def make_int8(out: int, columns: int, r: int) -> tuple[QuantizedTensor, Tensor, Tensor]:
    q, a, b = make(out, columns, r)
    return quantize(formats.dequantize(q), "int8"), a, b


@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_its_own_product_and_the_update(backend: str, shape: tuple[int, int, int], threshold: float) -> None:
    q, a, b = make_int8(*shape)
    for rows in ROWS[:4]:
        x = torch.randn(rows, shape[1], requires_grad=True)
        bias = torch.randn(shape[0], requires_grad=True)
        y = lora_linear(x, q, a, b, S, bias, threshold)
        with torch.no_grad():
            expected = linear(x, q, bias, threshold).double() + S * x.double() @ a.double().T @ b.double().T
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * shape[1])
        grad = torch.randn(y.shape)
        got = torch.autograd.grad(y, (x, a, b, bias), grad)
        w, xd, ad, bd, g = (t.detach().double() for t in (formats.dequantize(q), x, a, b, grad))
        formulas = (g @ w + S * g @ bd @ ad, S * (g @ bd).T @ xd, S * g.T @ (xd @ ad.T), g.sum(0))
        for gradient, formula in zip(got, formulas, strict=True):
            torch.testing.assert_close(gradient.double(), formula, rtol=1e-5, atol=1e-5 * max(shape))


def test_opcheck_of_int8(backend: str) -> None:
    q, a, b = make_int8(10, 33, 3)
    packed = (q.codes, q.absmax, None, None)
    x, bias = torch.randn(2, 3, 33, requires_grad=True), torch.randn(10, requires_grad=True)
    torch.library.opcheck(torch.ops.lilliput.lora_linear.default, (x, *packed, bias, a, b, S, "int8", 1.0))
    grad, low = torch.randn(2, 3, 10), torch.randn(6, 3)
    torch.library.opcheck(torch.ops.lilliput.lora_linear_backward.default, (grad, *packed, low, a.detach(), "int8"))


def test_gradcheck_of_int8_in_float64() -> None:
    q, _, _ = make_int8(5, 33, 3)
    tensors = [torch.randn(shape).double().requires_grad_() for shape in ((4, 33), (3, 33), (5, 3), (5,))]
    assert torch.autograd.gradcheck(lambda x, a, b, bias: lora_linear(x, q, a, b, S, bias, 1.0), tensors)


def test_backward_of_int8_keeps_what_was_given_and_r_numbers_a_row(backend: str) -> None:
    q, a, b = make_int8(64, 128, 4)
    x = torch.randn(20, 128, requires_grad=True)
    given = {t.data_ptr() for t in (x, a, b, q.codes, q.absmax)}
    assert len(kept_by(x, q, a, b).keys() - given) == 1


def test_a_threshold_belongs_to_int8(backend: str) -> None:
    q, a, b = make(10, 64, 3)
    with pytest.raises(UsageError, match="nf4 has no threshold"):
        lora_linear(torch.randn(3, 64), q, a, b, S, threshold=6.0)
    q, a, b = make_int8(10, 64, 3)
    with pytest.raises(UsageError, match="threshold=-2"):
        lora_linear(torch.randn(3, 64), q, a, b, S, threshold=-2.0)
