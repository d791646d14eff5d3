"""What 16-bit fixed point may add to the error of one row times a quantized matrix.

For blocks linear_4bit_fixed.simd.cpp, for groups linear_grouped_fixed.simd.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput import formats
from lilliput.formats import GroupedTensor, Quantized, QuantizedTensor
from lilliput.kernels import core

_HALF_STEP = 0.5 / 32767
_BLOCK = 64


def bound(x: Tensor, q: Quantized, backend: str) -> Tensor:
    """The largest error of each number of x W^T, float64 [rows, out]: 0 where the backend computes in float32.

    For blocks, half a step of 1/32767 in each number of x (of its block's greatest) and of W (of the codebook's
    greatest, times the block's absmax). For groups, of x alone.
    """
    out, columns = q.shape
    if backend != "core" or core.status().instruction_set != "avx2" or len(x) != 1:
        return torch.zeros(len(x), out, dtype=torch.float64)
    if isinstance(q, GroupedTensor):
        return _of_groups(x, q)
    assert isinstance(q, QuantizedTensor)
    if columns % _BLOCK:
        return torch.zeros(1, out, dtype=torch.float64)
    x_blocks = x.detach().double().abs().view(-1, _BLOCK)
    w_blocks = formats.dequantize(q, torch.float64).abs().view(out, -1, _BLOCK)
    absmax = formats.blockwise.block_absmax(q.absmax, q.absmax_scale, q.absmax_offset).double().abs().view(out, -1, 1)
    of_x = _HALF_STEP * x_blocks.amax(dim=1, keepdim=True)
    of_w = _HALF_STEP * q.format.codebook().abs().max() * absmax
    return (of_x * w_blocks + (x_blocks + of_x) * of_w).sum(dim=(1, 2))[None]


def _of_groups(x: Tensor, q: GroupedTensor) -> Tensor:
    """Numbers of x that share a scale: 128, 64 or 32, as divide a group, in the order that columns are stored in."""
    group = q.format.block or -(q.shape[1] // -32) * 32
    span = next(size for size in (128, 64, 32) if group % size == 0)
    order = torch.arange(q.shape[1]) if q.order is None else q.order.long()
    weights = formats.dequantize(q, torch.float64).abs()[:, order].split(span, dim=1)
    spans = x.detach().double().abs()[0, order].split(span)
    parts = (_HALF_STEP * one.max() * w.sum(dim=1) for one, w in zip(spans, weights, strict=True) if len(one))
    return 1.001 * sum(parts, torch.zeros(q.shape[0], dtype=torch.float64))[None]
