"""Writes GGUF files of tiny models as llama.cpp's converter would, with the `gguf` library's own writer and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

NORMAL, CONTROL = 1, 3  # token types of the GGUF specification


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None,
    kind: Kind = Kind.F32,
    add_bos: bool = False,
    rope_factors: np.ndarray | None = None,
    **extra: Any,
) -> Path:
    """Write `model`; matrices whose rows fit are quantized to `kind`, `extra` are further metadata strings."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_key_length(head_dim(config))
        writer.add_rope_dimension_count(head_dim(config))
        writer.add_vocab_size(config.vocab_size)
    for key, value in extra.items():
        writer.add_string(key, value)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, add_bos)
    add_tensors(writer, model, kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, add_bos: bool) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"] for token in content["added_tokens"]}
    ids = range(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(ids)))
    writer.add_token_types([CONTROL if i in special else NORMAL for i in ids])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(add_bos)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def add_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, kind: Kind) -> None:
    architecture = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == model.config.model_type)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tied = model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        stem, _, suffix = name.rpartition(".")
        values = as_stored(model, stem, tensor).float().contiguous().numpy()
        fits = values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        used = kind if fits else Kind.F32
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", quantized(values, used), raw_dtype=used)


def quantized(values: np.ndarray, kind: Kind) -> np.ndarray:
    """The library quantizes what it can; types it only reads get arbitrary, finite blocks."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        return arbitrary_blocks(values.shape, kind)


def arbitrary_blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    # bytes below 0x40 make no infinite or huge half-precision scale
    return rng.integers(0, 0x40, size=(*shape[:-1], shape[-1] // block * nbytes), dtype=np.uint8)


def as_stored(model: PreTrainedModel, stem: str, tensor: Tensor) -> Tensor:
    """The layout of llama.cpp: Conv1D transposed, rotary halves of Llama's q and k brought beside each other."""
    config = model.config
    if isinstance(model.get_submodule(stem), Conv1D) and tensor.ndim == 2:
        return tensor.t()
    if config.model_type == "llama" and stem.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
        return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    return tensor
