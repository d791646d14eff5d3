"""y = x W^T + bias with W in int8, x rounded by rows but for its large columns; and the gradient to x (and bias).

Source: LLM.int8(), arXiv 2208.07339, section 3: vector-wise quantization with mixed decomposition. One thing is finer
than there: a row of x has as many steps as sums of 32 bits allow (rowwise.largest_input: 29,357 for 576 columns, 4,128
for 4,096), not 127. It costs nothing on a CPU, and it takes nearly all of the error away that rounding x to int8 makes:
on WikiText-2 SmolLM2's perplexity is that of the int8 weights alone. The gradient is the
straight-through one: rounding x counts as the identity, so that g W, with W dequantized, reaches x; W is frozen.
The reference product is `lilliput.formats.rowwise.vectorwise_product`. Not here: the low-rank update beside it
(lora_linear.py).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lilliput.formats import Quantized, rowwise
from lilliput.kernels import dispatch
from lilliput.kernels.core import arrays
from lilliput.kernels.linear_4bit import check, compute_type, core_knows, float_rows, matrix


def linear_int8(x: Tensor, q: Quantized, bias: Tensor | None = None, threshold: float = 6.0) -> Tensor:
    """x [..., in] times an int8 matrix, plus bias: float [..., out] of x's dtype.

    x counts as [rows, in], whatever its leading sizes: each row is scaled by its own largest number and rounded to
    whole numbers, and columns with a number beyond the threshold in any row are multiplied in float32. So a row's
    result depends, by the rounding of x, on the rows beside it; with a threshold of 0 it does not. Computed in float32
    and whole numbers, rounded once to x's dtype, under autocast too. A float64 x is not rounded: then the product is
    the plain one with W dequantized, whose exact gradient is the one given here.

    A row with NaN or Inf, which int8 cannot say, gives a row of NaN; such a number makes no column an outlier, so that
    the other rows are as without it.

    Differentiable in x and bias; backward keeps codes and absmax, neither x nor a dequantized W.

    Args:
        x: [..., in]; float32, bfloat16, float16 or float64.
        q: of shape (out, in), in int8.
        bias: [out], or None.
        threshold: 6.0 in the paper; 0: no column is an outlier.

    Raises:
        FormatError: q is not an int8 matrix, x or bias do not fit it, or x is of another dtype.
        UsageError: a negative threshold.
    """
    check(x, q, bias, "rows")
    codes, absmax, *_ = q.packed
    return torch.ops.lilliput.linear_int8(x, codes.view(q.shape), absmax, bias, rowwise.check_threshold(threshold))


# ---- the references ----


def reference(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        wide = matrix(x).to(compute_type(x))
        if wide.dtype == torch.float64:
            y = wide @ _dense(codes, absmax, wide.dtype).T
        else:
            y = rowwise.vectorwise_product(wide, codes, absmax, threshold, rowwise.largest_input(codes.shape[1]))
        y = y if bias is None else y + bias.to(wide.dtype)
        return y.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


def backward_reference(grad: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        weight = _dense(codes, absmax, compute_type(grad))
        return (grad.to(weight.dtype) @ weight).to(grad.dtype)


def _dense(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return rowwise.dequantize_rows(codes, absmax, tuple(codes.shape), dtype)


# ---- fakes ----


def _linear_fake(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _linear_backward_fake(grad: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], codes.shape[1]))


# ---- the compiled core ----


def by_core(
    core: ModuleType,
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """`left` float32 [rows, r] and `right` float32 [out, r], both or neither: left right^T is added to the product."""
    rows = float_rows(x)
    y = rows.new_empty((*x.shape[:-1], codes.shape[0]))  # no view, since models add to it in place
    added = None if bias is None else bias.detach().float().contiguous()
    x_, codes_, absmax_, added_, left_, right_, y_ = arrays(rows, codes, absmax, added, left, right, matrix(y))
    core.linear_int8(x_, codes_, absmax_, added_, threshold, left_, right_, y_, torch.get_num_threads())
    return y.to(x.dtype)


def backward_by_core(
    core: ModuleType,
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """`left` float32 [rows, r] and `right` float32 [r, in], both or neither: left right is added to the gradient."""
    rows = float_rows(grad)
    gx = rows.new_empty((*grad.shape[:-1], codes.shape[1]))
    grad_, codes_, absmax_, left_, right_, gx_ = arrays(rows, codes, absmax, left, right, matrix(gx))
    core.linear_int8_backward(grad_, codes_, absmax_, left_, right_, gx_, torch.get_num_threads())
    return gx.to(grad.dtype)


# ---- registration ----

LINEAR = dispatch.define(
    "linear_int8(Tensor x, Tensor codes, Tensor absmax, Tensor? bias, float threshold) -> Tensor",
    reference,
    _linear_fake,
)
BACKWARD = dispatch.define(
    "linear_int8_backward(Tensor grad, Tensor codes, Tensor absmax) -> Tensor",
    backward_reference,
    _linear_backward_fake,
)
dispatch.register_core(LINEAR, reference, by_core, core_knows)
dispatch.register_core(BACKWARD, backward_reference, backward_by_core, core_knows)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, bias, _ = inputs
    ctx.save_for_backward(codes, absmax)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.lilliput.linear_int8_backward(grad, *ctx.saved_tensors)
    if ctx.needs_input_grad[3]:
        to_bias = matrix(grad).sum(dim=0, dtype=compute_type(grad)).to(ctx.bias_dtype)
    return to_x, None, None, to_bias, None


torch.library.register_autograd(LINEAR, _gradients, setup_context=_keep, lib=dispatch.LIBRARY)
