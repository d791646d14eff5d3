"""A model as a GGUF file that llama.cpp and what is built on it read.

Tensors are made one at a time (dequantized, laid out as ggml wants them, rounded to blocks by the `gguf` library) and
written at once, beside the file and then renamed: there is never a second copy of the model. Names of tensors come from
the `gguf` library, layouts from families.py, the tokenizer from vocabulary.py.
Source: the GGUF specification (ggml/docs/gguf.md); llama.cpp, convert_hf_to_gguf.py.
Not here: adapters alone (gguf_lora.py), K-quants and importance matrices (llama-quantize makes them of an F16 file),
split files, mixtures of experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFType, GGUFWriter, LlamaFileType
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.errors import UsageError, nearest
from lilliput.layers import QuantizedWeight
from lilliput.models.families import Family
from lilliput.models.gguf_file import Entry, Written, dense, family_of, tensor_names, write_file
from lilliput.models.rope import FACTORS, llama3_factors
from lilliput.models.vocabulary import vocabulary_of
from lilliput.progress import warn

_HEAD, _TABLE = "output.weight", "token_embd.weight"
_ALWAYS_F32 = ("position_embd.weight",)  # and whatever is no matrix


@dataclass(frozen=True)
class GgufType:
    """What a file's matrices are kept in.

    Attributes:
        kind: ggml's type of a tensor.
        file: what `general.file_type` says.
        head: of the matrix that gives the logits, where four bits are too few for it (llama.cpp: six there).
    """

    kind: Kind
    file: LlamaFileType
    head: Kind


TYPES = {
    "f32": GgufType(Kind.F32, LlamaFileType.ALL_F32, Kind.F32),
    "f16": GgufType(Kind.F16, LlamaFileType.MOSTLY_F16, Kind.F16),
    "q8_0": GgufType(Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0, Kind.Q8_0),
    "q4_0": GgufType(Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0, Kind.Q8_0),
    "q4_1": GgufType(Kind.Q4_1, LlamaFileType.MOSTLY_Q4_1, Kind.Q8_0),
}

# (metadata key without the architecture, field of the config): whole numbers, and reals
_COUNTS = (
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.sliding_window", "sliding_window"),
    ("vocab_size", "vocab_size"),
)
_REALS = (
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
)


def save_gguf(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    type: str = "q8_0",
    *,
    progress: bool = True,
) -> Written:
    """Write `model` with its tokenizer and chat template as one GGUF file; quantized layers are dequantized one by one.

    Args:
        type: of the matrices: "f32", "f16", "q8_0" (8.5 bits a weight), "q4_1" (5) or "q4_0" (4.5). Rows whose length
            is no multiple of 32 are kept in F16, and in four bits the matrix of the logits in Q8_0. Norms and biases
            are F32.
        progress: show a bar on standard error.
    Raises:
        UsageError: an unknown type; a family, activation or scaling of positions that GGUF has no word for; adapters on
            the model.
        CheckpointError: a tokenizer that cannot be written (vocabulary.py), or tensors that have no name in GGUF.
        FormatError: NaN, Inf, or numbers too large for float16.
        DiskError: the disk is full or the place cannot be written; a file that was there before is unchanged.
    """
    if type not in TYPES:
        raise UsageError(f"unknown GGUF type '{type}'{nearest(type, TYPES)}", todo=f"There are: {', '.join(TYPES)}.")
    config, chosen = model.config, TYPES[type]
    family = family_of(config)
    _check_plain(model)
    vocabulary = vocabulary_of(tokenizer, config)
    entries = _typed([*_factors(config), *_entries(model, family)], chosen)
    notes = [*_lost(config), *_fallbacks(entries, chosen)]
    for note in notes:
        warn(f"{Path(path).name}: {note}")

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.MODEL)
        if name := Path(str(model.name_or_path)).name.removesuffix(".gguf"):
            writer.add_name(name)
        writer.add_file_type(chosen.file)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _describe(writer, config, family)
        vocabulary.write(writer)

    return write_file(Path(path), family.architecture, entries, describe, notes, progress)


def _check_plain(model: PreTrainedModel) -> None:
    """Raise UsageError when adapters are on the model: their wrappers keep a `base_layer` or an `original_module`."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            raise UsageError(
                f"the model carries adapters ('{name}')",
                where="save_gguf",
                todo="Merge them into a copy first, or write the adapter alone with save_lora_gguf.",
            )


