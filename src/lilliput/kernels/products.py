"""The product with a quantized matrix under one signature, a row of functions a kind of format.

The operations that add something to a base's product (lora_linear.py) look it up here, so that they exist once for all
formats. Not here: the arithmetic (linear_4bit.py, linear_int8.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from lilliput.formats import FORMATS, ROW
from lilliput.kernels.linear_4bit import backward_by_core, backward_reference, by_core, reference
from lilliput.kernels.linear_int8 import backward_by_core as backward_by_core_int8
from lilliput.kernels.linear_int8 import backward_reference as backward_reference_int8
from lilliput.kernels.linear_int8 import by_core as by_core_int8
from lilliput.kernels.linear_int8 import reference as reference_int8

Packed = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # codes, absmax, absmax_scale, absmax_offset
Shape = tuple[int, int]  # (out, in)


@dataclass(frozen=True)
class Product:
    """How x W^T + bias and grad W are computed with W in a kind of format.

    Attributes:
        forward: (x, packed, bias, shape, format, threshold) to y of x's dtype.
        backward: (grad, packed, shape, format) to the gradient to x.
        forward_by_core: (core, x, packed, bias, shape, format, threshold, left, right) to y + left right^T, with left
            float32 [rows, r] and right float32 [out, r].
        backward_by_core: (core, grad, packed, shape, format, left, right) to grad W + left right, with right [r, in].
    """

    forward: Callable[[Tensor, Packed, Tensor | None, Shape, str, float], Tensor]
    backward: Callable[[Tensor, Packed, Shape, str], Tensor]
    forward_by_core: Callable[..., Tensor]
    backward_by_core: Callable[..., Tensor]


# ---- 4 bits ----


def _forward_4bit(
    x: Tensor, packed: Packed, bias: Tensor | None, shape: Shape, format: str, threshold: float
) -> Tensor:
    return reference(x, *packed, bias, format, shape[0])


def _backward_4bit(grad: Tensor, packed: Packed, shape: Shape, format: str) -> Tensor:
    return backward_reference(grad, *packed, format, shape[1])


def _forward_4bit_by_core(
    core: ModuleType, x: Tensor, packed: Packed, bias: Tensor | None, shape: Shape, format: str, threshold: float,
    left: Tensor, right: Tensor,
) -> Tensor:  # fmt: skip
    return by_core(core, x, *packed, bias, format, shape[0], left, right)


def _backward_4bit_by_core(
    core: ModuleType, grad: Tensor, packed: Packed, shape: Shape, format: str, left: Tensor, right: Tensor
) -> Tensor:
    return backward_by_core(core, grad, *packed, format, shape[1], left, right)


# ---- int8 ----


def _forward_int8(
    x: Tensor, packed: Packed, bias: Tensor | None, shape: Shape, format: str, threshold: float
) -> Tensor:
    return reference_int8(x, packed[0].view(shape), packed[1], bias, threshold)


def _backward_int8(grad: Tensor, packed: Packed, shape: Shape, format: str) -> Tensor:
    return backward_reference_int8(grad, packed[0].view(shape), packed[1])


def _forward_int8_by_core(
    core: ModuleType, x: Tensor, packed: Packed, bias: Tensor | None, shape: Shape, format: str, threshold: float,
    left: Tensor, right: Tensor,
) -> Tensor:  # fmt: skip
    return by_core_int8(core, x, packed[0].view(shape), packed[1], bias, threshold, left, right)


def _backward_int8_by_core(
    core: ModuleType, grad: Tensor, packed: Packed, shape: Shape, format: str, left: Tensor, right: Tensor
) -> Tensor:
    return backward_by_core_int8(core, grad, packed[0].view(shape), packed[1], left, right)


_BLOCKS = Product(_forward_4bit, _backward_4bit, _forward_4bit_by_core, _backward_4bit_by_core)
_ROWS = Product(_forward_int8, _backward_int8, _forward_int8_by_core, _backward_int8_by_core)

PRODUCTS: dict[str, Product] = {name: _ROWS if row.block == ROW else _BLOCKS for name, row in FORMATS.items()}
