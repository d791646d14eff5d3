"""Quantize and dequantize blocks of 4 bits.

Sources and rounding rules: `lilliput.formats.blockwise`, which is the reference. Quantizing has no gradient. Not here:
the doors that make and open a `QuantizedTensor` (doors.py), int8 (rowwise.py).
"""

from __future__ import annotations

from math import prod
from types import ModuleType

import torch
from torch import Tensor

from lilliput.formats import DYNAMIC8, get_format
from lilliput.formats import blockwise as reference
from lilliput.kernels import core as compiled
from lilliput.kernels import dispatch

# ---- lilliput::quantize_4bit ----


def _quantize(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    return reference.quantize_blocks(x, get_format(format))


def _quantize_fake(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    row = get_format(format)
    codes, blocks = (x.numel() + 1) // 2, (x.numel() + row.block - 1) // row.block
    return x.new_empty(codes, dtype=torch.uint8), x.new_empty(blocks, dtype=torch.float32)


def _quantize_core(core: ModuleType, x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    row = get_format(format)
    x = x.detach().contiguous()
    codes, absmax = _quantize_fake(x, format)
    bad_block = core.quantize_4bit(x, row.codebook(), row.block, codes, absmax, torch.get_num_threads())
    if bad_block >= 0:
        start = bad_block * row.block
        bad = ~x.reshape(-1)[start : start + row.block].isfinite()
        raise reference.not_finite(x, start + int(bad.nonzero()[0]))
    return codes, absmax


QUANTIZE = dispatch.define("quantize_4bit(Tensor x, str format) -> (Tensor, Tensor)", _quantize, _quantize_fake)
dispatch.register_core(QUANTIZE, _quantize, _quantize_core, lambda x, format: x.dtype in reference.FLOATS)


# ---- lilliput::dequantize_4bit ----


def _dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    format: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    constants = reference.block_absmax(absmax, absmax_scale, absmax_offset)
    return reference.dequantize_blocks(codes, constants, get_format(format), tuple(shape), dtype)


def _dequantize_fake(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    format: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def _dequantize_core(
    core: ModuleType,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    format: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    out = codes.new_empty(prod(shape), dtype=dtype)
    packed = core_arguments(codes, absmax, absmax_scale, absmax_offset, format)
    core.dequantize_4bit(*packed, out, torch.get_num_threads())
    return out.view(shape)


def core_arguments(
    codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None, format: str
) -> tuple[object, ...]:
    """A quantized tensor as the compiled core takes it: codes, codebook, block, absmax and its double quantization."""
    row = get_format(format)
    book = None if absmax_scale is None else DYNAMIC8.codebook()
    codes_, codebook, *constants = compiled.arrays(codes, row.codebook(), absmax, book, absmax_scale, absmax_offset)
    return codes_, codebook, row.block, *constants


DEQUANTIZE = dispatch.define(
    "dequantize_4bit(Tensor codes, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, str format,"
    " SymInt[] shape, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
dispatch.register_core(DEQUANTIZE, _dequantize, _dequantize_core, lambda *args: args[-1] in reference.FLOATS)
