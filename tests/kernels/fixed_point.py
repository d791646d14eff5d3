"""What 16-bit fixed point may add to the error of one row times a 4-bit matrix (linear_4bit_fixed.simd.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput import formats
from lilliput.formats import QuantizedTensor
from lilliput.kernels import core

_HALF_STEP = 0.5 / 32767
_BLOCK = 64


def bound(x: Tensor, q: QuantizedTensor, backend: str) -> Tensor:
    """The largest error of each number of x W^T, float64 [rows, out]: 0 where the backend computes in float32.

    Half a step of 1/32767 in each number of x (of its block's greatest) and of W (of the codebook's greatest, times
    the block's absmax).
    """
    out, columns = q.shape
    if backend != "core" or core.status().instruction_set != "avx2" or len(x) != 1 or columns % _BLOCK:
        return torch.zeros(len(x), out, dtype=torch.float64)
    x_blocks = x.detach().double().abs().view(-1, _BLOCK)
    w_blocks = formats.dequantize(q, torch.float64).abs().view(out, -1, _BLOCK)
    absmax = formats.blockwise.block_absmax(q.absmax, q.absmax_scale, q.absmax_offset).double().abs().view(out, -1, 1)
    of_x = _HALF_STEP * x_blocks.amax(dim=1, keepdim=True)
    of_w = _HALF_STEP * q.format.codebook().abs().max() * absmax
    return (of_x * w_blocks + (x_blocks + of_x) * of_w).sum(dim=(1, 2))[None]
