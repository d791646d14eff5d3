"""Which modules a LoraConfig means: from names, expressions and layer numbers to a list of modules of one model.

The rules are PEFT's (a list entry matches a whole name or its end after a dot; a string is an expression for the whole
name), so that a config picks the same modules in both. Unlike PEFT, an entry that picks nothing is an error.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lilliput.errors import UsageError, nearest
from lilliput.layers import QuantizedWeight
from lilliput.lora.config import TASK_HEADS, LoraConfig
from lilliput.lora.layer import LoraEmbedding, LoraLayer, LoraLinear, TrainedCopy

_LINEAR = (nn.Linear, Conv1D)
# What PEFT adapts when target_modules is not given: query and value projections, by the model's `config.model_type`.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "bart": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
    "bloom": ("query_key_value",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "electra": ("query", "value"),
    "falcon": ("query_key_value",),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gptj": ("q_proj", "v_proj"),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "opt": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "roberta": ("query", "value"),
    "stablelm": ("q_proj", "v_proj"),
    "t5": ("q", "v"),
    "xlm-roberta": ("query", "value"),
}


def outer_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules as before any adapter: a wrapper stands for what it wraps, its insides are not shown."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        if not isinstance(module, (LoraLayer, TrainedCopy)):
            for child_name, child in module.named_children():
                yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from walk(model, prefix)


def resolve(
    model: nn.Module, config: LoraConfig, *, each_entry: bool = True
) -> tuple[LoraConfig, list[str], list[str]]:
    """Settle a config on a model.

    Args:
        model: a model, with or without adapters.
        config: what is wanted.
        each_entry: every entry of a list must pick something; False for configs from files, where the tensors decide.

    Returns:
        The config with explicit lists in target_modules and modules_to_save; the names of the modules to adapt; the
        names of those to train whole. All in the model's order.

    Raises:
        UsageError: nothing matches (says what could be targeted), or a match cannot be adapted.
    """
    heads = TASK_HEADS.get(config.task_type or "", ())
    asked = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
    saved = _find_saved(model, asked, required=[n for n in asked if n not in heads] if each_entry else [])
    config = config.model_copy(update={"modules_to_save": asked or None})
    names = [name for name, _ in outer_modules(model) if name]
    if config.target_modules is None:
        config = config.model_copy(update={"target_modules": _default_targets(model)})
    if config.wants_all_linear:
        config = _spell_out(config, _all_linear(model, config), names)
    targets = [name for name in names if matches(config, name)]
    _check_found(model, config, targets, each_entry)
    _check_kinds(model, targets)
    conv = any(isinstance(_base(model.get_submodule(name)), Conv1D) for name in targets)
    settled = {"fan_in_fan_out": conv, "base_model_name_or_path": config.base_model_name_or_path or _name_of(model)}
    return config.model_copy(update=settled), targets, saved


def matches(config: LoraConfig, name: str) -> bool:
    """True when the config, its target_modules being a list or an expression, adapts the module `name`."""
    if _listed(config.exclude_modules, name) or any(f".{m}." in f".{name}." for m in config.modules_to_save or []):
        return False
    if config.target_modules is None or not _listed(config.target_modules, name):
        return False
    spelled_out = not isinstance(config.target_modules, str) and name in config.target_modules
    return spelled_out or _layer_chosen(config, name)


def _listed(entries: list[str] | str | None, name: str) -> bool:
    if not entries:
        return False
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return any(f".{name}".endswith(f".{entry}") for entry in entries)


def _layer_chosen(config: LoraConfig, name: str) -> bool:
    """True when the block that `name` lies in is among layers_to_transform, or none are asked for."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    index = _layer_index(name, config.layers_pattern)
    return index is not None and index in ([wanted] if isinstance(wanted, int) else wanted)


def _layer_index(name: str, layers_pattern: list[str] | str | None) -> int | None:
    """The number of the block: 3 in `model.layers.3.mlp.up_proj`; without a pattern the first from the third part."""
    if not layers_pattern:
        inner = name.split(".")[2:-1]
        return next((int(part) for part in inner if part.isdecimal()), None)
    for pattern in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern:
        if found := re.match(rf"(?:.*?\.)??{pattern}\.(\d+)\.", name):
            return int(found.group(1))
    return None


def _default_targets(model: nn.Module) -> list[str]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in DEFAULT_TARGETS:
        return list(DEFAULT_TARGETS[kind])
    raise UsageError(
        f"target_modules is not given, and there is no default for models of type {kind!r}",
        where="LoraConfig",
        todo=f"Give target_modules='all-linear' or some of: {_leaf_names(model)}.",
    )


