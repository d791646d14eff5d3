"""The demo data: what a row promises, and that the held-out rows hold nothing that training could have shown."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import fields

import pytest
from rapidfuzz import fuzz, process

from lilliput.data import Record, make_example, to_chat
from lilliput.data.demo import SYSTEM, TASK, demo_rows
from lilliput.data.demo_words import HELDOUT, KINDS, TRAIN, Words

KEYS = ["kind", "name", "item", "count", "day"]
COPIED = ("name", "item", "day")
SPLITS = ("train", "heldout")
NUMBERS = {"one", "1", *TRAIN.numbers, *HELDOUT.numbers}
SLOT = re.compile(r"\{\w+\}")


def _wordings(words: Words) -> set[str]:
    """All wordings of a set, without case and final punctuation."""
    flat = [*words.greetings, *words.introductions, *words.farewells, *words.signatures]
    flat += [line for table in (words.bodies, words.day_endings) for lines in table.values() for line in lines]
    return {line.strip(" .,!").lower() for line in flat}


def _entities(words: Words) -> set[str]:
    lists = (words.first_names, words.surnames, words.goods, words.bookables, words.either, words.weekdays, words.dates)
    lists = (*lists, words.some, tuple(words.numbers))
    return {entity.lower() for entities in lists for entity in entities if entity}


@pytest.mark.parametrize("split", SPLITS)
def test_the_seed_decides_and_a_longer_set_begins_with_the_shorter(split):
    assert demo_rows(split, 40, seed=3) == demo_rows(split, 90, seed=3)[:40]
    assert demo_rows(split, 40, seed=3) != demo_rows(split, 40, seed=4)


def test_rows_are_the_same_on_every_machine():
    row = demo_rows("heldout", 1, seed=0)[0]
    assert (
        row.message == "It's Mary again. by Thursday morning we need nine winter coats in our store. Have a nice day!"
    )
    assert row.answer == '{"kind":"order","name":"Mary","item":"winter coats","count":9,"day":"Thursday morning"}'


@pytest.mark.parametrize("split", SPLITS)
def test_rows_differ_and_kinds_are_equally_often(split):
    rows = demo_rows(split, 400)
    assert len({row.message for row in rows}) == 400
    assert Counter(row.record["kind"] for row in rows) == dict.fromkeys(KINDS, 100)


@pytest.mark.parametrize("split", SPLITS)
def test_an_answer_is_json_with_the_five_keys_in_order(split):
    for row in demo_rows(split, 200):
        record = json.loads(row.answer)
        assert list(record) == KEYS
        assert record == row.record
        assert record["count"] is None or type(record["count"]) is int


@pytest.mark.parametrize("split", SPLITS)
def test_the_message_says_what_is_copied_and_nothing_that_is_null(split):
    words = {"train": TRAIN, "heldout": HELDOUT}[split]
    for row in demo_rows(split, 400):
        for key in COPIED:
            assert row.record[key] is None or str(row.record[key]) in row.message
        said = set(re.findall(r"\w+", row.message))
        if row.record["count"] is None and row.record["day"] is None:
            assert not said & NUMBERS, row.message
        if row.record["count"] is not None:
            spellings = {spelling for spelling, number in words.numbers.items() if number == row.record["count"]}
            assert said & spellings, row.message
        if row.record["name"] is None:
            assert not said & (set(words.first_names) | set(words.surnames)), row.message
        assert not SLOT.search(row.message)


@pytest.mark.parametrize("split", SPLITS)
def test_every_optional_field_is_sometimes_missing(split):
    rows = demo_rows(split, 100)
    for key in ("name", "count", "day"):
        missing = sum(row.record[key] is None for row in rows)
        assert 10 <= missing <= 60, (key, missing)


def test_the_two_sets_share_no_entity():
    assert not _entities(TRAIN) & _entities(HELDOUT)
    assert not set(TRAIN.numbers.values()) & set(HELDOUT.numbers.values())


def test_the_two_sets_share_no_wording():
    assert not _wordings(TRAIN) & _wordings(HELDOUT)
    assert not set(TRAIN.the) & set(HELDOUT.the)


def test_no_held_out_wording_is_nearly_one_of_training():
    train = _wordings(TRAIN)
    for wording in _wordings(HELDOUT):
        nearest, score, _ = process.extractOne(wording, train, scorer=fuzz.ratio)
        assert score < 90, (wording, nearest)


def test_generated_rows_share_no_value_but_the_kind():
    train, heldout = demo_rows("train", 2000), demo_rows("heldout", 500)
    for key in ("name", "item", "count", "day"):
        seen = {row.record[key] for row in train} - {None}
        asked = {row.record[key] for row in heldout} - {None}
        assert not seen & asked, key


def test_no_list_says_a_thing_twice():
    for words in (TRAIN, HELDOUT):
        for field in fields(words):
            value = getattr(words, field.name)
            for entries in value.values() if field.name in ("bodies", "day_endings") else (value,):
                assert len(set(entries)) == len(entries), field.name


def test_wordings_have_the_slots_they_need_and_no_others():
    for words in (TRAIN, HELDOUT):
        assert all(SLOT.findall(line) == ["{name}"] for line in (*words.introductions, *words.signatures))
        assert not any(SLOT.search(line) for line in (*words.greetings, *words.farewells))
        for kind in KINDS:
            assert all(SLOT.findall(line) == ["{day}"] for line in words.day_endings[kind])
            for body in words.bodies[kind]:
                slots = set(SLOT.findall(body))
                assert slots - {"{day}"} in ({"{items}"}, {"{the_items}"}), body


def test_some_sentences_have_a_typo():
    known = {word for line in _wordings(TRAIN) for word in re.findall(r"[a-z]+", SLOT.sub("", line))}
    known |= {word for entity in _entities(TRAIN) for word in re.findall(r"[a-z]+", entity)}
    known |= {"the", "my", "our", "those", "ll", "we", "i"}
    odd = sum(bool(set(re.findall(r"[a-z]+", row.message.lower())) - known) for row in demo_rows("train", 400))
    assert 40 <= odd <= 120


def test_a_row_becomes_an_example_whose_labels_are_the_answer(tiny_tokenizer):
    row = demo_rows("train", 1)[0]
    example = make_example(to_chat(Record(row.as_messages(), "demo:1")), tiny_tokenizer)
    labelled = [token for token, label in zip(example.input_ids, example.label_mask, strict=True) if label]
    assert tiny_tokenizer.decode(labelled) == row.answer + "<|im_end|>"
    said = tiny_tokenizer.decode(example.input_ids)
    assert SYSTEM in said
    assert f"{TASK}\n\n{row.message}" in said
