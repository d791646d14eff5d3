"""Reals in, a quantized tensor out, and back, whatever the format.

By blocks of flat storage (`blockwise.py`), by rows (`rowwise.py`) or by groups of rows (`grouped.py`).

This is the reference; `lilliput.kernels` has the same two doors, quick.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.formats import blockwise, grouped, rowwise
from lilliput.formats.format import Format, Kind, Quantized, QuantizedTensor, get_format
from lilliput.formats.grouped import GroupedTensor

# What holds the tensors of each kind of format.
TENSORS: dict[Kind, type[QuantizedTensor] | type[GroupedTensor]] = {
    "blocks": QuantizedTensor,
    "rows": QuantizedTensor,
    "groups": GroupedTensor,
}


def quantize(
    x: Tensor, format: str | Format = "nf4", double_quant: bool | None = None, symmetric: bool | None = None
) -> Quantized:
    """Quantize a tensor of any shape: block by block of its flat storage, row by row, or group by group of its rows.

    Args:
        x: float32, float16 or bfloat16, finite.
        format: a name that `get_format` knows.
        double_quant: also quantize the absmax (8 bits, a float32 per 256 of them): 0.127 bits a number instead of 0.5.
            None: where the format has it (int8 and groups do not).
        symmetric: the middle code is the zero of all groups. None, for groups: no, each has its own.

    Returns:
        A QuantizedTensor, or a GroupedTensor of codes to the nearest on each group's min/max grid.

    Raises:
        FormatError: NaN, Inf, or another dtype; for groups, numbers beyond what a float16 scale reaches.
        UsageError: unknown format; an option that the format has not.
    """
    row = get_format(format)
    double = row.option("double_quant", double_quant)
    middle = row.option("symmetric", symmetric)
    if row.kind == "groups":
        return grouped.quantize_groups(x, row, middle)
    codes, absmax = rowwise.quantize_rows(x) if row.kind == "rows" else blockwise.quantize_blocks(x, row)
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


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The reals that `q` stands for, computed in float32 and rounded once to `dtype` (float64: not rounded)."""
    if isinstance(q, GroupedTensor):
        return grouped.dequantize_groups(q, dtype)
    assert isinstance(q, QuantizedTensor)
    if q.format.kind == "rows":
        return rowwise.dequantize_rows(q.codes, q.absmax, q.shape, dtype)
    absmax = blockwise.block_absmax(q.absmax, q.absmax_scale, q.absmax_offset)
    return blockwise.dequantize_blocks(q.codes, absmax, q.format, q.shape, dtype)
