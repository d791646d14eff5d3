"""Attention over packed rows, one sequence at a time.

A row of examples side by side needs a mask that keeps them apart, and attention with a mask computes every pair of
tokens and throws most of them away: seven eighths at 8 sequences of 128 tokens, and nearly half of a training step.
Here queries, keys and values are split where the sequences end, and each part is plain causal attention. The model gets
it as an attention implementation of its own, through transformers' AttentionInterface.
Not here: windows and chunks that are shorter than a sequence; such models, and others for which it does not work, keep
the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lilliput_blocks"
_SHORTER_THAN_CAUSAL = ("sliding_window", "attention_chunk_size")  # config: how far a token may look at most


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    blocks: list[list[int]] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa" attention, for each block by itself where `blocks` are given.

    Args:
        query, key, value: [rows, heads, tokens, width].
        attention_mask: what says the same as `blocks`; used without them.
        blocks: for each row the lengths of its sequences; they add up to `tokens`.

    Returns: [rows, tokens, heads, width], and None.
    """
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows = []
    for row, lengths in enumerate(blocks):
        parts = zip(*(whole[row : row + 1].split(lengths, dim=2) for whole in (query, key, value)), strict=True)
        outputs = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in parts]
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows), None


AttentionInterface.register(NAME, block_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def blocks_of(position_ids: Tensor) -> list[list[int]]:
    """The lengths of the sequences in each row of int64 [rows, tokens], where positions begin anew with each.

    [[0, 1, 2, 0, 1, 2, 3, 0, 0]] gives [[3, 4, 2]]: padding at the end, all zeros, is one block.
    """
    blocks = []
    for row in position_ids.tolist():
        starts = [place for place, position in enumerate(row) if position == 0]
        while len(starts) > 1 and row[starts[-2] :] == [0] * (len(row) - starts[-2]):
            starts.pop()
        blocks.append([end - start for start, end in zip(starts, [*starts[1:], len(row)], strict=True)])
    return blocks


def unread_mask(device: torch.device) -> Tensor:
    """What stands for the mask where attention goes by blocks: a model that gets none makes one of tokens x tokens."""
    return torch.zeros(1, 1, 1, 1, device=device)


def longest_block(model: PreTrainedModel) -> int | None:
    """The longest sequence for which plain causal attention is what this model computes; None: any."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in _SHORTER_THAN_CAUSAL]
    return min((limit for limit in limits if limit), default=None)


@contextmanager
def block_by_block(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model's attention takes `blocks=` among its inputs."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def works_in_blocks(model: PreTrainedModel, mask: Tensor, position_ids: Tensor) -> bool:
    """Whether this model gives the same hidden states in blocks as with the mask; tried on a few tokens.

    Args:
        mask: the additive mask of a small packed row [1, 1, tokens, tokens]; position_ids: [1, tokens].
    """
    if model.config._attn_implementation != "sdpa":
        return False
    inputs = {
        "input_ids": torch.arange(position_ids.shape[1], device=model.device).unsqueeze(0),
        "attention_mask": mask.to(model.device),
        "position_ids": position_ids.to(model.device),
        "use_cache": False,
    }
    training = model.training
    model.eval()
    masked = model.base_model(**inputs).last_hidden_state
    try:
        with block_by_block(model):
            if model.config._attn_implementation != NAME:  # an older architecture, which cannot be given one
                return False
            inputs["attention_mask"] = unread_mask(model.device)
            blocked = model.base_model(**inputs, blocks=blocks_of(position_ids)).last_hidden_state
    except TypeError:  # its forward passes no further arguments on
        return False
    finally:
        model.train(training)
    return bool((masked - blocked).abs().max() <= 1e-4 * masked.abs().max())
