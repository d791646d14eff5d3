"""Which numbers a group's codes stand for: the grid scale * (code - zero), by least and greatest or by least error.

    asymmetric:  scale = (max - min) / (2**bits - 1)        zero = round(-min / scale)
    symmetric:   scale = 2 max|w| / (2**bits - 1)           zero = 2**(bits - 1)

Source: GPTQ, arXiv 2210.17323, section 4 (grids by groups), and the authors' code for what the paper leaves open: the
range always holds zero, and a group of zeros has the range -1..1. Three things are ours: scales are rounded to float16
before a code is chosen (files hold them so, and codes fitted to other scales than the stored ones are worse codes);
zero is never 0 (GPTQ's first file layout stores it less one, in unsigned codes); and `search_grid` weighs the error of
a column by how large its inputs are. Not here: packing (grouped.py), codes chosen with regard to each other
(models/gptq.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.errors import FormatError

# The ranges that `search_grid` tries, in shares of the whole one; above 1 the outermost codes are not used.
SHARES = tuple(0.4 + 0.01 * step for step in range(71))
_SMALLEST = 2.0**-24  # the smallest scale that float16 can say
LARGEST = 65504.0  # and the largest


def minmax_grid(w: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group from its least and greatest number.

    Args:
        w: floating [..., group size], finite; a group is what the last dimension holds.
        bits: of a code.
        symmetric: whether zero is the middle code, 2**(bits - 1), for all groups.

    Returns:
        scale, float32 [...], rounded to float16's values; zero, float32 [...], whole numbers of 1..2**bits - 1.

    Raises:
        FormatError: numbers so large (beyond 65504 a step) that float16 cannot say the scale.
    """
    least, greatest = _range(w)
    return _grid(least, greatest, 1.0, bits, symmetric)


def search_grid(w: Tensor, bits: int, symmetric: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The grid with the least error among ranges of 0.4 to 1.1 times the whole one, and zeros beside the rounded one.

    The error of a group is sum_i importance_i (w_i - q_i)^2. Of grids with the same error the first is taken: the
    smallest range, and of its zeros the smallest.

    Args:
        w, bits, symmetric: as in `minmax_grid`.
        importance: float [..., group size], not negative, or what can be broadcast to w's shape; None: all the same.

    Returns:
        As `minmax_grid`.
    """
    w = w.float()
    weights = torch.ones_like(w) if importance is None else importance.float().expand_as(w)
    least, greatest = _range(w)
    best = torch.full_like(least, torch.inf)
    scale, zero = _grid(least, greatest, 1.0, bits, symmetric)
    for share in SHARES:
        some_scale, rounded = _grid(least, greatest, share, bits, symmetric)
        for shift in (0,) if symmetric else (-1, 0, 1):
            some_zero = (rounded + shift).clamp(1, 2**bits - 1)
            error = (weights * (w - on_grid(w, some_scale, some_zero, bits)).square()).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, some_scale, scale), torch.where(better, some_zero, zero)
    return scale, zero


def codes_on(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, whole float32 numbers of 0..2**bits - 1 [..., group size], to numbers of that shape.

    Args:
        scale, zero: [...], one a group.
    """
    return ((w / scale[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1)


def on_grid(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The numbers that those codes stand for."""
    return scale[..., None] * (codes_on(w, scale, zero, bits) - zero[..., None])


def _range(w: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest number of each group, zero counted; -1 and 1 for a group of zeros."""
    w = w.float()
    if not w.shape[-1]:
        return -w.new_ones(w.shape[:-1]), w.new_ones(w.shape[:-1])
    least, greatest = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    empty = least == greatest
    return least.masked_fill(empty, -1.0), greatest.masked_fill(empty, 1.0)


def _grid(least: Tensor, greatest: Tensor, share: float, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The grid of a share of the range."""
    top = 2**bits - 1
    width = 2 * torch.maximum(-least, greatest) if symmetric else greatest - least
    exact = share * width / top
    if not bool((exact <= LARGEST).all()):
        raise FormatError(f"numbers as large as {float(width.max()):.3g} in a group; float16 cannot hold the scale")
    scale = exact.half().float().clamp(min=_SMALLEST)
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, (-share * least / scale).round().clamp(1, top)
