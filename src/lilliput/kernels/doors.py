"""Reals in, a QuantizedTensor out, back, and the product with one, whatever the format: each format's own operation.

Same numbers as `lilliput.formats.quantize` and `dequantize`. Not here: arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.formats import ROW, Format, QuantizedTensor, get_format
from lilliput.formats.doors import finish
from lilliput.kernels import blockwise, rowwise  # noqa: F401  (they define the operations)
from lilliput.kernels.linear_4bit import linear_4bit
from lilliput.kernels.linear_int8 import linear_int8


def quantize(x: Tensor, format: str | Format = "nf4", double_quant: bool | None = None) -> QuantizedTensor:
    """Quantize a tensor of any shape, block by block of its flat storage or row by row; see `formats.quantize`.

    Raises:
        FormatError: NaN, Inf, or a dtype other than float32, float16, bfloat16.
        UsageError: unknown format; double quantization of a format that has none.
    """
    row = get_format(format)
    double = row.option("double_quant", double_quant)
    ops = torch.ops.lilliput
    codes, absmax = ops.quantize_int8(x.detach()) if row.block == ROW else ops.quantize_4bit(x.detach(), row.name)
    return finish(row, tuple(x.shape), codes, absmax, double)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The reals that `q` stands for, of its shape; computed in float32 and rounded once to `dtype`."""
    if q.format.block == ROW:
        return torch.ops.lilliput.dequantize_int8(q.codes, q.absmax, q.shape, dtype)
    return torch.ops.lilliput.dequantize_4bit(
        q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.format.name, q.shape, dtype
    )


def linear(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    """x [..., in] times a quantized matrix, plus bias: `linear_4bit`, or `linear_int8` with its threshold."""
    return linear_int8(x, q, bias, threshold) if q.format.block == ROW else linear_4bit(x, q, bias)
