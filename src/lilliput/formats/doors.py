"""Reals in, a QuantizedTensor out, and back, whatever the format: by blocks (`blockwise.py`) or by rows (`rowwise.py`).

This is the reference; `lilliput.kernels` has the same two doors, quick.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.formats import blockwise, rowwise
from lilliput.formats.format import ROW, Format, QuantizedTensor, get_format


def quantize(x: Tensor, format: str | Format = "nf4", double_quant: bool | None = None) -> QuantizedTensor:
    """Quantize a tensor of any shape, block by block of its flat storage or row by row.

    Args:
        x: float32, float16 or bfloat16, finite.
        format: a name of FORMATS.
        double_quant: also quantize the absmax (8 bits, a float32 per 256 of them): 0.127 bits a number instead of 0.5.
            None: where the format has it (int8 does not).

    Raises:
        FormatError: NaN, Inf, or another dtype.
        UsageError: unknown format; double quantization of a format that has none.
    """
    row = get_format(format)
    double = row.option("double_quant", double_quant)
    codes, absmax = rowwise.quantize_rows(x) if row.block == ROW else blockwise.quantize_blocks(x, row)
    return finish(row, tuple(x.shape), codes, absmax, double)


def finish(format: Format, shape: tuple[int, ...], codes: Tensor, absmax: Tensor, double: bool) -> QuantizedTensor:
    """Codes and float32 absmax as a QuantizedTensor, the absmax quantized too where `double` says so.

    The mean of the absmax is torch's own, whose rounding bitsandbytes has too; like any sum of torch's it may round
    otherwise on another number of threads once there are more than 32,768 blocks.
    """
    if not double:
        return QuantizedTensor(format, shape, codes, absmax)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    absmax8, scale = blockwise.quantize_dynamic8(absmax - offset)
    return QuantizedTensor(format, shape, codes, absmax8, scale, offset)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The reals that `q` stands for, computed in float32 and rounded once to `dtype` (float64: not rounded)."""
    if q.format.block == ROW:
        return rowwise.dequantize_rows(q.codes, q.absmax, q.shape, dtype)
    absmax = blockwise.block_absmax(q.absmax, q.absmax_scale, q.absmax_offset)
    return blockwise.dequantize_blocks(q.codes, absmax, q.format, q.shape, dtype)