def _lost(config: PreTrainedConfig) -> list[str]:
    """What the file says nothing of, or llama.cpp leaves aside."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return []
    return [f"llama.cpp attends to all tokens, not to the last {window:,}: beyond those its answers differ"]


def _describe(writer: GGUFWriter, config: PreTrainedConfig, family: Family) -> None:
    """The metadata of the architecture."""

    def key(name: str) -> str:
        return f"{family.architecture}.{name}"

    for name, source in _COUNTS:
        if (count := getattr(config, source, None)) is not None:
            writer.add_uint32(key(name), count)
    for name, source in _REALS:
        if (real := getattr(config, source, None)) is not None:
            writer.add_float32(key(name), real)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    writer.add_uint32(key("feed_forward_length"), inner)
    if rope := getattr(config, "rope_parameters", None):
        width = _head_dim(config)
        writer.add_float32(key("rope.freq_base"), rope["rope_theta"])
        writer.add_uint32(key("rope.dimension_count"), int(width * rope.get("partial_rotary_factor", 1.0)))
        writer.add_uint32(key("attention.key_length"), width)
        writer.add_uint32(key("attention.value_length"), width)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _factors(config: PreTrainedConfig) -> Iterator[Entry]:
    """What Llama 3 divides its rotary frequencies by (rope.py)."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        settings = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
        made = llama3_factors(rope["rope_theta"], _head_dim(config), **settings)
        yield Entry(FACTORS, tuple(made.shape), lambda: made)


def _entries(model: PreTrainedModel, family: Family) -> Iterator[Entry]:
    """All tensors of the model under their GGUF names, none of them made; tied ones once."""
    rename = tensor_names(family, model.config)
    tied = model.all_tied_weights_keys
    for path, module in model.named_modules():
        for key, parameter in _parameters(module):
            name = f"{path}.{key}"
            if name in tied and _same(parameter, model.get_parameter(tied[name])):
                continue
            yield _entry(rename(name), module, key, parameter, model.config, family)


def _parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters; of a quantized one the weight stands for its constants too."""
    for key, parameter in module.named_parameters(recurse=False):
        if not isinstance(module, QuantizedWeight) or key in ("weight", "bias"):
            yield key, parameter


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _entry(
    name: str, module: nn.Module, key: str, parameter: Tensor, config: PreTrainedConfig, family: Family
) -> Entry:
    layout = family.layout(name)
    make: Callable[[], Tensor] = partial(dense, parameter)
    shape = tuple(parameter.shape)
    if key == "weight" and isinstance(module, QuantizedWeight):
        make, shape = partial(module.dequantize, torch.float32), module.weight_shape
        layout = layout if layout and layout.rows else None  # its codes are of [out, in] already
    if layout is None:
        return Entry(name, shape, make)
    redo = partial(layout.redo, config=config)
    return Entry(name, tuple(redo(torch.empty(shape, device="meta")).shape), lambda: redo(make()))


# ---- types -------------------------------------------------------------------------------------------------------


def _typed(entries: list[Entry], chosen: GgufType) -> list[Entry]:
    """Each with the ggml type that it is written in."""
    names = {entry.name for entry in entries}
    head = _HEAD if _HEAD in names else _TABLE  # a tied head is the table
    return [
        dataclasses.replace(entry, kind=_kind(entry, chosen.head if entry.name == head else chosen.kind))
        for entry in entries
    ]


def _kind(entry: Entry, wanted: Kind) -> Kind:
    if len(entry.shape) != 2 or entry.name in _ALWAYS_F32:
        return Kind.F32
    return wanted if entry.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else Kind.F16


def _fallbacks(entries: list[Entry], chosen: GgufType) -> list[str]:
    """Says which matrices are kept in F16 although a smaller type was chosen."""
    if Kind.F16 in (chosen.kind, chosen.head):
        return []
    larger = [entry for entry in entries if entry.kind == Kind.F16]
    if not larger:
        return []
    widths = ", ".join(str(width) for width in sorted({entry.shape[-1] for entry in larger}))
    return [
        f"{len(larger)} matrices are kept in F16: their rows of {widths} numbers are not cut into blocks of 32 "
        f"({larger[0].name} among them)"
    ]
