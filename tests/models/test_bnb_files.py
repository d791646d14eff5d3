"""bitsandbytes files without bitsandbytes; beside the library itself: tests/peers/test_bitsandbytes_files.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lilliput import lora
from lilliput.errors import CheckpointError, FormatError, LilliputError, UsageError
from lilliput.layers import QuantizedLinear, identity_of, quantized_layers, replace_linears
from lilliput.models import load_model, save_model
from lilliput.models.bnb_files import save_bnb
from lilliput.models.stream import WEIGHTS
from tests.models.conftest import make_model

IDS = torch.arange(3, 99).reshape(2, 48)
UP = "model.layers.0.mlp.up_proj"
STATE = "quant_state.bitsandbytes__nf4"
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {"double_quant": True}),
    ("nf4", {"double_quant": False}),
    ("fp4", {"double_quant": True}),
    ("int8", {"threshold": 4.0}),
]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def edit(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    own = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(own, directory / WEIGHTS, metadata={"format": "pt"})


def edit_states(directory: Path, **changes: Any) -> None:
    """Change what the JSON of every layer says."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "quant_state" in name:
                said = {**json.loads(bytes(tensor.tolist())), **changes}
                tensors[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    edit(directory, change)


@pytest.fixture
def saved(tmp_path: Path, tiny_llama) -> tuple[Path, Any]:
    """A directory in nf4 that may be broken, and the model in it."""
    model = tiny_llama()
    replace_linears(model, "nf4")
    save_bnb(model, tmp_path / "saved", progress=False)
    return tmp_path / "saved", model


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "gpt2"])
@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_what_is_saved_opens_again_bit_for_bit(kind, format, options, tmp_path) -> None:
    make_model(kind).save_pretrained(tmp_path / "dense")
    model = load_model(tmp_path / "dense", format=format, progress=False, **options)
    save_bnb(model, tmp_path / "bnb", progress=False)
    again = load_model(tmp_path / "bnb", progress=False)
    expected, got = model.state_dict(), again.state_dict()
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name
    assert torch.equal(logits(again), logits(model))
    assert identity_of(again).weights_sha256 == identity_of(model).weights_sha256
    assert identity_of(again).quantized_sha256 == identity_of(model).quantized_sha256
    assert load_model(tmp_path / "bnb", format=format, progress=False, **options) is not None


