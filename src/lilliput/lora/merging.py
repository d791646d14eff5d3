"""The tuned model as plain tensors, made one at a time: W + s B A in float32, whatever number format W is held in.

    module of the model              tensor under the plain model's name
    LoRA layer over a quantized W    dequantize(W) + s B A
    LoRA layer over a dense W        W + s B A
    quantized layer without adapter  dequantize(W)
    copy of modules_to_save          the copy in use
    anything else                    as it is; of trained biases the numbers in use

The model itself is not changed, and one tensor in full precision exists at a time, where `adapters.merge` makes a whole
dense model. A weight that two modules share comes once, unless an adapter acts at one of them alone: then both come,
and the model is no longer tied.
Not here: merging inside a model, and back again (adapters.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import FormatError
from lilliput.layers import QuantizedWeight
from lilliput.lora.layer import LoraLayer, TrainedCopy
from lilliput.lora.targets import outer_modules


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model, made by `load` and kept by nobody.

    source: what tells tensors that are the same from others that only look alike.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    source: tuple[int, ...]


def merged_tensors(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, MergedTensor]:
    """Every tensor of the model with its active adapters merged, by the plain model's names; floats in `dtype`.

    Loading one raises FormatError where a sum is not finite, or too large for `dtype`. The model must not change
    before the last one is loaded.
    """
    found: dict[str, MergedTensor] = {}
    for name, module in outer_modules(model):
        for part, tensor in _tensors(module, dtype):
            full = f"{name}.{part}" if name else part
            found[full] = MergedTensor(tensor.dtype, tensor.shape, partial(_checked, full, tensor), tensor.source)
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = [(found[name], found[of]) for name, of in ties.items() if name in found and of in found]
    if all(one.source == other.source for one, other in pairs):
        found = {name: tensor for name, tensor in found.items() if name not in ties}
    return found


def _tensors(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, MergedTensor]]:
    """The tensors of one outer module under their plain names, children left to themselves."""
    if isinstance(module, TrainedCopy):
        for name, inner in module.in_use().named_modules():
            for part, tensor in _tensors(inner, dtype):
                yield f"{name}.{part}" if name else part, tensor
        return
    base: Any = module.base_layer if isinstance(module, LoraLayer) else module
    packed = isinstance(base, QuantizedWeight)
    names = module.active if isinstance(module, LoraLayer) and not module.merged else ()
    if packed or names:
        yield "weight", _weight(module, base, names, dtype)
    for part, held in _own(base).items():
        if part == "bias" or not (packed or (names and part == "weight")):
            yield part, _plain(held, dtype)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a module itself."""
    buffers = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    return {name: tensor for name, tensor in {**module._parameters, **buffers}.items() if tensor is not None}


def _weight(module: nn.Module, base: Any, names: tuple[str, ...], dtype: torch.dtype) -> MergedTensor:
    """The weight of a layer that is quantized, adapted, or both."""
    packed = isinstance(base, QuantizedWeight)
    shape = tuple(base.weight_shape if packed else base.weight.shape)
    turned = packed and getattr(base, "transposed", False)  # codes are of [out, in], a Conv1D's weight is [in, out]
    source: tuple[int, ...] = (base.weight.data_ptr(), id(module)) if names else (base.weight.data_ptr(),)

    def load() -> Tensor:
        total = module.sum_of(names) if isinstance(module, LoraLayer) else base.dequantize(torch.float32)
        return (total.T if turned else total).to(dtype)

    return MergedTensor(dtype, shape[::-1] if turned else shape, load, source)


def _plain(held: Tensor, dtype: torch.dtype) -> MergedTensor:
    kind = dtype if held.is_floating_point() else held.dtype
    return MergedTensor(kind, tuple(held.shape), lambda: held.detach().to(kind), (held.data_ptr(),))


def _checked(name: str, tensor: MergedTensor) -> Tensor:
    made = tensor.load()
    if made.is_floating_point() and not torch.isfinite(made).all():
        raise FormatError(
            f"merged it holds NaN or numbers that {str(made.dtype).removeprefix('torch.')} cannot hold",
            where=name,
            todo="Take float32 or bfloat16; if it is no better then, the adapter is broken.",
        )
    return made
