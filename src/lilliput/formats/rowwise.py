"""int8 by rows in plain torch, and the product of LLM.int8(): the reference that every kernel is tested against.

    c_r = max |x_rk| over row r        q_rk = round(127 x_rk / c_r)        x_rk ~ q_rk c_r / 127

Source: LLM.int8(), arXiv 2208.07339. Section 2.1 has the two ways to quantize a whole tensor, here for comparison;
section 3.1 the vector-wise product, one absmax per row of x and per row of W (an output of the layer); section 3.2 the
mixed decomposition: the few columns of x with large numbers leave the product in int8 and are multiplied in float32.
Rounding is to the nearest, half to even, of the float32 product x (127 / c), as bitsandbytes does it: codes and absmax
equal its own. Not here: training of int8 weights; the quick versions (`lilliput.kernels`).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lilliput.errors import UsageError
from lilliput.formats.blockwise import check_finite

LARGEST = 127  # the largest code; -128 is not used, so that x and -x have opposite codes
_LARGEST_INPUT = 2**15 - 1  # of a row of x: its codes are multiplied as 16-bit numbers
_SMALLEST_ABSMAX = 1e-38  # of a step: 1 / c and its multiples are no float32 for a smaller c, whose row gets zeros
# Sums of so many products of codes are whole numbers below 2**24, which float32 holds without rounding.
_EXACT_COLUMNS = 2**24 // LARGEST**2


# ---- rows ----


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8 [numel], and absmax, float32 [rows], of a tensor of any shape; a row runs along the last dimension.

    A row of zeros, or of numbers below 1.27e-36, has codes of zero.

    Raises:
        FormatError: NaN or Inf (says where the first is), or a dtype outside float32, float16, bfloat16.
    """
    check_finite(x)
    matrix = rows_of(x.detach()).float()
    absmax = row_absmax(matrix)
    return codes_of(matrix, absmax).reshape(-1), absmax


