"""Dequantize groups of rows: codes of 2, 3, 4 or 8 bits with a scale and a zero each.

Source: `lilliput.formats.grouped`, which is the reference and also what quantizes (to the nearest; there is no quicker
way yet, and none is needed: a tensor passes once). Not here: the doors (doors.py), products (linear_grouped.py).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lilliput.formats import get_format
from lilliput.formats.blockwise import FLOATS
from lilliput.formats.format import rows_and_columns
from lilliput.formats.grouped import dequantize_packed
from lilliput.kernels import dispatch
from lilliput.kernels.core import arrays

# ---- lilliput::dequantize_grouped ----


def _dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    format: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return dequantize_packed(codes, scale, zero, order, get_format(format), tuple(shape), dtype)


def _dequantize_fake(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    format: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def _dequantize_core(
    core: ModuleType,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    format: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    row = get_format(format)
    out = codes.new_empty(rows_and_columns(tuple(shape)), dtype=dtype)
    codes_, scale_, zero_, out_ = arrays(codes, scale, zero, out)
    core.dequantize_grouped(codes_, row.bits, row.block, scale_, zero_, out_, torch.get_num_threads())
    if order is not None:
        out = torch.empty_like(out).index_copy_(1, order.long(), out)
    return out.view(shape)


DEQUANTIZE = dispatch.define(
    "dequantize_grouped(Tensor codes, Tensor scale, Tensor? zero, Tensor? order, str format, SymInt[] shape,"
    " ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
dispatch.register_core(DEQUANTIZE, _dequantize, _dequantize_core, lambda *args: args[-1] in FLOATS)
