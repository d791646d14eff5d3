"""A LoRA adapter alone as a GGUF file, for llama.cpp's `--lora` over a GGUF file of its base.

Tensors are `NAME.lora_a` [r, in] and `NAME.lora_b` [out, r] for a matrix NAME of the base, whose rows lie in ggml's
order; so do the rows of B. Ranks, alphas and rsLoRA may differ from module to module: the file has one alpha, llama.cpp
divides it by each module's rank, and what differs from that goes into B.
Source: llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp. Not here: adapters merged into a base
(gguf_write.py), directories of adapters (`lora.load_adapter` puts one on its base).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFType, GGUFWriter
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lilliput.errors import UsageError, nearest
from lilliput.models.families import Family
from lilliput.models.gguf_file import Entry, Written, dense, family_of, tensor_names, write_file

_PEFT = "base_model.model."  # its shell around the names of a model's modules


@dataclass(frozen=True)
class _Update:
    """One module's part of an adapter: W + scaling B A, A [r, in], B [out, r]; is_table: of a table of tokens."""

    module: str
    a: Tensor
    b: Tensor
    scaling: float
    is_table: bool

    @property
    def alpha(self) -> float:
        return self.scaling * self.a.shape[0]


def save_lora_gguf(model: PreTrainedModel, path: str | Path, name: str = "default") -> Written:
    """Write a LoRA adapter alone, for llama.cpp's `--lora` over a GGUF file of its base.

    Ranks, alphas and rsLoRA may differ from module to module: the file has one alpha, and what differs goes into B.

    Args:
        model: the base with the adapter on it, Lilliput's (`load_model`, then `lora.load_adapter`) or PEFT's.
        name: which adapter.
    Raises:
        UsageError: no such adapter; a family that GGUF has no word for; trained biases or whole modules, or an adapter
            on a tied table or head, which the file cannot say.
        CheckpointError: adapted modules that have no name in GGUF.
        FormatError: NaN or Inf. DiskError: as `save_gguf`.
    """
    config = model.config
    family = family_of(config)
    _check_adapter(model, name)
    updates = list(_updates(model, name))
    alpha = Counter(update.alpha for update in updates).most_common(1)[0][0]
    rename = tensor_names(family, config)
    entries = [entry for update in updates for entry in _pair(update, alpha, rename, config, family)]

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)

    return write_file(Path(path), family.architecture, entries, describe, [], progress=False)


def _check_adapter(model: PreTrainedModel, name: str) -> None:
    """Raise UsageError when there is no such adapter, or it is more than LoRA on layers."""
    configs = _configs(model)
    if name not in configs:
        there = ", ".join(configs) or "none"
        raise UsageError(f"no adapter named '{name}'{nearest(name, configs)}", todo=f"Attached: {there}.")
    has_copies = any(name in (getattr(module, "modules_to_save", None) or ()) for module in model.modules())
    extras = {
        "copies of whole modules (modules_to_save)": has_copies,
        "biases": configs[name].bias != "none",
        "magnitudes (use_dora)": getattr(configs[name], "use_dora", False),
    }
    if what := " and ".join(extra for extra, trained in extras.items() if trained):
        raise UsageError(
            f"trains {what} too, which a LoRA file of llama.cpp cannot say",
            where=f"adapter '{name}'",
            todo="Merge it into the base and write that with save_gguf.",
        )


def _configs(model: Any) -> dict[str, Any]:
    """Configs by adapter, as Lilliput or PEFT leaves them on a model."""
    ours = getattr(model, "lilliput_adapters", None)
    return dict(getattr(model, "peft_config", {}) if ours is None else ours.configs)


def _updates(model: PreTrainedModel, name: str) -> Iterator[_Update]:
    """The adapter's parts. Lilliput's and PEFT's layers call them the same."""
    for path, layer in model.named_modules():
        module: Any = layer
        is_table = name in getattr(module, "lora_embedding_A", ())
        if is_table:
            a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
        elif name in getattr(module, "lora_A", ()):
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
        else:
            continue
        _check_untied(model, path.removeprefix(_PEFT))
        yield _Update(path.removeprefix(_PEFT), a, b, float(module.scaling[name]), is_table)


def _check_untied(model: PreTrainedModel, module: str) -> None:
    tied = {key.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for key in pair}
    if module in tied:
        raise UsageError(
            "is adapted, and shares its weight with another module: llama.cpp would adapt both",
            where=module,
            todo="Merge the adapter into an untied base and write that with save_gguf.",
        )


def _pair(
    update: _Update, alpha: float, rename: Callable[[str], str], config: PreTrainedConfig, family: Family
) -> Iterator[Entry]:
    """A and B as llama.cpp wants them: A of a table transposed, rows of B in the order of the file's rows of W."""
    name = rename(f"{update.module}.weight")
    layout = family.layout(name)

    def make_b() -> Tensor:
        b = dense(update.b) * (update.alpha / alpha)
        return layout.redo(b, config) if layout is not None and layout.rows else b

    a_shape = tuple(update.a.shape)
    yield Entry(
        f"{name}.lora_a",
        a_shape[::-1] if update.is_table else a_shape,
        lambda: dense(update.a).t() if update.is_table else dense(update.a),
    )
    yield Entry(f"{name}.lora_b", tuple(update.b.shape), make_b)
