"""y = weight (x / rms(x)) over the last dimension in one operation; gradients to x and, where asked for, to weight.

Source: "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4, with eps inside the root and float32
statistics, as transformers' LlamaRMSNorm has them. With r = 1 / sqrt(mean(x^2) + eps) of each row and g the gradient to
y:

    to x = r (weight g) - r^3 mean(weight g x) x          to weight = sum over rows of g (x r)

Backward keeps x and weight, no normed copy of x; r is computed again in the pass over x that the sums need anyway.
Kernel: csrc/ops/rms_norm.simd.cpp. Not here: a weight of 1 + w (Gemma's), LayerNorm.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.formats.blockwise import FLOATS
from lilliput.kernels import core, dispatch
from lilliput.kernels.linear_4bit import compute_type, matrix


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each row of x over the root of its mean square, times weight: [..., n] of the dtype that x * weight has.

    Statistics in float32 (float64 for a float64 x, by the reference); the normed row is rounded to x's dtype before it
    is multiplied with weight, LlamaRMSNorm's order; autocast changes nothing. A row whose squares sum up to more than
    float32 holds (numbers of 1e19) comes out as zeros, there as here. Gradients are rounded once. The result and both
    gradients do not depend on the number of threads. Differentiable in x and weight, once.

    Args:
        x: [..., n]; float32, bfloat16, float16 or float64.
        weight: [n]; any of these dtypes.
        eps: what is added to the mean square.

    Raises:
        FormatError: shapes that do not fit, or another dtype.
    """
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in (*FLOATS, torch.float64):
            raise FormatError(f"{name} is {tensor.dtype}; rms_norm takes float32, bfloat16, float16 or float64")
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise FormatError(f"x is {list(x.shape)}, weight {list(weight.shape)}; weight needs x's last size")
    return torch.ops.lilliput.rms_norm(x, weight, eps)


# ---- the reference: the formula's lines ----


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(compute_type(x))
        return (weight * (wide * _inverse_rms(wide, eps)).to(x.dtype)).contiguous()


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        exact = compute_type(grad)
        g, wide = grad.to(exact), x.to(exact)
        r, scaled = _inverse_rms(wide, eps), g * weight.to(exact)
        to_x = r * scaled - r * (r * (r * (scaled * wide).mean(-1, keepdim=True))) * wide
        to_weight = matrix(g * (wide * r)).sum(0) if wants_weight else weight.new_empty(0)
        return to_x.to(x.dtype).contiguous(), to_weight.to(weight.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """[..., 1]"""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


# ---- fakes ----


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


def _rms_norm_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if wants_weight else 0)


# ---- the compiled core ----


def _rms_norm_core(module: ModuleType, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    given, scale, out = core.arrays(x, weight.detach().float(), y)
    module.rms_norm(given, scale, eps, out, torch.get_num_threads())
    return y


def _rms_norm_backward_core(
    module: ModuleType, grad: Tensor, x: Tensor, weight: Tensor, eps: float, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    to_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    to_weight = torch.empty(weight.shape if wants_weight else 0, dtype=torch.float32)
    *given, of_x, of_weight = core.arrays(grad, x, weight.detach().float(), to_x, to_weight)
    module.rms_norm_backward(*given, eps, of_x, of_weight if wants_weight else None, torch.get_num_threads())
    return to_x, to_weight.to(weight.dtype)


def _core_knows(*args: Any) -> bool:
    return all(t.dtype in FLOATS for t in args if isinstance(t, Tensor))


# ---- registration ----

RMS_NORM = dispatch.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, _rms_norm_fake)
BACKWARD = dispatch.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool wants_weight) -> (Tensor, Tensor)",
    _rms_norm_backward,
    _rms_norm_backward_fake,
)
dispatch.register_core(RMS_NORM, _rms_norm, _rms_norm_core, _core_knows)
dispatch.register_core(BACKWARD, _rms_norm_backward, _rms_norm_backward_core, _core_knows)

_X, _WEIGHT = 0, 1  # places among the arguments


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad
    to_x, to_weight = torch.ops.lilliput.rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps, wants[_WEIGHT])
    return to_x if wants[_X] else None, to_weight if wants[_WEIGHT] else None, None


torch.library.register_autograd(RMS_NORM, _gradients, setup_context=_keep, lib=dispatch.LIBRARY)
