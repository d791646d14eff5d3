"""The model families that the field uses, each as a row: how to make a tiny random one, and what is expected of it.

Sizes are the smallest that still have several heads, grouped keys and values where the family has them, and two layers;
widths are multiples of 64 but for a few odd ones. `positions` are longer than any row of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 128
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDE: dict[str, Any] = {**_TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA: dict[str, Any] = {**_WIDE, "intermediate_size": 128, "max_position_embeddings": 256}
_FALCON: dict[str, Any] = {**_WIDE, "hidden_dropout": 0.0, "attention_dropout": 0.0}
_BERT: dict[str, Any] = {
    **_WIDE,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BERT_LAYERS = ("query", "key", "value", "dense")

Task = Literal["causal", "classify", "translate"]


@dataclass(frozen=True)
class Family:
    """A row.

    Attributes:
        name: of the test.
        model: transformers' class.
        config: arguments of its config.
        layers: last parts of the names of the layers that are quantized.
        targets: last parts of the names that LoRA adapts by default, as PEFT does.
        dense: last parts of the names of linear layers that stay in full precision.
        task: causal language model, classifier of sequences, or encoder and decoder.
        packs: rows of several examples can be trained on.
        parts: its forward can be parted into a frozen prefix and the rest.
        spread: standard deviation of the weights. transformers' 0.02 would leave a stream to which no layer adds
            anything; T5's attention, which divides by nothing, needs less than others.
    """

    name: str
    model: str
    config: dict[str, Any]
    layers: tuple[str, ...]
    targets: tuple[str, ...]
    dense: tuple[str, ...] = ("lm_head",)
    task: Task = "causal"
    packs: bool = True
    parts: bool = True
    spread: float = 0.15


FAMILIES = (
    Family("llama", "LlamaForCausalLM", {**_LLAMA, "intermediate_size": 172}, _LLAMA_LAYERS, ("q_proj", "v_proj")),
    Family(
        "llama-tied",  # SmolLM2
        "LlamaForCausalLM",
        {**_LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True},
        _LLAMA_LAYERS,
        ("q_proj", "v_proj"),
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        {**_LLAMA, "num_key_value_heads": 2, "sliding_window": 16},
        _LLAMA_LAYERS,
        ("q_proj", "v_proj"),
    ),
    Family(
        "qwen2",  # with windows in the upper layer, as its config allows
        "Qwen2ForCausalLM",
        {**_LLAMA, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        _LLAMA_LAYERS,
        ("q_proj", "v_proj"),
    ),
    Family(
        "gpt-neox",  # Pythia
        "GPTNeoXForCausalLM",
        {**_LLAMA, "rotary_pct": 0.25, "tie_word_embeddings": False},
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        ("query_key_value",),
    ),
    Family(
        "gpt-neox-serial",  # RedPajama-INCITE
        "GPTNeoXForCausalLM",
        {**_LLAMA, "rotary_pct": 1.0, "use_parallel_residual": False, "tie_word_embeddings": False},
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        ("query_key_value",),
    ),
    Family(
        "stablelm",
        "StableLmForCausalLM",
        {**_LLAMA, "num_key_value_heads": 4, "use_qkv_bias": True},
        _LLAMA_LAYERS,
        ("q_proj", "v_proj"),
    ),
    Family(
        "mpt",
        "MptForCausalLM",
        {**_TOKENS, "d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 256},
        ("Wqkv", "out_proj", "up_proj", "down_proj"),
        ("Wqkv",),
    ),
    Family(
        "falcon",  # Falcon-7B: one key and one value for all heads
        "FalconForCausalLM",
        {**_FALCON, "multi_query": True, "parallel_attn": True, "bias": False},
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        ("query_key_value",),
    ),
    Family(
        "falcon-grouped",  # Falcon-40B
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        ("query_key_value",),
    ),
    Family(
        "falcon-alibi",  # Falcon-RW
        "FalconForCausalLM",
        {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        ("query_key_value",),
        packs=False,
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        {**_WIDE, "ffn_dim": 128, "max_position_embeddings": 256, "word_embed_proj_dim": 64, "dropout": 0.0},
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        ("q_proj", "v_proj"),
    ),
    Family(
        "opt-350m",  # norms after, embeddings of another width
        "OPTForCausalLM",
        {
            **_WIDE,
            "ffn_dim": 100,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": False,
            "dropout": 0.0,
        },
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"),
        ("q_proj", "v_proj"),
        parts=False,
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        ("query_key_value",),
        packs=False,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        {
            **_TOKENS,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        ("c_attn", "c_proj", "c_fc"),
        ("c_attn",),
    ),
    Family(
        "bert",
        "BertForSequenceClassification",
        {**_BERT, "intermediate_size": 100},
        _BERT_LAYERS,
        ("query", "value"),
        dense=("classifier",),
        task="classify",
    ),
    Family(
        "roberta",
        "RobertaForSequenceClassification",
        _BERT,
        _BERT_LAYERS,
        ("query", "value"),
        dense=("classifier.dense", "classifier.out_proj"),
        task="classify",
    ),
    Family(
        "t5",  # FLAN-T5
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
        ("q", "k", "v", "o", "wi_0", "wi_1"),
        ("q", "v"),
        dense=("wo", "lm_head"),
        task="translate",
        spread=0.06,
    ),
)


def make_family(family: Family, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of the family, in float32 and evaluation mode; biases and norms are random too."""
    torch.manual_seed(seed)
    kind = getattr(transformers, family.model)
    model: PreTrainedModel = kind(kind.config_class(**family.config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * family.spread)
    return model


def inputs_of(family: Family, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the forward of the family takes for int64 [rows, tokens]."""
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :9]} if family.task == "translate" else {})


def labels_of(family: Family, ids: torch.Tensor) -> torch.Tensor:
    """Something to learn: the rows themselves, their first tokens, or a class for each."""
    if family.task == "classify":
        return torch.arange(len(ids)) % family.config["num_labels"]
    return ids if family.task == "causal" else ids[:, :9].contiguous()
