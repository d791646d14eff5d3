"""Percentile clipping: a gradient is no longer than most of its parameter's last hundred were.

Source: the practice of 8-bit Optimizers, arXiv 2110.02861, as bitsandbytes had it up to 0.45: for each weight tensor it
keeps the norms of the last 100 gradients, the new one among them, sorts them, and scales the new gradient down to the
one at the given percentile where it is longer. Per tensor and not over all: a spike in one layer must not shrink the
step of the others, and layers' gradients differ in size by orders of magnitude.

Different from there: while fewer than 100 norms are known, the percentile is taken of those. (There the missing ones
counted as zero, so that the first steps were multiplied by zero.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HISTORY = 100  # gradients


def new_history() -> Tensor:
    """Room for the norms: float64 [100] of NaN, on the CPU, where the decision is made."""
    return torch.full((HISTORY,), torch.nan, dtype=torch.float64)


def clipped_scale(history: Tensor, step: int, sum_of_squares: float, percentile: int) -> float:
    """What to multiply a gradient by; `history` gets its norm.

    Args:
        history: float64 [100]; the norm of step s at s % 100.
        step: of this parameter, before this one: 0 at the first.
        sum_of_squares: of the gradient; finite.
        percentile: 1 to 99.
    """
    norm = math.sqrt(sum_of_squares)
    history[step % HISTORY] = norm
    known = sorted(history[~history.isnan()].tolist())
    limit = known[len(known) * percentile // 100]
    return limit / norm if norm > limit else 1.0
