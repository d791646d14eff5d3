"""Models with outlier features that were planted, and one that has learned its text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.conftest import make_tiny_llama, make_tiny_tokenizer

PLANTED = [5, 17]  # features of the hidden states behind the norms
TEXT = "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris, maybe! " * 40


def plant(model: LlamaForCausalLM, factor: float = 20.0) -> LlamaForCausalLM:
    """Make two features `factor` times as large behind every norm, and their weights as much smaller: the function of
    the model stays, but for the rounding."""
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            readers = {
                block.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
                block.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
            }
            for norm, linears in readers.items():
                norm.weight[PLANTED] *= factor
                for linear in linears:
                    linear.weight[:, PLANTED] /= factor
    return model


@pytest.fixture
def planted() -> Callable[[], LlamaForCausalLM]:
    """A random Llama of width 256 with planted features, a new one at each call."""
    return lambda: plant(make_tiny_llama(hidden_size=256))


@pytest.fixture(scope="session")
def learned() -> LlamaForCausalLM:
    """A Llama that has learned TEXT by heart, with planted features and one large row in a weight of each block.

    Each way of rounding is clearly better than the one before. Leave it as it is.
    """
    model, ids = make_tiny_llama().train(), torch.tensor(make_tiny_tokenizer()(TEXT)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)[:8]
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[3] *= 50
            block.mlp.down_proj.weight[:, 3] /= 50
    return plant(model.eval(), 100.0)
