"""Loading: the same numbers by every way in, and a clear error for every way to be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lilliput import formats
from lilliput.errors import CheckpointError, FormatError, LilliputError, UsageError
from lilliput.kernels import core
from lilliput.layers import identity_of, quantized_layers, replace_linears
from lilliput.models import load_model, load_tokenizer, save_model
from lilliput.models.stream import INDEX, WEIGHTS
from tests.models.conftest import make_model

IDS = torch.arange(3, 99).reshape(2, 48)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory that may be broken."""
    make_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(directory: Path, change) -> None:
    """Load all tensors of `directory`, let `change` work on the dictionary, and write them back."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def shard(directory: Path, model: torch.nn.Module, parts: int = 3) -> None:
    tensors = list(model.state_dict().items())
    weight_map = {}
    for part in range(parts):
        chosen = dict(tensors[part::parts])
        save_file({k: v.contiguous() for k, v in chosen.items()}, directory / f"model-{part}.safetensors")
        weight_map |= dict.fromkeys(chosen, f"model-{part}.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / WEIGHTS).unlink()


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "qwen3", "phi3", "gpt2"])
def test_a_directory_loads_bit_for_bit(kind, tmp_path):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, progress=False)
    assert not loaded.training
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert torch.equal(logits(loaded), logits(model))
    for target, source in model.all_tied_weights_keys.items():
        assert loaded.get_parameter(target) is loaded.get_parameter(source)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize(
    ("format", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("int4", None), ("int2-row", None)]
)
def test_quantizing_while_loading_is_quantizing_what_was_loaded(kind, format, double_quant, tmp_path):
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, format=format, double_quant=double_quant, progress=False)
    replace_linears(model, format, double_quant)
    expected, got = model.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensor, got[name], rtol=0, atol=0, msg=name)
    assert loaded.get_memory_footprint() == model.get_memory_footprint()
    assert not any(
        p.requires_grad for _, layer in quantized_layers(loaded) for p in layer.parameters() if p is not layer.bias
    )


def test_bfloat16_shards_are_quantized_from_their_own_numbers(directory):
    model = make_model("llama").to(torch.bfloat16)
    shard(directory, model)
    loaded = load_model(directory, format="nf4", progress=False)
    weight = model.model.layers[1].mlp.down_proj.weight.float()
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.dequantize(), formats.dequantize(formats.quantize(weight)))
    assert loaded.model.norm.weight.dtype == torch.float32


def test_shards_and_a_single_file_are_the_same_model(directory, tmp_path):
    one = load_model(directory, progress=False)
    identity = identity_of(one)
    shard(directory, make_model("llama"))
    many = load_model(directory, progress=False)
    assert torch.equal(logits(one), logits(many))
    assert identity_of(many).weights_sha256 == identity.weights_sha256


def test_dtype_is_that_of_all_that_is_not_quantized(directory):
    loaded = load_model(directory, format="nf4", dtype=torch.bfloat16, progress=False)
    assert loaded.lm_head.weight.dtype == loaded.model.norm.weight.dtype == torch.bfloat16
    layer = loaded.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.uint8
    assert layer.weight_absmax_scale.dtype == torch.float32


def test_a_checkpoint_without_the_models_prefix_loads(tmp_path):
    """GPT-2's files on the hub name `wte.weight` what the model calls `transformer.wte.weight`."""
    model = make_model("gpt2")
    model.save_pretrained(tmp_path)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    edit(tmp_path, strip)
    assert torch.equal(logits(load_model(tmp_path, progress=False)), logits(model))
    assert len(list(quantized_layers(load_model(tmp_path, format="nf4", progress=False)))) == 8


def test_progress_is_shown_when_asked(directory, capfd):
    load_model(directory, format="nf4", progress=False)
    assert capfd.readouterr() == ("", "")
    load_model(directory, format="nf4")
    out, err = capfd.readouterr()
    assert out == ""
    assert "Quantizing model to nf4" in err
    assert "Loading weights" not in err


def test_generation_config_comes_along(directory):
    content = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(content | {"eos_token_id": [2, 7]}))
    loaded = load_model(directory, progress=False)
    assert loaded.generation_config.eos_token_id == [2, 7]
    assert loaded.name_or_path == loaded.config.name_or_path == str(directory)


