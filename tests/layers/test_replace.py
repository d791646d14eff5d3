"""Which layers are replaced, and which are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lilliput.errors import UsageError
from lilliput.layers import QuantizedLinear, default_skip, quantized_layers, replace_linears
from lilliput.layers.replace import linear_names


def small_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()


def test_a_llama_keeps_its_head_and_quantizes_the_rest_in_order(tiny_llama):
    model = tiny_llama()
    names = replace_linears(model)
    assert len(names) == 14
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert "lm_head" not in names
    assert names == [name for name, _ in quantized_layers(model)]
    assert linear_names(model) == ["lm_head"]


def test_the_replaced_model_answers_like_one_with_the_dequantized_weights(tiny_llama):
    model, twin, ids = tiny_llama(), tiny_llama(), torch.arange(20)[None]
    for name in replace_linears(model, "fp4", False):
        twin.get_submodule(name).weight.data = model.get_submodule(name).dequantize()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)


def test_ties_are_kept_and_never_quantized(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    assert "lm_head" not in replace_linears(model, skip=[])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    shared = nn.Linear(64, 64)
    both = nn.ModuleDict({"a": shared, "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    both["c"].weight = shared.weight
    assert replace_linears(both) == ["b"]


def test_gpt2s_conv1d_is_replaced_with_equal_answers():
    model = small_gpt2()
    twin = small_gpt2()
    twin.load_state_dict(model.state_dict())
    names = replace_linears(model)
    assert len(names) == 8
    assert "lm_head" not in names
    for name in names:
        twin.get_submodule(name).weight.data = model.get_submodule(name).dequantize().t().contiguous()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)


def test_all_that_lies_outside_the_backbone_is_a_head():
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    model = RobertaForSequenceClassification(config)
    assert default_skip(model) == ["classifier.dense", "classifier.out_proj"]
    assert all(name.startswith("roberta.encoder") for name in replace_linears(model))


def test_what_a_model_keeps_in_float32_stays():
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2))
    assert not any(name.endswith(".wo") or name == "lm_head" for name in replace_linears(model))


def test_skip_takes_full_names_and_their_last_parts(tiny_llama):
    names = replace_linears(tiny_llama(), skip=["lm_head", "o_proj", "model.layers.1"])
    assert names == [f"model.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")] + [
        f"model.layers.0.mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")
    ]
    assert "lm_head" in replace_linears(tiny_llama(), skip=[])


def test_a_skip_that_matches_nothing_is_refused_with_the_nearest_name(tiny_llama):
    with pytest.raises(UsageError, match=r"no module is called 'lm_haed'; did you mean 'lm_head'\?"):
        replace_linears(tiny_llama(), skip=["lm_haed"])
    with pytest.raises(UsageError, match="unknown number format"):
        replace_linears(tiny_llama(), "nf44")


def test_subclasses_of_linear_and_quantized_layers_are_left_alone():
    model = nn.Sequential(nn.MultiheadAttention(32, 2), nn.Linear(32, 32))
    assert replace_linears(model) == ["1"]
    assert replace_linears(model) == []


def test_layers_on_the_meta_device_become_empty_ones():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8, bias=False))
    assert replace_linears(model) == ["0", "1"]
    assert isinstance(model[0], QuantizedLinear)
    assert model[0].weight.device.type == "meta"
    assert model[0].bias.shape == (16,)
    assert model[1].bias is None


def test_the_footprint_is_true_to_the_byte(tiny_llama):
    model = tiny_llama()
    dense = model.get_memory_footprint()
    names = replace_linears(model)
    weights = sum(4 * model.get_submodule(n).in_features * model.get_submodule(n).out_features for n in names)
    codes = sum(layer.quantized.nbytes for _, layer in quantized_layers(model))
    assert model.get_memory_footprint() == dense - weights + codes


def test_groups_to_the_nearest_and_room_for_what_a_load_brings(tiny_llama):
    model = tiny_llama()
    names = replace_linears(model, "int3-g32", symmetric=True)
    layers = dict(quantized_layers(model))
    assert list(layers) == names
    assert {layer.format_name for layer in layers.values()} == {"int3-g32"}
    assert all(layer.quantized.zero is None for layer in layers.values())
    with torch.device("meta"):
        empty = tiny_llama()
    replace_linears(empty, "int4", ordered=True, scale_dtype="bfloat16")
    for _, layer in quantized_layers(empty):
        assert layer.options == {"symmetric": False, "ordered": True, "scale_dtype": "bfloat16"}
    for given in ({"ordered": True}, {"scale_dtype": "float32"}):
        with pytest.raises(UsageError, match="is for codes that will be loaded"):
            replace_linears(tiny_llama(), "int4", **given)
    with pytest.raises(UsageError, match="nf4 has no symmetric"):
        replace_linears(tiny_llama(), "nf4", symmetric=True)
    with pytest.raises(UsageError, match="int4 has no embeddings"):
        replace_linears(tiny_llama(), "int4", embeddings=True)
