"""transformers' own `from_pretrained` and `save_pretrained` with our number formats."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    RobertaConfig,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import lilliput
from lilliput.errors import CheckpointError, FormatError, UsageError
from lilliput.layers import QuantizedLinear, identity_of, quantized_layers, replace_linears
from lilliput.models import load_model
from lilliput.models.hf import config_for
from tests.models.conftest import make_model

IDS = torch.arange(3, 99).reshape(2, 48)
CONFIGS = [
    lilliput.NF4Config(),
    lilliput.NF4Config(double_quant=False),
    lilliput.FP4Config(),
    lilliput.Int8Config(),
    lilliput.Int8Config(threshold=1.0, embeddings=True),
    lilliput.GroupedConfig(),
    lilliput.GroupedConfig(bits=3, group_size=32, symmetric=True),
]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "gpt2"])
@pytest.mark.parametrize("config", CONFIGS)
def test_from_pretrained_equals_load_model_and_survives_save_pretrained(kind, config, tmp_path):
    make_model(kind).save_pretrained(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config)
    asked = {name: value for name, value in config.options.items() if name not in ("ordered", "scale_dtype")}
    ours = load_model(tmp_path / "original", format=config.format, **asked, progress=False)
    assert torch.equal(logits(model), logits(ours))
    assert identity_of(model) == identity_of(ours)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert identity_of(again).weights_sha256 == identity_of(model).weights_sha256
    assert identity_of(again).quantized_sha256 == identity_of(model).quantized_sha256
    assert torch.equal(logits(load_model(tmp_path / "saved", progress=False)), logits(model))
    assert not any(
        p.requires_grad for _, layer in quantized_layers(again) for n, p in layer.named_parameters() if n != "bias"
    )


def test_it_is_registered_with_its_method_name():
    assert AUTO_QUANTIZER_MAPPING["lilliput"].__name__ == "LilliputQuantizer"
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lilliput"].from_dict({"format": "fp4"}).__class__ is lilliput.FP4Config


def test_one_config_serves_two_models_of_different_shape(tmp_path):
    config = lilliput.NF4Config()
    for kind in ("llama", "gpt2"):
        make_model(kind).save_pretrained(tmp_path / kind)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, quantization_config=config)
        assert list(quantized_layers(model))
    assert config.skip_modules is None


def test_skip_modules_are_left_alone(tiny_model_dir):
    config = lilliput.NF4Config(skip_modules=["lm_head", "o_proj"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj) is QuantizedLinear


def test_a_classifier_keeps_its_head(tmp_path):
    config = RobertaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=lilliput.NF4Config())
    assert len(list(quantized_layers(loaded))) == 6
    assert torch.equal(loaded.classifier.dense.weight, model.classifier.dense.weight)


def test_training_goes_through_to_what_is_attached(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=lilliput.NF4Config())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable
    assert model.is_quantized


def test_a_quantized_config_round_trips_through_json(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, quantization_config=lilliput.FP4Config(double_quant=False)
    )
    model.config.save_pretrained(tmp_path)
    content = AutoConfig.from_pretrained(tmp_path).quantization_config
    assert content["format"] == "fp4"
    assert content["double_quant"] is False
    assert content["skip_modules"] == ["lm_head"]
    assert config_for(**content).to_dict() == content
    json.dumps(content)


def test_two_pickled_checkpoints_are_two_bases(tmp_path):
    hashes = []
    for seed in (0, 1, 0):
        model = make_model("llama", seed)
        place = tmp_path / str(len(hashes))
        model.config.save_pretrained(place)
        torch.save(model.state_dict(), place / "pytorch_model.bin")
        loaded = AutoModelForCausalLM.from_pretrained(place, quantization_config=lilliput.NF4Config())
        hashes.append(identity_of(loaded).weights_sha256)
    assert hashes[0] == hashes[2] != hashes[1]


def test_layers_that_are_dense_by_now_are_saved_as_such(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=lilliput.NF4Config())
    config = lilliput.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    lilliput.add_adapter(model, config)
    lilliput.merge(model)
    lilliput.detach(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(logits(again), logits(model))
    assert identity_of(again).weights_sha256 == identity_of(model).weights_sha256


def test_missing_codes_are_an_error_not_random_numbers(tiny_model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=lilliput.NF4Config())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_absmax"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor for 'model\.layers\.0\.mlp\.up_proj\.weight_absmax'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight_absmax"):
        load_model(tmp_path, progress=False)


def test_unknown_keys_formats_and_blocks_are_refused():
    with pytest.raises(UsageError, match="unknown key 'duoble_quant'; did you mean 'double_quant'"):
        lilliput.NF4Config(duoble_quant=True)
    with pytest.raises(UsageError, match="unknown number format 'nf5'; did you mean 'nf4'"):
        config_for("nf5")
    with pytest.raises(UsageError, match="NF4Config is for 'nf4', not 'fp4'"):
        lilliput.NF4Config(format="fp4")
    with pytest.raises(CheckpointError, match="blocks of 128 values, expected 64"):
        lilliput.NF4Config(block=128)


# ---- int8 ----


def test_int8_config_says_what_it_holds(tiny_model_dir, tmp_path):
    config = lilliput.Int8Config(threshold=3.0, skip_modules=["lm_head", "o_proj"], embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert {layer.threshold for _, layer in quantized_layers(model) if isinstance(layer, QuantizedLinear)} == {3.0}
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {key: value for key, value in content.items() if key not in ("skip_modules", "weights_sha256")} == {
        "quant_method": "lilliput", "format": "int8", "block": 0, "threshold": 3.0, "embeddings": True
    }  # fmt: skip
    assert config_for(**content).to_dict() == content
    assert lilliput.Int8Config().options == {"threshold": 6.0, "embeddings": False}


def test_what_does_not_belong_to_a_format_is_refused():
    with pytest.raises(UsageError, match="int8 has no double_quant"):
        lilliput.Int8Config(double_quant=True)
    with pytest.raises(UsageError, match="nf4 has no threshold"):
        lilliput.NF4Config(threshold=6.0)
    with pytest.raises(UsageError, match="fp4 has no embeddings"):
        lilliput.FP4Config(embeddings=True)
    with pytest.raises(UsageError, match="threshold=-1"):
        lilliput.Int8Config(threshold=-1)
    with pytest.raises(UsageError, match="unknown key 'treshold'; did you mean 'threshold'"):
        lilliput.Int8Config(treshold=6)
    with pytest.raises(CheckpointError, match="blocks of 64 values, expected 0"):
        lilliput.Int8Config(block=64)


@pytest.mark.parametrize("embeddings", [False, True])
def test_tied_heads_stay_tied_through_files(embeddings, tmp_path):
    make_model("llama-tied").save_pretrained(tmp_path / "original")
    config = lilliput.Int8Config(embeddings=embeddings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), load_model(tmp_path / "saved")):
        table, head = again.get_input_embeddings(), again.get_output_embeddings()
        assert head.weight is table.weight
        assert type(head) is (QuantizedLinear if embeddings else nn.Linear)
        assert not embeddings or head.weight_absmax is table.weight_absmax


def test_a_missing_scale_of_a_table_is_an_error(tiny_model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    config = lilliput.Int8Config(embeddings=True)
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.embed_tokens.weight_absmax"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight_absmax"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_footprint_of_a_gpt_neox_of_2_8_billion():
    """Pythia 2.8B in 16 bits takes 5.17 GiB; with its linear layers in int8, half of that and the tables."""
    config = GPTNeoXConfig(
        hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, intermediate_size=10240, vocab_size=50432
    )
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config).to(torch.bfloat16)
    dense = model.get_memory_footprint()
    assert dense / 2**30 == pytest.approx(5.17, abs=0.01)
    replace_linears(model, "int8")
    assert model.get_memory_footprint() / 2**30 <= 2.84
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config).to(torch.bfloat16)
    replace_linears(model, "int8", embeddings=True)
    assert model.get_memory_footprint() / 2**30 <= 2.72  # the head is not tied and stays


# ---- groups ----


def test_grouped_config_says_what_it_holds(tiny_model_dir, tmp_path):
    config = lilliput.GroupedConfig(bits=2, group_size=64, symmetric=True, skip_modules=["lm_head", "o_proj"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert all(layer.quantized.zero is None for _, layer in quantized_layers(model))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {key: value for key, value in content.items() if key not in ("skip_modules", "weights_sha256")} == {
        "quant_method": "lilliput", "format": "int2-g64", "block": 64,
        "symmetric": True, "ordered": False, "scale_dtype": "float16",
    }  # fmt: skip
    again = config_for(**content)
    assert type(again) is lilliput.GroupedConfig
    assert again.to_dict() == content


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "int4"),
        ({"bits": 8}, "int8g"),
        ({"bits": 3, "group_size": -1}, "int3-row"),
        ({"group_size": 32}, "int4-g32"),
    ],
)
def test_grouped_config_knows_its_formats_name(given, name):
    config = lilliput.GroupedConfig(**given)
    assert config.format == name
    assert config.options == {"symmetric": False, "ordered": False, "scale_dtype": "float16"}
    assert config_for(name).to_dict() == config.to_dict()


def test_what_grouped_config_does_not_know_is_refused():
    with pytest.raises(UsageError, match="no format has groups of 5-bit codes"):
        lilliput.GroupedConfig(bits=5)
    with pytest.raises(UsageError, match="groups of 100 numbers"):
        lilliput.GroupedConfig(group_size=100)
    with pytest.raises(UsageError, match="'int4' says bits and group already"):
        lilliput.GroupedConfig(bits=4, format="int4")
    with pytest.raises(UsageError, match="GroupedConfig is for groups, not 'nf4'"):
        lilliput.GroupedConfig(format="nf4")
    with pytest.raises(UsageError, match="int4 has no double_quant"):
        lilliput.GroupedConfig(double_quant=True)
    with pytest.raises(UsageError, match="nf4 has no symmetric"):
        lilliput.NF4Config(symmetric=True)
    with pytest.raises(FormatError, match="scales cannot be held in float64"):
        lilliput.GroupedConfig(scale_dtype="float64")
    with pytest.raises(CheckpointError, match="blocks of 64 values, expected 128"):
        config_for("int4", block=64)
