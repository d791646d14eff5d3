"""GPTQ: the codes of a weight chosen for the layer's inputs, each column making up for the errors of those before it.

For a layer y = x W^T and the rows x of a calibration text, with H = 2 X^T X / n, wanted are codes that keep

    error = sum over rows w of W, quantized to q:  (w - q) H (w - q)^T

small. Source: GPTQ, arXiv 2210.17323, algorithm 1: columns are quantized one after the other, in blocks; the error of
each is spread over the columns that are still to come, by the rows of the Cholesky factor U of the inverse Hessian,
H^-1 = U^T U. From the authors' code: dampening (a share of H's mean diagonal is added to it), columns without input,
the order of columns by their inputs' size (`act_order`), groups whose grids are set before the first column is touched
(`static_groups`). Three things are ours: grids are searched for the least error, weighed by the inputs; and when the
last column is done, scales and codes are improved in turn for the same error: scales by least squares
(`refit_scales`), codes by coordinate descent (`kernels.gptq.gptq_descend`). On SmolLM2 that takes a tenth of the error
away. The algorithm as published is `Gptq(correct=0, search=False, refine=0)`; what `correct` does is in drift.py.
Memory: wide inputs have a Hessian larger than the layer itself, so there are two matrices of that size and no third:
H, whose diagonal is raised where it lies, and U, which is factored and inverted where it lies; weights go through in
stripes of rows. Not here: where inputs come from (calibrate.py), files (gptq_files.py), factoring (triangular.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lilliput.errors import FormatError, UsageError
from lilliput.formats import ROW, Format, grouped_format
from lilliput.formats.grids import minmax_grid
from lilliput.formats.grouped import (
    GroupedTensor,
    by_groups,
    group_count,
    grouped,
    nearest_codes,
    spread,
    values_of,
)
from lilliput.kernels.gptq import LARGEST_BLOCK, gptq_block, gptq_descend, search_grid
from lilliput.models.triangular import inverse_factor

BITS = (2, 3, 4, 8)
ROWS_AT_ONCE = 4096  # of inputs, whose products are summed in float32 before they are added in float64
EXACT = 4096  # columns up to which H is held and factored in float64; beyond, H alone would be larger than the layer
STRIPE = 1 << 21  # numbers of a weight that are quantized at once: 8 MB each of some twenty tensors
_DAMP_STEPS = 8  # dampening grows tenfold each time that Cholesky fails
_SWEEPS = 4  # of coordinate descent in a round; it mostly ends sooner
_RIDGE = 1e-6  # of a scale's mean weight in its least squares, for groups whose codes are all zero
_FAR = 3.0  # a refitted scale further than so many times from the old one is not taken


@dataclass(frozen=True)
class Gptq:
    """How a weight is quantized.

    Attributes:
        bits: 2, 3, 4 or 8.
        group: consecutive columns that share a scale and a zero; ROW (0) or -1: all of a row.
        symmetric: whether zero is the middle code for all groups.
        act_order: quantize columns with large inputs first.
        static_groups: set all grids before the first column, so that groups are of neighbours whatever the order.
            Without it and with `act_order`, readers must gather columns at run time.
        damp: share of H's mean diagonal that is added to the diagonal.
        correct: how far a layer makes up for the errors of those before it, from 0 (it is asked for what its weights
            give for its inputs as they are now) to 1 (for what it gave in the original model); see drift.py.
        search: the grid of least error, not the one of the least and the greatest number.
        refine: rounds of refitted scales and descent behind the published algorithm.
        block: columns between two updates of all the others.

    Raises:
        UsageError: what no format has, or a number that makes no sense.
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = False
    act_order: bool = True
    static_groups: bool = True
    damp: float = 0.01
    correct: float = 0.25
    search: bool = True
    refine: int = 2
    block: int = 128

    def __post_init__(self) -> None:
        if self.group == -1:
            object.__setattr__(self, "group", ROW)
        _ = self.format
        if not 0 < self.damp < 1:
            raise UsageError(f"damp={self.damp} is not between 0 and 1", todo="0.01 is usual.")
        if not 0 <= self.correct <= 1:
            raise UsageError(f"correct={self.correct} is not from 0 to 1", todo="0.25 is usual, 0 corrects nothing.")
        if not 1 <= self.block <= LARGEST_BLOCK or self.refine < 0:
            raise UsageError(f"block={self.block} and refine={self.refine}: 1 to {LARGEST_BLOCK}, and 0 or more")

    @property
    def format(self) -> Format:
        """The number format of the codes."""
        if self.bits not in BITS:
            raise UsageError(f"{self.bits} bits: there are {', '.join(map(str, BITS))}", where="bits")
        return grouped_format(self.bits, self.group)

    @property
    def ordered(self) -> bool:
        """Whether groups are of columns that are no neighbours."""
        return self.act_order and not self.static_groups


