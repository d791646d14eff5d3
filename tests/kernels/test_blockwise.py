"""The core against the reference, bit for bit, on every nasty input; and the operations against torch's own checks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput import formats
from lilliput.errors import FormatError, UsageError
from lilliput.formats import FORMATS, Quantized, QuantizedTensor
from lilliput.kernels import dequantize, quantize, use
from tests.nasty import NASTY, NOT_FINITE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same(got: Quantized, expected: Quantized) -> None:
    assert (got.format, got.shape) == (expected.format, expected.shape)
    for name in ("codes", *expected.CONSTANTS):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("nasty", NASTY)
def test_codes_constants_and_values_equal_the_reference(
    backend: str, nasty: str, format: str, dtype: torch.dtype
) -> None:
    x = NASTY[nasty]().to(dtype)
    for double_quant in (False, None):
        q = quantize(x, format, double_quant)
        assert_same(q, formats.quantize(x, format, double_quant))
        for out in (*DTYPES, torch.float64):
            got, expected = dequantize(q, out), formats.dequantize(q, out)
            assert got.dtype == out
            assert got.shape == x.shape
            assert torch.equal(got, expected)
            assert torch.equal(got.signbit(), expected.signbit())


def test_a_matrix_of_many_tasks(backend: str) -> None:
    x = torch.randn(1, 64 * 1024 * 3 + 33, generator=torch.Generator().manual_seed(0))
    assert_same(quantize(x), formats.quantize(x))
    assert torch.equal(dequantize(quantize(x)), formats.dequantize(formats.quantize(x)))


def test_every_half_number(backend: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        x = x[x.isfinite()]
        assert_same(quantize(x), formats.quantize(x))


def test_rounding_to_half_on_the_way_out(backend: str) -> None:
    # One number a block: the value is its absmax, so any float32 can be sent through the conversion.
    bits = torch.randint(0, 2**31 - 2**23, (4096,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    absmax = torch.cat([bits.view(torch.float32), torch.tensor([65504.0, 65519.9, 65520.0, 6e-8, 3e-8, 2.98e-8])])
    codes = torch.full((absmax.numel() * 32,), 0xF0, dtype=torch.uint8)
    q = QuantizedTensor(formats.NF4, (absmax.numel() * 64,), codes, absmax)
    for dtype in DTYPES:
        assert torch.equal(dequantize(q, dtype), formats.dequantize(q, dtype))


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 63, 64, 199])
def test_what_is_not_finite_is_refused_with_its_place(backend: str, value: str, dtype: torch.dtype, place: int) -> None:
    x = torch.ones(5, 40, dtype=dtype)
    x.view(-1)[place:] = NOT_FINITE[value]
    for format in FORMATS:
        with pytest.raises(FormatError, match=rf"the number at \[{place // 40}, {place % 40}\]"):
            quantize(x, format)


def test_other_types_are_refused(backend: str) -> None:
    with pytest.raises(FormatError, match="float32, float16 or bfloat16"):
        quantize(torch.zeros(64, dtype=torch.float64))
    with pytest.raises(UsageError, match="unknown number format"):
        quantize(torch.zeros(64), "nf5")


def test_weights_that_require_gradients_quantize(backend: str) -> None:
    q = quantize(torch.nn.Parameter(torch.randn(3, 64)))
    assert not dequantize(q).requires_grad


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(backend: str, double_quant: bool) -> None:
    x = torch.randn(3, 33)
    q = quantize(x, "fp4", double_quant)
    torch.library.opcheck(torch.ops.lilliput.quantize_4bit.default, (x, "fp4"))
    packed: tuple[Tensor | None, ...] = (q.codes, q.absmax, q.absmax_scale, q.absmax_offset)
    torch.library.opcheck(torch.ops.lilliput.dequantize_4bit.default, (*packed, "fp4", [3, 33], torch.bfloat16))


@pytest.mark.parametrize("shape", [(3, 33), (2, 3, 5), (7,), (), (0, 4), (4, 0)])
def test_opcheck_of_int8(backend: str, shape: tuple[int, ...]) -> None:
    q = quantize(torch.randn(shape), "int8")
    torch.library.opcheck(torch.ops.lilliput.quantize_int8.default, (torch.randn(shape),))
    operation = torch.ops.lilliput.dequantize_int8.default
    torch.library.opcheck(operation, (q.codes, q.absmax, list(shape), torch.bfloat16))


def test_use_refuses_unknown_backends() -> None:
    with pytest.raises(UsageError, match="did you mean 'reference'"), use("referense"):
        pass
