"""Exact match: what counts as the same answer, and that batches change nothing."""

from __future__ import annotations

import pytest
import torch

from lilliput.data import Chat, Turn, prompt_ids
from lilliput.errors import DataError, UsageError
from lilliput.evaluation import exact_match
from lilliput.evaluation.exact_match import same_answer

QUESTIONS = ["Hi", "What is the capital of France?", "Order three boxes of tea for Friday, please.", "Two tall trees"]


def _chats(answers=("x", "x", "x", "x")):
    pairs = zip(QUESTIONS, answers, strict=True)
    return [Chat((Turn("user", question), Turn("assistant", answer)), f"t:{question}") for question, answer in pairs]


@pytest.fixture(scope="module")
def model():
    from tests.conftest import make_tiny_llama

    return make_tiny_llama(seed=1)


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ('{"a": 1, "b": null}', '{"b":null,"a":1}', True),
        ('  {"a":1}\n', '{"a": 1}', True),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": 1.0}', '{"a": 1}', False),
        ('{"a": 1, "b": 2}', '{"a": 1}', False),
        ('{"a": "X"}', '{"a": "x"}', False),
        ('Sure: {"a": 1}', '{"a": 1}', False),
        ('{"a": 1', '{"a": 1}', False),
        ("[" * 100_000, '{"a": 1}', False),
        ("", '{"a": 1}', False),
        (" Paris ", "Paris", True),
        ("paris", "Paris", False),
    ],
)
def test_same_answer(answer, expected, same):
    assert same_answer(answer, expected) is same


def test_batched_answers_are_those_of_each_prompt_alone(model, tiny_tokenizer):
    alone = [_greedy(model, tiny_tokenizer, chat, 12) for chat in _chats()]
    for batch_size in (1, 3, 4):
        found = exact_match(model, tiny_tokenizer, _chats(), max_new_tokens=12, batch_size=batch_size, progress=False)
        assert found.answers == alone


def _greedy(model, tokenizer, chat, steps):
    """The slow path: one prompt, no cache, the most likely token again and again."""
    ids = prompt_ids(chat.prompt, tokenizer)
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids = [*ids, token]
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_exact_counts_the_right_answers(model, tiny_tokenizer):
    said = exact_match(model, tiny_tokenizer, _chats(), max_new_tokens=5, progress=False).answers
    assert all(said), "the tiny model says something to every question"
    right = [said[0], "no", said[2], "no"]
    found = exact_match(model, tiny_tokenizer, _chats(right), max_new_tokens=5, batch_size=2, progress=False)
    assert (found.rows, found.exact, found.answers) == (4, 2, said)


def test_an_answer_ends_with_the_turn(model, tiny_tokenizer):
    """A model that can only say the end of the turn answers nothing."""
    from tests.conftest import make_tiny_llama

    mute = make_tiny_llama(seed=1)
    torch.nn.init.zeros_(mute.lm_head.weight)
    mute.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(2), 512).float())
    assert exact_match(mute, tiny_tokenizer, _chats(), progress=False).answers == [""] * 4


def test_no_chat_is_refused(model, tiny_tokenizer):
    with pytest.raises(DataError, match="no rows"):
        exact_match(model, tiny_tokenizer, [], progress=False)


def test_a_chat_without_an_answer_is_refused_with_its_place(model, tiny_tokenizer):
    with pytest.raises(DataError, match=r"my\.jsonl:3.*assistant"):
        exact_match(model, tiny_tokenizer, [Chat((Turn("user", "Hi"),), "my.jsonl:3")], progress=False)


@pytest.mark.parametrize("option", ["max_new_tokens", "batch_size"])
def test_numbers_below_one_are_refused(model, tiny_tokenizer, option):
    with pytest.raises(UsageError, match=f"{option}=0"):
        exact_match(model, tiny_tokenizer, _chats(), progress=False, **{option: 0})
