"""The merged model as tensors made one at a time: what `merge` and `detach` make in memory, without making it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lilliput import lora
from lilliput.errors import FormatError
from lilliput.layers import replace_linears
from lilliput.lora import LoraConfig, merged_tensors
from lilliput.lora.adapters import adapter_tensors
from tests.models.conftest import make_model

IDS = torch.tensor([[5, 17, 99, 3, 250, 8]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(kind: str, format: str, **fields: Any) -> PreTrainedModel:
    model = make_model(kind)
    if format != "none":
        replace_linears(model, format)
    torch.manual_seed(1)
    lora.add_adapter(model, LoraConfig(**{"target_modules": "all-linear", "r": 4, **fields}))
    with torch.no_grad():
        for tensor in adapter_tensors(model, "default").values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model


def fresh(kind: str, tensors: dict[str, lora.MergedTensor], tied: bool) -> PreTrainedModel:
    """A plain model with these tensors in it, and no others."""
    model = make_model(kind, seed=9)
    if not tied and model.all_tied_weights_keys:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    loaded = {name: tensor.load() for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert unexpected == []
    assert set(missing) <= (set(model.all_tied_weights_keys) if tied else set())
    return model


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "qwen2"])
@pytest.mark.parametrize("format", ["nf4", "int8", "none"])
def test_it_is_what_merge_makes_bit_for_bit(kind: str, format: str) -> None:
    model = adapted(kind, format)
    tensors = merged_tensors(model)
    made = fresh(kind, tensors, tied=True)
    lora.merge(model)
    wanted = lora.detach(model).state_dict()
    assert made.state_dict().keys() == wanted.keys()
    assert all(torch.equal(made.state_dict()[name], wanted[name]) for name in wanted)
    assert torch.equal(logits(made), logits(model))


def test_the_model_stays_as_it_is() -> None:
    model = adapted("llama", "nf4")
    tuned = logits(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in merged_tensors(model).values():
        tensor.load().zero_()  # what is made is nobody else's, or a plain tensor that is never written to
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert all("norm" in name or "embed" in name or "lm_head" in name for name in changed)
    model.load_state_dict(before)
    assert torch.equal(logits(model), tuned)


def test_copies_biases_and_embeddings_are_merged_too() -> None:
    model = adapted("gpt2", "nf4", target_modules=["c_attn", "wte"], modules_to_save=["ln_f"], bias="all")
    made = fresh("gpt2", merged_tensors(model), tied=False)
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-4, atol=1e-4)
    with lora.disabled(model):
        assert (logits(made) - logits(model)).abs().max() > 0.01


def test_an_adapter_on_one_of_two_tied_modules_unties_them() -> None:
    for fields in ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        model = adapted("llama-tied", "nf4", **fields)
        tensors = merged_tensors(model)
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= tensors.keys()
        torch.testing.assert_close(
            logits(fresh("llama-tied", tensors, tied=False)), logits(model), rtol=1e-4, atol=1e-4
        )
    assert "lm_head.weight" not in merged_tensors(adapted("llama-tied", "nf4"))


def test_a_table_in_int8_that_is_the_head_too_comes_once() -> None:
    model = make_model("llama-tied")
    replace_linears(model, "int8", embeddings=True)
    tensors = merged_tensors(model)
    assert "lm_head.weight" not in tensors
    torch.testing.assert_close(tensors["model.embed_tokens.weight"].load(), model.lm_head.dequantize())


def test_adapters_that_are_off_are_not_merged() -> None:
    model = adapted("llama", "nf4")
    with lora.disabled(model):
        base = logits(model)
        made = fresh("llama", merged_tensors(model), tied=True)
    torch.testing.assert_close(logits(made), base, rtol=1e-4, atol=1e-5)
    tuned = logits(model)
    lora.merge(model)  # and what is merged already is not merged again
    torch.testing.assert_close(logits(fresh("llama", merged_tensors(model), tied=True)), tuned, rtol=1e-4, atol=1e-4)


def test_numbers_come_in_the_type_that_was_asked_for_or_are_refused() -> None:
    model = adapted("llama", "nf4")
    tensors = merged_tensors(model, torch.bfloat16)
    assert all(tensor.dtype == tensor.load().dtype == torch.bfloat16 for tensor in tensors.values())
    assert all(tuple(tensor.load().shape) == tensor.shape for tensor in tensors.values())
    name = "model.layers.0.self_attn.q_proj.weight"
    with torch.no_grad():
        model.get_submodule(name.removesuffix(".weight")).lora_B["default"].weight[0, 0] = 1e9
    assert merged_tensors(model)[name].load().abs().max() > 1e6
    with pytest.raises(FormatError, match="q_proj.weight.*float16 cannot hold"):
        merged_tensors(model, torch.float16)[name].load()
