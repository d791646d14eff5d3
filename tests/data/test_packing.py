"""Packing: the picture of the module, the properties, and that a packed row computes what its sequences do alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from lilliput.data import Example, Pack, collate, pack, packing
from lilliput.errors import DataError

A = Example([11, 12, 13], [False, False, True])
B = Example([21, 22, 23, 24], [False, False, True, True])


def test_the_picture_in_the_docstring() -> None:
    (row,) = pack([A, B], 8)
    assert row == Pack.of([B, A])  # the longer first; the picture has them the other way round
    padded = collate([Pack.of([A, B]), Pack.of([Example(list(range(8)), [True] * 8)])], pad_token_id=9)
    batch = {name: tensor[0] for name, tensor in padded.items()}
    lines = [line.split("    ", 1)[1] for line in str(packing.__doc__).splitlines() if line.startswith("    ")]
    drawn = {line.split()[0]: line.split()[1:9] for line in lines[:5]}
    drawn_mask = [line[15:].split()[:8] for line in lines[4:]]
    assert batch["position_ids"].tolist() == [int(cell) for cell in drawn["position_ids"]]
    assert batch["input_ids"].tolist() == [11, 12, 13, 21, 22, 23, 24, 9]
    assert [{"1": "a", "2": "b", "9": "."}[str(token)[0]] for token in batch["input_ids"].tolist()] == [
        cell.lower() for cell in drawn["input_ids"]
    ]
    labels = [
        token if cell != "-" else -100 for token, cell in zip(batch["input_ids"].tolist(), drawn["labels"], strict=True)
    ]
    assert batch["labels"].tolist() == labels
    assert [
        [" x"[cell].replace(" ", ".") for cell in row] for row in batch["attention_mask"][0].int().tolist()
    ] == drawn_mask


examples_of_any_length = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=20).map(lambda mask: Example(list(range(100, 100 + len(mask))), mask)),
    max_size=30,
)


def sequences(row: Pack) -> list[Example]:
    """The examples of a row again."""
    found = []
    for number in sorted(set(row.sequence_ids)):
        places = [place for place, sequence in enumerate(row.sequence_ids) if sequence == number]
        assert places == list(range(places[0], places[0] + len(places)))
        assert [row.position_ids[place] for place in places] == list(range(len(places)))
        found.append(Example([row.input_ids[place] for place in places], [row.label_mask[place] for place in places]))
    return found


@settings(deadline=None, derandomize=True)
@given(examples=examples_of_any_length, length=st.integers(20, 64))
def test_packing_loses_nothing_and_keeps_to_the_length(examples: list[Example], length: int) -> None:
    rows = pack(examples, length)
    assert rows == pack(examples, length)
    assert all(0 < len(row) <= length for row in rows)
    for row in rows:
        assert len(row.input_ids) == len(row.label_mask) == len(row.position_ids) == len(row.sequence_ids)

    def key(example: Example) -> tuple[list[int], list[bool]]:
        return example.input_ids, example.label_mask

    assert sorted((e for row in rows for e in sequences(row)), key=key) == sorted(examples, key=key)
    # no two rows are half empty: they would have gone into one
    assert sum(2 * len(row) <= length for row in rows) <= 1


@settings(deadline=None, derandomize=True)
@given(examples=examples_of_any_length.filter(bool), length=st.integers(20, 48))
def test_a_batch_says_what_its_packs_say(examples: list[Example], length: int) -> None:
    rows = pack(examples, length)
    batch = collate(rows, pad_token_id=7)
    width = max(len(row) for row in rows)
    for number, row in enumerate(rows):
        padding = width - len(row)
        assert batch["input_ids"][number].tolist() == row.input_ids + [7] * padding
        assert batch["position_ids"][number].tolist() == row.position_ids + [0] * padding
        for place in range(width):
            real = place < len(row)
            label = real and row.label_mask[place] and row.position_ids[place] > 0
            assert batch["labels"][number, place] == (row.input_ids[place] if label else -100)
            first = place - row.position_ids[place] if real else place
            seen = batch["attention_mask"][number, 0, place].nonzero().flatten().tolist()
            assert seen == list(range(first, place + 1))


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:3: has 4 tokens; a packed row takes 1 to 3"):
        pack([A, Example(B.input_ids, B.label_mask, "rows.jsonl:3")], 3)
    with pytest.raises(DataError, match="has 0 tokens"):
        pack([Example([], [])], 3)


def test_no_label_crosses_from_one_sequence_to_the_next() -> None:
    always = Example([5, 6], [True, True])
    assert collate([Pack.of([always, always])], 0)["labels"].tolist() == [[-100, 6, -100, 6]]


def random_examples(lengths: list[int], seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Example(torch.randint(3, 512, (n,), generator=generator).tolist(), [False] * (n // 2) + [True] * (n - n // 2))
        for n in lengths
    ]


def test_packed_logits_equal_unpacked_logits(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(attn_implementation="sdpa").double()
    examples = random_examples([7, 30, 1, 12, 25, 5])
    rows = pack(examples, 40)
    assert len(rows) < len(examples)
    batch = collate(rows, pad_token_id=0)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        packed = model(**inputs).logits
        for number, row in enumerate(rows):
            start = 0
            for example in sequences(row):
                alone = model(torch.tensor([example.input_ids])).logits[0]
                torch.testing.assert_close(packed[number, start : start + len(example)], alone, rtol=1e-9, atol=1e-9)
                start += len(example)
    assert packed.isfinite().all()


def test_a_padded_batch_of_single_examples_gives_the_same_loss(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(attn_implementation="sdpa").double()
    examples = random_examples([7, 30, 12])
    losses = []
    for rows in (pack(examples, 64), [Pack.of([example]) for example in examples]):
        batch = collate(rows, pad_token_id=0)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
