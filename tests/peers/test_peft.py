"""Adapters against PEFT itself: same modules, parameters, logits, gradients; files both ways; quantized bases."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lilliput import lora
from lilliput.errors import CheckpointError
from lilliput.layers import QuantizedLinear, replace_linears, unrounded
from lilliput.lora import LoraConfig
from lilliput.lora.adapters import adapter_tensors
from tests.conftest import make_tiny_llama

peft = pytest.importorskip("peft", reason="comparisons with PEFT need peft (extra `test`)")

IDS = torch.tensor([[5, 17, 99, 3, 250, 8], [1, 2, 3, 4, 5, 6]])
SMALL = {
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
}


def llama() -> PreTrainedModel:
    return make_tiny_llama()


def tied_llama() -> PreTrainedModel:
    return make_tiny_llama(tie_word_embeddings=True)


def llama_with_biases() -> PreTrainedModel:
    model = make_tiny_llama(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).eval()


def roberta() -> PreTrainedModel:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, num_labels=2)).eval()


ALL_LINEAR = {"target_modules": "all-linear"}
CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama-default-targets": (llama, {"r": 4, "lora_alpha": 16}),
    "llama-all-linear": (llama, {**ALL_LINEAR, "r": 4, "task_type": "CAUSAL_LM"}),
    "llama-regex": (llama, {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"}),
    "llama-rslora": (llama, {**ALL_LINEAR, "r": 4, "lora_alpha": 8, "use_rslora": True}),
    "llama-patterns": (
        llama,
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r".*\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {"down_proj": 32},
        },
    ),
    "llama-layers": (llama, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "llama-layers-pattern": (
        llama,
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "llama-exclude": (llama, {**ALL_LINEAR, "exclude_modules": ["down_proj", "model.layers.0.mlp.up_proj"]}),
    "llama-embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "llama-tied-embedding": (tied_llama, {"target_modules": ["embed_tokens"], "r": 4}),
    "llama-embedding-saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "llama-bias-all": (llama_with_biases, {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "llama-bias-lora-only": (llama_with_biases, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "llama-gaussian": (llama, {**ALL_LINEAR, "init_lora_weights": "gaussian"}),
    "gpt2-default-targets": (gpt2, {"r": 4, "fan_in_fan_out": True}),
    "gpt2-all-linear": (gpt2, {**ALL_LINEAR, "r": 4, "fan_in_fan_out": True}),
    "gpt2-embeddings": (gpt2, {"target_modules": ["wte", "wpe", "c_proj"], "fan_in_fan_out": True}),
    "bert-classification": (bert, {"task_type": "SEQ_CLS"}),
    "bert-bias-all": (bert, {"task_type": "SEQ_CLS", "bias": "all"}),
    "roberta-classifier": (roberta, {"target_modules": ["query", "key", "value"], "modules_to_save": ["classifier"]}),
    "roberta-all-linear": (roberta, {**ALL_LINEAR, "task_type": "SEQ_CLS"}),
}
parametrize = pytest.mark.parametrize(("make", "fields"), CASES.values(), ids=CASES.keys())


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def shake(parameters: list[Tensor]) -> None:
    """Move every trained tensor away from where it starts, so that a forgotten one shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def peft_model(make: Callable[[], PreTrainedModel], fields: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied embeddings, as we do
        model = peft.get_peft_model(make(), peft.LoraConfig(**fields))
    shake([p for p in model.parameters() if p.requires_grad])
    return model


@parametrize
def test_adapter_from_peft_gives_the_same_logits_here(
    make: Callable[[], PreTrainedModel], fields: dict[str, Any], tmp_path: Path
) -> None:
    theirs = peft_model(make, fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    ours = make()
    assert lora.load_adapter(ours, tmp_path, trainable=True) is None
    assert torch.equal(logits(ours), logits(theirs))
    assert lora.trainable_parameters(ours)[0] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


@parametrize
def test_adapter_from_here_gives_the_same_logits_in_peft(
    make: Callable[[], PreTrainedModel], fields: dict[str, Any], tmp_path: Path
) -> None:
    ours = make()
    base = logits(ours)
    lora.add_adapter(ours, LoraConfig(**fields))
    shake(list(adapter_tensors(ours, "default").values()))
    lora.save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as "found missing adapter keys"
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.allclose(logits(ours), base, atol=1e-4)


@parametrize
def test_the_same_parameters_are_trained(make: Callable[[], PreTrainedModel], fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), peft.LoraConfig(**fields)).base_model.model
    ours = make()
    lora.add_adapter(ours, LoraConfig(**fields))
    trained = [{n: tuple(p.shape) for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trained[0] == trained[1]


@parametrize
def test_gradients_are_those_of_peft(
    make: Callable[[], PreTrainedModel], fields: dict[str, Any], tmp_path: Path
) -> None:
    theirs = peft_model(make, fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    ours = make()
    lora.load_adapter(ours, tmp_path, trainable=True)
    gradients = []
    for model in (ours, theirs.base_model.model):
        model(input_ids=IDS).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_two_adapters_add_up_as_in_peft(tmp_path: Path) -> None:
    ours = llama()
    for seed, (name, fields) in enumerate({"one": {"r": 4}, "two": {"r": 2, **ALL_LINEAR}}.items()):
        torch.manual_seed(seed)
        lora.add_adapter(ours, LoraConfig(**fields), name)
        shake(list(adapter_tensors(ours, name).values()))
        lora.save_adapter(ours, tmp_path / name, name)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", adapter_name="two")
    for chosen in (["one"], ["two"], ["one", "two"], ["two", "one"]):
        lora.set_adapter(ours, chosen)
        theirs.base_model.set_adapter(chosen)
        assert torch.equal(logits(ours), logits(theirs)), chosen


@pytest.mark.parametrize("make", [llama, gpt2])
def test_merged_weights_equal_pefts(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    ours = make()
    lora.add_adapter(ours, LoraConfig(**ALL_LINEAR, r=4))
    shake(list(adapter_tensors(ours, "default").values()))
    lora.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).merge_and_unload()
    lora.merge(ours)
    ours = lora.detach(ours)
    for (name, tensor), (their_name, their_tensor) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == their_name
        torch.testing.assert_close(tensor, their_tensor)


def test_start_of_training_has_pefts_distributions() -> None:
    # Kaiming-uniform with a = sqrt(5) is uniform in +-1/sqrt(in); "gaussian" has deviation 1/r.
    for init in (True, "gaussian"):
        ours, theirs = make_tiny_llama(hidden_size=256), make_tiny_llama(hidden_size=256)
        lora.add_adapter(ours, LoraConfig(r=64, init_lora_weights=init))
        peft.get_peft_model(theirs, peft.LoraConfig(r=64, init_lora_weights=init))
        a, b = (m.model.layers[0].self_attn.q_proj.lora_A["default"].weight for m in (ours, theirs))
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.05)
        assert a.abs().max().item() == pytest.approx(b.abs().max().item(), rel=0.35)


def test_an_adapter_with_a_field_we_do_not_compute_is_refused_by_name(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"use_dora=True.*not supported"):
        lora.load_adapter(llama(), tmp_path)


def test_every_field_of_the_installed_peft_is_known_or_off() -> None:
    fields = json.loads(json.dumps(peft.LoraConfig(r=4, target_modules=["q_proj"]).to_dict(), default=list))
    assert LoraConfig.from_peft(fields, "memory").r == 4


def test_an_embedding_of_another_base_inside_pefts_file_is_refused(tmp_path: Path) -> None:
    theirs = peft_model(llama, {"target_modules": ["embed_tokens"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    with pytest.raises(CheckpointError, match=r"brings its own 'model\.embed_tokens\.base_layer"):
        lora.load_adapter(other, tmp_path)
    assert lora.adapters(other) == {}


def quantized_llama(format: str) -> PreTrainedModel:
    model = llama()
    replace_linears(model, format)
    return model


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_peft_trains_saves_and_loads_over_our_quantized_layers(
    targets: list[str] | str, format: str, tmp_path: Path
) -> None:
    base = quantized_llama(format)
    codes = {n: p.clone() for n, p in base.named_parameters() if not p.is_floating_point()}
    assert codes
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = theirs(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in theirs.base_model.model.named_parameters():
        if not parameter.is_floating_point():
            assert torch.equal(parameter, codes[name.replace(".base_layer", "")]), name
    theirs.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized_llama(format), tmp_path)
    assert torch.equal(logits(again), logits(theirs))
    ours = quantized_llama(format)
    lora.load_adapter(ours, tmp_path)
    # ours is one operation, which adds the update inside the product's sums: another order of the same roundings (and
    # what int8 rounds inputs to may turn on their last bit)
    with unrounded(ours), unrounded(theirs):
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    assert isinstance(ours.model.layers[0].self_attn.q_proj.base_layer, QuantizedLinear)
    lora.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(quantized_llama(format), tmp_path / "ours")
    assert torch.equal(logits(back), logits(theirs))
