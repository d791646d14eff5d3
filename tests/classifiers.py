"""Tiny random encoders with a WordPiece tokenizer, and texts that they can learn to tell apart."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FILLERS = ["the", "a", "film", "plot", "cast", "was", "is", "and", "very", "it", "story", "##s"]
GOOD, BAD = ["good", "superb"], ["bad", "awful"]
_SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "initializer_range": 0.1,  # so that random words differ enough to be told apart
}
_GPT2 = {
    "vocab_size": 32,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def make_wordpiece() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer that writes [CLS] text [SEP]; at most 64 tokens."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *FILLERS, *GOOD, *BAD])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def make_encoder(kind: str = "bert", seed: int = 0) -> PreTrainedModel:
    """A random encoder of about 50,000 weights, float32, in evaluation mode."""
    torch.manual_seed(seed)
    build = {
        "bert": lambda: BertModel(BertConfig(**_SIZES, max_position_embeddings=64)),
        "bert without pooler": lambda: BertForMaskedLM(BertConfig(**_SIZES, max_position_embeddings=64)),
        "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**_SIZES, max_position_embeddings=65)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    }
    return build[kind]().eval()


def save_encoder(directory: Path, kind: str = "bert") -> Path:
    """A Hugging Face directory with a tiny encoder and its tokenizer."""
    make_encoder(kind).save_pretrained(directory)
    make_wordpiece().save_pretrained(directory)
    return directory


def opinions(count: int, labels: tuple[str, str] = ("0", "1")) -> list[tuple[str, str]]:
    """(text, label) of different lengths; three words tell the label."""
    rng, rows = random.Random(0), []
    for i in range(count):
        told = rng.choices((BAD, GOOD)[i % 2], k=3)
        rows.append((" ".join(["film", *told, *rng.choices(FILLERS[:-1], k=rng.randint(0, 3))]), labels[i % 2]))
    return rows


def write_tsv(path: Path, rows: list[tuple[str, str]], header: str = "") -> Path:
    """Tab-separated lines, behind a header where one is given."""
    path.write_text(header + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return path
