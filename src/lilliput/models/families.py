"""One row for each GGUF architecture: what its tensors go through on their way into the file, and the way back.

llama.cpp's converters rename every tensor (the `gguf` library knows the names) and change the layout or the values of a
few. A row lists the latter; an architecture without a row is refused, since its numbers would be wrong without a word.
Source: llama.cpp, convert_hf_to_gguf.py and src/models. Not here: fused or stacked tensors (Bloom, Falcon,
mixtures of experts), and architectures whose GGUF metadata leave out what the config needs (Gemma).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedConfig


class Change(Protocol):
    """Turns a tensor of the model into the file's, or back; `config` is the model's."""

    def __call__(self, weight: Tensor, config: PreTrainedConfig) -> Tensor: ...


def permute_queries(weight: Tensor, config: PreTrainedConfig) -> Tensor:
    """Rows of q_proj [heads·head_dim, ...] from the model's rotary order (halves) to ggml's (pairs together)."""
    return _permute(weight, config.num_attention_heads)


def unpermute_queries(weight: Tensor, config: PreTrainedConfig) -> Tensor:
    """The way back."""
    return _unpermute(weight, config.num_attention_heads)


def permute_keys(weight: Tensor, config: PreTrainedConfig) -> Tensor:
    """The same for k_proj, which has as many heads as there are keys and values."""
    return _permute(weight, config.num_key_value_heads)


def unpermute_keys(weight: Tensor, config: PreTrainedConfig) -> Tensor:
    """The way back."""
    return _unpermute(weight, config.num_key_value_heads)


def _permute(weight: Tensor, heads: int) -> Tensor:
    # in the file a head's rows are (x0, y0, x1, y1, ...); the model wants (x0, x1, ..., y0, y1, ...)
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def transpose(weight: Tensor, config: PreTrainedConfig) -> Tensor:
    """[out, in] of the file to the [in, out] of Conv1D, and back."""
    return weight.t().contiguous()


@dataclass(frozen=True)
class Layout:
    """A change of layout.

    Attributes:
        redo: from the model's to the file's.
        undo: from the file's to the model's.
        rows: it moves whole rows of W [out, in]; False: it transposes a matrix that the model has as [in, out].
    """

    redo: Change
    undo: Change
    rows: bool


QUERIES = Layout(permute_queries, unpermute_queries, rows=True)
KEYS = Layout(permute_keys, unpermute_keys, rows=True)
TRANSPOSED = Layout(transpose, transpose, rows=False)


@dataclass(frozen=True)
class Family:
    """A GGUF architecture.

    Attributes:
        architecture: its name in `general.architecture`.
        layouts: (pattern of GGUF tensor names, what they go through).
        settings: (metadata key without the architecture, field of the config) that transformers does not take over
            itself.
        models: types of transformers' models that are written as this architecture.
        computes: (field of the config or of its `rope_parameters`, the values that llama.cpp computes with, the first
            one where a config is silent); a model with another value is not written.
    """

    architecture: str
    layouts: tuple[tuple[str, Layout], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = ()
    computes: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def layout(self, name: str) -> Layout | None:
        """What the tensor of this GGUF name goes through; None when it is stored as the model has it."""
        return next((layout for pattern, layout in self.layouts if re.search(pattern, name)), None)

    def transform(self, name: str, config: PreTrainedConfig) -> Callable[[Tensor], Tensor] | None:
        """What to do with the tensor of this GGUF name; None when it is stored as the model has it."""
        layout = self.layout(name)
        return None if layout is None else partial(layout.undo, config=config)


_CONV1D = r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$"
_SILU: tuple[str, tuple[Any, ...]] = ("hidden_act", ("silu", "swish"))
_WHOLE: tuple[str, tuple[Any, ...]] = ("partial_rotary_factor", (1.0,))  # positions turn all of a head
_PLAIN: tuple[str, tuple[Any, ...]] = ("rope_type", ("default",))
_GPT2 = (
    ("activation_function", ("gelu_new", "gelu_pytorch_tanh")),
    ("scale_attn_weights", (True,)),
    ("scale_attn_by_inverse_layer_idx", (False,)),
    ("add_cross_attention", (False,)),
)
FAMILIES = {
    family.architecture: family
    for family in (
        # Llama 1 to 3, Mistral, SmolLM, TinyLlama, Yi...: whatever has the shape of a Llama
        Family(
            "llama",
            layouts=((r"\.attn_q\.", QUERIES), (r"\.attn_k\.", KEYS)),
            models=("llama", "mistral"),
            computes=(_SILU, _WHOLE, ("rope_type", ("default", "llama3"))),
        ),
        Family("qwen2", models=("qwen2",), computes=(_SILU, _WHOLE, _PLAIN)),
        Family(
            "qwen3",
            settings=(("attention.key_length", "head_dim"),),
            models=("qwen3",),
            computes=(_SILU, _WHOLE, _PLAIN),
        ),
        Family(
            "phi3",
            settings=(("attention.sliding_window", "sliding_window"),),
            models=("phi3",),
            computes=(_SILU, _PLAIN),
        ),
        Family(
            "gpt2",
            layouts=((_CONV1D, TRANSPOSED),),
            settings=(("context_length", "n_positions"),),
            models=("gpt2",),
            computes=_GPT2,
        ),
    )
}