def _all_linear(model: nn.Module, config: LoraConfig) -> list[str]:
    """Every linear layer but the head that makes logits (QLoRA, arXiv 2305.14314, section 4)."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = [n for n, m in outer_modules(model) if isinstance(_base(m), _LINEAR) and m is not head and not _inert(m)]
    probe = config.model_copy(update={"target_modules": linear})
    return [name for name in linear if matches(probe, name) and _layer_chosen(config, name)]


def _spell_out(config: LoraConfig, targets: list[str], names: list[str]) -> LoraConfig:
    """Write down which modules "all-linear" meant here: by their last names where that says the same, else in full."""
    leaves = sorted({name.rpartition(".")[2] for name in targets})
    short = config.model_copy(update={"target_modules": leaves})
    if [name for name in names if matches(short, name)] == targets:
        return short
    return config.model_copy(update={"target_modules": targets})


def _check_found(model: nn.Module, config: LoraConfig, targets: list[str], each_entry: bool) -> None:
    wanted = config.target_modules
    missing = [wanted] if not targets else []
    if targets and each_entry and isinstance(wanted, list):
        missing = [[entry] for entry in wanted if not any(_listed([entry], name) for name in targets)]
    if missing:
        todo = f"Names that can be adapted: {_leaf_names(model)}."
        raise UsageError(_nothing_found(model, config, missing[0]), where="LoraConfig", todo=todo)


def _nothing_found(model: nn.Module, config: LoraConfig, wanted: list[str] | str | None) -> str:
    """Why these entries, or this expression, pick no module of the model."""
    if any(_listed(wanted, name) for name, _ in outer_modules(model) if name):
        limits = ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save")
        given = ", ".join(f"{field}={value!r}" for field in limits if (value := getattr(config, field)) is not None)
        return f"target_modules={wanted!r} matches, but nothing is left of it after {given}"
    near = nearest(wanted[0], _leaves(model)) if isinstance(wanted, list) and wanted else ""
    return f"target_modules={wanted!r} matches no module of {type(model).__name__}{near}"


def _leaves(model: nn.Module) -> Counter[str]:
    kinds = (*_LINEAR, nn.Embedding)
    found = (n for n, m in outer_modules(model) if n and isinstance(_base(m), kinds) and not _inert(m))
    return Counter(name.rpartition(".")[2] for name in found)


def _leaf_names(model: nn.Module) -> str:
    """`down_proj (30), embed_tokens (1), ...`: last names of what can be adapted, with how often they occur."""
    return ", ".join(f"{name} ({count})" for name, count in sorted(_leaves(model).items())) or "none in this model"


def _check_kinds(model: nn.Module, targets: list[str]) -> None:
    for name in targets:
        base = _base(model.get_submodule(name))
        fault = None
        if isinstance(base, TrainedCopy):
            fault = "is trained whole by another adapter (modules_to_save)"
        elif not isinstance(base, (*_LINEAR, nn.Embedding)):
            fault = f"is a {type(base).__name__}; only Linear, Conv1D and Embedding layers can be adapted"
        elif isinstance(base, nn.Embedding) and base.max_norm is not None:
            fault = "is an Embedding with max_norm, which has no linear update"
        elif _inert(base):
            fault = "is never called: torch's MultiheadAttention reads its weight alone, and an update would do nothing"
        if fault:
            todo = f"Names that can be adapted: {_leaf_names(model)}."
            raise UsageError(f"'{name}' {fault}", where="LoraConfig", todo=todo)


def _find_saved(model: nn.Module, asked: list[str], required: list[str]) -> list[str]:
    """Names of the modules to train whole; `required` entries must be there, heads that a task implies need not."""
    outer = {name: module for name, module in outer_modules(model) if name}
    for entry in required:
        if not any(_listed([entry], name) for name in outer):
            raise UsageError(
                f"modules_to_save: '{entry}' matches no module{nearest(entry, {n.rpartition('.')[2] for n in outer})}",
                where="LoraConfig",
            )
    found = [name for name in outer if _listed(asked, name)]
    for name in found:
        _check_copyable(name, outer[name])
    return found


def _check_copyable(name: str, module: nn.Module) -> None:
    inner = module.original_module if isinstance(module, TrainedCopy) else module
    for part in inner.modules():
        fault = None
        if isinstance(part, (LoraLayer, TrainedCopy)):
            fault = "another adapter already sits on it or inside it"
        elif isinstance(part, QuantizedWeight):
            fault = "its weights are quantized, and codes cannot be trained; keep it dense when the model is quantized"
        elif isinstance(inner, (nn.ModuleList, nn.ModuleDict)):
            fault = f"it is a {type(inner).__name__}, which has no forward of its own"
        if fault:
            raise UsageError(f"modules_to_save: '{name}' cannot be trained whole: {fault}", where="LoraConfig")


def shared_weights(model: nn.Module) -> dict[str, list[str]]:
    """Names of modules that hold the very same weight, such as tied embeddings: name -> the other names."""
    holders: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in outer_modules(model):
        under = module.original_module if isinstance(module, TrainedCopy) else _base(module)
        weight = under._parameters.get("weight")
        if weight is not None:
            holders[id(weight)].append(name)
    return {name: [n for n in names if n != name] for names in holders.values() if len(names) > 1 for name in names}


def _inert(module: nn.Module) -> bool:
    """True for the output projection of torch's MultiheadAttention, whose forward is never run."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def _base(module: nn.Module) -> nn.Module:
    """What lies under a LoRA wrapper, or the module itself."""
    return module.base_layer if isinstance(module, (LoraLinear, LoraEmbedding)) else module


def _name_of(model: nn.Module) -> str | None:
    return getattr(model, "name_or_path", None) or None
