"""The loops of GPTQ over a weight's columns: codes of a block, codes improved one by one, and the search of grids.

Source: GPTQ, arXiv 2210.17323, algorithm 1 (`gptq_block` is its inner loop). `gptq_descend` goes on where it ends:
coordinate descent on the same error, sum over rows of (w - q) H (w - q)^T. A code is changed to the nearest of

    q_j + ((w - q) H)_j / H_jj

which is the number that would be best at column j if all others stayed, until nothing changes or the sweeps are over.
Rows do not depend on each other. Kernel: csrc/ops/gptq.cpp. Not here: Hessians, their inverse, order of columns, groups
(models/gptq.py); the grids' definition (formats/grids.py).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.formats import grids
from lilliput.formats.grouped import by_groups
from lilliput.kernels import dispatch
from lilliput.kernels.core import arrays

LARGEST_BLOCK = 512  # columns: max_gptq_block of csrc/ops/ops.h


def gptq_block(
    w: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes of a block of columns in their order, the error of each spread over those behind it.

    Args:
        w: float32 [out, block], at most 512 columns, with the errors of all columns before the block.
        upper: float32 [block, block], upper triangular: the block's part of the Cholesky factor of the inverse Hessian.
        scale, zero: float32 [out, groups].
        group: int32 [block], the group of each column.
        bits: of a code, at most 8.

    Returns:
        codes: uint8 [out, block]; errors: float32 [out, block], (w - q) / upper_jj at the time of each column.

    Raises:
        FormatError: shapes that do not fit each other.
    """
    _check(w, upper, scale, zero, group, bits)
    if w.shape[1] > LARGEST_BLOCK:
        raise FormatError(f"a block of {w.shape[1]} columns; at most {LARGEST_BLOCK}")
    return torch.ops.lilliput.gptq_block(w, upper, scale, zero, group, bits)


def gptq_descend(
    codes: Tensor,
    residual: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    bits: int,
    sweeps: int,
) -> Tensor:
    """Better codes for the same grids, uint8 [out, in].

    Args:
        codes: uint8 [out, in].
        residual: float32 [out, in], (w - q) H with q what the codes stand for.
        hessian: float32 [in, in], symmetric, its diagonal above zero.
        scale, zero, group, bits: as in `gptq_block`, the group of all columns.
        sweeps: over all columns, at most.

    Raises:
        FormatError: shapes that do not fit each other.
    """
    _check(residual, hessian, scale, zero, group, bits)
    if codes.shape != residual.shape:
        raise FormatError(f"codes are {list(codes.shape)}, the residual {list(residual.shape)}")
    return torch.ops.lilliput.gptq_descend(codes, residual, hessian, scale, zero, group, bits, sweeps)


