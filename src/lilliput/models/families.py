"""One row for each GGUF architecture: what its tensors went through on their way into the file, undone here.

llama.cpp's converters rename every tensor (the `gguf` library knows the names) and change the layout or the values of a
few. A row lists the latter; an architecture without a row is refused, since its numbers would be wrong without a word.
Source: llama.cpp, convert_hf_to_gguf.py. Not here: fused or stacked tensors (Bloom, Falcon,
mixtures of experts), and architectures whose GGUF metadata leave out what the config needs (Gemma).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedConfig


class Undo(Protocol):
    """Turns a tensor of the file into the model's; `config` is the model's."""

    def __call__(self, weight: Tensor, config: PreTrainedConfig) -> Tensor: ...


def unpermute_queries(weight: Tensor, config: PreTrainedConfig) -> Tensor:
    """Rows of q_proj [heads·head_dim, ...] from ggml's rotary order (pairs together) to the model's (halves)."""
    return _unpermute(weight, config.num_attention_heads)


def unpermute_keys(weight: Tensor, config: PreTrainedConfig) -> Tensor:
    """The same for k_proj, which has as many heads as there are keys and values."""
    return _unpermute(weight, config.num_key_value_heads)


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    # in the file a head's rows are (x0, y0, x1, y1, ...); the model wants (x0, x1, ..., y0, y1, ...)
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def transpose(weight: Tensor, config: PreTrainedConfig) -> Tensor:
    """[out, in] of the file to the [in, out] of Conv1D."""
    return weight.t().contiguous()


@dataclass(frozen=True)
class Family:
    """A GGUF architecture.

    Attributes:
        architecture: its name in `general.architecture`.
        undo: (pattern of GGUF tensor names, what undoes the change).
        settings: (metadata key without the architecture, field of the config) that transformers does not take over
            itself.
    """

    architecture: str
    undo: tuple[tuple[str, Undo], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()

    def transform(self, name: str, config: PreTrainedConfig) -> Callable[[Tensor], Tensor] | None:
        """What to do with the tensor of this GGUF name; None when it is stored as the model has it."""
        for pattern, function in self.undo:
            if re.search(pattern, name):
                return partial(function, config=config)
        return None


FAMILIES = {
    family.architecture: family
    for family in (
        # Llama 1 and 2, Mistral, SmolLM, TinyLlama, Yi...: whatever has the shape of a Llama
        Family("llama", ((r"\.attn_q\.", unpermute_queries), (r"\.attn_k\.", unpermute_keys))),
        Family("qwen2"),
        Family("qwen3", settings=(("attention.key_length", "head_dim"),)),
        Family("phi3", settings=(("attention.sliding_window", "sliding_window"),)),
        Family(
            "gpt2",
            undo=((r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$", transpose),),
            settings=(("context_length", "n_positions"),),
        ),
    )
}
