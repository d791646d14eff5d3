"""Walk a model and put quantized layers in place of its linear ones; ties and heads stay as they are.

Only plain `nn.Linear`, `Conv1D` and `nn.Embedding` are replaced, and subclasses that are known to compute the same:
others may read their weight in ways of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lilliput.errors import UsageError, nearest
from lilliput.formats import Format, get_format
from lilliput.layers.embedding import QuantizedEmbedding
from lilliput.layers.linear import QuantizedLinear
from lilliput.layers.weight import QuantizedWeight

_LINEAR = (nn.Linear, Conv1D)
# Subclasses of nn.Linear whose forward is x Wᵀ + b, written in another way.
_SAME_AS_LINEAR = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})


def replace_linears(
    model: nn.Module,
    format: str = "nf4",
    double_quant: bool | None = None,
    skip: Iterable[str] | None = None,
    *,
    threshold: float | None = None,
    embeddings: bool | None = None,
    symmetric: bool | None = None,
    ordered: bool | None = None,
    scale_dtype: str | None = None,
) -> list[str]:
    """Replace linear layers of `model` in place by QuantizedLinear and return their names, in the model's order.

    Layers on the meta device become empty quantized layers (to be filled by a load); others are quantized one after
    another, each freed before the next.

    Args:
        model: any module; a transformers model's heads and ties are recognised.
        format: a number format's name.
        double_quant: quantize the absmax values too (4-bit formats; None: yes).
        skip: names of modules to leave alone, full or the last parts of one ("lm_head", "self_attn.o_proj"), with all
            that is in them. None means `default_skip(model)`. Layers with tied weights are left alone in any case.
        threshold: of products in int8 (None: 6.0; see `kernels.linear_int8`).
        embeddings: the table of the model's input tokens too, and the head where it is tied to that (int8; None: no).
            Their names come last in the list.
        symmetric: the middle code is the zero of all groups (int4, int3, int2, int8g; None: no).
        ordered, scale_dtype: of layers on the meta device, in groups: whether their columns will come in an order of
            their own (None: no), and the type of their scales (None: float16).
    Raises:
        UsageError: an unknown format, an option that the format has not or that a load alone can fill, a name in `skip`
            that matches no module or shares its weight with the table, or a model without a plain table.
    """
    row = get_format(format)
    table = _table(model, skip) if row.option("embeddings", embeddings) else []
    replaced = replaceable(model, skip)
    chosen = {"double_quant": double_quant, "threshold": threshold, "symmetric": symmetric}
    stored = {"ordered": ordered, "scale_dtype": scale_dtype}
    for name in replaced:
        linear: Any = model.get_submodule(name)
        model.set_submodule(name, _quantized_in_place_of(linear, row, chosen, stored))
        del linear
    if table:
        _replace_table(model, table, format, threshold)
    return replaced + table


def replaceable(model: nn.Module, skip: Iterable[str] | None = None) -> list[str]:
    """Names of the linear layers that `replace_linears` would replace; `skip` and its errors are the same."""
    left_alone = set(default_skip(model)) if skip is None else _resolve(model, skip) | set(_tied(model))
    return [name for name in linear_names(model) if not _inside(name, left_alone)]


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


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """The linear layers and tables of `model` that are quantized, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            yield name, module


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers of `model` that are not quantized."""
    return [name for name, module in model.named_modules() if is_linear(module)]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a dense linear layer that a quantized one can stand for."""
    kind = type(module)
    return kind in _LINEAR or f"{kind.__module__}.{kind.__qualname__}" in _SAME_AS_LINEAR


def dense_type(model: nn.Module) -> torch.dtype:
    """The type of what is not quantized, as the first such parameter has it; float32 when there is none."""
    constants = {id(p) for _, layer in quantized_layers(model) for n, p in layer.named_parameters() if n != "bias"}
    floats = (p.dtype for p in model.parameters() if id(p) not in constants and p.is_floating_point())
    return next(floats, torch.float32)