def search_grid(w: Tensor, importance: Tensor, group: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """`formats.grids.search_grid` for each group of each row.

    Args:
        w: float32 [out, in], finite.
        importance: float32 [in], of a column's error.
        group: columns of a group; the last one of a row may have fewer.

    Returns:
        scale and zero: float32 [out, groups].

    Raises:
        FormatError: shapes that do not fit, or numbers too large for a scale in float16.
    """
    if w.dim() != 2 or importance.shape != w.shape[1:] or group < 1 or not 1 <= bits <= 8:
        raise FormatError(
            f"w is {list(w.shape)}, the importance {list(importance.shape)}, groups of {group}, {bits} bits"
        )
    if w.numel() and not float(w.abs().amax()) <= grids.LARGEST:
        raise FormatError(f"numbers beyond {grids.LARGEST:g}, or not finite; float16 cannot hold their scale")
    return torch.ops.lilliput.search_grid(w, importance, group, bits, symmetric)


def _check(w: Tensor, square: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int) -> None:
    rows, columns = w.shape if w.dim() == 2 else (-1, -1)
    fits = square.shape == (columns, columns) and group.shape == (columns,)
    if not fits or scale.shape != zero.shape or scale.dim() != 2 or scale.shape[0] != rows or not 1 <= bits <= 8:
        raise FormatError(
            f"w {list(w.shape)}, matrix {list(square.shape)}, scale {list(scale.shape)}, zero {list(zero.shape)}, "
            f"group {list(group.shape)} and {bits} bits do not fit each other"
        )


# ---- the references ----


def _block(w: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    left, codes, errors = w.clone(), w.new_empty(w.shape, dtype=torch.uint8), torch.empty_like(w)
    for i, g in enumerate(group.tolist()):
        code = grids.codes_on(left[:, i : i + 1], scale[:, g], zero[:, g], bits)[:, 0]
        error = (left[:, i] - scale[:, g] * (code - zero[:, g])) / upper[i, i]
        left[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
        codes[:, i], errors[:, i] = code.to(torch.uint8), error
    return codes, errors


def _descend(
    codes: Tensor,
    residual: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    bits: int,
    sweeps: int,
) -> Tensor:
    codes, slope = codes.clone(), residual.clone()
    for _ in range(sweeps):
        before = codes.clone()
        for j, g in enumerate(group.tolist()):
            s, z, curve = scale[:, g], zero[:, g], hessian[j, j]
            now = s * (codes[:, j].float() - z)
            code = grids.codes_on((now + slope[:, j] / curve)[:, None], s, z, bits)[:, 0]
            step = s * (code - z) - now
            better = step * (slope[:, j] - 0.5 * step * curve) > 0
            codes[:, j] = torch.where(better, code, codes[:, j]).to(torch.uint8)
            slope -= torch.where(better, step, 0.0)[:, None] * hessian[j]
        if torch.equal(before, codes):
            break
    return codes


def _search(w: Tensor, importance: Tensor, group: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    # zeros behind the last group change neither its range nor, without weight, its error
    return grids.search_grid(by_groups(w, group), bits, symmetric, by_groups(importance[None], group)[0])


# ---- fakes ----


def _block_fake(w: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int) -> Any:
    return w.new_empty(w.shape, dtype=torch.uint8), torch.empty_like(w)


def _descend_fake(codes: Tensor, residual: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(codes)


def _search_fake(w: Tensor, importance: Tensor, group: int, bits: int, symmetric: bool) -> Any:
    groups = -(w.shape[1] // -group)
    return w.new_empty((w.shape[0], groups)), w.new_empty((w.shape[0], groups))


# ---- the compiled core ----


def _block_core(
    core: ModuleType, w: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    codes, errors = w.new_empty(w.shape, dtype=torch.uint8), w.new_empty(w.shape)
    *given, codes_, errors_ = arrays(w, upper, scale, zero, group, codes, errors)
    core.gptq_block(*given, bits, codes_, errors_, torch.get_num_threads())
    return codes, errors


def _descend_core(
    core: ModuleType,
    codes: Tensor,
    residual: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    bits: int,
    sweeps: int,
) -> Tensor:
    found = codes.clone(memory_format=torch.contiguous_format)
    slope = residual.clone(memory_format=torch.contiguous_format)
    *given, found_, slope_ = arrays(hessian, scale, zero, group, found, slope)
    core.gptq_descend(*given, bits, sweeps, found_, slope_, torch.get_num_threads())
    return found


def _search_core(
    core: ModuleType, w: Tensor, importance: Tensor, group: int, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    scale, zero = _search_fake(w, importance, group, bits, symmetric)
    w_, importance_, scale_, zero_ = arrays(w, importance, scale, zero)
    core.search_grid(
        w_, importance_, group, bits, symmetric, list(grids.SHARES), scale_, zero_, torch.get_num_threads()
    )
    return scale, zero


def _knows(*args: Any) -> bool:
    return all(tensor.dtype != torch.float64 for tensor in args if isinstance(tensor, Tensor))


GRID = "Tensor scale, Tensor zero, Tensor group, int bits"
BLOCK = dispatch.define(f"gptq_block(Tensor w, Tensor upper, {GRID}) -> (Tensor, Tensor)", _block, _block_fake)
DESCEND = dispatch.define(
    f"gptq_descend(Tensor codes, Tensor residual, Tensor hessian, {GRID}, int sweeps) -> Tensor",
    _descend,
    _descend_fake,
)
SEARCH = dispatch.define(
    "search_grid(Tensor w, Tensor importance, int group, int bits, bool symmetric) -> (Tensor, Tensor)",
    _search,
    _search_fake,
)
dispatch.register_core(BLOCK, _block, _block_core, _knows)
dispatch.register_core(DESCEND, _descend, _descend_core, _knows)
dispatch.register_core(SEARCH, _search, _search_core, _knows)
