"""An adapter's GGUF file over its base's is the merged model's; what such a file cannot say is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from lilliput import lora
from lilliput.errors import FormatError, UsageError
from lilliput.layers import replace_linears
from lilliput.lora.adapters import base_only
from lilliput.models import save_gguf, save_lora_gguf
from lilliput.models.gguf import GgufFile, open_gguf
from tests.models.conftest import make_model

CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "some": {"r": 3, "lora_alpha": 16, "target_modules": r".*(q_proj|v_proj|qkv_proj|c_attn)"},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"k_proj": 2, "c_proj": 2, "o_proj": 2},
        "alpha_pattern": {"q_proj": 3, "c_fc": 3, "down_proj": 5},
    },
}


def adapted(kind: str, seed: int = 1, format: str | None = None, **fields: Any) -> PreTrainedModel:
    """A model with an adapter whose B is not zero."""
    model = make_model(kind)
    if format:
        replace_linears(model, format)
    torch.manual_seed(seed)
    lora.add_adapter(model, lora.LoraConfig(**fields, init_lora_weights=False))
    return model


def update(file: GgufFile, name: str) -> Tensor:
    """What llama.cpp adds to the matrix `name`: alpha / r B A; of a table, A is stored transposed."""
    a, b = file.read(f"{name}.lora_a"), file.read(f"{name}.lora_b")
    product = a @ b.T if name == "token_embd.weight" else b @ a
    return product * file.metadata["adapter.lora.alpha"] / b.shape[1]


def check_against_merged(model: PreTrainedModel, folder: Path, tokenizer: Any) -> int:
    """Base file plus adapter file is the merged model's file; returns how many matrices are adapted."""
    file = open_gguf(save_lora_gguf(model, folder / "adapter.gguf").path)
    with base_only(model):
        base = open_gguf(save_gguf(model, folder / "base.gguf", tokenizer, "f32", progress=False).path)
    lora.merge(model)
    merged = lora.detach(model)
    tuned = open_gguf(save_gguf(merged, folder / "merged.gguf", tokenizer, "f32", progress=False).path)
    changed = {name for name in base.tensors if not torch.equal(base.read(name), tuned.read(name))}
    assert changed == {name.rpartition(".")[0] for name in file.tensors}
    for name in changed:
        expected = tuned.read(name) - base.read(name)
        torch.testing.assert_close(update(file, name), expected, rtol=1e-4, atol=1e-5)
    return len(changed)


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gpt2"])
def test_base_and_adapter_are_the_merged_model(
    kind: str, fields: dict[str, Any], tmp_path: Path, tiny_tokenizer
) -> None:
    found = check_against_merged(adapted(kind, **fields), tmp_path, tiny_tokenizer)
    some = {"llama": 4, "qwen3": 4, "phi3": 2, "gpt2": 2}
    every = {"llama": 14, "qwen3": 14, "phi3": 8, "gpt2": 8}
    assert found == (every if fields.get("target_modules") == "all-linear" else some)[kind]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_over_a_quantized_base(kind: str, tmp_path: Path, tiny_tokenizer) -> None:
    check_against_merged(adapted(kind, format="nf4", **CONFIGS["all"]), tmp_path, tiny_tokenizer)


def test_tables_and_heads_that_are_not_tied(tmp_path: Path, tiny_tokenizer) -> None:
    model = adapted("llama", r=4, target_modules=["embed_tokens", "lm_head"])
    assert check_against_merged(model, tmp_path, tiny_tokenizer) == 2


def test_metadata_say_what_it_is(tmp_path: Path) -> None:
    written = save_lora_gguf(adapted("llama", r=4, lora_alpha=6), tmp_path / "adapter.gguf")
    said = open_gguf(written.path).metadata
    assert (said["general.type"], said["general.architecture"]) == ("adapter", "llama")
    assert (said["adapter.type"], said["adapter.lora.alpha"]) == ("lora", 6.0)
    assert written.tensors == {"F32": 8}
    assert written.nbytes == written.path.stat().st_size


def test_one_of_several_is_written(tmp_path: Path) -> None:
    model = adapted("llama", r=4)
    lora.add_adapter(model, lora.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False), "other")
    one = open_gguf(save_lora_gguf(model, tmp_path / "one.gguf").path)
    other = open_gguf(save_lora_gguf(model, tmp_path / "other.gguf", "other").path)
    assert {name.split(".")[2] for name in one.tensors} == {"attn_q", "attn_v"}
    assert {name.split(".")[2] for name in other.tensors} == {"attn_output"}


def test_a_saved_adapter_of_peft_and_peft_s_own_model_give_the_same_file(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="comparisons with PEFT need peft (extra `test`)")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(make_model("llama"), config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = make_model("llama")
    lora.load_adapter(ours, tmp_path / "adapter")
    files = [save_lora_gguf(model, tmp_path / f"{i}.gguf").path for i, model in enumerate((ours, theirs))]
    assert files[0].read_bytes() == files[1].read_bytes()


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_an_unknown_adapter_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no adapter named 'defautl'; did you mean 'default'\?.*Attached: default"):
        save_lora_gguf(adapted("llama", r=2), tmp_path / "x.gguf", "defautl")
    with pytest.raises(UsageError, match="Attached: none"):
        save_lora_gguf(make_model("llama"), tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, r"copies of whole modules \(modules_to_save\) too"),
        ({"bias": "all"}, "trains biases too"),
    ],
)
def test_more_than_lora_is_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    kind = "qwen2" if "bias" in fields else "llama"
    with pytest.raises(UsageError, match=rf"adapter 'default': .*{said}.*Merge it into the base"):
        save_lora_gguf(adapted(kind, r=2, **fields), tmp_path / "x.gguf")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_tables_and_heads_are_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{target}: is adapted, and shares its weight"):
        save_lora_gguf(adapted("llama-tied", r=2, target_modules=[target]), tmp_path / "x.gguf")


def test_another_family_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=64))
    lora.add_adapter(model, lora.LoraConfig(r=2))
    with pytest.raises(UsageError, match="cannot be written as GGUF"):
        save_lora_gguf(model, tmp_path / "x.gguf")


def test_a_broken_adapter_is_named(tmp_path: Path) -> None:
    model = adapted("llama", r=2)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(FormatError, match=r"blk\.0\.attn_q\.weight\.lora_b: holds .*broken"):
        save_lora_gguf(model, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
