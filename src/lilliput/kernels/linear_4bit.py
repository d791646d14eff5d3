"""y = x dequantize(W)^T + bias with W in 4 bits, and the gradient to x (and bias); W is frozen.

Source: QLoRA, arXiv 2305.14314, equation 5. Kernel: csrc/ops/linear_4bit.cpp. Not here: the low-rank update beside it
(lora_linear.py).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.formats import Quantized
from lilliput.formats import blockwise as formats
from lilliput.formats.format import Kind, get_format
from lilliput.kernels import dispatch
from lilliput.kernels.blockwise import core_arguments
from lilliput.kernels.core import arrays


def linear_4bit(x: Tensor, q: Quantized, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times a 4-bit matrix, plus bias: float [..., out] of x's dtype.

    Computed in float32 (float64 for a float64 x, by the reference) and rounded once to x's dtype, under autocast too;
    but a single row on AVX2, outside of `exact`, in 16-bit fixed point (linear_4bit_fixed.simd.cpp): an error of some
    3e-5 of the result's size. Differentiable in x and bias; backward keeps the packed tensors, neither x nor a
    dequantized W.

    Args:
        x: [..., in]; float32, bfloat16, float16 or float64.
        q: in nf4 or fp4, of shape (out, in), with or without double quantization.
        bias: [out], or None.

    Raises:
        FormatError: q is not such a matrix, x or bias do not fit it, or x is of another dtype.
    """
    check(x, q, bias, "blocks")
    return torch.ops.lilliput.linear_4bit(x, *q.packed, bias, q.format.name, q.shape[0])


def check(x: Tensor, q: Quantized, bias: Tensor | None, kind: Kind | None = None) -> None:
    """Raise FormatError when x [..., in] or bias [out] do not fit a quantized matrix, x is of another dtype, or the
    matrix is in a format of another kind.
    """
    if kind not in (None, q.format.kind):
        raise FormatError(f"the matrix is in {q.format.name}, by {q.format.kind}; this product takes {kind}")
    if x.dtype not in (*formats.FLOATS, torch.float64):
        raise FormatError(
            f"x is {x.dtype}; a product with a quantized matrix takes float32, bfloat16, float16 or float64"
        )
    if len(q.shape) != 2 or x.shape[-1:] != q.shape[1:]:
        raise FormatError(
            f"x is {list(x.shape)}, the quantized matrix {list(q.shape)}; x's last size must be its second"
        )
    if bias is not None and bias.shape != q.shape[:1]:
        raise FormatError(f"bias is {list(bias.shape)}, the quantized matrix {list(q.shape)} needs [{q.shape[0]}]")


# ---- the reference: three lines ----


def reference(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    format: str,
    out_features: int,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        weight = _dense(
            codes, absmax, absmax_scale, absmax_offset, format, (out_features, x.shape[-1]), compute_type(x)
        )
        y = x.to(weight.dtype) @ weight.T  # functional.linear may give a view, to which no model could add in place
        return (y if bias is None else y.add_(bias.to(weight.dtype))).to(x.dtype)


def backward_reference(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    format: str,
    in_features: int,
) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        shape = (grad.shape[-1], in_features)
        weight = _dense(codes, absmax, absmax_scale, absmax_offset, format, shape, compute_type(grad))
        return (grad.to(weight.dtype) @ weight).to(grad.dtype)


def _dense(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    format: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    constants = formats.block_absmax(absmax, absmax_scale, absmax_offset)
    return formats.dequantize_blocks(codes, constants, get_format(format), shape, dtype)


def compute_type(x: Tensor) -> torch.dtype:
    """What a product with x is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- fakes ----


def _linear_fake(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    format: str,
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_backward_fake(
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    format: str,
    in_features: int,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


# ---- the compiled core ----


def by_core(
    core: ModuleType,
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    format: str,
    out_features: int,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """`left` float32 [rows, r] and `right` float32 [out, r], both or neither: left right^T is added to the product."""
    rows = float_rows(x)
    y = rows.new_empty((*x.shape[:-1], out_features))  # no view, since models add to it in place
    added = None if bias is None else bias.detach().float().contiguous()
    packed = core_arguments(codes, absmax, absmax_scale, absmax_offset, format)
    x_, added_, left_, right_, y_ = arrays(rows, added, left, right, matrix(y))
    core.linear_4bit(x_, *packed, added_, left_, right_, y_, torch.get_num_threads(), dispatch.is_exact())
    return y.to(x.dtype)


def backward_by_core(
    core: ModuleType,
    grad: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    format: str,
    in_features: int,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """`left` float32 [rows, r] and `right` float32 [r, in], both or neither: left right is added to the gradient."""
    rows = float_rows(grad)
    gx = rows.new_empty((*grad.shape[:-1], in_features))
    packed = core_arguments(codes, absmax, absmax_scale, absmax_offset, format)
    grad_, left_, right_, gx_ = arrays(rows, left, right, matrix(gx))
    core.linear_4bit_backward(grad_, *packed, left_, right_, gx_, torch.get_num_threads())
    return gx.to(grad.dtype)


def float_rows(x: Tensor) -> Tensor:
    """float32 [rows, columns], contiguous, without a gradient."""
    return matrix(x.detach()).float().contiguous()


def matrix(x: Tensor) -> Tensor:
    """[..., columns] as [rows, columns]; -1 would not do for an empty x."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def core_knows(x: Tensor, *others: Any) -> bool:
    return x.dtype in formats.FLOATS


# ---- registration ----

PACKED = "Tensor codes, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset"
LINEAR = dispatch.define(
    f"linear_4bit(Tensor x, {PACKED}, Tensor? bias, str format, SymInt out_features) -> Tensor", reference, _linear_fake
)
BACKWARD = dispatch.define(
    f"linear_4bit_backward(Tensor grad, {PACKED}, str format, SymInt in_features) -> Tensor",
    backward_reference,
    _linear_backward_fake,
)
dispatch.register_core(LINEAR, reference, by_core, core_knows)
dispatch.register_core(BACKWARD, backward_reference, backward_by_core, core_knows)


def differentiable(linear: str, backward: str) -> None:
    """Give a product with (x, codes, three constants, bias, format, out) its gradients to x and bias.

    Args:
        linear, backward: qualified names; the latter's operation takes (grad, codes, three constants, format, in).
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *packed, bias, format, _ = inputs
        ctx.save_for_backward(*packed)
        ctx.format, ctx.in_features = format, x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            operation = getattr(torch.ops.lilliput, backward.partition("::")[2])
            to_x = operation(grad, *ctx.saved_tensors, ctx.format, ctx.in_features)
        if ctx.needs_input_grad[5]:
            to_bias = matrix(grad).sum(dim=0, dtype=compute_type(grad)).to(ctx.bias_dtype)
        return to_x, None, None, None, None, to_bias, None, None

    torch.library.register_autograd(linear, gradients, setup_context=keep, lib=dispatch.LIBRARY)


differentiable(LINEAR, BACKWARD)