def no_sums(rows: int, columns: int) -> Tensor:
    """Zeros [rows, columns] that products over a text are added to: float64, but float32 for more than 4096 columns."""
    return torch.zeros(rows, columns, dtype=torch.float64 if columns <= EXACT else torch.float32)


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to sums [rows, columns]; float32 [n, rows] and [n, columns], n at most ROWS_AT_ONCE."""
    if sums.dtype == torch.float32:
        sums.addmm_(left.T, right)  # nothing else of its size is there
    else:
        sums += left.T @ right


class Hessian:
    """2 X^T X / n, summed up over rows of inputs, and nothing of X is kept.

    [columns, columns]; float64, but float32 for more than 4096 columns.
    """

    def __init__(self, columns: int) -> None:
        self.sums = no_sums(columns, columns)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """x: floating [..., columns]; products of up to 4096 rows are summed in float32.

        Raises FormatError for NaN or Inf.
        """
        matrix = x.detach().reshape(-1, len(self.sums))
        for some in matrix.split(ROWS_AT_ONCE):
            part = some.float()
            add_product(self.sums, part, part)
        self.rows += len(matrix)
        if not bool(self.sums.diagonal().isfinite().all()):
            raise FormatError("an input of the layer is NaN or Inf", todo="Check the model with `lilliput eval`.")

    def mean(self) -> Tensor:
        """H, [columns, columns]."""
        return self.sums * (2 / max(self.rows, 1))

    def take_mean(self) -> Tensor:
        """H, made of the sums where they lie; there are none left."""
        sums, self.sums = self.sums, self.sums[:0, :0]
        return sums.mul_(2 / max(self.rows, 1))


@dataclass(frozen=True)
class Inputs:
    """What the algorithm needs of a layer's inputs, for all weights that share them.

    Attributes:
        dampened: H [in, in] with its diagonal raised, in the type that it came in.
        raised: [in], by how much: the dampening, and 1 for dead columns.
        upper: U, float32 [in, in], of the dampened H with its columns in `order`.
        order: int64 [in], the columns as they are quantized.
        damp: the share of H's mean diagonal that Cholesky needed.
        dead: bool [in], columns whose input was always zero.
    """

    dampened: Tensor
    raised: Tensor
    upper: Tensor
    order: Tensor
    damp: float
    dead: Tensor


@dataclass(frozen=True)
class Solution:
    """A quantized weight.

    Attributes:
        quantized: of the weight's shape [out, in].
        error: the error above, as a share of that of a weight of zeros.
        damp: the dampening that Cholesky needed.
        dead: columns whose input was always zero.
    """

    quantized: GroupedTensor
    error: float
    damp: float
    dead: int


def solve(weight: Tensor, hessian: Tensor | Inputs, settings: Gptq) -> Solution:
    """Quantize a weight for inputs with that Hessian.

    Args:
        weight: floating [out, in], finite.
        hessian: floating [in, in], symmetric; not changed. Or what `factor` made of it for these settings, where
            several weights share it.

    Raises:
        FormatError: shapes that do not fit, NaN or Inf, or a Hessian that no dampening makes positive definite.
    """
    square = hessian.dampened if isinstance(hessian, Inputs) else hessian
    if weight.dim() != 2 or square.shape != (weight.shape[1], weight.shape[1]):
        raise FormatError(f"the weight is {list(weight.shape)}, the Hessian {list(square.shape)}")
    if not bool(weight.isfinite().all()):
        raise FormatError("the weight has NaN or Inf")
    inputs = hessian if isinstance(hessian, Inputs) else factor(hessian.clone(), settings)
    problem = _Problem.of(inputs, settings)
    rows = max(1, STRIPE // max(weight.shape[1], 1))
    stripes = [problem.solve(some.detach().float()) for some in weight.split(rows)]
    codes, scale, zero = (torch.cat(parts) for parts in zip(*(found for found, _, _ in stripes), strict=True))
    lost, all_of_it = sum(error for _, error, _ in stripes), sum(error for _, _, error in stripes)
    q = grouped(codes, scale.half(), None if settings.symmetric else zero, settings.format, problem.stored)
    return Solution(q, lost / max(all_of_it, 1e-300), inputs.damp, int(inputs.dead.sum()))


@dataclass(frozen=True)
class _Problem:
    """What all stripes of a weight share: columns as they are stored, and H in that order and in float32."""

    inputs: Inputs
    settings: Gptq
    group: Tensor
    stored: Tensor | None  # the order of the columns, where groups are of columns that are no neighbours
    importance: Tensor
    hessian: Tensor
    raised: Tensor

    @classmethod
    def of(cls, inputs: Inputs, settings: Gptq) -> _Problem:
        damped, order = inputs.dampened, inputs.order
        group = _groups_of(len(damped), settings, order)
        stored = order if settings.ordered else None
        hessian, raised = damped.float(), inputs.raised
        if stored is not None:
            hessian, raised = hessian[stored][:, stored], raised[stored]
        return cls(inputs, settings, group, stored, damped.diagonal().float(), hessian, raised)

    def solve(self, w: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], float, float]:
        """(codes, scale, zero) of w, float32 [some rows, in], in the order in which columns are stored; the error, and
        that of zeros."""
        settings, order = self.settings, self.inputs.order
        w = w.masked_fill(self.inputs.dead, 0.0)
        static = _grids(w, self.importance, settings) if settings.static_groups else None
        codes, scale, zero = _algorithm_1(
            w[:, order], self.inputs.upper, self.importance[order], self.group, static, settings
        )
        if self.stored is None:  # back to the weight's own order, in which groups are of neighbours
            codes = torch.empty_like(codes).index_copy_(1, order, codes)
        else:
            w = w[:, self.stored]
        codes, scale = _refine(w, self.hessian, codes, scale, zero, settings)
        rest = w - values_of(codes, scale, zero, settings.group)
        return (codes, scale, zero), self._error(rest), self._error(w)

    def _error(self, rest: Tensor) -> float:
        """The error for H as it was before its diagonal was raised."""
        return float(_row_errors(rest, self.hessian).double().sum() - (rest.double() ** 2 @ self.raised.double()).sum())


def round_to_nearest(weight: Tensor, settings: Gptq) -> GroupedTensor:
    """Each number to the nearest of its group's grid: what GPTQ is compared with, and what a layer without inputs gets.

    Args:
        weight: floating [out, in], finite; in a search of grids all columns count the same.
    """
    w = weight.detach().float()
    scale, zero = _grids(w, torch.ones(w.shape[1]), settings)
    codes = nearest_codes(w, scale, zero, settings.format)
    return grouped(codes, scale.half(), None if settings.symmetric else zero, settings.format)


# ---- algorithm 1 ----


def factor(hessian: Tensor, settings: Gptq) -> Inputs:
    """Order the columns, dampen H until it has a Cholesky factor, and factor its inverse.

    Args:
        hessian: float32 or float64 [in, in], symmetric; taken over, its diagonal is raised where it lies.

    Raises:
        FormatError: no dampening makes it positive definite.
    """
    diagonal = hessian.diagonal()
    given, dead = diagonal.clone(), diagonal <= 0
    diagonal[dead] = 1.0
    alive, damp = diagonal.clone(), settings.damp
    mean = float(alive.mean()) if len(alive) else 1.0
    order = torch.argsort(alive, descending=True, stable=True) if settings.act_order else torch.arange(len(alive))
    for _ in range(_DAMP_STEPS):
        diagonal.copy_(alive + damp * mean)
        upper = inverse_factor(hessian, order)
        if upper is not None:
            return Inputs(hessian, diagonal - given, upper, order, damp, dead)
        damp = min(10 * damp, 1.0) if damp < 1 else 10 * damp
    raise FormatError("the Hessian of the inputs is not positive definite, whatever is added to its diagonal")


def _algorithm_1(
    w: Tensor,
    upper: Tensor,
    importance: Tensor,
    group: Tensor,
    static: tuple[Tensor, Tensor] | None,
    settings: Gptq,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [out, in] of the columns in the order given; scales and zeros float32 [out, groups].

    Args:
        w: float32 [out, in], columns in their order, as are those of U `upper` and of `importance`, H's diagonal.
        group: int32 [in], of each column.
        static: the grids; None: each is made when its first column is reached, for what the errors have made of it.
    """
    w, (rows, columns) = w.clone(), w.shape
    codes = torch.empty(w.shape, dtype=torch.uint8)
    width = _width(columns, settings)
    scale, zero = static or (torch.empty(rows, group_count(columns, settings.group)) for _ in range(2))
    for first, last in _blocks(columns, settings):
        if static is None and first % width == 0:
            some = slice(first, first + width)
            scale[:, first // width :][:, :1], zero[:, first // width :][:, :1] = _grids(
                w[:, some], importance[some], settings
            )
        part = upper[first:last, first:last].contiguous()
        codes[:, first:last], errors = gptq_block(
            w[:, first:last].contiguous(), part, scale, zero, group[first:last], settings.bits
        )
        w[:, last:] -= errors @ upper[first:last, last:]
    return codes, scale, zero


