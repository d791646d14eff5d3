"""Quantize and dequantize int8 by rows.

Source and rounding rules: `lilliput.formats.rowwise`, which is the reference. Quantizing has no gradient.
"""

from __future__ import annotations

from math import prod
from types import ModuleType

import torch
from torch import Tensor

from lilliput.formats import rowwise as reference
from lilliput.formats.blockwise import FLOATS, not_finite
from lilliput.kernels import dispatch

# ---- lilliput::quantize_int8 ----


def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = prod(x.shape[:-1])
    return x.new_empty(x.numel(), dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)


def _quantize_core(core: ModuleType, x: Tensor) -> tuple[Tensor, Tensor]:
    rows = reference.rows_of(x.detach()).contiguous()
    codes, absmax = rows.new_empty(rows.shape, dtype=torch.int8), rows.new_empty(len(rows), dtype=torch.float32)
    bad_row = core.quantize_int8(rows, codes, absmax, torch.get_num_threads())
    if bad_row >= 0:
        raise not_finite(x, bad_row * rows.shape[1] + int((~rows[bad_row].isfinite()).nonzero()[0]))
    return codes.reshape(-1), absmax


QUANTIZE = dispatch.define("quantize_int8(Tensor x) -> (Tensor, Tensor)", reference.quantize_rows, _quantize_fake)
dispatch.register_core(QUANTIZE, reference.quantize_rows, _quantize_core, lambda x: x.dtype in FLOATS)


# ---- lilliput::dequantize_int8 ----


def _dequantize(codes: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return reference.dequantize_rows(codes, absmax, tuple(shape), dtype)


def _dequantize_fake(codes: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def _dequantize_core(core: ModuleType, codes: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    out = codes.new_empty(shape, dtype=dtype)
    rows = codes.reshape(absmax.numel(), codes.numel() // max(absmax.numel(), 1)).contiguous()
    core.dequantize_int8(rows, absmax.contiguous(), out, torch.get_num_threads())
    return out


DEQUANTIZE = dispatch.define(
    "dequantize_int8(Tensor codes, Tensor absmax, SymInt[] shape, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
dispatch.register_core(DEQUANTIZE, _dequantize, _dequantize_core, lambda *args: args[-1] in FLOATS)
