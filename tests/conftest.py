"""What all rooms' tests share: real data, the real model, and a tiny random one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.classifiers import save_encoder

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network; hub code paths are tested on a local cache
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "Two tall trees stood by the river; the water was cold and clear, 12 345 67890.",
    "Order three boxes of tea for Friday, please. Yes: no, maybe!",
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data (../shared/data) is not on this machine")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The MODEL argument of the real small model, pulled once; `make test` pulls it before the tests."""
    from lilliput.errors import LilliputError
    from lilliput.models import pull

    try:
        pull("smollm2-135m-instruct")
    except LilliputError as error:
        pytest.skip(f"the real model cannot be had here: {error}")
    return "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 tokens with ChatML turns; no BOS."""
    return make_tiny_tokenizer()


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tiny tokenizer; the same one each time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


def make_tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random Llama of about 100,000 weights in float32, eval mode; keyword arguments change its config."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """The factory `make_tiny_llama(seed=0, **config_changes)`."""
    return make_tiny_llama


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Hugging Face directory with the tiny Llama and the tiny tokenizer; do not write into it."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    make_tiny_llama().save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tiny BERT and its WordPiece tokenizer; do not write into it."""
    return save_encoder(tmp_path_factory.mktemp("tiny-bert"))
