"""y = x dequantize(W)^T + bias + s (x A^T) B^T in one operation; gradients to x, A, B and bias; W is frozen.

Source: QLoRA, arXiv 2305.14314, equation 5, with LoRA's s (arXiv 2106.09685, section 4.1). With g the gradient to y:

    to x = g W + s (g B) A          to A = s (g B)^T x          to B = s g^T (x A^T)

The update is some more depth of the base's product: A and B stand beside W in its tiles, in forward and in the
gradient to x, so that neither passes over its result twice. Backward keeps x once, s x A^T (r numbers a row), A, B and
the packed weight.
The base's product is looked up by W's format (products.py); x A^T takes x as it is, also where that product rounds it.
Not here: dropout before A and several adapters at once (lora/layer.py composes those), the base's product alone
(linear_4bit.py, linear_int8.py).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.formats import Quantized
from lilliput.formats.rowwise import check_threshold
from lilliput.kernels import dispatch
from lilliput.kernels.linear_4bit import check, compute_type, core_knows, float_rows, matrix
from lilliput.kernels.products import product_with


def lora_linear(
    x: Tensor,
    q: Quantized,
    a: Tensor,
    b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """x [..., in] times a quantized matrix and a low-rank update of it, plus bias: float [..., out] of x's dtype.

    Computed in float32 (float64 for a float64 x, by the reference) and rounded once to x's dtype, under autocast too.

    Args:
        x: [..., in]; float32, bfloat16, float16 or float64.
        q: of shape (out, in), in any format.
        a: floating [r, in].
        b: floating [out, r].
        scaling: s, what the update is multiplied by.
        bias: [out], or None.
        threshold: of an int8 product (see `linear_int8`); 0 for other formats.

    Raises:
        FormatError: shapes that do not fit.
        UsageError: a threshold for a format that has none, or a negative one.
    """
    check(x, q, bias)
    if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != tuple(q.shape) or a.shape[0] != b.shape[1]:
        raise FormatError(
            f"A is {list(a.shape)} and B {list(b.shape)}; a quantized matrix {list(q.shape)} needs "
            f"[r, {q.shape[1]}] and [{q.shape[0]}, r]"
        )
    threshold = check_threshold(q.format.option("threshold", threshold))
    return torch.ops.lilliput.lora_linear(x, *q.packed, bias, a, b, scaling, q.format.name, threshold)[0]


# ---- the references ----


def _lora_linear(
    x: Tensor,
    codes: Tensor,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    format: str,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """y, and s x A^T as [rows, r] in the type that is computed in."""
    with torch.autocast(x.device.type, enabled=False):
        wide, a, b = (t.to(compute_type(x)) for t in (x, a, b))
        low = matrix(wide) @ a.T * scaling
        packed = (codes, first, second, third)
        y = product_with(format).forward(wide, packed, bias, (b.shape[0], a.shape[1]), format, threshold)
        return (y + (low @ b.T).view(y.shape)).to(x.dtype), low


def _lora_linear_fake(
    x: Tensor,
    codes: Tensor,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    format: str,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    low = x.new_empty((x.shape[:-1].numel(), a.shape[0]), dtype=compute_type(x))
    return x.new_empty((*x.shape[:-1], b.shape[0])), low


def _to_x(
    grad: Tensor,
    codes: Tensor,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    low: Tensor,
    a: Tensor,
    format: str,
) -> Tensor:
    """grad W + low A, with low = s grad B as [rows, r]."""
    with torch.autocast(grad.device.type, enabled=False):
        packed = (codes, first, second, third)
        base = product_with(format).backward(grad, packed, (grad.shape[-1], a.shape[1]), format)
        return base + (low.to(base.dtype) @ a.to(base.dtype)).view(base.shape)


def _to_x_fake(
    grad: Tensor,
    codes: Tensor,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    low: Tensor,
    a: Tensor,
    format: str,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], a.shape[1]))


# ---- the compiled core ----


def _lora_linear_core(
    core: ModuleType,
    x: Tensor,
    codes: Tensor,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    format: str,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        rows, right = float_rows(x), float_rows(b)
        low = (rows @ a.detach().float().T).mul_(scaling)
        wide = rows.view(x.shape)
        packed, shape = (codes, first, second, third), (b.shape[0], a.shape[1])
        y = product_with(format).forward_by_core(core, wide, packed, bias, shape, format, threshold, low, right)
        return y.to(x.dtype), low


def _to_x_core(
    core: ModuleType,
    grad: Tensor,
    codes: Tensor,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    low: Tensor,
    a: Tensor,
    format: str,
) -> Tensor:
    left, right = float_rows(low), float_rows(a)
    packed, shape = (codes, first, second, third), (grad.shape[-1], a.shape[1])
    return product_with(format).backward_by_core(core, grad, packed, shape, format, left, right)


_PACKED = "Tensor codes, Tensor first, Tensor? second, Tensor? third"  # the constants of whatever kind of format
LORA_LINEAR = dispatch.define(
    f"lora_linear(Tensor x, {_PACKED}, Tensor? bias, Tensor a, Tensor b, float scaling, str format, float threshold)"
    " -> (Tensor, Tensor)",
    _lora_linear,
    _lora_linear_fake,
)
TO_X = dispatch.define(
    f"lora_linear_backward(Tensor grad, {_PACKED}, Tensor low, Tensor a, str format) -> Tensor", _to_x, _to_x_fake
)
dispatch.register_core(LORA_LINEAR, _lora_linear, _lora_linear_core, core_knows)
dispatch.register_core(TO_X, _to_x, _to_x_core, core_knows)


# ---- backward ----

_X, _BIAS, _A, _B = 0, 5, 6, 7  # places among the arguments


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codes, first, second, third, bias, a, b, ctx.scaling, ctx.format, _ = inputs
    wants = ctx.needs_input_grad
    kept = (x if wants[_A] else None, output[1] if wants[_B] else None)
    ctx.save_for_backward(*kept, a, b, codes, first, second, third)
    ctx.mark_non_differentiable(output[1])
    ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad.device.type, enabled=False):
        x, low_forward, kept_a, kept_b, *packed = ctx.saved_tensors
        wide = grad.to(compute_type(grad))
        g, a, b = matrix(wide), kept_a.to(wide.dtype), kept_b.to(wide.dtype)
        low = g @ b * ctx.scaling
        wants = ctx.needs_input_grad
        to: list[Tensor | None] = [None] * len(wants)
        if wants[_X]:
            to[_X] = torch.ops.lilliput.lora_linear_backward(wide, *packed, low, a, ctx.format).to(ctx.dtype)
        if wants[_A]:
            to[_A] = (low.T @ matrix(x).to(wide.dtype)).to(kept_a.dtype)
        if wants[_B]:
            to[_B] = (g.T @ low_forward.to(wide.dtype)).to(kept_b.dtype)
        if wants[_BIAS]:
            to[_BIAS] = g.sum(dim=0).to(ctx.bias_dtype)
    return tuple(to)


torch.library.register_autograd(LORA_LINEAR, _gradients, setup_context=_keep, lib=dispatch.LIBRARY)