def test_names_types_and_configuration_are_those_of_transformers(saved) -> None:
    directory, model = saved
    tensors = load_file(directory / WEIGHTS)
    mine = {name: t for name, t in tensors.items() if name.startswith(f"{UP}.")}
    assert {name.removeprefix(f"{UP}."): (t.dtype, list(t.shape)) for name, t in mine.items() if STATE not in name} == {
        "weight": (torch.uint8, [128 * 64 // 2, 1]),
        "weight.absmax": (torch.uint8, [128]),
        "weight.quant_map": (torch.float32, [16]),
        "weight.nested_absmax": (torch.float32, [1]),
        "weight.nested_quant_map": (torch.float32, [256]),
    }
    offset = model.get_submodule(UP).quantized.absmax_offset.item()
    assert json.loads(bytes(mine[f"{UP}.weight.{STATE}"].tolist())) == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [128, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["load_in_4bit"]
    assert not config["load_in_8bit"]
    assert config["bnb_4bit_quant_type"] == "nf4"
    assert config["bnb_4bit_use_double_quant"]
    assert config["llm_int8_skip_modules"] == ["lm_head"]


def test_blocks_of_128_are_two_of_64(saved) -> None:
    """As ROCm has them; the numbers are not changed, so that the constants must be said twice."""
    directory, model = saved
    again = load_model(directory, progress=False)
    expected = {name: layer.dequantize() for name, layer in quantized_layers(again)}

    def pair(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.endswith("weight.absmax"):
                tensors[name] = tensors[name][::2].clone()

    edit(directory, pair)
    edit_states(directory, blocksize=128)
    wide = load_model(directory, progress=False)
    for name, layer in quantized_layers(wide):
        twice = layer.dequantize().view(-1, 128)
        assert torch.equal(twice[:, :64], expected[name].view(-1, 128)[:, :64])
    codes = model.get_submodule(UP).quantized.codes
    assert torch.equal(wide.get_submodule(UP).quantized.codes, codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_in_another_type_are_the_same_bytes(saved, dtype) -> None:
    """`bnb_4bit_quant_storage`, for FSDP."""
    directory, model = saved

    def store(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.endswith(".weight") and tensors[name].dtype == torch.uint8:
                tensors[name] = tensors[name].view(-1).view(dtype).view(-1, 1)

    edit(directory, store)
    assert torch.equal(logits(load_model(directory, progress=False)), logits(model))


def test_layers_that_are_dense_stay_dense(tmp_path, tiny_llama) -> None:
    model = tiny_llama()
    replaced = replace_linears(model, "fp4", skip=["lm_head", "down_proj", "layers.0.self_attn.q_proj"])
    save_bnb(model, tmp_path, progress=False)
    again = load_model(tmp_path, progress=False)
    assert [name for name, _ in quantized_layers(again)] == replaced
    assert torch.equal(logits(again), logits(model))


def test_adapters_train_over_it_and_it_is_saved_as_ours(saved, tmp_path) -> None:
    directory, model = saved
    again = load_model(directory, progress=False)
    save_model(again, tmp_path / "own")
    assert torch.equal(logits(load_model(tmp_path / "own", progress=False)), logits(model))
    lora.add_adapter(again, lora.LoraConfig(r=4, target_modules=["q_proj"]))
    again(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in again.named_parameters() if "lora_B" in name)


def test_bitsandbytes_is_not_imported(saved) -> None:
    program = (
        "import sys; from lilliput.models import load_model; load_model(sys.argv[1], progress=False);"
        "print('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(saved[0])], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- what is refused ----


def put(part: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """Change one tensor of one layer."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.{part}"] = make(tensors[f"{UP}.{part}"])

    return change


def drop(*parts: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for part in parts:
            del tensors[f"{UP}.{part}"]

    return change


def drop_all(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "quant_state" in name]:
        del tensors[name]


def claim_int8(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.SCB"] = torch.ones(128)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("weight.absmax"), f"has no '{UP}.weight.absmax'"),
        (drop("weight.quant_map"), f"has no '{UP}.weight.quant_map'"),
        (drop("weight.nested_absmax"), f"has no '{UP}.weight.nested_absmax'"),
        (drop(f"weight.{STATE}"), "have no place in the model|another shape"),
        (put("weight", lambda t: t[:-1]), r"weight' is uint8 \[4095, 1\], expected .* \[4096, 1\]"),
        (put("weight.absmax", lambda t: t[:-1]), r"absmax' is uint8 \[127\], expected uint8 \[128\]"),
        (put("weight.absmax", lambda t: t.float()), r"absmax' is float32 \[128\], expected uint8 \[128\]"),
        (put("weight.quant_map", lambda t: t * 0.99), "is not the codebook of nf4"),
        (put("weight.nested_quant_map", lambda t: t.flip(0)), "is not the codebook of nf4"),
        (put(f"weight.{STATE}", lambda t: t[:-3]), "quantization state cannot be read"),
        (put(f"weight.{STATE}", lambda t: torch.tensor(list(b"[]"), dtype=torch.uint8)), "state cannot be read"),
        (put(f"weight.{STATE}", lambda t: torch.tensor(list(b"{}"), dtype=torch.uint8)), "state cannot be read"),
        (put(f"weight.{STATE}", lambda t: torch.tensor([255], dtype=torch.uint8)), "state cannot be read"),
        (drop_all, "has no layer in 4 bits or int8"),
        (claim_int8, "has layers in 4 bits and in int8"),
        (lambda t: t.pop("model.norm.weight"), "are missing from the checkpoint"),
    ],
)
def test_broken_files_are_refused(saved, change, said) -> None:
    directory, _ = saved
    edit(directory, change)
    with pytest.raises(CheckpointError, match=said):
        load_model(directory, progress=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocksize": 32}, "blocks of 32 numbers; read here are multiples of 64"),
        ({"blocksize": 0}, "blocks of 0 numbers"),
        ({"blocksize": -64}, "blocks of -64 numbers"),
        ({"nested_blocksize": 100}, "blocks of 100 absmax; read here are multiples of 256"),
        ({"nested_blocksize": -256}, "blocks of -256 absmax"),
        ({"quant_type": "fp4"}, "speaks of fp4"),
        ({"quant_type": "int3"}, "speaks of int3"),
        ({"shape": [64, 128]}, r"has a quantized weight \[64, 128\], the model \["),
        ({"shape": None}, "state cannot be read"),
        ({"nested_offset": "much"}, "state cannot be read"),
        ({"nested_offset": float("nan")}, "has absmax around nan"),
        ({"blocksize": float("inf")}, "state cannot be read"),
    ],
)
def test_states_that_are_not_ours_are_refused(saved, changes, said) -> None:
    directory, _ = saved
    edit_states(directory, **changes)
    with pytest.raises(CheckpointError, match=said):
        load_model(directory, progress=False)


def test_layers_in_two_ways_are_refused(saved) -> None:
    directory, _ = saved
    other = make_model("llama")
    replace_linears(other, "nf4", double_quant=False)
    save_bnb(other, directory.parent / "other", progress=False)
    theirs = load_file(directory.parent / "other" / WEIGHTS)

    def mix(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(UP)]:
            del tensors[name]
        tensors.update({name: t for name, t in theirs.items() if name.startswith(UP)})

    edit(directory, mix)
    with pytest.raises(CheckpointError, match="quantized in 2 ways: nf4 without double quantization, nf4 with double"):
        load_model(directory, progress=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("weight_format", lambda t: t + 1), "laid out for the cores of some GPU"),
        (put("SCB", lambda t: t[:-1]), r"SCB' is float32 \[127\], expected float32 \[128\]"),
        (put("weight", lambda t: t.float()), r"weight' is float32 \[128, 64\], expected int8 \[128, 64\]"),
        (drop("weight"), f"has no '{UP}.weight'"),
    ],
)
def test_broken_int8_is_refused(change, said, tmp_path, tiny_llama) -> None:
    model = tiny_llama()
    replace_linears(model, "int8")
    save_bnb(model, tmp_path, progress=False)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=said):
        load_model(tmp_path, progress=False)


def test_a_threshold_that_is_none_is_refused(tmp_path, tiny_llama) -> None:
    model = tiny_llama()
    replace_linears(model, "int8")
    save_bnb(model, tmp_path, progress=False)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for wrong in ("six", -1.0, None, True):
        content["quantization_config"]["llm_int8_threshold"] = wrong
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="llm_int8_threshold is"):
            load_model(tmp_path, progress=False)


def test_models_that_bitsandbytes_cannot_hold_are_refused_and_nothing_is_written(tmp_path, tiny_llama) -> None:
    dense, other, mixed = tiny_llama(), tiny_llama(), tiny_llama()
    table = tiny_llama(tie_word_embeddings=True)
    replace_linears(other, "int4-g32")
    replace_linears(mixed, "nf4", skip=["o_proj", "lm_head"])
    replace_linears(mixed, "fp4", skip=["lm_head"])
    replace_linears(table, "int8", embeddings=True)
    alike = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.ModuleDict({"a": nn.Linear(64, 64)})})
    named = tiny_llama()
    replace_linears(named, "nf4", skip=["lm_head"])
    named.model.layers[0].add_module("extra", alike)
    alike["b"]["a"] = QuantizedLinear.from_linear(alike["b"]["a"], "nf4")
    named.add_module("a", nn.Linear(64, 64))
    faults: list[tuple[Any, type[LilliputError], str]] = [
        (dense, UsageError, "no layer of the model is quantized"),
        (other, UsageError, "is int4-g32, which bitsandbytes has not"),
        (table, UsageError, "is a table of embeddings"),
        (mixed, FormatError, "quantized in 2 ways"),
        (named, FormatError, r"'model\.layers\.0\.extra\.b\.a' is quantized, and transformers would take it"),
    ]
    for model, kind, said in faults:
        with pytest.raises(kind, match=said):
            save_bnb(model, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("here")
    good = tiny_llama()
    replace_linears(good, "nf4")
    with pytest.raises(UsageError, match="is a file, expected a directory"):
        save_bnb(good, tmp_path / "file", progress=False)
    good.model.norm.lora_A = nn.Parameter(torch.zeros(1))
    with pytest.raises(UsageError, match="carries adapters"):
        save_bnb(good, tmp_path / "out", progress=False)
