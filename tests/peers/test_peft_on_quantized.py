"""PEFT itself on our quantized models: it attaches, trains, saves and loads; a merge into the codes is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lilliput import NF4Config
from lilliput.layers import QuantizedLinear, identity_of
from lilliput.models import load_model

peft = pytest.importorskip("peft", reason="comparisons with PEFT need peft (extra `test`)")

IDS = torch.arange(3, 99).reshape(2, 48)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(params=["load_model", "from_pretrained", "int8"])
def base(request, tiny_model_dir) -> PreTrainedModel:
    if request.param == "from_pretrained":
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=NF4Config())
    return load_model(tiny_model_dir, format="int8" if request.param == "int8" else "nf4", progress=False)


def config(**changes) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **changes)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model: torch.nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_peft_trains_on_a_frozen_base_saves_and_loads(base, tmp_path):
    before, frozen, identity = logits(base), copy.deepcopy(base.state_dict()), identity_of(base)
    model = peft.get_peft_model(base, config())
    wrapped = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(wrapped.base_layer, QuantizedLinear)
    assert wrapped.lora_A["default"].weight.dtype == torch.float32
    assert torch.equal(logits(model), before)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert identity_of(model) == identity
    for name, tensor in frozen.items():
        assert torch.equal(tensor, _base_tensor(model, name)), name
    trained = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model.unload()), tmp_path)
    assert torch.equal(logits(again), trained)
    with again.disable_adapter():
        assert torch.equal(logits(again), before)


def _base_tensor(model: torch.nn.Module, name: str) -> torch.Tensor:
    tensors = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): t for key, t in model.state_dict().items()
    }
    return tensors[name]


def test_prepare_for_kbit_training_and_gradient_checkpointing_work(base):
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), config())
    losses = train(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_by_peft_is_refused_and_changes_nothing(base, safe):
    model = peft.get_peft_model(base, config())
    train(model)
    before = logits(model)
    with pytest.raises((RuntimeError, ValueError)):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(model), before)


def test_several_adapters_and_all_linear(base):
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    first = logits(model)
    model.add_adapter("other", config(init_lora_weights=False))
    model.set_adapter("other")
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert type(model.base_model.model.lm_head) is torch.nn.Linear
