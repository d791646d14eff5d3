"""y = x dequantize(W)^T + bias with W in groups of rows, 2, 3, 4 or 8 bits, and the gradient to x (and bias).

Source: GPTQ, arXiv 2210.17323, section 4, makes such weights. W is frozen. Kernel: csrc/ops/linear_grouped.cpp. Not
here: the low-rank update beside it (lora_linear.py).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lilliput.formats import Quantized, get_format
from lilliput.formats.grouped import dequantize_packed
from lilliput.kernels import dispatch
from lilliput.kernels.core import arrays
from lilliput.kernels.linear_4bit import check, compute_type, core_knows, differentiable, float_rows, matrix


def linear_grouped(x: Tensor, q: Quantized, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times a matrix in groups of its rows, plus bias: float [..., out] of x's dtype.

    Computed in float32 (float64 for a float64 x, by the reference) and rounded once to x's dtype, under autocast too;
    but a single row on AVX2, outside of `exact`, with x in 16-bit fixed point (linear_grouped_fixed.simd.cpp): an error
    of some 2e-5 of the result's size. Differentiable in x and bias; backward keeps the packed tensors, neither x nor a
    dequantized W.

    Args:
        x: [..., in]; float32, bfloat16, float16 or float64.
        q: a GroupedTensor of shape (out, in), with or without zeros and an order of columns.
        bias: [out], or None.

    Raises:
        FormatError: q is not such a matrix, x or bias do not fit it, or x is of another dtype.
    """
    check(x, q, bias, "groups")
    return torch.ops.lilliput.linear_grouped(x, *q.packed, bias, q.format.name, q.shape[0])


# ---- the reference: three lines ----


def reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    format: str,
    out_features: int,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        weight = _dense(codes, scale, zero, order, format, (out_features, x.shape[-1]), compute_type(x))
        y = x.to(weight.dtype) @ weight.T  # functional.linear may give a view, to which no model could add in place
        return (y if bias is None else y.add_(bias.to(weight.dtype))).to(x.dtype)


def backward_reference(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    format: str,
    in_features: int,
) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        weight = _dense(codes, scale, zero, order, format, (grad.shape[-1], in_features), compute_type(grad))
        return (grad.to(weight.dtype) @ weight).to(grad.dtype)


def _dense(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    format: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    return dequantize_packed(codes, scale, zero, order, get_format(format), shape, dtype)


# ---- fakes ----


def _linear_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    format: str,
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_backward_fake(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    format: str,
    in_features: int,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


# ---- the compiled core: columns in the order they are stored in; x and its gradient are reordered here ----


def by_core(
    core: ModuleType,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    format: str,
    out_features: int,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """`left` float32 [rows, r] and `right` float32 [out, r], both or neither: left right^T is added to the product."""
    rows = _stored_order(float_rows(x), order)
    y = rows.new_empty((*x.shape[:-1], out_features))  # no view, since models add to it in place
    added = None if bias is None else bias.detach().float().contiguous()
    x_, codes_, scale_, zero_, added_, left_, right_, y_ = arrays(
        rows, codes, scale, zero, added, left, right, matrix(y)
    )
    row = get_format(format)
    packed = (codes_, row.bits, row.block, scale_, zero_)
    core.linear_grouped(x_, *packed, added_, left_, right_, y_, torch.get_num_threads(), dispatch.is_exact())
    return y.to(x.dtype)


def backward_by_core(
    core: ModuleType,
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    format: str,
    in_features: int,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """`left` float32 [rows, r] and `right` float32 [r, in], both or neither: left right is added to the gradient."""
    rows = float_rows(grad)
    gx = rows.new_empty((*grad.shape[:-1], in_features))
    stored = matrix(gx) if order is None else torch.empty_like(matrix(gx))
    right = None if right is None else _stored_order(right, order)
    grad_, codes_, scale_, zero_, left_, right_, stored_ = arrays(rows, codes, scale, zero, left, right, stored)
    row = get_format(format)
    packed = (codes_, row.bits, row.block, scale_, zero_)
    core.linear_grouped_backward(grad_, *packed, left_, right_, stored_, torch.get_num_threads())
    if order is not None:
        matrix(gx).index_copy_(1, order.long(), stored)
    return gx.to(grad.dtype)


def _stored_order(rows: Tensor, order: Tensor | None) -> Tensor:
    """[rows, in] with its columns as W's are stored."""
    return rows if order is None else rows.index_select(1, order)


# ---- registration ----

PACKED = "Tensor codes, Tensor scale, Tensor? zero, Tensor? order"
LINEAR = dispatch.define(
    f"linear_grouped(Tensor x, {PACKED}, Tensor? bias, str format, SymInt out_features) -> Tensor",
    reference,
    _linear_fake,
)
BACKWARD = dispatch.define(
    f"linear_grouped_backward(Tensor grad, {PACKED}, str format, SymInt in_features) -> Tensor",
    backward_reference,
    _linear_backward_fake,
)
dispatch.register_core(LINEAR, reference, by_core, core_knows)
dispatch.register_core(BACKWARD, backward_reference, backward_by_core, core_knows)
differentiable(LINEAR, BACKWARD)
