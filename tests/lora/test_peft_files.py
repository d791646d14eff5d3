"""Saving and loading adapters: bit for bit, strict, and every broken file is said clearly and changes nothing."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lilliput import lora
from lilliput.errors import CheckpointError, DiskError, UsageError, WrongBaseError
from lilliput.layers import replace_linears
from lilliput.lora import LoraConfig
from lilliput.lora.adapters import adapter_tensors

MakeLlama = Callable[..., LlamaForCausalLM]
IDS = torch.tensor([[5, 17, 99, 3, 250, 8]])
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def tuned(model: LlamaForCausalLM, name: str = "default", **fields: Any) -> LlamaForCausalLM:
    """`model` with an adapter whose tensors are all moved away from their start."""
    torch.manual_seed(1)
    lora.add_adapter(model, LoraConfig(**{"target_modules": "all-linear", "r": 4, **fields}), name)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model


@pytest.fixture
def saved(tiny_llama: MakeLlama, tmp_path: Path) -> Path:
    """An adapter of the tiny Llama, on disk."""
    lora.save_adapter(tuned(tiny_llama()), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    with safe_open(folder / WEIGHTS, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"], "use_rslora": True},
        {"bias": "all"},
        {"target_modules": ["q_proj"], "bias": "lora_only", "rank_pattern": {"layers.0.self_attn.q_proj": 2}},
    ],
    ids=["all-linear", "embedding-and-head", "bias-all", "bias-lora-only"],
)
@pytest.mark.parametrize("quantized", [None, "nf4", "int8"], ids=["dense", "nf4", "int8"])
def test_saved_and_loaded_gives_the_same_logits_bit_for_bit(
    tiny_llama: MakeLlama, tmp_path: Path, fields: dict[str, Any], quantized: str | None
) -> None:
    models = [tiny_llama(attention_bias=True, mlp_bias=True) for _ in range(2)]
    if quantized:
        for model in models:
            replace_linears(model, quantized)
    lora.save_adapter(tuned(models[0], "mine", **fields), tmp_path, "mine")
    state = torch.random.get_rng_state()
    lora.load_adapter(models[1], tmp_path, "other_name")
    assert torch.equal(torch.random.get_rng_state(), state)  # loading draws no random numbers
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert not any(parameter.requires_grad for parameter in models[1].parameters())


def test_saving_does_not_depend_on_what_is_active_or_merged(tiny_llama: MakeLlama, tmp_path: Path) -> None:
    model = tuned(tiny_llama(attention_bias=True), bias="all")
    lora.save_adapter(model, tmp_path / "active")
    with lora.disabled(model):
        lora.save_adapter(model, tmp_path / "disabled")
    lora.merge(model)
    lora.save_adapter(model, tmp_path / "merged")
    active, disabled, merged = (load_file(tmp_path / folder / WEIGHTS) for folder in ("active", "disabled", "merged"))
    assert len(active) == 28 + 6 + 2  # A and B of 14 layers, the biases of q, k, v in two layers and of o_proj
    for other in (disabled, merged):
        assert other.keys() == active.keys()
        assert all(torch.equal(other[key], active[key]) for key in active)


def test_training_can_go_on_after_loading(tiny_llama: MakeLlama, saved: Path) -> None:
    model = tiny_llama()
    lora.load_adapter(model, saved, trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


def test_files_are_those_of_peft(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {CONFIG, WEIGHTS}
    config = json.loads((saved / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["inference_mode"]) == ("LORA", 4, True)
    tensors = load_file(saved / WEIGHTS)
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 64)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_several_adapters_from_files(tiny_llama: MakeLlama, saved: Path) -> None:
    model = tiny_llama()
    base = logits(model)
    lora.load_adapter(model, saved, "one")
    alone = logits(model)
    lora.load_adapter(model, saved, "two")
    assert lora.active_adapters(model) == ("two",)
    assert torch.equal(logits(model), alone)
    with pytest.raises(UsageError, match="already an adapter named 'one'"):
        lora.load_adapter(model, saved, "one")
    with pytest.raises(UsageError, match="cannot be the name"):
        lora.load_adapter(model, saved, "a.b")
    with lora.disabled(model):
        assert torch.equal(logits(model), base)


def test_a_run_folder_stands_for_its_adapter(tiny_llama: MakeLlama, saved: Path) -> None:
    model = tiny_llama()
    assert lora.load_adapter(model, saved.parent) == lora.read_passport(saved)


def test_an_adapter_in_another_dtype_is_read_as_float32(tiny_llama: MakeLlama, saved: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()})

    edit_tensors(saved, halve)
    model = tiny_llama()
    lora.load_adapter(model, saved)
    assert {tensor.dtype for tensor in adapter_tensors(model, "default").values()} == {torch.float32}


def first_key(tensors: dict[str, Tensor]) -> str:
    return sorted(tensors)[0]


def drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors[first_key(tensors)]


def add_one(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 64)


def reshape_one(tensors: dict[str, Tensor]) -> None:
    tensors[first_key(tensors)] = torch.zeros(5, 128)


def poison_one(tensors: dict[str, Tensor]) -> None:
    tensors[first_key(tensors)][0, 0] = float("nan")


FIRST = r"model\.layers\.0\.mlp\.down_proj\.lora_A\.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_one, rf"1 tensors are missing: {FIRST}"),
        (add_one, r"1 tensors belong to no module of this adapter: model\.layers\.7\.mlp\.up_proj\.lora_A\.weight"),
        (reshape_one, rf"wrong shape: {FIRST} is \[5, 128\], the model needs \[4, 128\]"),
        (poison_one, rf"1 tensors hold NaN or Inf: {FIRST}"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tiny_llama: MakeLlama, saved: Path, change: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    edit_tensors(saved, change)
    model = tuned(tiny_llama(), "other", r=2)
    before, keys = logits(model), list(model.state_dict())
    with pytest.raises(CheckpointError, match=rf"adapter_model\.safetensors: .*{said}"):
        lora.load_adapter(model, saved)
    assert list(model.state_dict()) == keys
    assert lora.active_adapters(model) == ("other",)
    assert torch.equal(logits(model), before)


def test_an_adapter_of_a_wider_model_is_refused_by_its_shapes(tiny_llama: MakeLlama, saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"28 tensors have the wrong shape: .* and 24 more"):
        lora.load_adapter(tiny_llama(hidden_size=32, intermediate_size=64), saved, allow_other_base=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'; only LORA can be loaded"),
        ({"use_dora": True}, "use_dora=True is a field of PEFT that is not supported"),
        ({"r": 0}, "r=0"),
        ({"target_modules": ["c_attn"]}, r"does not fit this model: .*\['c_attn'\] matches no module"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(
    tiny_llama: MakeLlama, saved: Path, changes: dict[str, Any], said: str
) -> None:
    edit_config(saved, **changes)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {said}"):
        lora.load_adapter(tiny_llama(), saved)


def test_missing_files(tiny_llama: MakeLlama, saved: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(CheckpointError, match="no such directory"):
        lora.load_adapter(model, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no adapter: adapter_config\.json is not there"):
        lora.load_adapter(model, tmp_path / "empty")
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        lora.load_adapter(model, saved)
    (saved / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        lora.load_adapter(model, saved)


@pytest.mark.parametrize("kept", [0, 5, 2000, -1])
def test_truncated_safetensors(tiny_llama: MakeLlama, saved: Path, kept: int) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: .*cut short"):
        lora.load_adapter(tiny_llama(), saved)


@pytest.mark.parametrize(("text", "said"), [("{", "broken JSON in line 1"), ("[1]", "not a JSON object")])
def test_broken_config(tiny_llama: MakeLlama, saved: Path, text: str, said: str) -> None:
    (saved / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        lora.load_adapter(tiny_llama(), saved)


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a file system that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100, 10_000], ids=["config does not fit", "weights do not fit"])
def test_a_full_disk_leaves_the_old_adapter(tiny_llama: MakeLlama, saved: Path, room: int) -> None:
    model = tiny_llama()
    lora.load_adapter(model, saved)
    before, files = logits(model), {path.name: path.read_bytes() for path in saved.iterdir()}
    with disk_full_after(room), pytest.raises(DiskError, match="could not be written"):
        lora.save_adapter(tuned(tiny_llama(), r=8), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files
    again = tiny_llama()
    lora.load_adapter(again, saved)
    assert torch.equal(logits(again), before)


def test_an_unknown_adapter_is_not_saved(tiny_llama: MakeLlama, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter named 'default'"):
        lora.save_adapter(tiny_llama(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_is_attached_when_the_base_is_wrong(tiny_llama: MakeLlama, saved: Path) -> None:
    model = tiny_llama(seed=1)
    with pytest.raises(WrongBaseError):
        lora.load_adapter(model, saved)
    assert lora.adapters(model) == {}


def test_nothing_is_attached_when_loading_is_interrupted(
    tiny_llama: MakeLlama, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    model = tiny_llama()
    monkeypatch.setattr("lilliput.lora.peft_files._fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora.load_adapter(model, saved)
    assert lora.adapters(model) == {}
    assert lora.target_layers(model) == {}
