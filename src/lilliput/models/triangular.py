"""The upper Cholesky factor of an inverse, U with H^-1 = U^T U, in one matrix of H's size and stripes of it.

With the columns of H from the last to the first, H = M M^T for a lower triangular M; read backwards again, M is upper
triangular, and its inverse is U. So H^-1 itself is never there: a factorization and a triangular inverse, half of the
work of inverting H and factoring that, and all of it where the matrix lies.
Source of the inverse by halves: Higham, Accuracy and Stability of Numerical Algorithms, chapter 14.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STRIPE = 256  # rows or columns that are moved or multiplied at once
_SMALL = 64  # columns that torch inverts at once


def inverse_factor(h: Tensor, order: Tensor) -> Tensor | None:
    """U of H with its columns (and rows) in `order`.

    Args:
        h: float32 or float64 [n, n], symmetric; not changed.
        order: int64 [n].

    Returns:
        float32 [n, n], upper triangular with zeros below, held by columns where H is float32; None where H is not
        positive definite.
    """
    last_first = order.flip(0)
    matrix = torch.empty_like(h)
    for place, some in zip(matrix.split(_STRIPE), last_first.split(_STRIPE), strict=True):
        place.copy_(h[some][:, last_first])
    lower, failed = matrix.mT, torch.empty((), dtype=torch.int32)  # by columns, as LAPACK has it
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if int(failed):
        return None
    invert_lower(lower)
    _turn(lower)
    if not all(bool(rows.isfinite().all()) for rows in lower.split(_STRIPE)):
        return None
    return lower if lower.dtype == torch.float32 else lower.float().contiguous()


def invert_lower(lower: Tensor) -> None:
    """Put the inverse of a lower triangular matrix [n, n] in its place; above the diagonal there are zeros."""
    n = len(lower)
    if n <= _SMALL:
        lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(n, dtype=lower.dtype), upper=False))
        return
    half = n // 2
    first, second, between = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower(first)
    invert_lower(second)
    for columns in between.split(_STRIPE, dim=1):
        columns.copy_(second @ columns)
    for rows in between.split(_STRIPE):
        rows.copy_(rows @ first).neg_()


def _turn(matrix: Tensor) -> None:
    """Rows and columns from the last to the first, in place."""
    n = len(matrix)
    for start in range(0, n // 2, _STRIPE):
        end = min(start + _STRIPE, n // 2)
        top, bottom = matrix[start:end], matrix[n - end : n - start]
        turned = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(turned)
    if n % 2:
        middle = matrix[n // 2]
        middle.copy_(middle.flip(0))
