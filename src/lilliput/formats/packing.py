"""Codes to bytes and back. Not here: other libraries' orders of nibbles (they come with their file formats)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_nibbles(codes: Tensor, filler: int = 0) -> Tensor:
    """uint8 [n] of 4-bit codes to uint8 [ceil(n / 2)], the earlier code in the high nibble.

    `[a, b, c]` becomes `[a << 4 | b, c << 4 | filler]`.
    """
    if codes.numel() % 2:
        codes = pad(codes, (0, 1), value=filler)
    return (codes[0::2] << 4) | codes[1::2]


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The inverse: uint8 [ceil(count / 2)], of any shape, to uint8 [count]."""
    packed = packed.reshape(-1)
    return torch.stack([packed >> 4, packed & 0xF], dim=1).reshape(-1)[:count]
