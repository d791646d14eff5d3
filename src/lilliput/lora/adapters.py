"""Attach adapters to a model, choose the active ones, merge them into the base, take them off again.

One record on the model (`AdapterState`) says which adapters there are and which are active; the layers are told.
Several adapters may be active at once: their updates add up. A model has one set of trained biases at most,
and each module of `modules_to_save` runs one copy at a time.
Not here: files (peft_files.py), the equations (layer.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from lilliput.errors import FormatError, UsageError, nearest
from lilliput.files import TensorsHash
from lilliput.layers import IdentitySource, QuantizedWeight
from lilliput.layers.identity import ATTRIBUTE
from lilliput.lora.config import LoraConfig
from lilliput.lora.layer import LoraEmbedding, LoraLayer, LoraLinear, TrainedCopy
from lilliput.lora.targets import outer_modules, resolve, shared_weights
from lilliput.progress import say, warn

_STATE = "lilliput_adapters"  # the attribute of the model that holds its AdapterState


@dataclass
class TrainedBiases:
    """The base's biases that one adapter trains in place, and the numbers that are not in place now.

    `parameters` are named as PEFT's file names them (`...query.base_layer.bias` where the adapter wraps the layer).
    """

    owner: str
    parameters: dict[str, nn.Parameter]
    elsewhere: dict[str, Tensor] = field(default_factory=dict)
    in_place: bool = True

    def __post_init__(self) -> None:
        self.elsewhere = {name: p.detach().clone() for name, p in self.parameters.items()}

    def put(self, in_place: bool) -> None:
        """Put the adapter's numbers (True) or the base's own (False) into the model."""
        if in_place != self.in_place:
            for name, parameter in self.parameters.items():
                numbers = self.elsewhere[name].to(parameter.device)  # the model may have moved since
                self.elsewhere[name], parameter.data = parameter.data, numbers
            self.in_place = in_place

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's numbers, wherever they are."""
        return dict(self.parameters) if self.in_place else self.elsewhere


@dataclass
class AdapterState:
    """What the model knows of its adapters."""

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trainable: set[str] = field(default_factory=set)
    enabled: bool = True
    merged: bool = False
    biases: TrainedBiases | None = None


def add_adapter(model: nn.Module, config: LoraConfig, name: str = "default") -> None:
    """Attach a new adapter, make it the only active one, and freeze everything else.

    Afterwards exactly the adapter's A and B, its copies of `modules_to_save` and the biases that `config.bias` asks for
    require gradients (none of them with `inference_mode=True`). The output is the base's until B is trained, unless
    `init_lora_weights=False`.

    Raises:
        UsageError: the name is taken or unusable, a target matches nothing or cannot be adapted, adapters are merged.
    """
    attach(model, config, name)
    for layer in target_layers(model).values():
        if name in layer.scaling:
            layer.reset(name, config.init_lora_weights)


def attach(model: nn.Module, config: LoraConfig, name: str, *, each_entry: bool = True) -> None:
    """`add_adapter` without drawing the first numbers: A and B hold whatever was in memory."""
    check_new(model, config, name)
    state = state_of(model)
    config, targets, saved = resolve(model, config, each_entry=each_entry)
    _warn_of_ties(model, targets, saved)
    for target in targets:
        layer = _wrapped(model, target)
        rank, alpha = config.rank_and_alpha(target)
        layer.attach(name, rank, alpha, dropout=config.lora_dropout, use_rslora=config.use_rslora)
    for target in saved:
        _copied(model, target).attach(name)
    if config.bias != "none":
        state.biases = TrainedBiases(name, _biases(model, config, targets))
    state.configs[name] = config
    if not config.inference_mode:
        state.trainable.add(name)
    setattr(model, _STATE, state)
    set_adapter(model, name)


