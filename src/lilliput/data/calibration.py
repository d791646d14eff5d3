"""Tokens to calibrate a quantization with: a text file, or rows with texts or chats, as segments of equal length.

A text file is one string of tokens; rows are joined by the tokenizer's end-of-text token, chats in the model's own
template. The segments are spread evenly over what the file has, so that a few of them see more of it than its
beginning. Source: GPTQ, arXiv 2210.17323, section 4 (128 segments of 2048 tokens). Not here: what is done with them
(models/calibrate.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lilliput.data.examples import load_examples
from lilliput.data.records import read_records
from lilliput.errors import DataError, UsageError
from lilliput.files import read_text

_PLAIN = (".txt", ".text", ".md", ".raw", ".tokens")
_TEXT = "text"  # the field of a row that is a text
# Of a file no more characters are read than some sixteen times what the segments can hold.
_CHARACTERS_A_TOKEN = 64


@dataclass(frozen=True)
class Calibration:
    """ids: int64 [segments, length]; available: tokens that were found in the file; origin: the file."""

    ids: Tensor
    available: int
    origin: str

    @property
    def tokens(self) -> int:
        """How many tokens the segments hold."""
        return self.ids.numel()


def load_calibration(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, samples: int = 128, length: int = 2048
) -> Calibration:
    """At most `samples` segments of `length` tokens from a text file or a file of rows (JSON, JSONL, CSV, Parquet).

    Rows have a field `text`, or are chats in any form that `lilliput tune` takes. A file with less than was asked for
    gives fewer segments, or a single shorter one.

    Raises:
        UsageError: samples below 1 or a length below 2.
        DataError: a file that is missing, empty or malformed, or that has fewer than two tokens.
    """
    if samples < 1 or length < 2:
        raise UsageError(f"{samples} samples of {length} tokens calibrate nothing", todo="Take 1 or more of 2 or more.")
    path = Path(path)
    limit = samples * length * _CHARACTERS_A_TOKEN
    if path.suffix.lower() in _PLAIN:
        ids = _ids(read_text(path, "Give --calibration a text or a file of rows.", limit), tokenizer)
    else:
        ids = _of_rows(path, tokenizer, limit)
    if len(ids) < 2:
        raise DataError(f"has {len(ids)} tokens; calibration needs thousands", where=str(path))
    return Calibration(_spread(torch.tensor(ids, dtype=torch.int64), samples, length), len(ids), str(path))


def _spread(ids: Tensor, samples: int, length: int) -> Tensor:
    """Segments [n, length] of ids [tokens], with equal gaps between them; n as many as fit, at most `samples`."""
    length = min(length, len(ids))
    count = min(samples, len(ids) // length)
    last = len(ids) - length
    starts = [last * i // max(count - 1, 1) for i in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def _of_rows(path: Path, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    records = read_records(path)
    if not all(isinstance(record.fields.get(_TEXT), str) for record in records):
        return _of_chats(path, tokenizer)
    ids: list[int] = []
    taken = 0
    for record in records:
        text = record.fields[_TEXT]
        ids += [*_ids(text, tokenizer), *_end(tokenizer)]
        taken += len(text)
        if taken >= limit:
            break
    return ids


def _of_chats(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every row rendered by the model's template; a row of any length counts, since rows are joined and cut again."""
    examples = load_examples(path, tokenizer, max_length=1 << 30, progress=False)
    return [token for example in examples for token in example.input_ids]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
