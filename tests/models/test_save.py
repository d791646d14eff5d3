"""What is saved loads again as it was, and a save that fails loses nothing."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lilliput import lora
from lilliput.errors import DiskError, FormatError, UsageError
from lilliput.formats import GroupedTensor
from lilliput.layers import QuantizedLinear, identity_of, replace_linears
from lilliput.models import load_model, load_tokenizer, save_model
from lilliput.models.stream import INDEX, WEIGHTS
from tests.models.conftest import make_model

IDS = torch.arange(3, 99).reshape(2, 48)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize(
    ("format", "double_quant"),
    [("nf4", True), ("nf4", False), ("fp4", True), ("int8", None), ("int4-g32", None), ("none", None)],
)
def test_a_saved_model_loads_again_bit_for_bit_by_both_ways(kind, format, double_quant, tmp_path):
    make_model(kind).save_pretrained(tmp_path / "original")
    model = load_model(tmp_path / "original", format=format, double_quant=double_quant, progress=False)
    save_model(model, tmp_path / "saved")
    expected = model.state_dict()
    for again in (
        load_model(tmp_path / "saved", progress=False),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
    ):
        got = again.state_dict()
        assert got.keys() == expected.keys()
        assert all(
            torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype for name, tensor in expected.items()
        )
        assert torch.equal(logits(again), logits(model))
        assert again.get_memory_footprint() == model.get_memory_footprint()
        identity = identity_of(again)
        assert identity.quantized_sha256 == identity_of(model).quantized_sha256
        if format != "none":
            assert identity.weights_sha256 == identity_of(model).weights_sha256
            assert identity.format == format
        for target, source in model.all_tied_weights_keys.items():
            assert again.get_parameter(target) is again.get_parameter(source)


def test_the_config_says_how_it_was_quantized(tmp_path, tiny_model_dir):
    model = load_model(tiny_model_dir, format="nf4", progress=False)
    save_model(model, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["quantization_config"] == {
        "quant_method": "lilliput",
        "format": "nf4",
        "double_quant": True,
        "block": 64,
        "skip_modules": ["lm_head"],
        "weights_sha256": identity_of(model).weights_sha256,
    }
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert "_name_or_path" not in content


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_groups_in_an_order_with_scales_of_another_type_come_back(scale_dtype, tmp_path, tiny_llama):
    """What GPTQ makes: every layer's columns lie in an order of their own."""
    model = tiny_llama()
    for name in replace_linears(model, "int3-g32"):
        q = model.get_submodule(name).quantized
        order = torch.randperm(q.shape[1]).to(torch.int32)
        model.get_submodule(name).hold(
            GroupedTensor(q.format, q.shape, q.codes, q.scale.to(scale_dtype), q.zero, order)
        )
    save_model(model, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert content["ordered"] is True
    assert content["scale_dtype"] == str(scale_dtype).removeprefix("torch.")
    for again in (load_model(tmp_path, progress=False), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(again), logits(model))
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
            assert again.state_dict()[name].dtype == tensor.dtype
    with pytest.raises(UsageError, match="is quantized to int3-g32 already and cannot be loaded as int3"):
        load_model(tmp_path, format="int3", progress=False)


@pytest.mark.parametrize("targets", [["attn.c_proj"], ["c_attn"], "all-linear"])  # attn.c_proj is square
def test_a_merged_gpt2_loads_again_with_its_weights_the_right_way_round(targets, tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "original")
    model = load_model(tmp_path / "original", format="nf4", progress=False)
    lora.add_adapter(model, lora.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    tuned = logits(model)
    lora.merge(model)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-4)
    save_model(lora.detach(model), tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved", progress=False)), logits(model))


def test_a_merged_head_that_was_tied_loads_again_untied(tmp_path):
    make_model("llama-tied").save_pretrained(tmp_path / "original")
    model = load_model(tmp_path / "original", format="nf4", progress=False)
    config = lora.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    lora.add_adapter(model, config)
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.add_(1)
    lora.merge(model)
    save_model(lora.detach(model), tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved", progress=False)), logits(model))


def test_an_unusual_choice_of_layers_comes_back(tmp_path, tiny_llama):
    model = tiny_llama()
    replaced = replace_linears(model, skip=["down_proj", "model.layers.1.self_attn.q_proj"])
    save_model(model, tmp_path)
    again = load_model(tmp_path, progress=False)
    assert [n for n, m in again.named_modules() if isinstance(m, QuantizedLinear)] == replaced
    assert torch.equal(logits(again), logits(model))


def test_the_tokenizer_is_saved_beside(tmp_path, tiny_llama, tiny_tokenizer):
    save_model(tiny_llama(), tmp_path, tiny_tokenizer)
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again("The river, 12").input_ids == tiny_tokenizer("The river, 12").input_ids
        assert again.chat_template == tiny_tokenizer.chat_template
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_quantized_directory_is_refused_as_another_format(tmp_path, tiny_model_dir):
    save_model(load_model(tiny_model_dir, format="nf4", progress=False), tmp_path)
    assert load_model(tmp_path, format="nf4", progress=False).config.quantization_config.format == "nf4"
    with pytest.raises(UsageError, match="is quantized to nf4 already and cannot be loaded as fp4"):
        load_model(tmp_path, format="fp4")


def test_saving_over_the_directory_that_is_mapped_keeps_the_numbers(tmp_path, tiny_model_dir):
    save_model(load_model(tiny_model_dir, format="nf4", progress=False), tmp_path)
    mapped = load_model(tmp_path, progress=False)
    before = logits(mapped)
    save_model(load_model(tiny_model_dir, format="fp4", progress=False), tmp_path)
    assert torch.equal(logits(mapped), before)
    save_model(mapped, tmp_path)
    assert torch.equal(logits(load_model(tmp_path, progress=False)), before)


def test_writing_into_a_loaded_model_does_not_reach_the_file(tmp_path, tiny_model_dir):
    save_model(load_model(tiny_model_dir, format="nf4", progress=False), tmp_path)
    raw = (tmp_path / WEIGHTS).read_bytes()
    with torch.no_grad():
        load_model(tmp_path, progress=False).model.norm.weight.zero_()
    assert (tmp_path / WEIGHTS).read_bytes() == raw


def test_an_index_of_shards_from_before_goes(tmp_path, tiny_llama):
    tiny_llama(seed=1).save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / INDEX).is_file()
    model = tiny_llama()
    save_model(model, tmp_path)
    assert torch.equal(logits(load_model(tmp_path, progress=False)), logits(model))


FULL = """
import resource, sys
from lilliput.errors import DiskError
from lilliput.models import load_model, load_tokenizer, save_model
model, tokenizer = load_model(sys.argv[1], format="nf4", progress=False), load_tokenizer(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # more than config.json, less than the weights
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    save_model(model, sys.argv[2], tokenizer)
except DiskError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_model_that_was_there(tmp_path, tiny_model_dir):
    old = load_model(tiny_model_dir, format="fp4", progress=False)
    old.generation_config.max_new_tokens = 7  # each file must differ from what the failing save would write
    save_model(old, tmp_path, load_tokenizer(tiny_model_dir))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", FULL, str(tiny_model_dir), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "model.safetensors: could not be written" in done.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_fills_while_the_tokenizer_is_written_says_so(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tiny_tokenizer), "save_pretrained", full)
    with pytest.raises(DiskError, match=r"tokenizer could not be written.*No space left"):
        save_model(tiny_llama(), tmp_path, tiny_tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_is_refused(tmp_path, tiny_llama):
    (tmp_path / "file").write_text("here")
    with pytest.raises(UsageError, match="is a file, expected a directory"):
        save_model(tiny_llama(), tmp_path / "file")
    mixed = tiny_llama()
    replace_linears(mixed, "nf4", skip=["o_proj"])
    mixed.model.layers[0].self_attn.o_proj = QuantizedLinear.from_linear(mixed.model.layers[0].self_attn.o_proj, "fp4")
    with pytest.raises(FormatError, match="quantized in 2 ways"):
        save_model(mixed, tmp_path / "mixed")
    adapted = tiny_llama()
    adapted.model.norm.lora_A = nn.Parameter(torch.zeros(1))
    with pytest.raises(UsageError, match=r"carries adapters.*save_adapter"):
        save_model(adapted, tmp_path / "adapted")
    assert not (tmp_path / "mixed").exists()
    assert not (tmp_path / "adapted").exists()