def set_adapter(model: nn.Module, names: str | Iterable[str]) -> None:
    """Choose the active adapters: one, several (their updates add up), or none (an empty list).

    The active ones that were attached for training require gradients; everything else is frozen.

    Raises UsageError for an unknown name, two adapters with a copy of the same module, or while adapters are merged.
    """
    state = state_of(model)
    active = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    _check_known(state, active)
    _check_unmerged(state)
    for copy_name, copied in _copies(model).items():
        owners = [name for name in active if name in copied.modules_to_save]
        if len(owners) > 1:
            raise UsageError(f"{' and '.join(owners)} both bring their own '{copy_name}'; only one can be active")
    state.active = active
    _tell(model, state)
    _set_requires_grad(model, state)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; layers that no adapter uses any more are unwrapped. Other adapters stay as they are.

    Raises UsageError for an unknown name, or while adapters are merged.
    """
    state = state_of(model)
    _check_known(state, (name,))
    _check_unmerged(state)
    state.active = tuple(other for other in state.active if other != name)
    if state.biases is not None and state.biases.owner == name:
        state.biases.put(False)
        state.biases = None
    for target, layer in target_layers(model).items():
        if name in layer.scaling:
            layer.remove(name)
        if not layer.scaling:
            _put(model, target, layer.base_layer)
    for target, copied in _copies(model).items():
        if name in copied.modules_to_save:
            copied.remove(name)
        if not copied.modules_to_save:
            _put(model, target, copied.original_module)
    del state.configs[name]
    state.trainable.discard(name)
    _tell(model, state)
    _set_requires_grad(model, state)


def enable_adapters(model: nn.Module) -> None:
    """Let the active adapters take part again."""
    _switch(model, True)


def disable_adapters(model: nn.Module) -> None:
    """Run the base alone: no updates, the original modules and biases. Which adapters are active is remembered."""
    _switch(model, False)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """`with disabled(model): ...` runs the base alone inside the block."""
    before = state_of(model).enabled
    disable_adapters(model)
    try:
        yield model
    finally:
        _switch(model, before)


def merge(model: nn.Module, names: str | Iterable[str] | None = None) -> None:
    """Add the updates of `names` (the active adapters when None) to the base's weights; `unmerge` takes them back.

    The merged adapters are the active ones from here on. Dense weights keep their dtype; a quantized layer is replaced
    by a dense one in the model's dtype, about 8 times as large at float32. The originals stay in memory for `unmerge`;
    `detach` lets them go.

    Raises:
        UsageError: an unknown name, nothing to merge, already merged, or a layer that shares its weight with another.
        FormatError: the sum is not finite (a broken adapter). The model is as before in every case.
    """
    state = state_of(model)
    _check_unmerged(state)
    before = state.active
    if names is not None:
        set_adapter(model, names)
    if not state.active:
        raise UsageError("no adapter is active, nothing to merge", todo="Name one, or call set_adapter first.")
    layers = {t: layer for t, layer in target_layers(model).items() if any(n in layer.scaling for n in state.active)}
    try:
        _check_unshared(model, layers)
        dtype = getattr(model, "dtype", torch.float32)
        for target, layer in layers.items():
            _merge_one(target, layer, state.active, dtype)
    except BaseException:  # Ctrl-C and a full memory too: half a merge would be the base of all that follows
        for layer in layers.values():
            if layer.merged:
                layer.unmerge()
        set_adapter(model, before)
        raise
    state.merged, state.enabled = True, True
    _tell(model, state)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every weight is what it was, bit for bit. Raises UsageError when nothing is merged."""
    state = state_of(model)
    if not state.merged:
        raise UsageError("no adapter is merged", where="unmerge")
    for layer in target_layers(model).values():
        if layer.merged:
            layer.unmerge()
    state.merged = False


def detach(model: nn.Module) -> nn.Module:
    """Take all wrappers off and return the model: with merged adapters the tuned model, else the base as it was.

    After `merge` the active copies of `modules_to_save` and the trained biases stay in the model. It is a base of its
    own from then on: its weights are hashed now, and adapters trained over it remember these and not the old base's.
    """
    state = state_of(model)
    if not state.merged and state.biases is not None:
        state.biases.put(False)
    for target, layer in target_layers(model).items():
        _put(model, target, layer.base_layer)
    for target, copied in _copies(model).items():
        _put(model, target, copied.in_use() if state.merged else copied.original_module)
    if hasattr(model, _STATE):
        delattr(model, _STATE)
    if state.merged:
        _become_a_base(model, state.active)
    return model


