"""Recomputing all but products changes no bit of loss or gradients and runs no product twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from lilliput.layers import replace_linears
from lilliput.lora import LoraConfig, add_adapter
from lilliput.training.recompute import keep_products_only

IDS = torch.arange(3, 99).reshape(2, 48)


class Calls(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def make(tiny_llama: Callable[..., LlamaForCausalLM], quantized: bool, dropout: float = 0.0) -> LlamaForCausalLM:
    model = tiny_llama(hidden_size=64, intermediate_size=256)
    if quantized:
        replace_linears(model, "nf4")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
    add_adapter(model, config)
    return model.train()


def step(model: LlamaForCausalLM) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    torch.manual_seed(1)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("quantized", [True, False])
def test_loss_and_gradients_are_equal_bit_for_bit(
    tiny_llama: Callable[..., LlamaForCausalLM], quantized: bool, dropout: float
) -> None:
    expected_loss, expected = step(make(tiny_llama, quantized, dropout))
    model = make(tiny_llama, quantized, dropout)
    keep_products_only(model)
    loss, gradients = step(model)
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 28
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name


def test_no_product_runs_twice_and_cheap_operations_do(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    counts = []
    for recompute in (False, True):
        model = make(tiny_llama, quantized=True)
        if recompute:
            keep_products_only(model)
        with Calls() as calls:
            step(model)
        counts.append(calls.names)
    for product in ("lilliput.lora_linear_4bit.default", "aten._scaled_dot_product_flash_attention_for_cpu.default"):
        assert counts[0][product] == counts[1][product] > 0
    assert counts[1]["aten.silu.default"] > counts[0]["aten.silu.default"] > 0
