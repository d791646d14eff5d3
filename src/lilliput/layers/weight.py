"""What every module with a quantized weight is: codes and constants as plain, frozen parameters.

So that state_dict, deepcopy, pickle and sharding need no special case. The number format is data, not a subclass.
Sources: QLoRA, arXiv 2305.14314, section 3 (NF4, double quantization); LLM.int8(), arXiv 2208.07339 (int8 by rows);
GPTQ, arXiv 2210.17323 (groups of rows).
Not here: what a module does with the weight (linear.py, embedding.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lilliput import kernels
from lilliput.errors import FormatError
from lilliput.formats import TENSORS, Format, Quantized, get_format

# What the parameters with a weight's constants are called, by kind of format.
_CONSTANTS = {kind: tuple(f"weight_{name}" for name in of_kind.CONSTANTS) for kind, of_kind in TENSORS.items()}

Self = TypeVar("Self", bound="QuantizedWeight")


class QuantizedWeight(nn.Module):
    """A module whose weight, of shape `weight_shape`, is in a number format.

    Parameters (all frozen; names are those in the state dict):
        weight: codes of W in flat storage, [bytes, 1]. Never of W's own shape, so that nobody (PEFT's merge) adds real
            numbers to codes unnoticed.
        weight_ and the name of each constant of the format's tensors, as far as this weight has it:
            `weight_absmax`, `weight_absmax_scale`, `weight_absmax_offset` (QuantizedTensor: nf4, fp4, int8) or
            `weight_scale`, `weight_zero`, `weight_order` (GroupedTensor), which say their types and sizes.

    `.to(dtype)` and `.half()` leave codes and constants in their types.
    """

    format_name: str
    weight: Any  # an nn.Parameter; torch's own layers say Tensor
    _view: tuple[tuple[int, int], Quantized] | None = None  # where the parameters lay, and what `quantized` gave

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the reals that the codes stand for."""
        raise NotImplementedError

    def hold(self, quantized: Quantized) -> None:
        """Take other codes and constants, of the same shape and format, without copying them."""
        if tuple(quantized.shape) != self.weight_shape:
            raise FormatError(f"weight of shape {tuple(quantized.shape)}, expected {self.weight_shape}")
        self._view = None
        self.weight = frozen(quantized.codes.reshape(-1, 1))
        for name, value in zip(self.constant_names, quantized.constants, strict=True):
            self.register_parameter(name, None if value is None else frozen(value))

    def share(self, other: QuantizedWeight) -> None:
        """Hold the very parameters that another module holds, of the same shape and format: a tie."""
        self.hold(other.quantized)
        for name in ("weight", *self.constant_names):
            self.register_parameter(name, getattr(other, name))

    def make_room(self, device: torch.device | str) -> None:
        """Put uninitialised codes and constants on `device`, to be filled; the bias stays where it is."""
        own = self.quantized
        self.hold(type(own).empty(own.format, self.weight_shape, own.options, device))

    def fill(self, quantized: Quantized) -> None:
        """Copy other codes and constants, of the same shape, format and options, over those that are there."""
        own = self.quantized
        kinds = [(tuple(q.shape), q.format.name, q.options) for q in (quantized, own)]
        if kinds[0] != kinds[1]:
            raise FormatError(f"codes of shape, format and options {kinds[0]}, expected {kinds[1]}")
        for mine, theirs in zip(own.packed, quantized.packed, strict=True):
            if mine is not None and theirs is not None:  # both or neither: the options are the same
                mine.copy_(theirs)

    @property
    def format(self) -> Format:
        """The number format of the weight."""
        return get_format(self.format_name)

    @property
    def constant_names(self) -> tuple[str, ...]:
        """What the parameters with the weight's constants are called; those that it has not are None."""
        return _CONSTANTS[self.format.kind]

    @property
    def options(self) -> dict[str, Any]:
        """What was chosen of the format's options, as far as this module has them."""
        told = self.quantized.options
        mine = {name: getattr(self, name) for name in self.format.options if hasattr(self, name)}
        return {name: value for name, value in {**mine, **told}.items() if name in self.format.options}

    @property
    def quantized(self) -> Quantized:
        """The weight, of `weight_shape`, as codes and constants; they share memory with the parameters.

        Made once and kept while the parameters lie where they lay: generating asks for it at every token.
        """
        if torch.compiler.is_compiling() or self.weight.is_meta:
            return self._make_view()
        place = (self.weight.data_ptr(), getattr(self, self.constant_names[0]).data_ptr())
        if self._view is None or self._view[0] != place:
            self._view = (place, self._make_view())
        return self._view[1]

    def _make_view(self) -> Quantized:
        held = (getattr(self, name) for name in self.constant_names)
        constants: list[Any] = [None if value is None else value.detach() for value in held]
        return TENSORS[self.format.kind](self.format, self.weight_shape, self.weight.detach().reshape(-1), *constants)

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
        before = {name: value.data for name in self.constant_names if (value := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, original in before.items():
            moved = getattr(self, name)
            if moved.dtype != original.dtype:
                moved.data = original.to(moved.device)
        return self


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without a gradient, on the same memory."""
    return nn.Parameter(tensor.detach(), requires_grad=False)
