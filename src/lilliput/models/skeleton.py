"""A causal model without weights, whose decoder layers are filled one at a time from the checkpoint, run, and emptied.

Parameters lie on the meta device until they are wanted; buffers (rotary frequencies, ALiBi slopes) are real from the
start. What a layer is called with besides the hidden states (masks, positions) is learned from the model itself: its
forward runs once with recorders in the layers' places, which know all that the model asks of a layer and compute
nothing. Not here: what is done with a layer while it is filled (calibrate.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

from lilliput.errors import CheckpointError, UsageError
from lilliput.layers.replace import replaceable, shape_of
from lilliput.models.causal import require_causal
from lilliput.models.load import Checkpoint, model_class
from lilliput.models.stream import StoredTensor

_FEWEST = 32  # outputs of a layer worth quantizing


@dataclass(frozen=True)
class Call:
    """What a layer is called with behind the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """What a model makes of token ids before its layers: hidden states [rows, length, d], and each layer's call."""

    hidden: Tensor
    calls: list[Call]


class Skeleton:
    """The model of a checkpoint, empty.

    Attributes:
        model: as transformers builds it, in float32; `path` is its decoder layers' name ("model.layers").
        tensors: readers of the checkpoint, by the model's own names; tied weights may be absent.
        linears: for each layer the names, within it, of the linear layers that can be quantized; gates of fewer than 32
            outputs, whose few numbers decide much, are not among them.
        weights: the model's names of their weights, which become codes, in order; a dict for quick look-up.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Build it.

        Raises:
            UsageError: no causal model, or none with a plain list of decoder layers.
            CheckpointError: a tensor that the model needs is not there, or has another shape.
        """
        self.name = checkpoint.source.name
        with init_empty_weights(include_buffers=False), no_init_weights():
            self.model: PreTrainedModel = model_class(checkpoint.config)._from_config(
                checkpoint.config, dtype=torch.float32
            )
        require_causal(self.model, "lilliput quantize --format gptq")
        self.model.eval()
        self.path = _path_of_layers(self.model)
        self.layers: Any = self.model.get_submodule(self.path)
        self.tensors = _by_model_names(self.model, checkpoint.tensors, self.name)
        names = [name for name in replaceable(self.model) if shape_of(self.model.get_submodule(name))[0] >= _FEWEST]
        self.linears = [
            [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            for prefix in map(self.prefix, range(len(self.layers)))
        ]
        layers = enumerate(self.linears)
        self.weights = dict.fromkeys(f"{self.prefix(index)}{name}.weight" for index, names in layers for name in names)

    def __len__(self) -> int:
        return len(self.layers)

    def prefix(self, index: int) -> str:
        """What the names of a layer's tensors begin with: "model.layers.7."."""
        return f"{self.path}.{index}."

    def outside(self) -> dict[str, StoredTensor]:
        """The tensors that belong to no decoder layer."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(f"{self.path}.")}

    @contextmanager
    def filled(self, index: int) -> Iterator[nn.Module]:
        """Layer `index` with its weights in float32; they are gone after the block."""
        layer = self.layers[index]
        _fill(layer, self.prefix(index), self.tensors, self.name)
        try:
            yield layer
        finally:
            _empty(layer)

    @contextmanager
    def beginning(self) -> Iterator[Beginning]:
        """What stands before the layers, with its weights; they are gone after the block."""
        outside = [(name, module) for name, module in self._modules_outside() if name != _head_name(self.model)]
        for name, module in outside:
            _fill(module, f"{name}." if name else "", self.tensors, self.name, recurse=False)
        try:
            yield Beginning(self)
        finally:
            for _, module in outside:
                _empty(module, recurse=False)

    def _modules_outside(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.model.named_modules():
            if name != self.path and not name.startswith(f"{self.path}."):
                yield name, module


def run_layer(layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states [rows, length, d] behind a layer."""
    found = layer(hidden, *call.args, **call.kwargs)
    return found[0] if isinstance(found, tuple) else found


class _Stop(Exception):
    """Leaves a forward pass from within."""


@dataclass
class _Log:
    hidden: Tensor | None = None
    calls: list[Call] = field(default_factory=list)


class _Recorder(nn.Module):
    """Stands in a layer's place: notes what it is called with and hands on the first layer's input."""

    def __init__(self, layer: nn.Module, log: _Log, last: bool) -> None:
        super().__init__()
        self._noted = (layer, log, last)  # in a tuple, so that the layer does not become a part of this module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._noted[0], name)  # models ask a layer for its kind of attention

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        _, log, last = self._noted
        hidden = args[0] if args else kwargs.pop("hidden_states")
        log.hidden = hidden if log.hidden is None else log.hidden
        log.calls.append(Call(args[1:], kwargs))
        if last:
            raise _Stop
        return log.hidden


class Beginning:
    """A skeleton whose embeddings are filled: turns token ids into what the first layer gets."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton

    @torch.no_grad()
    def start(self, ids: Tensor) -> Start:
        """ids: int64 [rows, length]."""
        model, layers = self.skeleton.model, self.skeleton.layers
        kept, log = list(layers), _Log()
        try:
            for index, layer in enumerate(kept):
                layers[index] = _Recorder(layer, log, last=index == len(kept) - 1)
            model(input_ids=ids, use_cache=False)
        except _Stop:
            pass
        finally:
            for index, layer in enumerate(kept):
                layers[index] = layer
        if log.hidden is None or len(log.calls) != len(kept):
            raise UsageError(
                f"{type(model).__name__} does not call its {len(kept)} layers one after the other",
                where=self.skeleton.name,
            )
        return Start(log.hidden.float(), log.calls)


def _path_of_layers(model: PreTrainedModel) -> str:
    """The name of the list of decoder layers: as many modules of one kind as the config says."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(layer) for layer in module}) == 1:
            return name
    raise UsageError(
        f"{type(model).__name__} has no plain list of {count} decoder layers, which GPTQ walks through",
        where=str(model.config.model_type),
    )


def _head_name(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def _by_model_names(model: PreTrainedModel, stored: dict[str, StoredTensor], where: str) -> dict[str, StoredTensor]:
    """The checkpoint's tensors by the model's names, as transformers renames them on the way.

    Files may leave out the backbone's name, or have it too much, or call a head otherwise ("embed_out"). What
    transformers would put together of several tensors (experts) is not found under the model's name, and refused.
    """
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    wanted = model.state_dict()
    renamed = {
        rename_source_key(name, renamings, [], model.base_model_prefix, wanted)[0]: tensor
        for name, tensor in stored.items()
    }
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[str, StoredTensor] = {}
    for name, parameter in wanted.items():
        if name in renamed:
            _check_shape(name, renamed[name], parameter, where)
            found[name] = renamed[name]
        elif name not in tied and name not in tied.values():
            raise CheckpointError(f"has no tensor '{name}', which the model needs", where=where)
    return found


def _check_shape(name: str, tensor: StoredTensor, parameter: Tensor, where: str) -> None:
    if tuple(tensor.shape) != tuple(parameter.shape):
        raise CheckpointError(
            f"tensor '{name}' is {list(tensor.shape)}, the model needs {list(parameter.shape)}", where=where
        )


def _fill(module: nn.Module, prefix: str, tensors: dict[str, StoredTensor], where: str, recurse: bool = True) -> None:
    """Read a module's parameters, and buffers that were saved, in float32."""
    for name, _ in list(module.named_parameters(recurse=recurse)):
        stored = tensors.get(prefix + name)
        if stored is not None:  # else it is tied, and its partner's
            _put(module, name, nn.Parameter(stored.load().float(), requires_grad=False))
    for name, buffer in module.named_buffers(recurse=recurse):
        if (stored := tensors.get(prefix + name)) is not None:
            buffer.copy_(stored.load())


def _empty(module: nn.Module, recurse: bool = True) -> None:
    for name, parameter in list(module.named_parameters(recurse=recurse)):
        if not parameter.is_meta:
            _put(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, parameter)
