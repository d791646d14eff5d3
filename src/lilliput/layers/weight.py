"""What every module with a quantized weight is: codes and constants as plain, frozen parameters.

So that state_dict, deepcopy, pickle and sharding need no special case. The number format is data, not a subclass.
Sources: QLoRA, arXiv 2305.14314, section 3 (NF4, double quantization); LLM.int8(), arXiv 2208.07339 (int8 by rows).
Not here: what a module does with the weight (linear.py, embedding.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lilliput import kernels
from lilliput.errors import FormatError
from lilliput.formats import Format, QuantizedTensor, get_format

ABSMAX_BLOCK = 256  # absmax values that share a scale under double quantization (QLoRA, section 3)
_CONSTANTS = ("weight_absmax", "weight_absmax_scale", "weight_absmax_offset")

Self = TypeVar("Self", bound="QuantizedWeight")


class QuantizedWeight(nn.Module):
    """A module whose weight, of shape `weight_shape`, is in a number format.

    Parameters (all frozen; names are those in the state dict):
        weight: codes of W in flat storage: uint8 [ceil(numel/2), 1] in 4 bits, two to a byte, high nibble first; int8
            [numel, 1]. Never of W's own shape, so that nobody (PEFT's merge) adds real numbers to codes unnoticed.
        weight_absmax: float32 [blocks], or uint8 [blocks] when double-quantized; a block is 64 values of flat storage,
            or (int8) a row.
        weight_absmax_scale: float32 [ceil(blocks/256)], only when double-quantized.
        weight_absmax_offset: float32 [], only when double-quantized.

    `.to(dtype)` and `.half()` leave codes and constants in their types.
    """

    format_name: str
    weight: Any  # an nn.Parameter; torch's own layers say Tensor
    weight_absmax: nn.Parameter
    weight_absmax_scale: nn.Parameter | None
    weight_absmax_offset: nn.Parameter | None
    _view: tuple[tuple[int, int], QuantizedTensor] | None = None  # where the parameters lay, and what `quantized` gave

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the reals that the codes stand for."""
        raise NotImplementedError

    def hold(self, quantized: QuantizedTensor) -> None:
        """Take other codes and constants, of the same shape and format, without copying them."""
        if tuple(quantized.shape) != self.weight_shape:
            raise FormatError(f"weight of shape {tuple(quantized.shape)}, expected {self.weight_shape}")
        self._view = None
        self.weight = frozen(quantized.codes.reshape(-1, 1))
        for name, value in zip(
            _CONSTANTS, (quantized.absmax, quantized.absmax_scale, quantized.absmax_offset), strict=True
        ):
            self.register_parameter(name, None if value is None else frozen(value))

    def share(self, other: QuantizedWeight) -> None:
        """Hold the very parameters that another module holds, of the same shape and format: a tie."""
        self.hold(other.quantized)
        for name in ("weight", *_CONSTANTS):
            self.register_parameter(name, getattr(other, name))

    def make_room(self, device: torch.device | str) -> None:
        """Put uninitialised codes and constants on `device`, to be filled; the bias stays where it is."""
        self.hold(empty_quantized(self.weight_shape, self.format, self.double_quant, device))

    def fill(self, quantized: QuantizedTensor) -> None:
        """Copy other codes and constants, of the same shape and format, over those that are there."""
        own = self.quantized
        kinds = [(tuple(q.shape), q.format.name, q.double_quant) for q in (quantized, own)]
        if kinds[0] != kinds[1]:
            raise FormatError(f"codes of shape, format and double quantization {kinds[0]}, expected {kinds[1]}")
        for name in ("codes", "absmax", "absmax_scale", "absmax_offset"):
            mine, theirs = getattr(own, name), getattr(quantized, name)
            if mine is not None:
                mine.copy_(theirs)

    @property
    def format(self) -> Format:
        """The number format of the weight."""
        return get_format(self.format_name)

    @property
    def double_quant(self) -> bool:
        """Whether the absmax values are quantized too."""
        return self.weight_absmax_scale is not None

    @property
    def options(self) -> dict[str, Any]:
        """What was chosen of the format's options, as far as this module has them."""
        return {name: getattr(self, name) for name in self.format.options if hasattr(self, name)}

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight, of `weight_shape`, as codes and constants; they share memory with the parameters.

        Made once and kept while the parameters lie where they lay: generating asks for it at every token.
        """
        if torch.compiler.is_compiling() or self.weight.is_meta:
            return self._make_view()
        place = (self.weight.data_ptr(), self.weight_absmax.data_ptr())
        if self._view is None or self._view[0] != place:
            self._view = (place, self._make_view())
        return self._view[1]

    def _make_view(self) -> QuantizedTensor:
        return QuantizedTensor(
            format=self.format,
            shape=self.weight_shape,
            codes=self.weight.detach().reshape(-1),
            absmax=self.weight_absmax.detach(),
            absmax_scale=None if self.weight_absmax_scale is None else self.weight_absmax_scale.detach(),
            absmax_offset=None if self.weight_absmax_offset is None else self.weight_absmax_offset.detach(),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as real numbers, of `weight_shape`, in `dtype`; a new tensor."""
        return kernels.dequantize(self.quantized, dtype)

    def reset_parameters(self) -> None:
        """Nothing to draw: the codes come from a checkpoint or from a dense module."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_view"}

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.half()` and `.to(dtype)` arrive here for every floating tensor. The constants belong to the codes: rounded
        # to 16 bits they would name other weights, so they follow to the new device in the type they have. In place,
        # since another module may share them.
        self._view = None
        before = {name: value.data for name in _CONSTANTS if (value := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, original in before.items():
            moved = getattr(self, name)
            if moved.dtype != original.dtype:
                moved.data = original.to(moved.device)
        return self


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without a gradient, on the same memory."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def empty_quantized(
    shape: tuple[int, int], format: Format, double_quant: bool, device: str | torch.device
) -> QuantizedTensor:
    """Codes and constants of a weight of that shape, uninitialised, on `device`."""
    blocks = format.blocks(shape)

    def room(size: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    return QuantizedTensor(
        format=format,
        shape=shape,
        codes=room(format.code_bytes(shape), format.code_type),
        absmax=room(blocks, torch.uint8 if double_quant else torch.float32),
        absmax_scale=room(-(-blocks // ABSMAX_BLOCK), torch.float32) if double_quant else None,
        absmax_offset=room((), torch.float32) if double_quant else None,
    )
