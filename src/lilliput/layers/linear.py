"""A linear layer whose weight is held in a few bits: one class for every number format, the format is data.

It is an `nn.Linear` for everyone who asks (PEFT attaches its LoRA to it, transformers counts its bytes); its `weight`
holds codes, and their constants lie beside it (weight.py).
Not here: training of the quantized weight itself; it is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lilliput import kernels
from lilliput.errors import FormatError
from lilliput.formats import TENSORS, Format, Quantized, get_format
from lilliput.formats.rowwise import check_threshold
from lilliput.layers.weight import QuantizedWeight, frozen

# As a threshold: every column with a number in it is an outlier, so that no input is rounded.
_EVERY_COLUMN = torch.finfo(torch.float32).tiny


class QuantizedLinear(QuantizedWeight, nn.Linear):
    """`y = x Wᵀ + b` with W [out, in] in a number format. Only x and b can have gradients.

    Parameters: those of QuantizedWeight, and
        bias: floating point [out], or absent.

    `threshold` says which columns of x leave a product in int8 (kernels.linear_int8); 0 in other formats.
    `transposed` says that it stands for a `Conv1D`, whose dense weight is [in, out]; codes are always of [out, in].
    `.to(dtype)` and `.half()` change the type of the bias alone: codes and constants keep their types.
    """

    transposed: bool = False
    threshold: float

    def __init__(self, quantized: Quantized, bias: Tensor | None = None, threshold: float | None = None) -> None:
        """Hold `quantized`, of shape (out, in), and `bias` [out]; neither is copied.

        Raises FormatError on other shapes, UsageError on a threshold that is negative or that the format has not.
        """
        nn.Module.__init__(self)  # nn.Linear's own would allocate out·in floats
        if len(quantized.shape) != 2:
            raise FormatError(f"a linear layer needs a weight of shape (out, in), not {tuple(quantized.shape)}")
        self.out_features, self.in_features = quantized.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise FormatError(f"the bias has shape {tuple(bias.shape)}, expected ({self.out_features},)")
        self.format_name = quantized.format.name
        self.threshold = check_threshold(quantized.format.option("threshold", threshold))
        self.register_parameter("bias", None if bias is None else frozen(bias))
        self.hold(quantized)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | Conv1D,
        format: str | Format = "nf4",
        double_quant: bool | None = None,
        threshold: float | None = None,
        symmetric: bool | None = None,
    ) -> QuantizedLinear:
        """Quantize an `nn.Linear`, or a `Conv1D` (GPT-2), whose weight [in, out] is transposed on the way in.

        The result is on the layer's device and in its training mode. What is None is the format's own default. Raises
        FormatError for NaN or Inf in the weight, UsageError for an option that the format has not.
        """
        weight = linear.weight.detach()
        if isinstance(linear, Conv1D):
            weight = weight.t().contiguous()
        quantized = kernels.quantize(weight, format, double_quant, symmetric)
        bias = getattr(linear, "bias", None)
        layer = cls(quantized, None if bias is None else bias.detach(), threshold).train(linear.training)
        layer.transposed = isinstance(linear, Conv1D)
        return layer

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = False,
        format: str | Format = "nf4",
        double_quant: bool | None = None,
        device: str | torch.device = "meta",
        dtype: torch.dtype | None = None,
        threshold: float | None = None,
        **options: Any,
    ) -> QuantizedLinear:
        """A layer with room for the codes and nothing in it yet. `dtype` is the bias's (default: torch's).

        `options` are the format's other ones: `symmetric`, `ordered`, `scale_dtype` of groups.
        """
        row = get_format(format)
        chosen = {"double_quant": double_quant, **options}
        quantized = TENSORS[row.kind].empty(row, (out_features, in_features), chosen, device)
        return cls(quantized, torch.empty(out_features, device=device, dtype=dtype) if bias else None, threshold)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the input's type; the product itself is computed in float32 on a CPU."""
        return kernels.linear(input, self.quantized, self.bias, self.threshold)

    def extra_repr(self) -> str:
        chosen = "".join(f", {name}={value}" for name, value in self.options.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format_name}{chosen}"
        )


@contextmanager
def unrounded(model: nn.Module) -> Iterator[list[str]]:
    """Inside the block products take their inputs as they are, in float32, and only the weights are in few bits.

    In int8 a row's rounding depends on the rows beside it and on the last bit of its numbers, so that two ways of
    computing the same agree to 1e-2 or so and not to float32's rounding; in 4 bits a single row may be rounded to 16
    bits (`kernels.exact`). In here they agree.

    Yields: the names of the layers that round inputs otherwise; none without int8.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    rounding = {name: layer for name, layer in linears.items() if "threshold" in layer.options}
    kept = [layer.threshold for layer in rounding.values()]
    try:
        for layer in rounding.values():
            layer.threshold = _EVERY_COLUMN
        with kernels.exact():
            yield list(rounding)
    finally:
        for layer, threshold in zip(rounding.values(), kept, strict=True):
            layer.threshold = threshold
