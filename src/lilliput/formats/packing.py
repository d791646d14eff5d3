"""Codes to bytes and back. Not here: other libraries' orders of codes (they come with their file formats)."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

RUN = 32  # codes of a row that are packed together; a row is padded to whole runs
# Bits of a code that are packed together, from the lowest on: of 3 bits the low two, then the high one.
_PARTS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


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


# ---- rows of 2, 3, 4 or 8 bits ----


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row."""
    return -(columns // -RUN) * RUN * bits // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] of codes below 2**bits to uint8 [rows * row_bytes(columns, bits)].

    A row is padded with zeros to runs of 32 codes, each of which takes 4 * bits bytes. A vector of so many bytes,
    shifted right by different distances side by side, gives the 32 codes in their order:

        8 bits   byte i = code[i]                                                                       32 bytes
        4 bits   byte i = code[i] | code[16 + i] << 4                                                   16 bytes
        2 bits   byte i = code[i] | code[8 + i] << 2 | code[16 + i] << 4 | code[24 + i] << 6             8 bytes
        3 bits   the low two bits as above, then 4 bytes whose bit t of byte i is the high bit of code[4 * t + i]
    """
    rows, columns = codes.shape
    runs = pad(codes, (0, -columns % RUN)).reshape(rows, -(columns // -RUN), RUN)
    folded, shift = [], 0
    for part in _PARTS[bits]:
        folded.append(_fold(runs >> shift & (1 << part) - 1, part))
        shift += part
    return torch.cat(folded, dim=-1).view(-1)


def unpack_codes(packed: Tensor, shape: tuple[int, int], bits: int) -> Tensor:
    """The inverse: uint8 of any shape to uint8 [rows, columns]."""
    rows, columns = shape
    runs = packed.reshape(rows, -(columns // -RUN), RUN * bits // 8)
    codes, shift = torch.zeros((), dtype=torch.uint8, device=packed.device), 0
    for part, folded in zip(_PARTS[bits], runs.split([RUN * part // 8 for part in _PARTS[bits]], dim=-1), strict=True):
        codes = codes | _unfold(folded, part) << shift
        shift += part
    return codes.flatten(1)[:, :columns]


def _fold(codes: Tensor, bits: int) -> Tensor:
    """[..., 32] to [..., 4 * bits]: byte i holds codes i, 4 * bits + i, 8 * bits + i, .. from its lowest bit on."""
    planes = codes.unflatten(-1, (8 // bits, 4 * bits)).unbind(-2)
    return reduce(torch.bitwise_or, [plane << bits * place for place, plane in enumerate(planes)])


def _unfold(folded: Tensor, bits: int) -> Tensor:
    planes = [folded >> bits * place & (1 << bits) - 1 for place in range(8 // bits)]
    return torch.cat(planes, dim=-1)
