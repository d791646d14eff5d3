"""Codes, constants and values equal bitsandbytes' on the CPU, bit for bit; and a 4-bit product equals its own.

One corner where bitsandbytes differs with itself: FP4's code 8 is a second zero, which its compiled dequantizer gives
as -0.0 in the last few numbers of a row and as 0.0 elsewhere. We give 0.0; `torch.equal` takes them as equal.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.formats import QuantizedTensor, codebooks, rowwise
from lilliput.kernels import core, dequantize, linear_4bit, linear_int8, quantize
from tests.kernels import fixed_point
from tests.nasty import NASTY

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed (extra 'test')")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same(x: Tensor, format: str, double_quant: bool) -> tuple[QuantizedTensor, Tensor, object]:
    """Quantize with both and compare every tensor; returns ours and theirs."""
    codes, state = functional.quantize_4bit(x, blocksize=64, quant_type=format, compress_statistics=double_quant)
    q = quantize(x, format, double_quant)
    assert torch.equal(q.codes, codes.flatten())
    assert torch.equal(q.absmax, state.absmax)
    if double_quant:
        assert q.absmax_scale is not None
        assert q.absmax_offset is not None
        assert torch.equal(q.absmax_scale, state.state2.absmax)
        assert torch.equal(q.absmax_offset, state.offset)
    return q, codes, state


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_codebooks(format: str) -> None:
    assert torch.equal(getattr(codebooks, format)(), functional.get_4bit_type(format, device="cpu"))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_tree(signed: bool) -> None:
    assert torch.equal(codebooks.dynamic8(signed), functional.create_dynamic_map(signed))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("nasty", [name for name in NASTY if name not in ("scalar", "empty", "no_columns")])
def test_quantize_and_dequantize(nasty: str, format: str, double_quant: bool) -> None:
    for dtype in DTYPES:
        x = NASTY[nasty]().to(dtype)
        q, codes, state = assert_same(x, format, double_quant)
        if x.shape[-1] % 2 == 0:  # odd rows: see below
            assert torch.equal(dequantize(q, dtype), functional.dequantize_4bit(codes, state).view(x.shape))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_odd_rows_dequantize_the_same(format: str) -> None:
    # bitsandbytes compiles this path with torch.compile, a minute of C++; its uncompiled function is the same.
    from bitsandbytes.backends.default import ops

    for shape in ((7, 33), (131,), (1,)):
        x = torch.randn(shape)
        q, codes, state = assert_same(x, format, False)
        compute = getattr(ops._dequantize_4bit_compute, "__wrapped__", ops._dequantize_4bit_compute)
        theirs = compute(codes.reshape(-1), state.absmax, state.code, 64, shape, torch.float32)
        assert torch.equal(dequantize(q), theirs.view(shape))


def test_numbers_on_the_bounds_between_codes() -> None:
    for format in ("nf4", "fp4"):
        values = getattr(codebooks, format)().sort().values
        bounds = (values[:-1] + values[1:]) / 2
        up, down = torch.nextafter(bounds, torch.tensor(2.0)), torch.nextafter(bounds, torch.tensor(-2.0))
        block = torch.cat([torch.ones(1), bounds, up, down, -bounds, torch.zeros(3)])
        for scale in (1.0, 3.0, 0.1, 1e-20):
            assert_same(block.repeat(3) * scale, format, False)  # two full blocks and a ragged one


def test_double_quantization_of_many_blocks() -> None:
    generator = torch.Generator().manual_seed(5)
    for spread in (0.01, 1.0, 5.0):
        x = torch.randn(2000, 64, generator=generator) * torch.exp(spread * torch.randn(2000, 1, generator=generator))
        assert_same(x, "nf4", True)


def test_product_equals_theirs() -> None:
    q, codes, state = assert_same(torch.randn(96, 128), "nf4", True)
    for rows in (1, 30):
        x = torch.randn(rows, 128)
        theirs = x @ functional.dequantize_4bit(codes, state).t()
        backend = "core" if core.status().loaded else "reference"
        allowed = fixed_point.bound(x, q, backend) + 1e-5 + 1e-5 * theirs.abs()
        assert bool(((linear_4bit(x, q) - theirs).abs() <= allowed).all())


# ---- int8 ----


@pytest.mark.parametrize("nasty", [name for name, make in NASTY.items() if make().dim() == 2 and make().numel()])
def test_int8_codes_and_absmax(nasty: str) -> None:
    for dtype in DTYPES:
        x = NASTY[nasty]().to(dtype)
        codes, absmax, _ = functional.int8_vectorwise_quant(x.clone())
        q = quantize(x, "int8")
        assert torch.equal(q.absmax, absmax)
        # theirs divides by the absmax of an all-zero row, and by those too small for 127 / absmax to be a float32
        usual = absmax > 1e-36
        assert torch.equal(q.codes.view(x.shape)[usual], codes[usual])
        assert not q.codes.view(x.shape)[~usual].any()
        theirs = functional.int8_vectorwise_dequant(codes, absmax)
        torch.testing.assert_close(dequantize(q)[usual], theirs[usual], rtol=1e-6, atol=0)


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_int8_product_is_theirs(threshold: float) -> None:
    """Their operations, put together as their layer does it on a GPU."""
    x, w = torch.randn(30, 128), torch.randn(96, 128)
    x[:, 7] *= 30
    codes, absmax, _ = functional.int8_vectorwise_quant(w.clone())
    beyond = (x.abs() > threshold).any(dim=0) if threshold else torch.zeros(128, dtype=torch.bool)
    rows, row_absmax, _ = functional.int8_vectorwise_quant(x.masked_fill(beyond, 0.0))
    whole = torch.ops.bitsandbytes.int8_linear_matmul(rows, codes)
    assert torch.equal(whole, rowwise.integer_product(rows, codes))
    theirs = whole.double() * row_absmax.double()[:, None] * absmax.double() / 127**2
    theirs += x[:, beyond].double() @ functional.int8_vectorwise_dequant(codes, absmax).double()[:, beyond].T
    ours = linear_int8(x, quantize(w, "int8"), None, threshold)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)
