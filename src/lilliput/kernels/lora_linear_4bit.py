"""y = x dequantize(W)^T + bias + s (x A^T) B^T in one operation; gradients to x, A, B and bias. W is frozen, in 4 bits.

Source: QLoRA, arXiv 2305.14314, equation 5, with LoRA's s (arXiv 2106.09685, section 4.1). With g the gradient to y:

    to x = g W + s (g B) A          to A = s (g B)^T x          to B = s g^T (x A^T)

The update is added to the base's product where it lies, in forward and in the gradient to x: neither has a second
tensor of its size. Backward keeps x once, A, B and the packed weight; x A^T, r numbers a row, is computed again.
Not here: dropout before A and several adapters at once (lora/layer.py composes those), the base's product alone
(linear_4bit.py).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.formats import QuantizedTensor
from lilliput.kernels import dispatch
from lilliput.kernels.linear_4bit import PACKED, by_core, check, compute_type, core_knows, float_rows, matrix
from lilliput.kernels.linear_4bit import reference as base_reference


def lora_linear_4bit(
    x: Tensor, q: QuantizedTensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """x [..., in] times a 4-bit matrix and a low-rank update of it, plus bias: float [..., out] of x's dtype.

    Computed in float32 (float64 for a float64 x, by the reference) and rounded once to x's dtype, under autocast too.

    Args:
        x: [..., in]; float32, bfloat16, float16 or float64.
        q: of shape (out, in), with or without double quantization.
        a: floating [r, in].
        b: floating [out, r].
        scaling: s, what the update is multiplied by.
        bias: [out], or None.

    Raises:
        FormatError: shapes that do not fit.
    """
    check(x, q, bias)
    if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != tuple(q.shape) or a.shape[0] != b.shape[1]:
        raise FormatError(
            f"A is {list(a.shape)} and B {list(b.shape)}; a quantized matrix {list(q.shape)} needs "
            f"[r, {q.shape[1]}] and [{q.shape[0]}, r]"
        )
    return torch.ops.lilliput.lora_linear_4bit(
        x, q.codes, q.absmax, q.absmax_scale, q.absmax_offset, bias, a, b, scaling, q.format.name
    )


# ---- the reference ----


def _lora_linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    format: str,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        wide, a, b = (t.to(compute_type(x)) for t in (x, a, b))
        y = base_reference(wide, codes, absmax, absmax_scale, absmax_offset, bias, format, b.shape[0])
        return (y + scaling * (wide @ a.T @ b.T)).to(x.dtype)


def _lora_linear_fake(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    format: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], b.shape[0]))


# ---- the compiled core's product, and torch's thin ones into the same memory ----


def _lora_linear_core(
    core: ModuleType,
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    format: str,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        rows, a, b = float_rows(x), a.detach().float(), b.detach().float()
        y = by_core(core, rows, codes, absmax, absmax_scale, absmax_offset, bias, format, b.shape[0])
        y.addmm_(rows @ a.T, b.T, alpha=scaling)
        return y.to(x.dtype).view(*x.shape[:-1], b.shape[0])


LORA_LINEAR = dispatch.define(
    f"lora_linear_4bit(Tensor x, {PACKED}, Tensor? bias, Tensor a, Tensor b, float scaling, str format) -> Tensor",
    _lora_linear,
    _lora_linear_fake,
)
dispatch.register_core(LORA_LINEAR, _lora_linear, _lora_linear_core, core_knows)


# ---- backward ----

_X, _BIAS, _A, _B = 0, 5, 6, 7  # places among the arguments


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, absmax, absmax_scale, absmax_offset, bias, a, b, ctx.scaling, ctx.format = inputs
    trained = ctx.needs_input_grad[_A] or ctx.needs_input_grad[_B]
    ctx.save_for_backward(x if trained else None, a, b, codes, absmax, absmax_scale, absmax_offset)
    ctx.in_features, ctx.dtype = x.shape[-1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad.device.type, enabled=False):
        x, kept_a, kept_b, *packed = ctx.saved_tensors
        wide = grad.to(compute_type(grad))
        g, a, b = matrix(wide), kept_a.to(wide.dtype), kept_b.to(wide.dtype)
        low = g @ b * ctx.scaling
        wants = ctx.needs_input_grad
        to: list[Tensor | None] = [None] * len(wants)
        if wants[_X]:
            to_x = torch.ops.lilliput.linear_4bit_backward(wide, *packed, ctx.format, ctx.in_features)
            matrix(to_x).addmm_(low, a)
            to[_X] = to_x.to(ctx.dtype)
        if wants[_A]:
            to[_A] = (low.T @ matrix(x).to(wide.dtype)).to(kept_a.dtype)
        if wants[_B]:
            to[_B] = (g.T @ (matrix(x).to(wide.dtype) @ a.T * ctx.scaling)).to(kept_b.dtype)
        if wants[_BIAS]:
            to[_BIAS] = g.sum(dim=0).to(ctx.bias_dtype)
    return tuple(to)


torch.library.register_autograd(LORA_LINEAR, _gradients, setup_context=_keep, lib=dispatch.LIBRARY)
