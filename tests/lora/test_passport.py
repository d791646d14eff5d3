"""The passport: what it holds, which bases it lets pass, how a wrong one is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from lilliput import lora
from lilliput.errors import CheckpointError, WrongBaseError
from lilliput.layers import replace_linears
from lilliput.lora import LoraConfig, Passport
from lilliput.lora.passport import METADATA_KEY, hash_tokenizer
from tests.conftest import make_tiny_tokenizer

MakeLlama = Callable[..., LlamaForCausalLM]


def from_directory(directory: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory)


def on_one_line(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_passport_survives_the_file(
    tiny_llama: MakeLlama, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_llama()
    lora.add_adapter(model, LoraConfig(target_modules=["q_proj"]))
    passport = lora.make_passport(model, tiny_tokenizer, data_sha256="d" * 64)
    lora.save_adapter(model, tmp_path, passport=passport)
    assert lora.read_passport(tmp_path) == passport
    assert lora.load_adapter(tiny_llama(), tmp_path) == passport
    hashes = (passport.base_weights_sha256, passport.tokenizer_sha256, passport.chat_template_sha256)
    assert all(len(sha) == 64 for sha in hashes if sha is not None)
    assert None not in hashes
    assert passport.data_sha256 == "d" * 64
    assert passport.versions["torch"] == torch.__version__


def test_the_passport_is_the_bases_whatever_is_attached(tiny_llama: MakeLlama) -> None:
    plain = tiny_llama(attention_bias=True)
    born = lora.make_passport(plain)
    model = tiny_llama(attention_bias=True)
    lora.add_adapter(model, LoraConfig(target_modules=["q_proj"], bias="all", modules_to_save=["lm_head"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert lora.make_passport(model) == born
    lora.merge(model)
    assert lora.make_passport(model) == born


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_and_detached_model_is_a_base_of_its_own(tiny_llama: MakeLlama, tmp_path: Path, tied: bool) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = from_directory(tmp_path / "base")
    lora.add_adapter(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "mine")
    born = lora.make_passport(model)
    lora.merge(model)
    lora.detach(model)
    lora.add_adapter(model, LoraConfig(target_modules=["q_proj"]), "next")
    now = lora.make_passport(model)
    assert now.base_weights_sha256 != born.base_weights_sha256
    assert now.base_name == f"{tmp_path / 'base'} + mine"
    lora.save_adapter(model, tmp_path / "next", "next")
    lora.detach(model).save_pretrained(tmp_path / "merged")
    assert lora.load_adapter(from_directory(tmp_path / "merged"), tmp_path / "next") is not None


def test_another_base_is_refused_with_both_names_and_hashes(
    tiny_llama: MakeLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = tiny_llama(), tiny_llama(seed=1)
    mine.name_or_path, other.name_or_path = "org/mine", "org/other"
    lora.add_adapter(mine, LoraConfig(target_modules=["q_proj"]))
    lora.save_adapter(mine, tmp_path)
    hashes = [lora.make_passport(model).base_weights_sha256 for model in (mine, other)]
    with pytest.raises(WrongBaseError) as caught:
        lora.load_adapter(other, tmp_path)
    said = str(caught.value)
    assert f"trained over 'org/mine' ({hashes[0][:12]}), the model is 'org/other' ({hashes[1][:12]})" in said
    assert all(sha in said for sha in hashes)
    assert "allow_other_base" in said
    lora.load_adapter(other, tmp_path, allow_other_base=True)
    assert "warning:" in (warned := on_one_line(capsys))
    assert "'org/mine'" in warned
    assert list(lora.adapters(other)) == ["default"]


def test_the_same_base_in_another_number_format_is_allowed_with_one_note(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, quantized = from_directory(tiny_model_dir), from_directory(tiny_model_dir)
    replace_linears(quantized, "nf4")
    lora.add_adapter(quantized, LoraConfig(target_modules=["q_proj"]))
    lora.save_adapter(quantized, tmp_path)
    capsys.readouterr()
    passport = lora.load_adapter(dense, tmp_path)
    assert passport is not None
    assert (passport.format, passport.base_quantized_sha256 is None) == ("nf4", False)
    assert capsys.readouterr().err.count("trained over nf4") == 1


def test_an_int8_base_is_in_the_passport(tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    models = [from_directory(tiny_model_dir) for _ in range(2)]
    for model in models:
        replace_linears(model, "int8")
    lora.add_adapter(models[0], LoraConfig(target_modules=["q_proj"]))
    lora.save_adapter(models[0], tmp_path)
    capsys.readouterr()
    passport = lora.load_adapter(models[1], tmp_path)
    assert passport is not None
    assert (passport.format, passport.base_quantized_sha256 is None) == ("int8", False)
    assert "trained over" not in capsys.readouterr().err


def test_other_constants_of_the_same_format_are_noted(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [from_directory(tiny_model_dir) for _ in range(2)]
    for model, double_quant in zip(models, (True, False), strict=True):
        replace_linears(model, "nf4", double_quant=double_quant)
    lora.add_adapter(models[0], LoraConfig(target_modules=["q_proj"]))
    lora.save_adapter(models[0], tmp_path)
    lora.load_adapter(models[1], tmp_path)
    assert "with other constants" in on_one_line(capsys)


def test_the_same_base_in_the_same_format_passes_in_silence(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [from_directory(tiny_model_dir) for _ in range(2)]
    lora.add_adapter(models[0], LoraConfig(target_modules=["q_proj"]))
    lora.save_adapter(models[0], tmp_path)
    capsys.readouterr()
    lora.load_adapter(models[1], tmp_path)
    assert "adapter" not in capsys.readouterr().err


def test_an_adapter_without_passport_is_taken_with_a_note(
    tiny_llama: MakeLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    lora.add_adapter(model, LoraConfig(target_modules=["q_proj"]))
    lora.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file)
    assert lora.read_passport(tmp_path) is None
    assert lora.load_adapter(tiny_llama(seed=1), tmp_path) is None
    assert "no passport" in on_one_line(capsys)


@pytest.mark.parametrize("text", ["{", "[]", '{"base_name": "x"}'])
def test_a_broken_passport_is_said(text: str) -> None:
    with pytest.raises(CheckpointError, match="its passport is broken"):
        Passport.from_metadata({METADATA_KEY: text}, "x.safetensors")


def test_a_passport_of_a_later_version_is_read() -> None:
    passport = Passport("base", "f" * 64)
    metadata = passport.to_metadata()
    metadata[METADATA_KEY] = metadata[METADATA_KEY].replace("{", '{"something_new": 1, ', 1)
    assert Passport.from_metadata(metadata, "x") == passport


def test_the_tokenizers_hash_is_of_its_rules_not_of_its_last_call() -> None:
    one, two = make_tiny_tokenizer(), make_tiny_tokenizer()
    before = hash_tokenizer(one)
    one(["a", "long text"], padding=True, truncation=True, max_length=3)
    assert hash_tokenizer(one) == before == hash_tokenizer(two)
    two.add_tokens(["<new>"])
    assert hash_tokenizer(two) != before


def test_another_tokenizer_or_template_is_noted(tiny_llama: MakeLlama) -> None:
    tokenizer = make_tiny_tokenizer()
    passport = lora.make_passport(tiny_llama(), tokenizer)
    assert lora.tokenizer_notes(passport, tokenizer) == []
    tokenizer.chat_template += " "
    assert lora.tokenizer_notes(passport, tokenizer) == ["the adapter was trained with another chat template"]
    tokenizer.add_tokens(["<new>"])
    assert len(lora.tokenizer_notes(passport, tokenizer)) == 2
    unknown = replace(passport, tokenizer_sha256=None, chat_template_sha256=None)
    assert lora.tokenizer_notes(unknown, tokenizer) == []
