"""Groups of rows against the formula, number by number; what quantizing to the nearest promises; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.errors import FormatError, UsageError
from lilliput.formats import FORMATS, ROW, GroupedTensor, dequantize, get_format, quantize
from lilliput.formats.grouped import dequantize_groups, group_count, grouped, quantize_groups, unpack_codes
from tests.nasty import NASTY, NOT_FINITE

NAMES = [f"{bits}{group}" for bits in ("int4", "int3", "int2", "int8g") for group in ("", "-g32", "-g64", "-row")]


def parts(name: str, out: int, columns: int, ordered: bool = False) -> dict[str, Any]:
    """Random codes, scales and zeros of a matrix, as `grouped` takes them."""
    row, draw = get_format(name), torch.Generator().manual_seed(out)
    groups = group_count(columns, row.block)
    return {
        "codes": torch.randint(0, 2**row.bits, (out, columns), dtype=torch.uint8, generator=draw),
        "scale": torch.rand(out, groups, generator=draw).half(),
        "zero": torch.randint(0, 2**row.bits, (out, groups), generator=draw),
        "format": name,
        "order": torch.randperm(columns, generator=draw) if ordered else None,
    }


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_number_is_its_scale_times_its_code_less_the_zero(name: str, ordered: bool) -> None:
    given = parts(name, 3, 150, ordered)
    size = get_format(name).block or 150
    for zero in (given["zero"], None):
        q = grouped(**{**given, "zero": zero})
        values = dequantize_groups(q, torch.float64)
        for n, j in ((0, 0), (1, 31), (2, 32), (1, 127), (0, 128), (2, 149)):
            middle = 2 ** (q.format.bits - 1) if zero is None else int(zero[n, j // size])
            column = int(given["order"][j]) if ordered else j
            expected = float(given["scale"][n, j // size]) * (int(given["codes"][n, j]) - middle)
            assert values[n, column].item() == torch.tensor(expected).item()
        assert torch.equal(unpack_codes(q.codes, (3, 150), q.format.bits), given["codes"])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("nasty", NASTY)
@pytest.mark.parametrize("name", NAMES)
def test_quantizing_takes_the_nearest_number_of_a_grid_over_the_range(name: str, nasty: str, symmetric: bool) -> None:
    x = NASTY[nasty]()
    q = quantize(x, name, symmetric=symmetric)
    assert isinstance(q, GroupedTensor)
    assert q.shape == tuple(x.shape)
    assert (q.zero is None) == symmetric
    back = dequantize(q)
    assert back.shape == x.shape
    columns = x.shape[-1] if x.dim() else 1
    steps = q.scale.float().repeat_interleave(q.format.block or columns, dim=1)[:, :columns].reshape(x.shape)
    # A whole step, since the ends of the range are rounded to steps too, and what float16 takes off a scale.
    slack = 1 + 2**q.format.bits * 2**-11
    assert bool(((back - x).abs() <= slack * steps + 2**-24).all())


def test_numbers_on_the_grid_come_back_as_they_are() -> None:
    x = torch.arange(16.0).repeat(4, 8) - 5
    q = quantize(x, "int4")
    assert torch.equal(dequantize(q), x)
    assert set(q.zero.flatten().tolist()) == {5}


@pytest.mark.parametrize("name", ["int4", "int3", "int2", "int8g"])
def test_more_bits_and_smaller_groups_are_nearer(name: str) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = [float((dequantize(quantize(x, name + group)) - x).norm()) for group in ("-row", "", "-g64", "-g32")]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < float((dequantize(quantize(x, name, symmetric=True)) - x).norm())


def test_bits_per_number() -> None:
    x = torch.randn(128, 1024)
    for name, bits in (
        ("int4", 4 + 24 / 128),
        ("int3-g64", 3 + 24 / 64),
        ("int2", 2 + 24 / 128),
        ("int8g", 8 + 24 / 128),
    ):
        q = quantize(x, name)
        assert 8 * q.nbytes / q.numel == bits
    assert 8 * quantize(x, "int4", symmetric=True).nbytes / x.numel() == 4 + 16 / 128


def test_options_are_told_by_the_tensors() -> None:
    q = grouped(**parts("int4", 5, 64, ordered=True))
    assert q.options == {"symmetric": False, "ordered": True, "scale_dtype": "float16"}
    assert quantize(torch.randn(4, 64), "int4", symmetric=True).options["symmetric"]
    empty = GroupedTensor.empty(q.format, q.shape, q.options)
    for made, held in zip(empty.packed, q.packed, strict=True):
        assert (made.shape, made.dtype, made.is_meta) == (held.shape, held.dtype, True)


def test_scales_may_be_of_any_float_type() -> None:
    given = parts("int4", 3, 64)
    for dtype in (torch.float32, torch.bfloat16):
        q = grouped(**{**given, "scale": given["scale"].to(dtype)})
        assert q.scale.dtype == dtype
        half = grouped(**{**given, "scale": q.scale.half()})
        if dtype == torch.float32:
            assert torch.equal(dequantize(q), dequantize(half))


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
def test_what_is_not_finite_is_refused(value: float) -> None:
    x = torch.ones(3, 64)
    x[1, 7] = value
    with pytest.raises(FormatError, match=r"the number at \[1, 7\]"):
        quantize(x, "int4")


def test_what_float16_scales_cannot_reach_is_refused() -> None:
    with pytest.raises(FormatError, match="float16 cannot hold the scale"):
        quantize(torch.full((2, 64), 1e7), "int4")


def _other(name: str, value: Any) -> dict[str, Any]:
    return {**parts("int4", 4, 256, ordered=True), name: value}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (_other("format", "nf4"), "nf4 has no groups"),
        (_other("codes", torch.zeros(4, 256, dtype=torch.int32)), "expected uint8"),
        (_other("codes", torch.zeros(256, dtype=torch.uint8)), r"expected uint8 \[out, in\]"),
        (_other("codes", torch.full((4, 256), 16, dtype=torch.uint8)), "code 16 does not fit 4 bits"),
        (_other("scale", torch.ones(4, 3).half()), r"scale is \[4, 3\], int4 of \[4, 256\] needs \[4, 2\]"),
        (_other("scale", torch.ones(4, 2).double()), r"scale are torch\.float64"),
        (_other("zero", torch.zeros(2, 4)), r"zero is \[2, 4\]"),
        (_other("zero", torch.full((4, 2), 256)), r"zeros of 256\.\.256"),
        (_other("zero", torch.full((4, 2), -1)), r"zeros of -1\.\.-1"),
        (_other("order", torch.zeros(256, dtype=torch.int64)), "order is no permutation of 256 columns"),
        (_other("order", torch.arange(255)), "no permutation"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        grouped(**given)


@pytest.mark.parametrize("name", ["codes", "scale", "zero", "order"])
def test_a_tensor_of_another_size_or_type_is_refused(name: str) -> None:
    q = grouped(**parts("int4", 4, 256, ordered=True))
    held = dict(zip(("codes", *q.CONSTANTS), q.packed, strict=True))
    with pytest.raises(FormatError, match=rf"{name} has .* int4 of shape \[4, 256\] needs"):
        GroupedTensor(q.format, q.shape, **{**held, name: held[name].flatten()[:-1]})
    with pytest.raises(FormatError, match=rf"{name} are torch\.int64, int4 has"):
        GroupedTensor(q.format, q.shape, **{**held, name: held[name].long()})


def test_options_of_other_formats_are_refused() -> None:
    with pytest.raises(UsageError, match="int4 has no double_quant"):
        quantize(torch.randn(4, 64), "int4", double_quant=True)
    with pytest.raises(UsageError, match="nf4 has no symmetric"):
        quantize(torch.randn(4, 64), "nf4", symmetric=True)
    with pytest.raises(FormatError, match=r"scales cannot be held in int8.*float16"):
        GroupedTensor.empty(FORMATS["int4"], (4, 64), {"scale_dtype": "int8"})


def test_groups_of_a_row() -> None:
    assert [group_count(*given) for given in ((576, 128), (128, 128), (0, 128), (129, 32), (0, ROW), (7, ROW))] == [
        5, 1, 0, 5, 1, 1,
    ]  # fmt: skip


def test_quantizing_is_blind_to_how_rows_lie() -> None:
    x: Tensor = torch.randn(96, 40, generator=torch.Generator().manual_seed(1))
    one, other = quantize_groups(x.t(), "int4-g32"), quantize_groups(x.t().contiguous(), "int4-g32")
    assert all(torch.equal(a, b) for a, b in zip(one.packed[:3], other.packed[:3], strict=True))
