"""Attention block by block gives what the mask gives: hidden states, losses and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, PreTrainedModel

from lilliput.data import Example, Pack, pack
from lilliput.training.attention import NAME, blocks_of, longest_block
from lilliput.training.trainer import LabelLoss, batch_of


def rows() -> list[Pack]:
    """Two packed rows of different lengths."""
    made = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 512, (n,), generator=made).tolist() for n in (9, 5, 12, 7, 1, 4)]
    return pack([Example(row, [t >= len(row) // 3 for t in range(len(row))]) for row in ids], 21)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=128)).eval()


def mistral(window: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=512,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            sliding_window=window,
        )
    ).eval()


@pytest.mark.parametrize(
    ("positions", "blocks"),
    [
        ([[0, 1, 2, 0, 1, 2, 3, 0, 0]], [[3, 4, 2]]),
        ([[0, 1, 2], [0, 1, 0]], [[3], [2, 1]]),
        ([[0, 0, 0, 1]], [[1, 1, 2]]),
        ([[0, 0, 0]], [[3]]),
        ([[0]], [[1]]),
    ],
)
def test_blocks_are_found_where_positions_begin_anew(positions: list[list[int]], blocks: list[list[int]]) -> None:
    assert blocks_of(torch.tensor(positions)) == blocks


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_loss_and_gradients_equal_those_with_the_mask(family: str, tiny_llama: Callable[..., PreTrainedModel]) -> None:
    model = {"llama": tiny_llama, "gpt2": gpt2, "mistral": lambda: mistral(100)}[family]()
    batch, loss = batch_of(rows(), 0), LabelLoss(model)
    assert loss.in_blocks
    blocked = loss(**batch)["loss"]
    parameters = list(model.base_model.parameters())
    blocked_grads = torch.autograd.grad(blocked, parameters)
    loss.in_blocks = False
    masked = loss(**batch)["loss"]
    torch.testing.assert_close(blocked, masked, rtol=1e-6, atol=1e-6)
    for got, expected in zip(blocked_grads, torch.autograd.grad(masked, parameters), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"


def test_it_runs_where_it_should(tiny_llama: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        seen.append(query.shape[2])
        return original(query, *arguments, **options)

    loss = LabelLoss(tiny_llama())
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    batch = batch_of(rows(), 0)
    loss(**batch)
    assert sorted(seen) == sorted(2 * [length for row in blocks_of(batch["position_ids"]) for length in row])


def test_a_window_shorter_than_a_sequence_keeps_the_mask() -> None:
    loss = LabelLoss(mistral(4))
    batch = batch_of(rows(), 0)
    assert longest_block(loss.model) == 4
    assert loss._blocks(batch["position_ids"]) is None
    assert loss._blocks(torch.tensor([[0, 1, 2, 3, 0, 1]])) == [[4, 2]]


def test_other_implementations_keep_the_mask(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    model = tiny_llama(attn_implementation="eager")
    assert not LabelLoss(model).in_blocks
    assert model.config._attn_implementation == "eager"


def test_gradient_checkpointing_of_packed_rows(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    model = tiny_llama()
    loss, batch, parameters = LabelLoss(model), batch_of(rows(), 0), list(model.model.parameters())
    expected = torch.autograd.grad(loss(**batch)["loss"], parameters)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    got = torch.autograd.grad(loss(**batch)["loss"], parameters)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_implementation_without_blocks_is_transformers_own(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    model, ids = tiny_llama(), torch.arange(20).unsqueeze(0)
    expected = model(input_ids=ids).logits
    LabelLoss(model)
    model.set_attn_implementation(NAME)
    assert torch.equal(model(input_ids=ids).logits, expected)
