"""Checkpoints that transformers and bitsandbytes write open here, and ours open there, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lilliput.layers import quantized_layers
from lilliput.models import load_model
from lilliput.models.bnb_files import save_bnb
from lilliput.models.stream import WEIGHTS
from tests.models.conftest import make_model

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed (extra 'test')")

IDS = torch.arange(3, 99).reshape(2, 48)
KINDS = ("llama", "llama-tied", "qwen2", "gpt2")
WAYS: list[tuple[str, bool, dict[str, Any]]] = [
    ("nf4", True, {}),
    ("nf4", False, {}),
    ("fp4", True, {}),
    ("nf4", True, {"bnb_4bit_quant_storage": torch.bfloat16}),
]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def theirs(directory: Path, config: BitsAndBytesConfig | None = None) -> Any:
    given = {} if config is None else {"quantization_config": config}  # a None would take it out of config.json
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **given).eval()


def their_weight(module: Any) -> Tensor:
    """float32 [out, in]."""
    return functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("format", "double_quant", "more"), WAYS)
def test_what_they_save_opens_here(kind, format, double_quant, more, tmp_path) -> None:
    make_model(kind).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
        **more,
    )
    model = theirs(tmp_path / "dense", config)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", progress=False)
    layers = dict(quantized_layers(ours))
    assert layers
    for name, layer in layers.items():
        assert (layer.format_name, layer.options) == (format, {"double_quant": double_quant})
        assert torch.equal(layer.dequantize(), their_weight(model.get_submodule(name)))
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_what_we_save_opens_there(kind, format, double_quant, tmp_path) -> None:
    make_model(kind).save_pretrained(tmp_path / "dense")
    ours = load_model(tmp_path / "dense", format=format, double_quant=double_quant, progress=False)
    save_bnb(ours, tmp_path / "ours", progress=False)
    model = theirs(tmp_path / "ours")
    for name, layer in quantized_layers(ours):
        module = model.get_submodule(name)
        assert type(module).__name__ == "Linear4bit"
        assert torch.equal(layer.dequantize(), their_weight(module))
    torch.testing.assert_close(logits(model), logits(ours), rtol=1e-4, atol=1e-4)


def test_a_file_of_ours_is_a_file_of_theirs(tmp_path) -> None:
    """Names, types, shapes and numbers: what they write of the same weights."""
    make_model("llama").save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs(tmp_path / "dense", config).save_pretrained(tmp_path / "theirs")
    save_bnb(load_model(tmp_path / "dense", format="nf4", progress=False), tmp_path / "ours", progress=False)
    one, other = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if "quant_state" not in name:  # JSON, whose keys may come in any order
            assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_int8_goes_both_ways(kind, tmp_path) -> None:
    """Their product rounds inputs to 127 steps, ours to finer ones: the weights are equal, the logits near.

    (They round weights to float16 before they quantize them, so that their codes are not ours of the same weights.)
    """
    make_model(kind).save_pretrained(tmp_path / "dense")
    model = theirs(tmp_path / "dense", BitsAndBytesConfig(load_in_8bit=True))
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", progress=False)
    stored = load_file(tmp_path / "theirs" / WEIGHTS)
    for name, layer in quantized_layers(ours):
        assert layer.format_name == "int8"
        theirs_dense = stored[f"{name}.weight"].float() * (stored[f"{name}.SCB"] / 127)[:, None]
        assert torch.equal(layer.dequantize(), theirs_dense)
    save_bnb(ours, tmp_path / "ours", progress=False)
    again = theirs(tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    assert (logits(ours) - logits(model)).norm() < 0.05 * logits(model).norm()
