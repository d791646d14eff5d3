"""`linear_grouped` on both backends against float64, its gradients, what it keeps for backward; dequantizing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput import formats
from lilliput.errors import FormatError
from lilliput.formats import GroupedTensor, get_format
from lilliput.formats.grouped import group_count, grouped
from lilliput.kernels import dequantize, exact, linear, linear_4bit, linear_grouped, lora_linear, quantize
from tests.kernels import fixed_point
from tests.nasty import NASTY, NOT_FINITE

BITS = ["int4", "int3", "int2", "int8g"]
NAMES = [name + group for name in BITS for group in ("", "-g32", "-g64", "-row")]
# (out, in): whole tiles; rows that end inside a group, inside a run; thin; deeper than a tile.
SHAPES = [(64, 128), (33, 96), (7, 33), (31, 130), (5, 1), (1, 320), (24, 650), (600, 70)]
ROWS = [1, 2, 5, 8, 9, 29]


def make(
    out: int, columns: int, name: str = "int4", *, symmetric: bool = False, ordered: bool = False,
    dtype: torch.dtype = torch.float16,
) -> tuple[GroupedTensor, Tensor]:  # fmt: skip
    """A random matrix in a grouped format, and it dequantized in float64."""
    row, draw = get_format(name), torch.Generator().manual_seed(out)
    groups = group_count(columns, row.block)
    q = grouped(
        torch.randint(0, 2**row.bits, (out, columns), dtype=torch.uint8, generator=draw),
        torch.randn(out, groups, generator=draw).to(dtype),
        None if symmetric else torch.randint(0, 2**row.bits, (out, groups), generator=draw),
        row,
        torch.randperm(columns, generator=draw) if ordered else None,
    )
    return q, formats.dequantize(q, torch.float64)


def assert_right(
    got: Tensor, left: Tensor, right: Tensor, added: Tensor | None = None, more: Tensor | float = 0.0
) -> None:
    """`got` equals left @ right + added to float32's rounding of a sum of its terms' magnitudes, and to `more`."""
    expected = left.double() @ right + (0 if added is None else added.double())
    magnitude = left.double().abs() @ right.abs() + (0 if added is None else added.double().abs())
    assert bool(((got.double() - expected).abs() <= 1.2e-7 * (right.shape[0] + 4) * magnitude + more).all())


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_product_and_gradients(backend: str, name: str, symmetric: bool, ordered: bool) -> None:
    for shape in SHAPES:
        q, weight = make(*shape, name, symmetric=symmetric, ordered=ordered)
        for rows in ROWS:
            x = torch.randn(rows, shape[1], requires_grad=True)
            bias = torch.randn(shape[0], requires_grad=True)
            y = linear_grouped(x, q, bias)
            assert_right(y, x, weight.t(), bias, fixed_point.bound(x, q, backend))
            grad = torch.randn(rows, shape[0])
            to_x, to_bias = torch.autograd.grad(y, (x, bias), grad)
            assert_right(to_x, grad, weight)
            torch.testing.assert_close(to_bias, grad.sum(0))
            assert torch.equal(linear(x, q, bias), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BITS)
def test_scales_of_each_type(backend: str, name: str, dtype: torch.dtype) -> None:
    q, weight = make(33, 200, name, dtype=dtype)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 200, requires_grad=True)
        y = linear_grouped(x, q)
        assert_right(y, x, weight.t(), more=fixed_point.bound(x, q, backend))
        assert_right(torch.autograd.grad(y.sum(), x)[0], torch.ones(rows, 33), weight)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_dequantizing_equals_the_reference(backend: str, name: str, ordered: bool) -> None:
    for shape in SHAPES:
        for scales in (torch.float16, torch.float32):
            q, _ = make(*shape, name, symmetric=not ordered, ordered=ordered, dtype=scales)
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                got = dequantize(q, dtype)
                assert got.dtype == dtype
                assert torch.equal(got, formats.dequantize(q, dtype))


@pytest.mark.parametrize("name", ["int4", "int8g-g32"])
@pytest.mark.parametrize("nasty", [name for name, made in NASTY.items() if made().dim() == 2 and made().numel()])
def test_nasty_inputs(backend: str, nasty: str, name: str) -> None:
    x = NASTY[nasty]()
    weight = quantize(x, name)
    dense = formats.dequantize(weight, torch.float64)
    for left in (x, x[:1], torch.randn(12, x.shape[1])):
        y = linear_grouped(left, weight)
        assert_right(y, left, dense.t(), more=fixed_point.bound(left, weight, backend) + 1e-43)


@pytest.mark.parametrize("factor", [1e-30, 1e-26, 1e-20, 1.0, 1e20, 1e26])
def test_one_row_of_any_size(backend: str, factor: float) -> None:
    q, weight = make(33, 300)
    x = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)) * factor
    x[0, 128:256] = 0
    x[0, 270] *= 300  # one huge value in its group
    assert_right(linear_grouped(x, q), x, weight.t(), more=fixed_point.bound(x, q, backend))
    error = (linear_grouped(x, q).double() - x.double() @ weight.t()).norm() / (x.double() @ weight.t()).norm()
    assert error < 2e-4


@pytest.mark.parametrize("columns", [64, 576, 100])
def test_one_row_in_float32_where_that_is_asked_for(backend: str, columns: int) -> None:
    q, weight = make(33, columns)
    x = torch.randn(1, columns)
    with exact():
        assert_right(linear_grouped(x, q), x, weight.t())
        both = linear_grouped(x.expand(2, columns), q)
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_number_that_is_none_spoils_its_own_row_only(backend: str, value: float) -> None:
    q, _ = make(33, 200, "int8g")
    for rows in (1, 5, 20):
        x = torch.randn(rows, 200)
        x[0, 77] = value
        y = linear_grouped(x, q)
        touched = formats.dequantize(q)[:, 77] != 0
        assert not y[0, touched].isfinite().any()
        assert y[1:].isfinite().all()


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64), (2, 0, 64), (1, 1, 1, 64)])
@pytest.mark.parametrize("ordered", [False, True])
def test_leading_sizes_are_kept(backend: str, shape: tuple[int, ...], ordered: bool) -> None:
    q, weight = make(10, 64, ordered=ordered)
    x = torch.randn(shape, requires_grad=True)
    y = linear_grouped(x, q, torch.zeros(10, requires_grad=True))
    assert y.shape == (*shape[:-1], 10)
    flat = x.detach().reshape(-1, 64)
    assert_right(y.reshape(-1, 10), flat, weight.t(), more=fixed_point.bound(flat, q, backend))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).float().expand(shape), atol=1e-3, rtol=1e-4)


def test_the_result_can_be_changed_in_place(backend: str) -> None:
    q, weight = make(10, 64)
    for bias in (None, torch.zeros(10)):
        x = torch.randn(2, 3, 64, requires_grad=True)
        y = linear_grouped(x, q, bias)
        y += 1.0
        y *= 2.0
        torch.testing.assert_close(y, (2 * (x.double() @ weight.t() + 1)).float(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["int4", "int3-row"])
def test_empty_matrices(backend: str, name: str) -> None:
    for out, columns in ((0, 64), (5, 0), (0, 0)):
        q = quantize(torch.zeros(out, columns), name)
        for rows in (1, 20):
            x = torch.randn(rows, columns, requires_grad=True)
            y = linear_grouped(x, q, torch.ones(out))
            assert torch.equal(y, torch.ones(rows, out))
            assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros(rows, columns))


def test_a_row_that_is_not_contiguous(backend: str) -> None:
    q, weight = make(10, 64)
    x = torch.randn(64, 12).t()
    assert_right(linear_grouped(x, q), x, weight.t())


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_compute_in_float32(backend: str, dtype: torch.dtype, rows: int) -> None:
    q, _ = make(33, 128, ordered=True)
    x = torch.randn(rows, 128).to(dtype).requires_grad_()
    bias = torch.randn(33).to(dtype)
    y = linear_grouped(x, q, bias)
    assert y.dtype == dtype
    assert torch.equal(y, linear_grouped(x.detach().float(), q, bias.float()).to(dtype))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.dtype == dtype


def test_autocast_changes_nothing(backend: str) -> None:
    q, _ = make(33, 128)
    x = torch.randn(20, 128, requires_grad=True)
    plain = linear_grouped(x, q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_grouped(x, q)
        (grad,) = torch.autograd.grad(cast.sum(), x)
    assert torch.equal(plain, cast)
    assert torch.equal(grad, torch.autograd.grad(plain.sum(), x)[0])


@pytest.mark.parametrize("ordered", [False, True])
def test_gradcheck_in_float64(ordered: bool) -> None:
    q, _ = make(5, 33, ordered=ordered)
    x = torch.randn(3, 33, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: linear_grouped(x, q, bias), (x, bias))


@pytest.mark.parametrize(("symmetric", "ordered"), [(False, False), (True, True)])
def test_opcheck(backend: str, symmetric: bool, ordered: bool) -> None:
    q, _ = make(10, 33, "int3-g32", symmetric=symmetric, ordered=ordered)
    ops = torch.ops.lilliput
    x, bias = torch.randn(2, 3, 33, requires_grad=True), torch.randn(10, requires_grad=True)
    torch.library.opcheck(ops.linear_grouped.default, (x, *q.packed, bias, q.format.name, 10))
    torch.library.opcheck(ops.linear_grouped_backward.default, (torch.randn(4, 10), *q.packed, q.format.name, 33))
    torch.library.opcheck(ops.dequantize_grouped.default, (*q.packed, q.format.name, [10, 33], torch.bfloat16))


def test_backward_keeps_only_the_packed_tensors(backend: str) -> None:
    q, _ = make(64, 128, ordered=True)
    kept: list[Tensor] = []
    x = torch.randn(20, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_grouped(x, q, torch.randn(64, requires_grad=True))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in q.packed if t is not None}


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_the_result_does_not_depend_on_threads(backend: str, rows: int) -> None:
    if backend == "reference":
        pytest.skip("torch's own products may round differently on another number of threads")
    q, _ = make(500, 1500)
    x = torch.randn(rows, 1500)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear_grouped(x, q))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- with a low-rank update ----


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", [*BITS, "int4-row"])
def test_a_low_rank_update_beside_it(backend: str, name: str, ordered: bool) -> None:
    for out, columns, r in ((64, 128, 16), (33, 96, 4), (7, 33, 3), (31, 130, 1), (9, 64, 0)):
        q, weight = make(out, columns, name, ordered=ordered)
        draw = torch.Generator().manual_seed(r)
        a = torch.randn(r, columns, generator=draw, requires_grad=True)
        b = torch.randn(out, r, generator=draw, requires_grad=True)
        for rows in (1, 8, 9, 40):
            x = torch.randn(rows, columns, requires_grad=True)
            bias = torch.randn(out, requires_grad=True)
            y = lora_linear(x, q, a, b, 1.5, bias)
            xd, ad, bd, cd = (t.detach().double() for t in (x, a, b, bias))
            expected = xd @ weight.t() + 1.5 * xd @ ad.t() @ bd.t() + cd
            more = fixed_point.bound(x, q, backend)
            assert bool(((y.double() - expected).abs() <= more + 1e-5 * (1 + expected.abs().max())).all())
            g = torch.randn(rows, out)
            got = torch.autograd.grad(y, (x, a, b, bias), g)
            gd = g.double()
            formulas = (gd @ weight + 1.5 * gd @ bd @ ad, 1.5 * (gd @ bd).T @ xd, 1.5 * gd.T @ (xd @ ad.T), gd.sum(0))
            for gradient, formula in zip(got, formulas, strict=True):
                scale = float(formula.abs().max()) if formula.numel() else 0.0
                torch.testing.assert_close(gradient.double(), formula, rtol=1e-5, atol=1e-5 * scale)


def test_opcheck_with_a_low_rank_update(backend: str) -> None:
    q, _ = make(10, 33, "int4-g32", symmetric=True, ordered=True)
    x, bias = torch.randn(2, 3, 33, requires_grad=True), torch.randn(10, requires_grad=True)
    a, b = torch.randn(3, 33, requires_grad=True), torch.randn(10, 3, requires_grad=True)
    ops = torch.ops.lilliput
    torch.library.opcheck(ops.lora_linear.default, (x, *q.packed, bias, a, b, 1.5, q.format.name, 0.0))
    grad, low = torch.randn(2, 3, 10), torch.randn(6, 3)
    torch.library.opcheck(ops.lora_linear_backward.default, (grad, *q.packed, low, a.detach(), q.format.name))


# ---- what does not fit ----


def test_sizes_that_do_not_fit_are_refused(backend: str) -> None:
    q, _ = make(10, 64)
    with pytest.raises(FormatError, match=r"x is \[3, 63\], the quantized matrix \[10, 64\]"):
        linear_grouped(torch.randn(3, 63), q)
    with pytest.raises(FormatError, match=r"bias is \[9\]"):
        linear_grouped(torch.randn(3, 64), q, torch.zeros(9))
    with pytest.raises(FormatError, match="must be its second"):
        linear_grouped(torch.randn(3, 64), quantize(torch.randn(64), "int4"))
    with pytest.raises(FormatError, match=r"x is torch\.int64"):
        linear_grouped(torch.ones(3, 64, dtype=torch.int64), q)


def test_a_product_of_another_kind_is_refused(backend: str) -> None:
    x = torch.randn(3, 64)
    with pytest.raises(FormatError, match="the matrix is in nf4, by blocks; this product takes groups"):
        linear_grouped(x, quantize(torch.randn(10, 64)))
    with pytest.raises(FormatError, match="the matrix is in int4, by groups; this product takes blocks"):
        linear_4bit(x, make(10, 64)[0])


def test_an_order_beyond_the_columns_is_refused(backend: str) -> None:
    """A file may say so; nothing outside of x is read or written."""
    q, _ = make(10, 64, ordered=True)
    wrong: dict[str, Any] = dict(zip(("codes", *q.CONSTANTS), q.packed, strict=True))
    wrong["order"] = torch.full((64,), 64, dtype=torch.int32)
    broken = GroupedTensor(q.format, q.shape, **wrong)
    for rows in (1, 20):
        with pytest.raises((IndexError, RuntimeError)):
            linear_grouped(torch.randn(rows, 64), broken)
    with pytest.raises((IndexError, RuntimeError)):
        dequantize(broken)
