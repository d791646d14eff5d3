"""Reals in, a quantized tensor out, back, and the product with one, whatever the format: each kind's own operation.

Same numbers as `lilliput.formats.quantize` and `dequantize`. Not here: arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.formats import Format, Quantized, get_format
from lilliput.formats.doors import finish
from lilliput.formats.grouped import quantize_groups
from lilliput.kernels import blockwise, grouped, rowwise  # noqa: F401  (they define the operations)
from lilliput.kernels.linear_4bit import linear_4bit
from lilliput.kernels.linear_grouped import linear_grouped
from lilliput.kernels.linear_int8 import linear_int8


def quantize(
    x: Tensor, format: str | Format = "nf4", double_quant: bool | None = None, symmetric: bool | None = None
) -> Quantized:
    """Quantize a tensor of any shape, by blocks of its flat storage, by rows or by groups; see `formats.quantize`.

    Raises:
        FormatError: NaN, Inf, or a dtype other than float32, float16, bfloat16.
        UsageError: unknown format; an option that the format has not.
    """
    row = get_format(format)
    double = row.option("double_quant", double_quant)
    middle = row.option("symmetric", symmetric)
    ops = torch.ops.lilliput
    if row.kind == "groups":
        return quantize_groups(x, row, middle)
    codes, absmax = ops.quantize_int8(x.detach()) if row.kind == "rows" else ops.quantize_4bit(x.detach(), row.name)
    return finish(row, tuple(x.shape), codes, absmax, double)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The reals that `q` stands for, of its shape; computed in float32 and rounded once to `dtype`."""
    ops = torch.ops.lilliput
    if q.format.kind == "rows":
        return ops.dequantize_int8(*q.packed[:2], q.shape, dtype)
    of_kind = ops.dequantize_grouped if q.format.kind == "groups" else ops.dequantize_4bit
    return of_kind(*q.packed, q.format.name, q.shape, dtype)


def linear(x: Tensor, q: Quantized, bias: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    """x [..., in] times a quantized matrix, plus bias, by the product of its kind; a threshold is for `linear_int8`."""
    if q.format.kind == "rows":
        return linear_int8(x, q, bias, threshold)
    return linear_grouped(x, q, bias) if q.format.kind == "groups" else linear_4bit(x, q, bias)
