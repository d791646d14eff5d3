"""silu(gate) * up in one operation, and both its gradients in another: each number is read once and written once.

Source: SwiGLU, "GLU Variants Improve Transformer", arXiv 2002.05202, section 2, with silu(g) = g sigmoid(g), Swish at
beta 1. With y the gradient to the product and s = sigmoid(gate):

    to gate = y up s (1 + gate (1 - s))          to up = y gate s

Backward keeps gate and up, and neither silu(gate) nor the product. Kernel: csrc/ops/swiglu.simd.cpp. Not here: the
linear layers around it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.formats.blockwise import FLOATS
from lilliput.kernels import core, dispatch


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of gate's shape and dtype.

    Computed in float32 (float64 by the reference, where one of the two is that) and rounded once to gate's dtype, under
    autocast too. Differentiable in both, once. A gate of -Inf gives NaN, as torch's silu does.

    Args:
        gate: [..., n]; float32, bfloat16, float16 or float64.
        up: of gate's shape; any of these dtypes.

    Raises:
        FormatError: shapes that differ, or another dtype.
    """
    for name, tensor in (("gate", gate), ("up", up)):
        if tensor.dtype not in (*FLOATS, torch.float64):
            raise FormatError(f"{name} is {tensor.dtype}; swiglu takes float32, bfloat16, float16 or float64")
    if gate.shape != up.shape:
        raise FormatError(f"gate is {list(gate.shape)} and up {list(up.shape)}; swiglu needs two of one shape")
    return torch.ops.lilliput.swiglu(gate, up)


# ---- the reference ----


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    with torch.autocast(gate.device.type, enabled=False):
        g, u = _widened(gate, up)
        return (torch.nn.functional.silu(g) * u).to(gate.dtype).contiguous()


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(gate.device.type, enabled=False):
        y, g, u = _widened(grad, gate, up)
        s, rest = torch.sigmoid(g), torch.sigmoid(-g)  # 1 - s, without a difference
        to_gate, to_up = y * (s * (1 + g * rest)) * u, y * (g * s)
        return to_gate.to(gate.dtype).contiguous(), to_up.to(up.dtype).contiguous()


def _widened(*tensors: Tensor) -> list[Tensor]:
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(wide) for t in tensors]


# ---- fakes ----


def _swiglu_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _swiglu_backward_fake(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


# ---- the compiled core ----


def _swiglu_core(module: ModuleType, gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    module.swiglu(*core.arrays(gate, up, out), torch.get_num_threads())
    return out


def _swiglu_backward_core(module: ModuleType, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    to_gate, to_up = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
    module.swiglu_backward(*core.arrays(grad, gate, up, to_gate, to_up), torch.get_num_threads())
    return to_gate, to_up


def _core_knows(*tensors: Tensor) -> bool:
    return all(t.dtype in FLOATS for t in tensors)


# ---- registration ----

SWIGLU = dispatch.define("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu, _swiglu_fake)
BACKWARD = dispatch.define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)", _swiglu_backward, _swiglu_backward_fake
)
dispatch.register_core(SWIGLU, _swiglu, _swiglu_core, _core_knows)
dispatch.register_core(BACKWARD, _swiglu_backward, _swiglu_backward_core, _core_knows)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    both = torch.ops.lilliput.swiglu_backward(grad, *ctx.saved_tensors)
    return tuple(to if wanted else None for to, wanted in zip(both, ctx.needs_input_grad, strict=True))


torch.library.register_autograd(SWIGLU, _gradients, setup_context=_keep, lib=dispatch.LIBRARY)
