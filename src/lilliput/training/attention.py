"""Attention over packed rows, one sequence at a time.

A row of examples side by side needs a mask that keeps them apart, and attention with a mask computes every pair of
tokens and throws most of them away: seven eighths at 8 sequences of 128 tokens, and nearly half of a training step.
Here queries, keys and values are split where the sequences end, and each part is plain causal attention. The model gets
it as an attention implementation of its own, through transformers' AttentionInterface. Models with windows shorter than
a sequence, and others for which it does not work, keep the mask, which has the window in it. A model that takes no mask
of ours at all (BLOOM makes its positions out of the mask) can have no packed rows.
Not here: chunks that are shorter than a sequence (the check of the packed loss finds such a model).
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

from lilliput.errors import FormatError
from lilliput.layers import unrounded

NAME = "lilliput_blocks"
_PACKED_AGREES = {torch.float64: 1e-4, torch.float32: 1e-4}  # relative; between a row of two sequences and each alone
# What the forward of a family says to a mask that it cannot take.
_UNFIT = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, FormatError)
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


def additive(allowed: Tensor, model: PreTrainedModel) -> Tensor | dict[str, Tensor]:
    """A bool attention mask [rows, 1, tokens, tokens] as the numbers that are added to attention scores.

    Every implementation in transformers adds a mask of floats; some would add a bool mask as 0 and 1. A mask that is
    given is taken as it is, so that a window has to be in it. A model with windows in some layers only gets a mask for
    each kind of layer.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    whole = _numbers(allowed, model.dtype)
    if window is None:
        return whole
    near = torch.ones(allowed.shape[-2:], dtype=torch.bool, device=allowed.device).triu(1 - window)
    within = _numbers(allowed & near, model.dtype)
    mixed = getattr(config, "layer_types", None) is not None
    return {"full_attention": whole, "sliding_attention": within} if mixed else within


def _numbers(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    numbers = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return numbers.masked_fill_(~allowed, torch.finfo(dtype).min)


@torch.no_grad()
def takes_packed_rows(model: PreTrainedModel, allowed: Tensor, position_ids: Tensor) -> bool:
    """Whether two sequences in a row give what each gives alone; tried on a few tokens.

    Args:
        allowed: the bool mask of a small packed row [1, 1, tokens, tokens]; position_ids: [1, tokens].
    """
    inputs = _sample(model, allowed, position_ids)
    with _evaluating(model):
        try:
            packed = model.base_model(**inputs).last_hidden_state
        except _UNFIT:
            return False
        parts = inputs["input_ids"].split(blocks_of(position_ids)[0], dim=1)
        alone = torch.cat([model.base_model(input_ids=p, use_cache=False).last_hidden_state for p in parts], dim=1)
    agrees = _PACKED_AGREES.get(model.dtype, 5e-2)
    return bool((packed - alone).abs().max() <= agrees * alone.abs().max())


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
def works_in_blocks(model: PreTrainedModel, allowed: Tensor, position_ids: Tensor) -> bool:
    """Whether this model gives the same hidden states in blocks as with the mask; tried on a few tokens.

    Args:
        allowed: the bool mask of a small packed row [1, 1, tokens, tokens]; position_ids: [1, tokens].
    """
    if model.config._attn_implementation != "sdpa":
        return False
    inputs = _sample(model, allowed, position_ids)
    with _evaluating(model):
        masked = model.base_model(**inputs).last_hidden_state
        try:
            with block_by_block(model):
                if model.config._attn_implementation != NAME:  # an older architecture, which cannot be given one
                    return False
                inputs["attention_mask"] = unread_mask(model.device)
                blocked = model.base_model(**inputs, blocks=blocks_of(position_ids)).last_hidden_state
        except TypeError:  # its forward passes no further arguments on
            return False
    return bool((masked - blocked).abs().max() <= 1e-4 * masked.abs().max())


def _sample(model: PreTrainedModel, allowed: Tensor, position_ids: Tensor) -> dict[str, Any]:
    return {
        "input_ids": torch.arange(position_ids.shape[1], device=model.device).unsqueeze(0),
        "attention_mask": additive(allowed.to(model.device), model),
        "position_ids": position_ids.to(model.device),
        "use_cache": False,
    }


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with unrounded(model):
            yield
    finally:
        model.train(training)
