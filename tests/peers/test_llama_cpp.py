"""What we write as GGUF, in llama.cpp itself: the same logits, tokens and chat template; adapters too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lilliput import lora
from lilliput.layers import replace_linears
from lilliput.models import load_model, save_gguf, save_lora_gguf
from lilliput.models.pre_tokenizers import CUTS, PROBE
from tests.models.conftest import make_model
from tests.models.pieces import SIZE, as_fast, train_pieces
from tests.models.test_gguf import llama3

llama_cpp = pytest.importorskip("llama_cpp", reason="comparisons with llama.cpp need llama-cpp-python")

IDS = [(7 * i + 3) % 500 + 3 for i in range(40)]
FLOAT32 = 0  # ggml's number of the type, for keys and values, which are float16 otherwise
TEXTS = [
    "What is the capital of France? The capital",
    "  two  blanks\n\n and 12345 lines\tor so \n",
    "It's a naïve 🦙, isn't it? Order three boxes!",
    "<|im_start|>user\nHi<|im_end|>\n",
    PROBE,
]


def opened(path: Path, adapter: Path | None = None) -> Any:
    """A file in llama.cpp, computing with keys and values in float32."""
    lora_path = None if adapter is None else str(adapter)
    return closing(
        llama_cpp.Llama(
            str(path), lora_path=lora_path, n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True,
            type_k=FLOAT32, type_v=FLOAT32, verbose=False,
        )
    )  # fmt: skip


def their_logits(path: Path, adapter: Path | None = None) -> torch.Tensor:
    """Of all of IDS, [tokens, vocabulary]."""
    with opened(path, adapter) as model:
        model.eval(IDS)
        return torch.from_numpy(np.array(model.scores[: len(IDS)]))


def our_logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def bound(kind: str) -> float:
    """Of the distance in float32; GPT-2's GELU is looked up in a table of float16 there."""
    return 2e-4 if kind == "gpt2" else 2e-6


# ---- models ------------------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{kind: lambda kind=kind: make_model(kind) for kind in ("llama", "llama-tied", "qwen2", "qwen3", "phi3", "gpt2")},
    "llama3": lambda: llama3(8.0),
}


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_ours(kind: str, tmp_path: Path, tiny_tokenizer) -> None:
    model = MODELS[kind]()
    path = save_gguf(model, tmp_path / "tiny.gguf", tiny_tokenizer, "f32", progress=False).path
    assert distance(their_logits(path), our_logits(model)) < bound(kind)


def test_biases_and_wide_heads_are_read(tmp_path: Path, tiny_tokenizer, tiny_llama) -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True, head_dim=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    path = save_gguf(model, tmp_path / "tiny.gguf", tiny_tokenizer, "f32", progress=False).path
    assert distance(their_logits(path), our_logits(model)) < 2e-6


@pytest.mark.parametrize(("type", "most"), [("f16", 1e-3), ("q8_0", 0.015), ("q4_1", 0.015), ("q4_0", 0.015)])
def test_each_type_is_what_we_read_of_it(
    type: str, most: float, tmp_path: Path, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp rounds what it multiplies blocks with to 8 bits; the weights are the same."""
    monkeypatch.setenv("LILLIPUT_HOME", str(tmp_path / "cache"))
    path = save_gguf(make_model("llama"), tmp_path / "tiny.gguf", tiny_tokenizer, type, progress=False).path
    assert distance(their_logits(path), our_logits(load_model(path, progress=False))) < most


def test_a_quantized_model_and_rows_that_are_not_cut(tmp_path: Path, tiny_tokenizer, tiny_llama) -> None:
    model = tiny_llama(intermediate_size=72)
    replace_linears(model, "nf4")
    path = save_gguf(model, tmp_path / "tiny.gguf", tiny_tokenizer, "q8_0", progress=False).path
    assert distance(their_logits(path), our_logits(model)) < 0.03


# ---- tokenizers --------------------------------------------------------------------------------------------------


def check_tokens(path: Path, tokenizer: Any, texts: list[str]) -> None:
    with opened(path) as model:
        for text in texts:
            found = model.tokenize(text.encode(), add_bos=True, special=True)
            assert found == tokenizer(text).input_ids, text


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.names[0])
def test_text_becomes_the_same_tokens(cut: Any, tmp_path: Path, tiny_tokenizer) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = cut.pre_tokenizer()
    tokenizer.backend_tokenizer.model.ignore_merges = cut.ignore_merges
    path = save_gguf(make_model("llama"), tmp_path / "tiny.gguf", tokenizer, progress=False).path
    check_tokens(path, tokenizer, TEXTS)


def test_sentencepiece_becomes_the_same_tokens(tmp_path: Path, tiny_llama) -> None:
    tokenizer = as_fast(train_pieces())
    model = tiny_llama(vocab_size=SIZE, bos_token_id=1)
    path = save_gguf(model, tmp_path / "tiny.gguf", tokenizer, progress=False).path
    check_tokens(path, tokenizer, [text for text in TEXTS if "<|" not in text])


def test_special_tokens_and_template_are_known(tmp_path: Path, tiny_tokenizer) -> None:
    path = save_gguf(make_model("llama"), tmp_path / "tiny.gguf", tiny_tokenizer, progress=False).path
    with opened(path) as model:
        assert model.token_eos() == tiny_tokenizer.eos_token_id
        assert model.n_vocab() == 512
        assert model.metadata["tokenizer.chat_template"] == tiny_tokenizer.chat_template


# ---- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gpt2"])
def test_an_adapter_gives_our_logits(kind: str, tmp_path: Path, tiny_tokenizer) -> None:
    model = make_model(kind)
    base = save_gguf(model, tmp_path / "base.gguf", tiny_tokenizer, "f32", progress=False).path
    plain = our_logits(model)
    torch.manual_seed(1)
    fields = {"target_modules": "all-linear", "alpha_pattern": {"q_proj": 3, "c_fc": 3, "down_proj": 5}}
    lora.add_adapter(model, lora.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **fields))
    adapter = save_lora_gguf(model, tmp_path / "adapter.gguf").path
    tuned = our_logits(model)
    assert distance(tuned, plain) > 0.1
    assert distance(their_logits(base, adapter), tuned) < bound(kind)


def test_an_adapter_of_table_and_head_gives_our_logits(tmp_path: Path, tiny_tokenizer) -> None:
    model = make_model("llama")
    base = save_gguf(model, tmp_path / "base.gguf", tiny_tokenizer, "f32", progress=False).path
    torch.manual_seed(1)
    targets = ["embed_tokens", "lm_head", "o_proj"]
    lora.add_adapter(model, lora.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapter = save_lora_gguf(model, tmp_path / "adapter.gguf").path
    assert distance(their_logits(base, adapter), our_logits(model)) < 2e-6