def _blocks(columns: int, settings: Gptq) -> list[tuple[int, int]]:
    """Ranges of columns that are quantized at once; none reaches from one group into the next."""
    width = _width(columns, settings)
    edges = {*range(0, columns, settings.block), columns}
    if not settings.static_groups:
        edges |= {*range(0, columns, width)}
    ordered = sorted(edges)
    return list(pairwise(ordered))


def _width(columns: int, settings: Gptq) -> int:
    """Columns of a group."""
    return max(columns, 1) if settings.group == ROW else settings.group


def _groups_of(columns: int, settings: Gptq, order: Tensor) -> Tensor:
    """int32 [in]: the group of each column in the order in which they are quantized."""
    places = torch.arange(columns) if settings.ordered else order
    return (places // _width(columns, settings)).int()


def _grids(w: Tensor, importance: Tensor, settings: Gptq) -> tuple[Tensor, Tensor]:
    """Scale and zero, float32 [out, groups], of w [out, in] cut into groups as it is."""
    width = _width(w.shape[1], settings)
    if settings.search:
        return search_grid(w.contiguous(), importance.contiguous(), width, settings.bits, settings.symmetric)
    return minmax_grid(by_groups(w, settings.group), settings.bits, settings.symmetric)


# ---- what is ours behind it ----


def _refine(
    w: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, settings: Gptq
) -> tuple[Tensor, Tensor]:
    """Scales and codes improved in turn; all arguments in the order in which columns are stored."""
    width = _width(w.shape[1], settings)
    group = (torch.arange(w.shape[1]) // width).int()
    for _ in range(settings.refine):
        scale = refit_scales(w, hessian, codes, scale, zero, width)
        residual = (w - values_of(codes, scale, zero, settings.group)) @ hessian
        better = gptq_descend(codes, residual, hessian, scale, zero, group, settings.bits, _SWEEPS)
        if torch.equal(better, codes):
            break
        codes = better
    return codes, scale


def refit_scales(w: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, width: int) -> Tensor:
    """The scales of least error for codes that stay: float32 [out, groups], rounded to float16's values.

    With v_g a row's (code - zero) in group g, and zero elsewhere, the error is quadratic in the scales s:
    (w - sum_g s_g v_g) H (w - sum_g s_g v_g)^T is least where sum_h (v_g H v_h^T) s_h = v_g H w^T. A row keeps its old
    scales where rounding makes the new ones worse, or where they are far from the old ones.

    Args:
        w: float32 [out, in]; hessian: float32 [in, in]; codes: uint8 [out, in]; scale, zero: float32 [out, groups].
        width: columns of a group.
    """
    groups, columns = scale.shape[1], w.shape[1]
    v = codes.float() - spread(zero, width, columns)
    gram, right = w.new_empty(len(w), groups, groups), w.new_empty(len(w), groups)
    for g in range(groups):
        some = slice(g * width, (g + 1) * width)
        behind = v[:, some] @ hessian[some]
        gram[:, g] = by_groups(behind * v, width).sum(-1)
        right[:, g] = (behind * w).sum(-1)
    gram, right = gram.double(), right.double()
    ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    found, failed = torch.linalg.solve_ex(gram, right[..., None])
    new = found[..., 0].half().float()
    usable = (new > scale / _FAR) & (new < scale * _FAR) & (failed == 0)[:, None]
    new = torch.where(usable, new, scale)
    before, after = (_row_errors(w - spread(s, width, columns) * v, hessian) for s in (scale, new))
    return torch.where((after < before)[:, None], new, scale).contiguous()


def _row_errors(rest: Tensor, hessian: Tensor) -> Tensor:
    return ((rest @ hessian) * rest).sum(-1)
