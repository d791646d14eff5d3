"""A linear layer whose weight is held in a few bits: one class for every number format, the format is data.

It is an `nn.Linear` for everyone who asks (PEFT attaches its LoRA to it, transformers counts its bytes); its `weight`
holds packed codes, and the constants of the blocks lie beside it as plain parameters, so that state_dict, deepcopy,
pickle and sharding need no special case. Source: QLoRA, arXiv 2305.14314, section 3 (NF4, double quantization).
Not here: training of the quantized weight itself; it is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lilliput import kernels
from lilliput.errors import FormatError
from lilliput.formats import Format, QuantizedTensor, get_format

ABSMAX_BLOCK = 256  # absmax values that share a scale under double quantization (QLoRA, section 3)
_CONSTANTS = ("weight_absmax", "weight_absmax_scale", "weight_absmax_offset")


class QuantizedLinear(nn.Linear):
    """`y = x Wᵀ + b` with W [out, in] in a number format. Only x and b can have gradients.

    Parameters (all frozen; names are those in the state dict):
        weight: uint8 [ceil(out·in/2), 1], codes of W in flat storage, two to a byte, high nibble first.
        weight_absmax: float32 [blocks], or uint8 [blocks] when double-quantized; blocks of 64 values in flat storage.
        weight_absmax_scale: float32 [ceil(blocks/256)], only when double-quantized.
        weight_absmax_offset: float32 [], only when double-quantized.
        bias: floating point [out], or absent.

    `transposed` says that it stands for a `Conv1D`, whose dense weight is [in, out]; codes are always of [out, in].
    `.to(dtype)` and `.half()` change the type of the bias alone: codes and constants keep their types.
    """

    format_name: str
    transposed: bool = False
    weight_absmax: nn.Parameter
    weight_absmax_scale: nn.Parameter | None
    weight_absmax_offset: nn.Parameter | None
    _view: tuple[tuple[int, int], QuantizedTensor] | None = None  # where the parameters lay, and what `quantized` gave

    def __init__(self, quantized: QuantizedTensor, bias: Tensor | None = None) -> None:
        """Hold `quantized`, of shape (out, in), and `bias` [out]; neither is copied. Raises FormatError on other
        shapes.
        """
        nn.Module.__init__(self)  # nn.Linear's own would allocate out·in floats
        if len(quantized.shape) != 2:
            raise FormatError(f"a linear layer needs a weight of shape (out, in), not {tuple(quantized.shape)}")
        self.out_features, self.in_features = quantized.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise FormatError(f"the bias has shape {tuple(bias.shape)}, expected ({self.out_features},)")
        self.format_name = quantized.format.name
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        self.hold(quantized)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear | Conv1D, format: str | Format = "nf4", double_quant: bool = True
    ) -> QuantizedLinear:
        """Quantize an `nn.Linear`, or a `Conv1D` (GPT-2), whose weight [in, out] is transposed on the way in.

        The result is on the layer's device and in its training mode. Raises FormatError for NaN or Inf in the weight.
        """
        weight = linear.weight.detach()
        if isinstance(linear, Conv1D):
            weight = weight.t().contiguous()
        quantized = kernels.quantize(weight, _name(format), double_quant)
        bias = getattr(linear, "bias", None)
        layer = cls(quantized, None if bias is None else bias.detach()).train(linear.training)
        layer.transposed = isinstance(linear, Conv1D)
        return layer

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = False,
        format: str | Format = "nf4",
        double_quant: bool = True,
        device: str | torch.device = "meta",
        dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """A layer with room for the codes and nothing in it yet. `dtype` is the bias's (default: torch's)."""
        quantized = _empty_quantized((out_features, in_features), get_format(_name(format)), double_quant, device)
        return cls(quantized, torch.empty(out_features, device=device, dtype=dtype) if bias else None)

    def hold(self, quantized: QuantizedTensor) -> None:
        """Take other codes and constants, of the same shape and format, without copying them."""
        if tuple(quantized.shape) != (self.out_features, self.in_features):
            raise FormatError(
                f"weight of shape {tuple(quantized.shape)}, expected ({self.out_features}, {self.in_features})"
            )
        self._view = None
        self.weight = _frozen(quantized.codes.reshape(-1, 1))
        for name, value in zip(
            _CONSTANTS, (quantized.absmax, quantized.absmax_scale, quantized.absmax_offset), strict=True
        ):
            self.register_parameter(name, None if value is None else _frozen(value))

    def make_room(self, device: torch.device | str) -> None:
        """Put uninitialised codes and constants on `device`, to be filled; the bias stays where it is."""
        self.hold(_empty_quantized((self.out_features, self.in_features), self.format, self.double_quant, device))

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
    def quantized(self) -> QuantizedTensor:
        """The weight, of shape (out, in), as codes and constants; they share memory with the parameters.

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
            shape=(self.out_features, self.in_features),
            codes=self.weight.detach().reshape(-1),
            absmax=self.weight_absmax.detach(),
            absmax_scale=None if self.weight_absmax_scale is None else self.weight_absmax_scale.detach(),
            absmax_offset=None if self.weight_absmax_offset is None else self.weight_absmax_offset.detach(),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as real numbers, [out, in] in `dtype`; a new tensor."""
        return kernels.dequantize(self.quantized, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the input's type; the product itself is computed in float32 on a CPU."""
        return kernels.linear_4bit(input, self.quantized, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_view"}

    def reset_parameters(self) -> None:
        """Nothing to draw: the codes come from a checkpoint or from `from_linear`."""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format_name}, double_quant={self.double_quant}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # `.half()` and `.to(dtype)` arrive here for every floating tensor. The constants belong to the codes: rounded
        # to 16 bits they would name other weights, so they follow to the new device in the type they have.
        self._view = None
        before = {name: value.data for name in _CONSTANTS if (value := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, original in before.items():
            moved = getattr(self, name)
            if moved.dtype != original.dtype:
                self.register_parameter(name, _frozen(original.to(moved.device)))
        return self


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _name(format: str | Format) -> str:
    return format.name if isinstance(format, Format) else format


def _empty_quantized(
    shape: tuple[int, int], format: Format, double_quant: bool, device: str | torch.device
) -> QuantizedTensor:
    """Codes and constants of a [out, in] weight, uninitialised, on `device`."""
    numel = shape[0] * shape[1]
    blocks = -(-numel // format.block)

    def room(size: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    return QuantizedTensor(
        format=format,
        shape=shape,
        codes=room(-(-numel // 2), torch.uint8),
        absmax=room(blocks, torch.uint8 if double_quant else torch.float32),
        absmax_scale=room(-(-blocks // ABSMAX_BLOCK), torch.float32) if double_quant else None,
        absmax_offset=room((), torch.float32) if double_quant else None,
    )