def shape_of(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """(out, in) of an `nn.Linear` or `Conv1D`, which stores its weight as [in, out]."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def _quantized_in_place_of(
    linear: nn.Linear | Conv1D, format: Format, chosen: dict[str, Any], stored: dict[str, Any]
) -> QuantizedLinear:
    """`chosen`: what quantizing asks for; `stored`: what else codes from a checkpoint may have."""
    if linear.weight.device.type != "meta":
        for name, given in stored.items():
            if format.option(name, given) != format.option(name):
                raise UsageError(f"{name}={given} is for codes that will be loaded", where="replace_linears")
        return QuantizedLinear.from_linear(linear, format, **chosen)
    out_features, in_features = shape_of(linear)
    bias = linear.bias
    dtype = None if bias is None else bias.dtype
    layer = QuantizedLinear.empty(in_features, out_features, bias is not None, format, dtype=dtype, **chosen, **stored)
    layer.transposed = isinstance(linear, Conv1D)
    return layer


def _table(model: nn.Module, skip: Iterable[str] | None) -> list[str]:
    """Names of the model's token table and of all modules that share its weight, the table first."""
    found = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(found) is not nn.Embedding or found.max_norm is not None:
        what = type(model).__name__ if found is None else f"{type(model).__name__}'s {type(found).__name__}"
        raise UsageError(f"embeddings=True needs a plain nn.Embedding for tokens; {what} has none", where="embeddings")
    table = next(name for name, module in model.named_modules() if module is found)
    names = [table, *(name for name in _partners(model, table) if name != table)]
    strange = [name for name in names if not _can_share(model.get_submodule(name))]
    asked = _resolve(model, skip or ())
    for name, why in [(n, "is no plain layer without a bias") for n in strange] + [
        (n, "is in skip") for n in names if n in asked
    ]:
        raise UsageError(f"embeddings=True quantizes '{name}' with the token table, and it {why}", where="embeddings")
    return names


def _can_share(module: nn.Module) -> bool:
    # a bias would be padded by transformers to the length of what it is tied to, which is that of the flat codes
    return type(module) is nn.Embedding or (type(module) is nn.Linear and module.bias is None)


def _partners(model: nn.Module, name: str) -> list[str]:
    """Modules whose weight is that of module `name` too, declared or in fact."""
    declared: Any = getattr(model, "all_tied_weights_keys", None) or {}
    key, weight = f"{name}.weight", model.get_submodule(name).weight
    keys = [target for target, source in declared.items() if source == key]
    keys += [source for target, source in declared.items() if target == key]
    keys += [other for other, p in model.named_parameters(remove_duplicate=False) if p is weight]
    return list(dict.fromkeys(other.rpartition(".")[0] for other in keys))


def _replace_table(model: nn.Module, names: list[str], format: str, threshold: float | None) -> None:
    """Put the quantized table, and layers that share its codes, in place; the ties are declared for loads and saves."""
    dense: Any = model.get_submodule(names[0])
    table = _table_in_place_of(dense, format)
    model.set_submodule(names[0], table)
    for name in names[1:]:
        tied: Any = model.get_submodule(name)
        layer: QuantizedWeight
        if isinstance(tied, nn.Embedding):
            layer = QuantizedEmbedding(table.quantized, tied.padding_idx, tied.weight.dtype)
        else:
            layer = QuantizedLinear(table.quantized, threshold=threshold)
        layer.share(table)
        model.set_submodule(name, layer.train(tied.training))
    ties: Any = getattr(model, "all_tied_weights_keys", None)
    for target, source in list((ties or {}).items()):
        if target.rpartition(".")[0] in names:
            ties[f"{target}_absmax"] = f"{source}_absmax"


def _table_in_place_of(dense: nn.Embedding, format: str) -> QuantizedEmbedding:
    if dense.weight.device.type != "meta":
        return QuantizedEmbedding.from_embedding(dense, format)
    size = (dense.num_embeddings, dense.embedding_dim)
    return QuantizedEmbedding.empty(*size, dense.padding_idx, format, dtype=dense.weight.dtype)


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
