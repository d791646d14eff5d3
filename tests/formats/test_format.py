"""The table of formats and what a QuantizedTensor refuses to hold."""

from __future__ import annotations

import pytest
import torch

from lilliput.errors import FormatError, UsageError
from lilliput.formats import DYNAMIC8, FORMATS, INT8, NF4, ROW, QuantizedTensor, get_format, grouped_format, quantize


def test_get_format_knows_each_row_and_suggests_the_nearest() -> None:
    assert [get_format(name).name for name in FORMATS] == ["nf4", "fp4", "int8", "int4", "int3", "int2", "int8g"]
    assert get_format(NF4) is NF4
    with pytest.raises(UsageError, match=r"unknown number format 'nf-4'; did you mean 'nf4'\?"):
        get_format("nf-4")


@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [("int4", 4, 128), ("int3", 3, 128), ("int2-g64", 2, 64), ("int8g-row", 8, ROW), ("int8g-g32", 8, 32)],
)
def test_a_grouped_formats_name_says_bits_and_group(name: str, bits: int, group: int) -> None:
    row = get_format(name)
    assert (row.name, row.kind, row.bits, row.block) == (name, "groups", bits, group)
    assert row == grouped_format(bits, group)
    assert get_format("int4-g128") == get_format("int4")
    assert row.codebook().tolist() == list(range(2**bits))


@pytest.mark.parametrize("name", ["int5", "int4-64", "int4-g0", "int4-g", "int4-rows", "int8-g128", "xint4", "int4x"])
def test_what_looks_like_a_grouped_format_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown number format '{name}'"):
        get_format(name)


def test_groups_that_no_kernel_has_are_refused() -> None:
    with pytest.raises(UsageError, match=r"groups of 48 numbers.*multiple of 32"):
        get_format("int4-g48")
    with pytest.raises(UsageError, match="groups of -1 numbers"):
        grouped_format(4, -1)
    with pytest.raises(UsageError, match="no format has groups of 5-bit codes"):
        grouped_format(5)


def test_kinds() -> None:
    assert [row.kind for row in FORMATS.values()] == ["blocks", "blocks", "rows", *["groups"] * 4]


def test_bits_per_number_of_a_double_quantized_tensor() -> None:
    q = quantize(torch.randn(512, 1024))
    # 4 bits, 8 bits per 64 numbers, 32 bits per 64 * 256 numbers (and one offset): QLoRA's 4.127.
    assert q.nbytes * 8 / q.numel == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert q.double_quant
    plain = quantize(torch.randn(512, 1024), double_quant=False)
    assert plain.nbytes * 8 / plain.numel == 4.5
    assert not plain.double_quant


@pytest.mark.parametrize("part", ["codes", "absmax", "absmax_scale"])
def test_parts_of_the_wrong_size_are_refused(part: str) -> None:
    q = quantize(torch.randn(64, 1024))
    parts = {name: getattr(q, name) for name in ("codes", "absmax", "absmax_scale", "absmax_offset")}
    parts[part] = parts[part][:-1]
    with pytest.raises(FormatError, match=rf"^{part} has .* nf4 of shape \[64, 1024\] needs"):
        QuantizedTensor(NF4, q.shape, **parts)


def test_half_of_a_double_quantization_is_refused() -> None:
    q = quantize(torch.randn(64))
    with pytest.raises(FormatError, match="belong together"):
        QuantizedTensor(NF4, q.shape, q.codes, q.absmax, q.absmax_scale, None)


def test_dynamic8_is_not_offered_for_weights() -> None:
    assert DYNAMIC8.name not in FORMATS


@pytest.mark.parametrize(
    ("shape", "rows"), [((), 1), ((5,), 1), ((0,), 1), ((3, 4), 3), ((3, 0), 3), ((0, 4), 0), ((2, 3, 4), 6)]
)
def test_int8_has_an_absmax_a_row(shape: tuple[int, ...], rows: int) -> None:
    q = quantize(torch.ones(shape), "int8")
    assert (q.absmax.shape, q.codes.shape) == ((rows,), (q.numel,))
    assert (q.absmax.dtype, q.codes.dtype) == (torch.float32, torch.int8)
    assert q.nbytes == q.numel + 4 * rows


def test_codes_of_another_type_are_refused() -> None:
    with pytest.raises(FormatError, match=r"codes are torch\.uint8, int8 has torch\.int8"):
        QuantizedTensor(INT8, (2, 3), torch.zeros(6, dtype=torch.uint8), torch.zeros(2))


def test_options_are_the_formats_own_unless_given() -> None:
    assert get_format("nf4").option("double_quant") is True
    assert get_format("nf4").option("double_quant", False) is False
    assert get_format("int8").option("threshold") == 6.0
    assert get_format("int8").option("threshold", 0) == 0
    assert get_format("int8").option("double_quant") is False


@pytest.mark.parametrize(
    ("format", "option", "value"),
    [
        ("int8", "double_quant", True),
        ("nf4", "threshold", 6.0),
        ("fp4", "embeddings", True),
        ("int4", "double_quant", True),
        ("int8", "symmetric", True),
    ],
)
def test_an_option_that_a_format_lacks_is_refused_when_asked_for(format: str, option: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"{option}={value} was asked for, and {format} has no {option}"):
        get_format(format).option(option, value)
    assert not get_format(format).option(option, type(value)(0))  # switched off is no fault


def test_int8_quantizes_without_double_quantization() -> None:
    assert not quantize(torch.randn(4, 64), "int8").double_quant
    assert not quantize(torch.randn(4, 64), "int8", double_quant=False).double_quant
    with pytest.raises(UsageError, match="int8 has no double_quant"):
        quantize(torch.randn(4, 64), "int8", double_quant=True)