@contextmanager
def base_only(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model is its untouched base: names, weights and biases as before any adapter."""
    state = state_of(model)
    layers, copies = target_layers(model), _copies(model)
    merged = [layer for layer in layers.values() if layer.merged]
    biases_in_place = state.biases is not None and state.biases.in_place
    try:
        for layer in merged:
            layer.swap()
        if state.biases is not None:
            state.biases.put(False)
        for target, layer in layers.items():
            _put(model, target, layer.base_layer)
        for target, copied in copies.items():
            _put(model, target, copied.original_module)
        yield model
    finally:
        for target, wrapper in {**layers, **copies}.items():
            _put(model, target, wrapper)
        if state.biases is not None:
            state.biases.put(biases_in_place)
        for layer in merged:
            layer.swap()


def adapters(model: nn.Module) -> dict[str, LoraConfig]:
    """The attached adapters with their settled configs, in the order in which they came."""
    return dict(state_of(model).configs)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the active adapters (also while they are disabled)."""
    return state_of(model).active


def target_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by the name that their base has in the plain model."""
    return {name: module for name, module in outer_modules(model) if isinstance(module, LoraLayer)}


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Every tensor of one adapter by its name in PEFT's file, less the prefix: float32, copies in the base's dtype."""
    state = state_of(model)
    _check_known(state, (name,))
    found: dict[str, Tensor] = {}
    for target, layer in target_layers(model).items():
        if name in layer.scaling:
            found.update({f"{target}.{key}": tensor for key, tensor in layer.tensors(name).items()})
    for target, copied in _copies(model).items():
        if name in copied.modules_to_save:
            own = copied.modules_to_save[name].state_dict(keep_vars=True)
            found.update({f"{target}.{key}": tensor for key, tensor in own.items()})
    if state.biases is not None and state.biases.owner == name:
        found.update(state.biases.tensors())
    return found


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(parameters that require gradients, all parameters).

    A weight packed into few bits counts as the weights it stands for, its scales as none; a weight shared by several
    modules counts once; the frozen original of a copy in `modules_to_save` is not counted beside the copy.
    """
    trainable = total = 0
    seen: set[int] = set()
    for module in _counted(model):
        packed = isinstance(module, QuantizedWeight)
        if isinstance(module, QuantizedWeight) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            total += prod(module.weight_shape)
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or (packed and name != "bias"):
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Say how much is trained: `trainable parameters: 1,034,498 of 125,089,538 (0.827006 %)`."""
    trainable, total = trainable_parameters(model)
    share = 100 * trainable / total if total else 0.0
    say(f"trainable parameters: {trainable:,} of {total:,} ({share:.6f} %)")


def state_of(model: nn.Module) -> AdapterState:
    """The model's record of its adapters; a new, empty one when it has none."""
    return getattr(model, _STATE, None) or AdapterState()


def _counted(module: nn.Module) -> Iterator[nn.Module]:
    """All modules below, leaving out originals that have a trained copy."""
    yield module
    for name, child in module.named_children():
        if not (isinstance(module, TrainedCopy) and name == "original_module"):
            yield from _counted(child)


def _switch(model: nn.Module, enabled: bool) -> None:
    state = state_of(model)
    if state.enabled != enabled:
        _check_unmerged(state)
        state.enabled = enabled
        _tell(model, state)


def _tell(model: nn.Module, state: AdapterState) -> None:
    """Pass the choice of adapters on to the layers, the copies and the biases."""
    active = state.active if state.enabled else ()
    for layer in target_layers(model).values():
        layer.active = tuple(name for name in active if name in layer.scaling)
    for copied in _copies(model).values():
        copied.active = next((name for name in active if name in copied.modules_to_save), None)
    if state.biases is not None:
        state.biases.put(state.biases.owner in active)


def _set_requires_grad(model: nn.Module, state: AdapterState) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    chosen = [name for name in state.active if name in state.trainable]
    trained = [tensor for name in chosen for tensor in adapter_tensors(model, name).values()]
    if state.biases is not None and state.biases.owner in chosen:
        trained += state.biases.parameters.values()  # also while the base's own numbers are in them
    for tensor in trained:
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.requires_grad_(True)


def _wrapped(model: nn.Module, target: str) -> LoraLayer:
    """The LoRA layer at `target`, made now if there is none yet."""
    module = model.get_submodule(target)
    if isinstance(module, LoraLayer):
        return module
    layer = LoraEmbedding(module) if isinstance(module, nn.Embedding) else LoraLinear(module)
    _put(model, target, layer)
    return layer


def _copied(model: nn.Module, target: str) -> TrainedCopy:
    module = model.get_submodule(target)
    if not isinstance(module, TrainedCopy):
        module = TrainedCopy(module)
        _put(model, target, module)
    return module


def _put(model: nn.Module, target: str, module: nn.Module) -> None:
    parent, _, child = target.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _copies(model: nn.Module) -> dict[str, TrainedCopy]:
    return {name: module for name, module in outer_modules(model) if isinstance(module, TrainedCopy)}


def _biases(model: nn.Module, config: LoraConfig, targets: list[str]) -> dict[str, nn.Parameter]:
    """The biases that the config trains: all of the base's, or those of the adapted layers."""
    found: dict[str, nn.Parameter] = {}
    for name, module in outer_modules(model):
        base = module.base_layer if isinstance(module, LoraLayer) else module
        bias = base._parameters.get("bias")
        if bias is None or isinstance(module, TrainedCopy):
            continue
        if name in targets:
            found[f"{name}.base_layer.bias"] = bias
        elif config.bias == "all":
            found[f"{name}.bias" if name else "bias"] = bias
    return found


def _become_a_base(model: nn.Module, merged: tuple[str, ...]) -> None:
    """Give a merged model the identity of its present weights in place of that of the files it once came from."""
    old = getattr(model, ATTRIBUTE, None)
    name = old.name if isinstance(old, IdentitySource) else getattr(model, "name_or_path", "") or type(model).__name__
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # a saved model holds tied weights once
    digest = TensorsHash()
    for key, tensor in model.state_dict().items():
        if key not in tied:
            digest.add(key, tensor)
    source = IdentitySource(f"{name} + {' + '.join(merged)}", partial(str, digest.hexdigest()))
    setattr(model, ATTRIBUTE, source)


def _merge_one(target: str, layer: LoraLayer, active: tuple[str, ...], dtype: torch.dtype) -> None:
    try:
        layer.merge(tuple(name for name in active if name in layer.scaling), dtype)
    except FormatError as error:
        raise FormatError(error.what, where=target, todo="Train it again with a lower learning rate.") from error


def _check_unshared(model: nn.Module, layers: dict[str, LoraLayer]) -> None:
    shared = shared_weights(model)
    for target in layers:
        if target in shared:
            raise UsageError(
                f"'{target}' shares its weight with '{shared[target][0]}', which would be changed too",
                where="merge",
                todo="Keep the adapter apart, or untie the weights before it is attached.",
            )


def _warn_of_ties(model: nn.Module, targets: list[str], saved: list[str]) -> None:
    shared = shared_weights(model)
    for target in targets:
        if target in shared:
            warn(
                f"'{target}' shares its weight with '{shared[target][0]}': the adapter acts at '{target}' alone, "
                "and it cannot be merged"
            )
    for target in saved:
        if target in shared:
            warn(f"'{target}' shares its weight with '{shared[target][0]}': the trained copy of '{target}' is its own")


def check_new(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Raise UsageError when no adapter with this name and config can be added to what the model already carries."""
    state = state_of(model)
    _check_unmerged(state)
    if name in state.configs:
        raise UsageError(f"there is already an adapter named '{name}'", todo="Choose another name, or delete it first.")
    if not name or "." in name or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise UsageError(f"'{name}' cannot be the name of an adapter", todo="Use a plain word, without dots.")
    if config.bias != "none" and state.biases is not None:
        raise UsageError(
            f"'{state.biases.owner}' already trains the base's biases, and only one adapter can",
            where=f"adapter '{name}'",
            todo="Use bias='none'.",
        )


def _check_known(state: AdapterState, names: tuple[str, ...]) -> None:
    for name in names:
        if name not in state.configs:
            known = ", ".join(state.configs) or "none"
            raise UsageError(f"no adapter named '{name}'{nearest(name, state.configs)}", todo=f"Attached: {known}.")


def _check_unmerged(state: AdapterState) -> None:
    if state.merged:
        raise UsageError("adapters are merged into the base", todo="Call unmerge(model) first.")