def test_identity_is_read_when_asked_and_refused_when_the_file_has_changed(directory):
    loaded = load_model(directory, format="nf4", progress=False)
    plain = identity_of(make_model("llama"))
    assert identity_of(loaded).weights_sha256 == plain.weights_sha256
    assert identity_of(loaded).format == "nf4"
    loaded = load_model(directory, progress=False)
    edit(directory, lambda tensors: tensors["lm_head.weight"].zero_())
    with pytest.raises(CheckpointError, match="changed since the model was loaded"):
        identity_of(loaded)


# what can be wrong


def test_an_unknown_format_is_refused_with_the_nearest(directory):
    with pytest.raises(UsageError, match=r"unknown number format 'nf5'; did you mean 'nf4'\?"):
        load_model(directory, format="nf5")


@pytest.mark.parametrize("part", [0.0, 0.00001, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("format", ["none", "nf4"])
def test_truncated_safetensors_name_the_file(part, format, directory):
    raw = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(raw[: int(len(raw) * part)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*cut short"):
        load_model(directory, format=format, progress=False)


def test_a_missing_shard_is_named(directory):
    shard(directory, make_model("llama"))
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of the 3 shards it names are missing: model-1\.safetensors"):
        load_model(directory, progress=False)


def test_a_tensor_that_the_index_promises_and_no_shard_has(directory):
    shard(directory, make_model("llama"))
    content = json.loads((directory / INDEX).read_text())
    content["weight_map"]["model.layers.7.extra"] = "model-0.safetensors"
    (directory / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.7\.extra' among them"):
        load_model(directory, progress=False)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": {"a": "../../etc/passwd"}}', '{"weight_map": {"a": 3}}']
)
def test_a_malformed_index_is_refused(content, directory):
    (directory / WEIGHTS).unlink()
    (directory / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        load_model(directory, progress=False)


@pytest.mark.parametrize("format", ["none", "nf4"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(format, name, directory):
    edit(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model(directory, format=format, progress=False)


@pytest.mark.parametrize("format", ["none", "nf4"])
def test_an_unexpected_tensor_is_named(format, directory):
    edit(directory, lambda tensors: tensors.update(surplus=torch.zeros(3)))
    with pytest.raises(
        CheckpointError, match="1 tensors have no place in the model but lie in the checkpoint: surplus"
    ):
        load_model(directory, format=format, progress=False)


@pytest.mark.parametrize("format", ["none", "nf4"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_another_shape_is_named_with_both(format, name, directory):
    edit(directory, lambda tensors: tensors.update({name: torch.zeros(5, 3)}))
    with pytest.raises(LilliputError, match=r"\[5, 3\]") as caught:
        load_model(directory, format=format, progress=False)
    assert (name in str(caught.value) and "128" in str(caught.value)) or "64" in str(caught.value)


def test_nan_in_a_weight_is_refused_with_its_name(directory):
    edit(directory, lambda tensors: tensors["model.layers.0.self_attn.v_proj.weight"].fill_(float("nan")))
    with pytest.raises(FormatError, match=r"model\.layers\.0\.self_attn\.v_proj\.weight"):
        load_model(directory, format="nf4", progress=False)


def test_pickles_alone_are_refused_with_what_to_do(directory):
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no weights.*pytorch_model\.bin is a pickle.*convert it to safetensors"):
        load_model(directory, progress=False)


def test_no_weights_and_no_config(directory):
    (directory / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no weights in this directory\. Expected model\.safetensors"):
        load_model(directory, progress=False)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(directory, progress=False)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no-such-model"}'])
def test_a_broken_config_is_refused(content, directory):
    (directory / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(directory, progress=False)


def test_a_directory_quantized_by_others_is_refused_with_their_name(directory):
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "aqlm"}}))
    with pytest.raises(CheckpointError, match="is quantized by 'aqlm', which is not read here"):
        load_model(directory, progress=False)


def test_an_unreadable_tokenizer_is_refused(directory, tiny_tokenizer):
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(directory)
    tiny_tokenizer.save_pretrained(directory)
    assert load_tokenizer(directory)("The river").input_ids == tiny_tokenizer("The river").input_ids


# the real model

PEAK = """
import sys
import torch, transformers, lilliput
from lilliput.models.load import load_model
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before = peak()
model = load_model(sys.argv[1], format="nf4", progress=False)
print(before, peak(), model.get_memory_footprint())
"""


def test_a_bigger_model_never_lies_in_memory_whole(tmp_path):
    """270 MB of bfloat16 become 75 MB: the peak stays below what a whole copy would take."""
    if not core.status().loaded:
        pytest.skip("the plain torch quantizer needs memory of its own; this counts with the compiled core")
    config = make_model("llama").config
    config.update({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9, "num_attention_heads": 8})
    config.head_dim = 128
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense = model.get_memory_footprint()
    model.save_pretrained(tmp_path)
    del model
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    before, peak, footprint = map(int, done.stdout.split())
    assert dense > 2.5 * footprint
    # 70 MB: the largest tensor in float32, what it was read as, its codes, and modules imported meanwhile
    assert peak - before < 1.3 * footprint + 70e6 < dense


def test_the_quantized_real_model_loads_as_it_was_saved(smollm2, tmp_path):
    """How long that takes is measured by benchmarks/load.py."""
    model = load_model(smollm2, format="nf4", progress=False)
    assert 160e6 < model.get_memory_footprint() < 170e6
    save_model(model, tmp_path, load_tokenizer(smollm2))
    loaded = load_model(tmp_path, progress=False)
    assert torch.equal(logits(loaded), logits(model))
    assert identity_of(loaded).weights_sha256 == identity_of(model).weights_sha256
    assert load_tokenizer(tmp_path).get_vocab() == load_tokenizer(smollm2).get_vocab()


def test_gpt2_of_the_old_shape_with_mask_buffers_loads(tmp_path):
    """The hub's GPT-2 files carry `attn.bias` buffers that the model no longer has."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=128)).eval()
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32)}))
    assert torch.equal(logits(load_model(tmp_path, progress=False)), logits(model))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", '{"model_type": "llama", "hidden_size": "abc"}', "no configuration that transformers can use"),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}', "no configuration that transformers"),
        ("config.json", '{"model_type": "llama", "quantization_config": []}', "no configuration that transformers"),
        (
            "config.json",
            '{"model_type": "llama", "quantization_config": {"quant_method": "lilliput", "format": "nf5"}}',
            "nf5",
        ),
        ("generation_config.json", "{", "no generation config"),
        ("tokenizer_config.json", "[]", "no tokenizer that can be read"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE"}}', "no tokenizer that can be read"),
    ],
)
def test_a_broken_file_of_settings_is_named(name, text, said, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "broken")
    (tmp_path / "broken" / name).write_text(text)
    with pytest.raises(CheckpointError, match=rf"broken.*{said}"):
        load_model(tmp_path / "broken", progress=False)
        load_tokenizer(tmp_path / "broken")


# ---- int8 ----


def test_options_that_the_model_has_not_are_refused(tiny_model_dir, tmp_path):
    with pytest.raises(UsageError, match="int8 has no double_quant"):
        load_model(tiny_model_dir, format="int8", double_quant=True, progress=False)
    with pytest.raises(UsageError, match="nf4 has no symmetric"):
        load_model(tiny_model_dir, format="nf4", symmetric=True, progress=False)
    with pytest.raises(UsageError, match="is not to be quantized, and threshold=6"):
        load_model(tiny_model_dir, threshold=6.0, progress=False)
    save_model(load_model(tiny_model_dir, format="int8", threshold=4.0, progress=False), tmp_path)
    with pytest.raises(UsageError, match=r"quantized to int8 with threshold=4\.0, and threshold=6\.0"):
        load_model(tmp_path, threshold=6.0, progress=False)
    assert load_model(tmp_path, format="int8", threshold=4.0, progress=False).config.quantization_config.threshold == 4


def test_a_weight_that_int8_cannot_hold_is_refused_with_its_layer(tmp_path):
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: the number at \[3, 5\]"):
        load_model(tmp_path, format="int8", progress=False)


def test_the_dense_rest_of_a_model_with_a_quantized_table_keeps_its_type(tmp_path):
    make_model("llama-tied").save_pretrained(tmp_path / "original")
    options = {"format": "int8", "embeddings": True, "dtype": torch.bfloat16, "progress": False}
    model = load_model(tmp_path / "original", **options)
    save_model(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.model.norm.weight.dtype == again.model.embed_tokens.dtype == torch.bfloat16
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
