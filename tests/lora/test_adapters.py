"""Adapters on a model: attach, choose, switch off, delete, merge, detach; what is trained and counted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, RobertaConfig, RobertaForSequenceClassification

from lilliput import lora
from lilliput.errors import FormatError, UsageError
from lilliput.layers import QuantizedLinear, replace_linears, unrounded
from lilliput.lora import LoraConfig
from lilliput.lora.adapters import adapter_tensors, base_only
from lilliput.lora.layer import LoraLinear

MakeLlama = Callable[..., LlamaForCausalLM]
IDS = torch.tensor([[5, 17, 99, 3, 250, 8]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def add(model: PreTrainedModel, name: str = "default", seed: int = 1, **fields: Any) -> None:
    """Attach an adapter whose tensors are all moved away from their start."""
    torch.manual_seed(seed)
    lora.add_adapter(model, LoraConfig(**{"target_modules": "all-linear", "r": 4, **fields}), name)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)


def with_biases(tiny_llama: MakeLlama) -> LlamaForCausalLM:
    return tiny_llama(attention_bias=True, mlp_bias=True)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_only_the_adapter_is_trained_and_the_base_stays(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    lora.add_adapter(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))
    base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert trained(model) == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_which_biases_are_trained(tiny_llama: MakeLlama, bias: str) -> None:
    model = with_biases(tiny_llama)
    lora.add_adapter(model, LoraConfig(target_modules=["q_proj"], bias=bias))
    biases = {name for name in trained(model) if name.endswith("bias")}
    of_targets = {f"model.layers.{i}.self_attn.q_proj.base_layer.bias" for i in (0, 1)}
    everything = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert biases == {"none": set(), "all": everything, "lora_only": of_targets}[bias]


def test_modules_to_save_are_copies_and_train(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    base = logits(model)
    add(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "lm_head.modules_to_save.default.weight" in trained(model)
    assert not torch.equal(logits(model), base)
    with lora.disabled(model):
        assert torch.equal(logits(model), base)
    assert model.get_output_embeddings().weight is model.lm_head.modules_to_save["default"].weight


def test_an_adapter_for_inference_is_frozen(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    add(model, inference_mode=True, modules_to_save=["lm_head"])
    assert trained(model) == set()


def test_several_adapters_add_up_and_are_chosen(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    base = logits(model)
    alone = {}
    for seed, name in enumerate(("one", "two")):
        add(model, name, seed, target_modules=["lm_head"])
        alone[name] = logits(model)
    assert lora.active_adapters(model) == ("two",)
    lora.set_adapter(model, ["one", "two"])
    # The last layer is linear, so that there the effects of two adapters add up exactly.
    torch.testing.assert_close(logits(model) - base, (alone["one"] - base) + (alone["two"] - base))
    assert {name.rsplit(".", 2)[1] for name in trained(model)} == {"one", "two"}
    lora.set_adapter(model, "one")
    assert torch.equal(logits(model), alone["one"])
    assert {name.rsplit(".", 2)[1] for name in trained(model)} == {"one"}
    lora.set_adapter(model, [])
    assert torch.equal(logits(model), base)
    assert trained(model) == set()


def test_adapters_may_sit_on_different_modules(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    add(model, "one", target_modules=["q_proj"], r=2)
    add(model, "two", target_modules=["q_proj", "down_proj"], r=3)
    layers = lora.target_layers(model)
    assert list(layers["model.layers.0.self_attn.q_proj"].scaling) == ["one", "two"]
    assert list(layers["model.layers.0.mlp.down_proj"].scaling) == ["two"]
    lora.delete_adapter(model, "two")
    assert set(lora.target_layers(model)) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_disabling_runs_the_base_bit_for_bit(tiny_llama: MakeLlama, bias: str) -> None:
    model = with_biases(tiny_llama)
    base = logits(model)
    add(model, bias=bias, modules_to_save=["lm_head"])
    tuned = logits(model)
    with lora.disabled(model):
        assert torch.equal(logits(model), base)
        with lora.disabled(model):
            pass
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned)
    lora.disable_adapters(model)
    assert torch.equal(logits(model), base)
    lora.enable_adapters(model)
    assert torch.equal(logits(model), tuned)


def test_choosing_while_disabled_keeps_the_biases_trainable(tiny_llama: MakeLlama) -> None:
    model = with_biases(tiny_llama)
    add(model, bias="all")
    before = trained(model)
    with lora.disabled(model):
        lora.set_adapter(model, "default")
    assert trained(model) == before


@pytest.mark.parametrize("bias", ["none", "all"])
def test_deleting_the_last_adapter_leaves_the_plain_model(tiny_llama: MakeLlama, bias: str) -> None:
    model = with_biases(tiny_llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add(model, bias=bias, modules_to_save=["lm_head"])
    lora.delete_adapter(model, "default")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_one_adapter_only_may_train_biases(tiny_llama: MakeLlama) -> None:
    model = with_biases(tiny_llama)
    add(model, "one", bias="all")
    with pytest.raises(UsageError, match="'one' already trains the base's biases"):
        add(model, "two", bias="all")
    tuned = logits(model)
    add(model, "two")
    lora.set_adapter(model, "one")
    assert torch.equal(logits(model), tuned)
    lora.delete_adapter(model, "one")
    add(model, "three", bias="all")


def test_two_copies_of_a_module_cannot_both_be_active(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    add(model, "one", modules_to_save=["lm_head"])
    tuned = logits(model)
    add(model, "two", seed=2, modules_to_save=["lm_head"])
    with pytest.raises(UsageError, match="one and two both bring their own 'lm_head'"):
        lora.set_adapter(model, ["one", "two"])
    lora.set_adapter(model, "one")
    assert torch.equal(logits(model), tuned)


def test_a_model_with_adapters_can_be_copied(tiny_llama: MakeLlama) -> None:
    model = with_biases(tiny_llama)
    add(model, bias="all", modules_to_save=["lm_head"])
    tuned = logits(model)
    twin = copy.deepcopy(model)
    with lora.disabled(twin):
        assert not torch.equal(logits(twin), tuned)
        assert torch.equal(logits(model), tuned)
    assert torch.equal(logits(twin), tuned)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "forward"])
def test_names_that_cannot_be_used(tiny_llama: MakeLlama, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of an adapter"):
        add(tiny_llama(), name)


def test_wrong_names(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    add(model, "tuned")
    with pytest.raises(UsageError, match="already an adapter named 'tuned'"):
        add(model, "tuned")
    for action in (lora.set_adapter, lora.delete_adapter, lora.merge):
        with pytest.raises(UsageError, match=r"no adapter named 'tunde'; did you mean 'tuned'.*Attached: tuned"):
            action(model, "tunde")
    assert lora.active_adapters(model) == ("tuned",)


def test_a_refused_adapter_leaves_the_model_as_it_was(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    keys = list(model.state_dict())
    with pytest.raises(UsageError):
        add(model, target_modules=["q_proj"], modules_to_save=["nothing"])
    assert list(model.state_dict()) == keys
    assert lora.adapters(model) == {}


def test_merge_and_unmerge(tiny_llama: MakeLlama) -> None:
    model = with_biases(tiny_llama)
    add(model, "one", bias="all", modules_to_save=["lm_head"])
    add(model, "two", seed=2, target_modules=["q_proj", "embed_tokens"])
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.set_adapter(model, ["one", "two"])
    tuned = logits(model)
    lora.merge(model)
    torch.testing.assert_close(logits(model), tuned)
    assert not torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, weights["model.layers.0.self_attn.q_proj.base_layer.weight"]
    )
    lora.unmerge(model)
    assert torch.equal(logits(model), tuned)
    lora.set_adapter(model, "two")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_merging_some_makes_them_the_active_ones(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    add(model, "one")
    alone = logits(model)
    add(model, "two", seed=2)
    lora.set_adapter(model, ["one", "two"])
    lora.merge(model, "one")
    torch.testing.assert_close(logits(model), alone)
    assert lora.active_adapters(model) == ("one",)


def test_while_merged_nothing_else_changes(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    add(model, "one")
    lora.merge(model)
    actions: list[Callable[[], object]] = [
        lambda: add(model, "two"),
        lambda: lora.set_adapter(model, []),
        lambda: lora.delete_adapter(model, "one"),
        lambda: lora.disable_adapters(model),
        lambda: lora.merge(model),
    ]
    for action in actions:
        with pytest.raises(UsageError, match=r"merged into the base.*unmerge"):
            action()
    lora.unmerge(model)
    with pytest.raises(UsageError, match="no adapter is merged"):
        lora.unmerge(model)
    lora.set_adapter(model, [])
    with pytest.raises(UsageError, match="nothing to merge"):
        lora.merge(model)


def test_a_broken_adapter_is_not_merged_and_nothing_changes(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    add(model, "fine")
    add(model, "broken", seed=2)
    lora.set_adapter(model, "fine")
    before = logits(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B["broken"].weight[3, 1] = float("nan")
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.down_proj: merging broken gives NaN"):
        lora.merge(model, ["broken"])
    assert lora.active_adapters(model) == ("fine",)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_a_merge_that_is_stopped_half_way_is_undone(
    tiny_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    model = tiny_llama()
    add(model)
    tuned, update_of, calls = logits(model), LoraLinear.update_of, iter(range(99))

    def stopped(self: LoraLinear, name: str) -> Tensor:
        if next(calls) == 3:
            raise stop
        return update_of(self, name)

    monkeypatch.setattr(LoraLinear, "update_of", stopped)
    with pytest.raises(stop):
        lora.merge(model)
    assert torch.equal(logits(model), tuned)
    lora.merge(model)
    lora.unmerge(model)
    assert torch.equal(logits(model), tuned)


def test_a_tied_embedding_warns_and_is_not_merged(tiny_llama: MakeLlama, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    add(model, target_modules=["q_proj", "embed_tokens"])
    assert "'model.embed_tokens' shares its weight with 'lm_head'" in " ".join(capsys.readouterr().err.split())
    before = logits(model)
    with pytest.raises(UsageError, match=r"'model\.embed_tokens' shares its weight with 'lm_head'"):
        lora.merge(model)
    assert torch.equal(logits(model), before)


def test_a_tied_head_is_not_merged_when_the_embedding_has_a_trained_copy(tiny_llama: MakeLlama) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    add(model, "embedding", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    add(model, "head", target_modules=["lm_head"])
    with pytest.raises(UsageError, match=r"'lm_head' shares its weight with 'model\.embed_tokens'"):
        lora.merge(model)


def test_detach_leaves_a_plain_model(tiny_llama: MakeLlama) -> None:
    plain = with_biases(tiny_llama)
    keys, base = list(plain.state_dict()), logits(plain)
    model = copy.deepcopy(plain)
    add(model, bias="all", modules_to_save=["lm_head"])
    tuned = logits(model)
    lora.merge(model)
    lora.detach(model)
    assert list(model.state_dict()) == keys
    assert lora.adapters(model) == {}
    torch.testing.assert_close(logits(model), tuned)
    add(plain, bias="all", modules_to_save=["lm_head"])
    assert list(lora.detach(plain).state_dict()) == keys
    assert torch.equal(logits(plain), base)


@pytest.mark.parametrize("merged", [False, True])
def test_base_only_is_the_base_and_puts_everything_back(tiny_llama: MakeLlama, merged: bool) -> None:
    model = with_biases(tiny_llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add(model, bias="all", modules_to_save=["lm_head"])
    if merged:
        lora.merge(model)
    tuned, keys = logits(model), list(model.state_dict())
    with base_only(model):
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), tuned)


def test_a_quantized_base_is_merged_into_a_dense_copy_and_comes_back(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    replace_linears(model, "nf4")
    add(model)
    tuned = logits(model)
    layer = model.model.layers[0].self_attn.q_proj
    quantized, codes = layer.base_layer, layer.base_layer.weight.clone()
    lora.merge(model)
    assert type(layer.base_layer) is nn.Linear
    assert layer.base_layer.weight.dtype == torch.float32
    exact = quantized.dequantize(torch.float32) + layer.update_of("default")
    assert torch.equal(layer.base_layer.weight, exact)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-5)
    with base_only(model):
        assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    lora.unmerge(model)
    assert layer.base_layer is quantized
    assert torch.equal(quantized.weight, codes)
    assert torch.equal(logits(model), tuned)


def test_gradients_over_a_quantized_base_are_those_over_its_dequantized_weights(tiny_llama: MakeLlama) -> None:
    quantized, dense = tiny_llama(), tiny_llama()
    replace_linears(quantized, "nf4")
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            dense.get_submodule(name).weight.data = module.dequantize()
    gradients = []
    for model in (quantized, dense):
        add(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: t.grad for n, t in adapter_tensors(model, "default").items()})
    assert len(gradients[0]) == 28
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
        assert gradient is not None
        assert gradient.abs().max() > 0, name


def test_an_int8_base_is_merged_with_its_update_and_comes_back(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    replace_linears(model, "int8")
    add(model)
    tuned = logits(model)
    with unrounded(model):
        exact = logits(model)
    lora.merge(model)
    torch.testing.assert_close(logits(model), exact, rtol=1e-4, atol=1e-5)  # a dense layer rounds no input
    lora.unmerge(model)
    assert torch.equal(logits(model), tuned)


def test_an_adapter_on_an_int8_table_is_merged_into_a_dense_one(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    replace_linears(model, "int8", embeddings=True)
    add(model, target_modules=["embed_tokens"])
    tuned, table = logits(model), model.model.embed_tokens.base_layer
    lora.merge(model)
    assert type(model.model.embed_tokens.base_layer) is nn.Embedding
    torch.testing.assert_close(logits(model), tuned, rtol=1e-2, atol=1e-3)
    lora.unmerge(model)
    assert model.model.embed_tokens.base_layer is table
    assert torch.equal(logits(model), tuned)


def test_packed_weights_count_as_the_weights_they_stand_for(tiny_llama: MakeLlama) -> None:
    for tied, options in ((False, {"format": "nf4"}), (True, {"format": "int8", "embeddings": True})):
        dense, quantized = (tiny_llama(attention_bias=True, tie_word_embeddings=tied) for _ in range(2))
        replace_linears(quantized, **options)
        for model in (dense, quantized):
            lora.add_adapter(model, LoraConfig(target_modules="all-linear"))
        assert lora.trainable_parameters(dense) == lora.trainable_parameters(quantized)


def test_modules_to_save_over_quantized_layers_are_refused(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    replace_linears(model, "nf4", skip=[])
    with pytest.raises(UsageError, match="its weights are quantized"):
        add(model, target_modules=["q_proj"], modules_to_save=["lm_head"])


def test_parameters_of_roberta_base_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    # 12 layers x 3 projections x 2 x 768 x 8 + the head (768 x 768 + 768 + 768 x 2 + 2) = 1,034,498; PEFT's 0.827 %
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
    targets = ["query", "key", "value"]
    lora.add_adapter(model, LoraConfig(r=8, target_modules=targets, modules_to_save=["classifier"]))
    assert lora.trainable_parameters(model) == (1_034_498, 125_089_538)
    lora.print_trainable_parameters(model)
    assert "1,034,498 of 125,089,538 (0.827006 %)" in capsys.readouterr().err


def test_a_shared_weight_is_counted_once(tiny_llama: MakeLlama) -> None:
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama()
    embedding = tied.model.embed_tokens.weight.numel()
    assert lora.trainable_parameters(untied)[1] - lora.trainable_parameters(tied)[1] == embedding
    add(tied, target_modules=["q_proj"], modules_to_save=["lm_head"])  # now it has a head of its own besides
    add(untied, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert lora.trainable_parameters(untied) == lora.trainable_parameters(tied)
