"""Quantize and dequantize int8 by rows.

Source and rounding rules: `lilliput.formats.rowwise`, which is the reference. Quantizing has no gradient.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lilliput.formats import rowwise as reference
from lilliput.kernels import dispatch

# ---- lilliput::quantize_int8 ----


def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = prod(x.shape[:-1])
    return x.new_empty(x.numel(), dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)


QUANTIZE = dispatch.define("quantize_int8(Tensor x) -> (Tensor, Tensor)", reference.quantize_rows, _quantize_fake)


# ---- lilliput::dequantize_int8 ----


def _dequantize(codes: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return reference.dequantize_rows(codes, absmax, tuple(shape), dtype)


def _dequantize_fake(codes: Tensor, absmax: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


DEQUANTIZE = dispatch.define(
    "dequantize_int8(Tensor codes, Tensor absmax, SymInt[] shape, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
