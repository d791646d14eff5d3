"""Quantize and dequantize blocks of 4 bits, and the doors that make and open a `QuantizedTensor`.

Sources and rounding rules: `lilliput.formats.blockwise`, which is the reference. Quantizing has no gradient.
"""

from __future__ import annotations

from math import prod
from types import ModuleType

import torch
from torch import Tensor

from lilliput.formats import DYNAMIC8, Format, QuantizedTensor, get_format
from lilliput.formats import blockwise as reference
from lilliput.kernels import core as compiled
from lilliput.kernels import dispatch


def quantize(x: Tensor, format: str | Format = "nf4", double_quant: bool = True) -> QuantizedTensor:
    """Quantize a tensor of any shape, block by block of its flat storage; see `lilliput.formats.quantize`.

    Raises:
        FormatError: NaN, Inf, or a dtype other than float32, float16, bfloat16.
        UsageError: unknown format.
    """
    row = get_format(format)
    codes, absmax = torch.ops.lilliput.quantize_4bit(x.detach(), row.name)
    if not double_quant:
        return QuantizedTensor(row, tuple(x.shape), codes, absmax)
    # torch's own mean, whose rounding bitsandbytes has too; like any sum of torch's it may round otherwise on another
    # number of threads once there are more than 32,768 blocks.
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    absmax8, scale = reference.quantize_dynamic8(absmax - offset)
    return QuantizedTensor(row, tuple(x.shape), codes, absmax8, scale, offset)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The reals that `q` stands for, of its shape; computed in float32 and rounded once to `dtype`."""
    return torch.ops.lilliput.dequantize_4bit(
        q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.format.name, q.shape, dtype
    )


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
