"""The product with a quantized matrix under one signature, a row of functions a kind of format.

The operations that add something to a base's product (lora_linear.py) look it up here, so that they exist once for all
formats. Not here: the arithmetic (linear_4bit.py, linear_int8.py, linear_grouped.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from lilliput.formats import get_format
from lilliput.formats.format import Kind
from lilliput.kernels.linear_4bit import backward_by_core as backward_by_core_4bit
from lilliput.kernels.linear_4bit import backward_reference as backward_reference_4bit
from lilliput.kernels.linear_4bit import by_core as by_core_4bit
from lilliput.kernels.linear_4bit import reference as reference_4bit
from lilliput.kernels.linear_grouped import backward_by_core as backward_by_core_grouped
from lilliput.kernels.linear_grouped import backward_reference as backward_reference_grouped
from lilliput.kernels.linear_grouped import by_core as by_core_grouped
from lilliput.kernels.linear_grouped import reference as reference_grouped
from lilliput.kernels.linear_int8 import backward_by_core as backward_by_core_int8
from lilliput.kernels.linear_int8 import backward_reference as backward_reference_int8
from lilliput.kernels.linear_int8 import by_core as by_core_int8
from lilliput.kernels.linear_int8 import reference as reference_int8

Packed = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # codes and the three constants of their kind
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


def product_with(format: str) -> Product:
    """The product with matrices in the format of that name."""
    return _PRODUCTS[get_format(format).kind]


def _takes_format(
    reference: Callable[..., Tensor],
    backward_reference: Callable[..., Tensor],
    by_core: Callable[..., Tensor],
    of_gradient_by_core: Callable[..., Tensor],
) -> Product:
    """The row of functions that take the format's name and one size (linear_4bit.py, linear_grouped.py)."""

    def forward(x: Tensor, packed: Packed, bias: Tensor | None, shape: Shape, format: str, threshold: float) -> Tensor:
        return reference(x, *packed, bias, format, shape[0])

    def backward(grad: Tensor, packed: Packed, shape: Shape, format: str) -> Tensor:
        return backward_reference(grad, *packed, format, shape[1])

    def forward_by_core(
        core: ModuleType, x: Tensor, packed: Packed, bias: Tensor | None, shape: Shape, format: str, threshold: float,
        left: Tensor, right: Tensor,
    ) -> Tensor:  # fmt: skip
        return by_core(core, x, *packed, bias, format, shape[0], left, right)

    def backward_by_core(
        core: ModuleType, grad: Tensor, packed: Packed, shape: Shape, format: str, left: Tensor, right: Tensor
    ) -> Tensor:
        return of_gradient_by_core(core, grad, *packed, format, shape[1], left, right)

    return Product(forward, backward, forward_by_core, backward_by_core)


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


_PRODUCTS: dict[Kind, Product] = {
    "blocks": _takes_format(reference_4bit, backward_reference_4bit, by_core_4bit, backward_by_core_4bit),
    "rows": Product(_forward_int8, _backward_int8, _forward_int8_by_core, _backward_int8_by_core),
    "groups": _takes_format(reference_grouped, backward_reference_grouped, by_core_grouped, backward_by_core_grouped),
}
