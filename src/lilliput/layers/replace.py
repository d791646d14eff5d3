"""Walk a model and put quantized layers in place of its linear ones; ties and heads stay as they are.

Only plain `nn.Linear` and `Conv1D` are replaced, and subclasses that are known to compute the same: others may read
their weight in ways of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lilliput.errors import UsageError, nearest
from lilliput.layers.linear import QuantizedLinear

_LINEAR = (nn.Linear, Conv1D)
# Subclasses of nn.Linear whose forward is x Wᵀ + b, written in another way.
_SAME_AS_LINEAR = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})


def replace_linears(
    model: nn.Module, format: str = "nf4", double_quant: bool = True, skip: Iterable[str] | None = None
) -> list[str]:
    """Replace linear layers of `model` in place by QuantizedLinear and return their names, in the model's order.

    Layers on the meta device become empty quantized layers (to be filled by a load); others are quantized one after
    another, each freed before the next.

    Args:
        model: any module; a transformers model's heads and ties are recognised.
        format: a number format's name.
        double_quant: quantize the absmax values too.
        skip: names of modules to leave alone, full or the last parts of one ("lm_head", "self_attn.o_proj"), with all
            that is in them. None means `default_skip(model)`. Layers with tied weights are left alone in any case.
    Raises:
        UsageError: an unknown format, or a name in `skip` that matches no module.
    """
    names = [name for name, module in model.named_modules() if is_linear(module)]
    left_alone = set(default_skip(model)) if skip is None else _resolve(model, skip) | set(_tied(model))
    replaced = [name for name in names if not _inside(name, left_alone)]
    for name in replaced:
        linear: Any = model.get_submodule(name)
        model.set_submodule(name, _quantized_in_place_of(linear, format, double_quant))
        del linear
    return replaced


def default_skip(model: nn.Module) -> list[str]:
    """Names of the modules that stay in full precision: heads, tied weights, and what the model keeps in float32.

    A head is what lies outside the backbone (`model.base_model` of transformers), and the output embedding.
    """
    skipped = set(_tied(model))
    if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        skipped |= {name for name, module in model.named_modules() if module is head}
    backbone: Any = getattr(model, "base_model", model)
    if backbone is not model:
        inside = {id(module) for module in backbone.modules()}
        skipped |= {n for n, m in model.named_modules() if is_linear(m) and id(m) not in inside}
    in_float32: Any = getattr(model, "_keep_in_fp32_modules", None) or ()
    for pattern in in_float32:
        skipped |= {name for name, _ in model.named_modules() if pattern in name.split(".")}
    return sorted(skipped)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantized layers of `model` with their names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers of `model` that are not quantized."""
    return [name for name, module in model.named_modules() if is_linear(module)]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a dense linear layer that a quantized one can stand for."""
    kind = type(module)
    return kind in _LINEAR or f"{kind.__module__}.{kind.__qualname__}" in _SAME_AS_LINEAR


def shape_of(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """(out, in) of an `nn.Linear` or `Conv1D`, which stores its weight as [in, out]."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def _quantized_in_place_of(linear: nn.Linear | Conv1D, format: str, double_quant: bool) -> QuantizedLinear:
    if linear.weight.device.type != "meta":
        return QuantizedLinear.from_linear(linear, format, double_quant)
    out_features, in_features = shape_of(linear)
    bias = linear.bias
    layer = QuantizedLinear.empty(
        in_features, out_features, bias is not None, format, double_quant, dtype=None if bias is None else bias.dtype
    )
    layer.transposed = isinstance(linear, Conv1D)
    return layer


def _tied(model: nn.Module) -> list[str]:
    """Modules whose weight is another module's too: by what transformers declares, and by what is shared in fact."""
    declared: Any = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {key.rpartition(".")[0] for pair in declared.items() for key in pair}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return sorted(tied.union(*(set(names) for names in owners.values() if len(set(names)) > 1)))


def _resolve(model: nn.Module, skip: Iterable[str]) -> set[str]:
    """The full names that the entries of `skip` stand for."""
    known = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for entry in skip:
        matches = {name for name in known if name == entry or name.endswith(f".{entry}")}
        if not matches:
            raise UsageError(f"no module is called '{entry}'{nearest(entry, known)}", where="skip")
        found |= matches
    return found


def _inside(name: str, left_alone: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:n]) in left_alone for n in range(1, len(parts) + 1))