def dequantize_rows(
    codes: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """code * (absmax of the row / 127), in float32, rounded once to `dtype`. codes: int8 [numel], or of any shape."""
    columns = shape[-1] if shape else 1
    values = codes.reshape(absmax.numel(), columns).float() * (absmax / LARGEST)[:, None]
    return values.to(dtype).view(shape)


def rows_of(x: Tensor) -> Tensor:
    """[..., columns] as [rows, columns]; a scalar is one row of one number."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1)


def row_absmax(matrix: Tensor) -> Tensor:
    """[rows, columns] to [rows]; rows without numbers have 0."""
    return matrix.abs().amax(dim=1) if matrix.shape[1] else matrix.new_zeros(matrix.shape[0])


def codes_of(matrix: Tensor, absmax: Tensor, largest: int = LARGEST) -> Tensor:
    """Whole numbers of at most `largest`, int8 (int16 above 127) [rows, columns], of a float32 matrix by rows."""
    factor = torch.where(absmax >= largest * _SMALLEST_ABSMAX, largest / absmax, 0.0)
    return (matrix * factor[:, None]).round().to(torch.int8 if largest <= LARGEST else torch.int16)


def largest_input(columns: int) -> int:
    """The largest code for numbers of x, of which a row has so many: as fine as sums of 32 bits allow, at least 127.

    columns * 127 * this is below 2**31, so that no sum of products with int8 codes can overflow. A processor multiplies
    16-bit numbers as quickly as bytes that it must not let saturate, so that finer steps than the paper's cost nothing.
    """
    return max(LARGEST, min(_LARGEST_INPUT, (2**31 - 1) // (LARGEST * max(columns, 1))))


# ---- the product ----


def vectorwise_product(
    x: Tensor, codes: Tensor, absmax: Tensor, threshold: float = 0.0, largest: int = LARGEST
) -> Tensor:
    """x W^T with W in int8 and x rounded to whole numbers on the way: float32 [rows, out].

    Columns of x that hold an outlier are multiplied in float32 with W's columns dequantized; the other ones in whole
    numbers, without a rounding, and scaled by both absmax at the end. A row with NaN or Inf gives NaN, and does not
    disturb the other rows.

    Args:
        x: float32 [rows, in].
        codes: int8 [out, in].
        absmax: float32 [out].
        threshold: a column with a number beyond it, in any row, is an outlier; 0: none is.
        largest: the code of a row's largest number: 127 in the paper, `largest_input` in our kernels.
    """
    outliers = outlier_columns(x, threshold)
    usual = x.masked_fill(outliers, 0.0)
    finite = x.isfinite().all(dim=1)
    row_scale = torch.where(finite, row_absmax(usual) / largest, torch.nan)
    usual = usual.masked_fill(~finite[:, None], 0.0)
    whole = integer_product(codes_of(usual, row_absmax(usual), largest), codes)
    y = whole.float() * row_scale[:, None] * (absmax / LARGEST)
    if outliers.any():
        weight = dequantize_rows(codes[:, outliers].contiguous(), absmax, (codes.shape[0], int(outliers.sum())))
        y = y + x[:, outliers] @ weight.T
    return y


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """Which columns of x [rows, in] hold a finite number beyond the threshold: bool [in]; none for the threshold 0."""
    if threshold == 0:
        return torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    return ((x.abs() > threshold) & x.isfinite()).any(dim=0)


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T of codes [rows, in], int8 or int16, and [out, in], int8, exact: int32 [rows, out].

    Float32 products of so few columns that nothing is rounded (float64 for int16, where nothing is in any case);
    torch's own integer products are far slower.
    """
    if left.dtype == torch.int16:
        return (left.double() @ right.double().T).int()
    parts = zip(left.split(_EXACT_COLUMNS, dim=1), right.split(_EXACT_COLUMNS, dim=1), strict=True)
    total = left.new_zeros((left.shape[0], right.shape[0]), dtype=torch.int32)
    for one, other in parts:
        total += (one.float() @ other.float().T).int()
    return total


def check_threshold(threshold: float) -> float:
    """The threshold, or UsageError when it is negative or no number."""
    if not 0 <= threshold < float("inf"):
        raise UsageError(
            f"threshold={threshold}: expected 0 (no outliers) or a positive number", todo="LLM.int8() takes 6.0."
        )
    return float(threshold)


# ---- whole tensors, for comparison ----


def quantize_absmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """One absmax for a whole tensor: codes, int8 of x's shape, and absmax, float32 []. Value: code absmax / 127.

    One large number takes the resolution of all others, which is why LLM.int8() scales by rows. Raises FormatError as
    `quantize_rows`.
    """
    check_finite(x)
    flat = x.detach().float().reshape(1, -1)
    absmax = row_absmax(flat)
    return codes_of(flat, absmax).view(x.shape), absmax[0]


def quantize_zeropoint(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The whole range of an asymmetric tensor: codes, int8 of x's shape, steps and zero, float32 [] each.

        code = round(steps x) + zero        x ~ (code - zero) / steps        steps = 254 / (max - min)

    zero is the whole number that puts the middle of the range on code 0 (it need not be a code itself). A tensor whose
    numbers are all the same is scaled by its absmax. Raises FormatError as `quantize_rows`.
    """
    check_finite(x)
    wide = x.detach().double()
    low, high = (wide.min(), wide.max()) if x.numel() else (wide.new_zeros(()), wide.new_zeros(()))
    span = high - low
    steps = (
        2 * LARGEST / span
        if span >= LARGEST * _SMALLEST_ABSMAX
        else LARGEST / high.abs().clamp(min=LARGEST * _SMALLEST_ABSMAX)
    )
    zero = -(steps * (low + high) / 2).round() if span >= LARGEST * _SMALLEST_ABSMAX else torch.zeros_like(steps)
    codes = ((wide * steps).round() + zero).clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8), steps.float(), zero.float()


def dequantize_zeropoint(codes: Tensor, steps: Tensor, zero: Tensor) -> Tensor:
    """(code - zero) / steps, float32 of codes' shape."""
    return (codes.float() - zero) / steps
