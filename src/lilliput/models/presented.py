"""What every reader of another library's checkpoint needs and gives: the model's linear layers, and our own tensors.

    their file             a reader (gptq_files.py, bnb_files.py)      what load_model sees
    X.qweight, X.qzeros …  ─────────────────────────────────────────>  X.weight, X.weight_scale, X.weight_zero …
    X.weight.absmax …      ─────────────────────────────────────────>  X.weight, X.weight_absmax …
    everything else        ─────────────────────────────────────────>  as it is

Nothing is read for this but what has to be known of all layers at once. Not here: which reader is taken (foreign.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lilliput.errors import CheckpointError
from lilliput.layers.replace import is_linear, shape_of
from lilliput.models.stream import Lazy, StoredTensor


@dataclass(frozen=True)
class Presented:
    """A checkpoint of another library as one of ours.

    Attributes:
        format: the number format of its quantized layers, and
        options: what holds for the format's options.
        tensors: readers, under the names of our layers' parameters.
        modules: the quantized layers, by the names of the file.
    """

    format: str
    options: dict[str, Any]
    tensors: dict[str, StoredTensor]
    modules: list[str]


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model: its full name, W's shape (out, in), and whether it has a bias."""

    name: str
    shape: tuple[int, int]
    has_bias: bool


class Linears:
    """The linear layers of a model, by the names that its files may have for them."""

    def __init__(self, empty: PreTrainedModel) -> None:
        """empty: the model, not quantized, on any device."""
        self.model = empty
        self._prefix = f"{empty.base_model_prefix}."

    def find(self, name: str, where: str) -> Linear:
        """The layer that a file calls `name`; some files leave out the backbone's name, or have it too much.

        Raises CheckpointError when there is none.
        """
        for spelled in (name, self._prefix + name, name.removeprefix(self._prefix)):
            try:
                module: Any = self.model.get_submodule(spelled)
            except AttributeError:
                continue
            if is_linear(module):
                return Linear(spelled, shape_of(module), getattr(module, "bias", None) is not None)
        raise CheckpointError(
            f"'{name}' is quantized, and is no linear layer of {type(self.model).__name__}",
            where=where,
            todo="Weights and config.json belong to different models, or transformers has another layout for this one.",
        )


def parts_of(tensors: Mapping[str, StoredTensor], name: str, parts: Iterable[str]) -> dict[str, StoredTensor]:
    """Those of the tensors `{name}.{part}` that are there, by part."""
    return {part: tensors[f"{name}.{part}"] for part in parts if f"{name}.{part}" in tensors}


def others(tensors: Mapping[str, StoredTensor], taken: Iterable[Mapping[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors that belong to no quantized layer; `taken` are the parts of each."""
    used = {tensor.name for parts in taken for tensor in parts.values()}
    return {name: tensor for name, tensor in tensors.items() if name not in used}


def made(name: str, dtype: torch.dtype, shape: Iterable[int], load: Callable[[], Tensor]) -> StoredTensor:
    """A tensor that is computed of stored ones when it is asked for."""
    size = tuple(shape)
    return StoredTensor(name, dtype, size, prod(size) * dtype.itemsize, load)


def held(name: str, tensor: Tensor) -> StoredTensor:
    """A tensor in memory that looks like one in a file."""
    return made(name, tensor.dtype, tensor.shape, lambda: tensor)


def expect(part: str, tensor: Lazy | None, shape: tuple[int, ...], types: tuple[torch.dtype, ...], where: str) -> None:
    """Raise CheckpointError unless `tensor` is there, of that shape and of one of the types."""
    if tensor is None:
        raise CheckpointError(f"has no '{part}'", where=where, todo="Copy or download the model again.")
    known = " or ".join(str(dtype).removeprefix("torch.") for dtype in types)
    if tensor.dtype not in types or tuple(tensor.shape) != shape:
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise CheckpointError(f"'{part}' is {found}, expected {known} {list(shape)}", where=where)
