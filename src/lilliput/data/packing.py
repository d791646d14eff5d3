"""Examples side by side in one row, each as if it were alone.

Two chats of 3 and 4 tokens (`a` and `b`; capitals are labels) in a row of eight, the last place is padding:

    sequence        0  0  0  1  1  1  1  -
    input_ids       a  a  A  b  b  B  B  .
    labels          -  -  A  -  -  B  B  -        labels[t] is token t itself: the loss shifts, as Hugging Face's does
    position_ids    0  1  2  0  1  2  3  0
    attention_mask  x  .  .  .  .  .  .  .        row: who looks; column: at whom
                    x  x  .  .  .  .  .  .
                    x  x  x  .  .  .  .  .
                    .  .  .  x  .  .  .  .
                    .  .  .  x  x  .  .  .
                    .  .  .  x  x  x  .  .
                    .  .  .  x  x  x  x  .
                    .  .  .  .  .  .  .  x        padding sees itself, so that its softmax is no 0/0

Not here: kernels that make use of the blocks (the mask says which they are), splitting an example over two rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.data.examples import Example
from lilliput.errors import DataError

NO_LABEL = -100  # what torch's and transformers' losses leave out


@dataclass(frozen=True)
class Pack:
    """One row: lists of the same length, an entry a token. `sequence_ids` counts the examples of the row from 0,
    `position_ids` the tokens of each of them."""

    input_ids: list[int]
    label_mask: list[bool]
    position_ids: list[int]
    sequence_ids: list[int]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Pack:
        """The examples one after the other; a single one is an unpacked row."""
        return cls(
            input_ids=[token for example in examples for token in example.input_ids],
            label_mask=[label for example in examples for label in example.label_mask],
            position_ids=[position for example in examples for position in range(len(example))],
            sequence_ids=[number for number, example in enumerate(examples) for _ in range(len(example))],
        )

    def __len__(self) -> int:
        return len(self.input_ids)


def pack(examples: Sequence[Example], length: int) -> list[Pack]:
    """Put all examples into rows of at most `length` tokens, none split, none lost; the same rows each time.

    Best-fit decreasing: the longest first, each into the fullest row that still has room for it.

    Raises DataError for an example that is empty or longer than `length`.
    """
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]))  # stable: ties in file order
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for index in order:
        example = examples[index]
        if not 0 < len(example) <= length:
            what = f"has {len(example):,} tokens; a packed row takes 1 to {length:,}"
            raise DataError(what, where=example.origin or None, todo="Drop or truncate such examples, or raise length.")
        place = bisect_left(room, (len(example), 0))
        free, row = room.pop(place) if place < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        if left := free - len(example):
            insort(room, (left, row))
    return [Pack.of(row) for row in rows]


def collate(packs: Sequence[Pack], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of B rows, padded at the right to the longest, T tokens.

    Returns:
        input_ids: int64 [B, T].
        labels: int64 [B, T], the token itself where it is a label, else -100; never at the first token of a sequence,
            which nothing precedes. `logits[:, t]` is to be compared with `labels[:, t + 1]`.
        position_ids: int64 [B, T], from 0 in every sequence; 0 at padding.
        attention_mask: bool [B, 1, T, T], True where the token of the row may attend to that of the column: causal,
            within its sequence. As transformers takes it for "sdpa" attention.
    """
    width = max(len(row) for row in packs)
    input_ids = torch.full((len(packs), width), pad_token_id)
    position_ids = torch.zeros((len(packs), width), dtype=torch.int64)
    sequence_ids = torch.full((len(packs), width), -1)
    label_mask = torch.zeros((len(packs), width), dtype=torch.bool)
    for number, row in enumerate(packs):
        here = (number, slice(0, len(row)))
        input_ids[here] = torch.tensor(row.input_ids)
        position_ids[here] = torch.tensor(row.position_ids)
        sequence_ids[here] = torch.tensor(row.sequence_ids)
        label_mask[here] = torch.tensor(row.label_mask)
    labels = input_ids.masked_fill(~label_mask | (position_ids == 0), NO_LABEL)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "attention_mask": _attention_mask(sequence_ids),
    }


def _attention_mask(sequence_ids: Tensor) -> Tensor:
    """bool [B, 1, T, T] from int64 [B, T], -1 at padding."""
    width = sequence_ids.shape[1]
    same = sequence_ids[:, :, None] == sequence_ids[:, None, :]
    real = (sequence_ids >= 0)[:, :, None]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    itself = torch.eye(width, dtype=torch.bool)
    return (same & real & causal | itself)[:, None]
