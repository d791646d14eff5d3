"""A tokenizer as metadata of a GGUF file: tokens with their types, merges or scores, special tokens, chat template.

Two kinds are written: byte-level BPE ("gpt2": Llama 3, Qwen, SmolLM, GPT-2), which needs its merges and the name
of how text is cut (pre_tokenizers.py), and sentencepiece's BPE ("llama": Llama 1 and 2, Mistral 7B, TinyLlama), which
needs a score a token. `tokenizer.json` holds no scores: the order of the merges is theirs, since a merge is tried the
earlier the higher its token's score.
Source: the GGUF specification; llama.cpp, convert_hf_to_gguf.py and src/llama-vocab.cpp.
Not here: WordPiece and unigram vocabularies, which no model has that is written as GGUF here.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lilliput.errors import CheckpointError
from lilliput.models.pre_tokenizers import PROBE, name_of

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"  # sentencepiece's
_OTHER_SCORES = {  # of what no merge makes, as llama.cpp's converter has it
    TokenType.BYTE: 0.0,
    TokenType.UNKNOWN: 0.0,
    TokenType.CONTROL: -1000.0,
    TokenType.USER_DEFINED: -1000.0,
    TokenType.UNUSED: -10000.0,
}
_SPECIAL = ("bos", "eos", "unk", "pad")
_ELSE = "Convert a directory that save_model wrote with llama.cpp's convert_hf_to_gguf.py."


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: "gpt2" or "llama".
        pre: how text is cut, by llama.cpp's name.
        tokens: their texts, by id; as many as the embedding has rows.
        types: a gguf.TokenType each.
        merges: pairs "left right", the first tried first; None for "llama".
        scores: a number a token, the highest merged first; None for "gpt2".
        special: ids of "bos", "eos", "unk", "pad", as far as there are such tokens.
        adds: whether a BOS goes in front of a text, and an EOS behind it.
        space_prefix: whether a blank goes in front of a text; None for "gpt2".
        chat_template: Jinja; or several by name; or None.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    special: dict[str, int]
    adds: dict[str, bool]
    space_prefix: bool | None
    chat_template: str | dict[str, str] | None

    def write(self, writer: GGUFWriter) -> None:
        """Add it to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        for name, wanted in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(wanted)
        if isinstance(self.chat_template, dict):
            writer.add_chat_template([{"name": name, "template": t} for name, t in self.chat_template.items()])
        elif self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Vocabulary:
    """Read a tokenizer off its own `tokenizer.json`; its model's config says how many tokens there are.

    Raises CheckpointError when it is of a kind that GGUF has no word for, has more tokens than the model, or changes or
    cuts text in a way that llama.cpp has no name for: the model would be shown other tokens than it was trained on.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise _unknown("is no tokenizer of the `tokenizers` library, which alone can be read here")
    backend: Any = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    kind = content["model"]["type"]
    if kind != "BPE":
        raise _unknown(f"is a {kind} tokenizer, and only byte-pair encoding is written")
    entries, types = _entries(content, config.vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    is_pieces = bool(content["model"].get("byte_fallback"))
    if is_pieces:
        types = _types_of_pieces(entries, types, content["model"].get("unk_token"))
    return Vocabulary(
        model="llama" if is_pieces else "gpt2",
        pre="default" if is_pieces else _cut(backend, content),
        tokens=entries,
        types=[int(kind) for kind in types],
        merges=None if is_pieces else merges,
        scores=_scores(entries, types, merges) if is_pieces else None,
        special=_special(tokenizer, config),
        adds=_adds(tokenizer),
        space_prefix=_prefixes(tokenizer) if is_pieces else None,
        chat_template=tokenizer.chat_template,
    )


def _unknown(what: str, todo: str = _ELSE) -> CheckpointError:
    return CheckpointError(what, where="the tokenizer", todo=todo)


def _entries(content: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types by id; ids without a token, which pad an embedding, are unused."""
    vocabulary: dict[str, int] = content["model"]["vocab"]
    added = {token["id"]: token for token in content["added_tokens"]}
    largest = max([*vocabulary.values(), *added])
    if largest >= size:
        raise _unknown(
            f"has tokens up to id {largest}, and the model an embedding of {size} rows",
            "Give the tokenizer that belongs to this model.",
        )
    texts = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    for text, number in vocabulary.items():
        texts[number], types[number] = text, TokenType.NORMAL
    for number, token in added.items():
        control = token["special"] or _looks_special(token["content"])
        texts[number] = token["content"] if control else token["content"].replace(_SPACE, " ")
        types[number] = TokenType.CONTROL if control else TokenType.USER_DEFINED
    return texts, types


def _looks_special(text: str) -> bool:
    """Some models say of tokens like <|eot|> that they are ordinary text; llama.cpp's converter does not believe it."""
    return (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))


def _types_of_pieces(texts: list[str], types: list[TokenType], unknown: str | None) -> list[TokenType]:
    """Sentencepiece has types of its own for the bytes that text falls back to, and for what is in no vocabulary."""
    named = {unknown: TokenType.UNKNOWN} if unknown else {}
    return [
        TokenType.BYTE if _BYTE.fullmatch(text) else named.get(text, kind)
        for text, kind in zip(texts, types, strict=True)
    ]


def _scores(texts: list[str], types: list[TokenType], merges: Iterable[str]) -> list[float]:
    """Minus the place at which the merges first make a token; letters, which nothing makes, come last."""
    places: dict[str, int] = {}
    for pair in merges:
        places.setdefault(pair.replace(" ", ""), len(places))
    return [
        -float(places.get(text, len(places))) if kind == TokenType.NORMAL else _OTHER_SCORES[kind]
        for text, kind in zip(texts, types, strict=True)
    ]


def _cut(backend: Any, content: dict[str, Any]) -> str:
    """The name of how a byte-level tokenizer cuts text."""
    # llama.cpp does not compose letters and marks (NFC) as some tokenizers do; nearly all text is composed already
    unchanged = (PROBE, unicodedata.normalize("NFC", PROBE))
    if backend.normalizer is not None and backend.normalizer.normalize_str(PROBE) not in unchanged:
        raise _unknown("changes text before it is cut, which llama.cpp would not do")
    name = name_of(backend, bool(content["model"].get("ignore_merges")))
    if name is None:
        raise _unknown("cuts text into words in a way that llama.cpp has no name for, as far as is known here")
    return name


def _special(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str, int]:
    """Ids by what they are for, as the tokenizer says, else the config."""
    found: dict[str, int] = {}
    for name in _SPECIAL:
        number = getattr(tokenizer, f"{name}_token_id", None)
        number = getattr(config, f"{name}_token_id", None) if number is None else number
        if isinstance(number, int) and 0 <= number < config.vocab_size:
            found[name] = number
    return found


def _adds(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether the tokenizer puts a BOS in front and an EOS behind, by what it does."""
    ids = tokenizer("a").input_ids
    ends = {"bos": ids[:1], "eos": ids[-1:]}
    return {name: end == [getattr(tokenizer, f"{name}_token_id")] for name, end in ends.items()}


def _prefixes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether "a" is read as " a"."""
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)
    return bool(pieces) and str(pieces[0]).startswith(_SPACE)
