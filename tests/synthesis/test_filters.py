"""Self-Instruct's filter: every reason, what is just allowed, and that real data passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lilliput.synthesis.filters import (
    INSTANCE_CHECKS,
    INSTRUCTION_CHECKS,
    KEYWORDS,
    Refusal,
    Rules,
    refuse_instance,
    refuse_instruction,
    repeated_share,
    sift,
)

REFUSED = {
    "": "too short",
    "Name three fruits": "too short",
    "word " * 151: "too long",
    "Describe the picture of a lake in spring.": "key word",
    "Put this into a GRAPH, please.": "key word",
    "How do I go to the station?": "key word",
    "Write a program that adds two numbers.": "unclear program",
    "- list three kinds of bread": "starts with punctuation",
    "Écris un poème sur la mer.": "starts with a letter that is not ASCII",
    "Say hello to him and " * 5: "repeats itself",
    "Explain this half \ud83d of a smile.": "half a character",
}
TAKEN = (
    "Name three fruits quickly",
    "word " * 4 + " ".join(f"w{number}" for number in range(146)),
    "Explain photography and mapping to a filer.",  # no key word is inside a word
    "Rewrite a program of a concert.",
    "3 reasons to sleep well?",
)


@pytest.mark.parametrize("text", REFUSED)
def test_instructions_that_are_refused(text: str) -> None:
    refusal = refuse_instruction(text)
    assert refusal is not None
    assert refusal.reason == REFUSED[text]
    assert refusal.detail


@pytest.mark.parametrize("text", TAKEN)
def test_instructions_that_are_taken(text: str) -> None:
    assert refuse_instruction(text) is None


def test_every_reason_is_tested() -> None:
    assert set(REFUSED.values()) == {reason for reason, _ in INSTRUCTION_CHECKS}
    assert set(BAD_INSTANCES.values()) == {reason for reason, _ in INSTANCE_CHECKS}


def test_key_words_of_the_paper() -> None:
    assert {"image", "picture", "graph"} <= set(KEYWORDS)


def test_other_languages() -> None:
    rules = Rules(unicode=True)
    assert refuse_instruction("Écris un poème sur la mer.", rules) is None
    assert refuse_instruction("写一首关于秋天的诗", rules) is None  # nine signs without a space
    assert refuse_instruction("写诗", rules) == Refusal("too short", "2 words")
    assert refuse_instruction("写一首关于秋天的诗") == Refusal("too short", "1 words")


BAD_INSTANCES = {
    ("Add.", "1, 2", "  "): "no output",
    ("Copy it.", "one  two", "one two"): "output equals input",
    ("Say what I say.", "", "Say what I say."): "output equals instruction",
    ("List fruits.", "", "Here are three fruits:"): "unfinished",
    ("Answer.", "The question:", "42"): "unfinished",
    ("Sing.", "", "la la la la " * 5): "output repeats itself",
    ("Smile.", "", "\ud83d"): "half a character",
}


@pytest.mark.parametrize("case", BAD_INSTANCES)
def test_instances_that_are_refused(case: tuple[str, str, str]) -> None:
    refusal = refuse_instance(*case)
    assert refusal is not None
    assert refusal.reason == BAD_INSTANCES[case]


def reasons(pairs: list[tuple[str, str]], *, classification: bool = False, most: int = 5) -> list[str]:
    verdicts = sift("Do it.", pairs, classification=classification, most=most)
    return [verdict.reason if verdict else "" for verdict in verdicts]


def test_instances_that_contradict_each_other_all_go() -> None:
    contradiction = "same input, different outputs"
    assert reasons([("2", "even"), ("3", "odd"), ("2", "odd")]) == [contradiction, "", contradiction]


def test_without_input_there_may_be_many_outputs() -> None:
    assert reasons([("", "a poem"), ("", "another poem")]) == ["", ""]
    assert reasons([("", "yes"), ("", "no")], classification=True) == ["same input, different outputs"] * 2


def test_a_repeated_instance_stays_once() -> None:
    assert reasons([("2", "even"), ("2", "even"), ("4", "even")]) == ["", "duplicate instance", ""]


def test_a_fault_of_its_own_comes_first() -> None:
    """What is empty is no contradiction to what is not."""
    assert reasons([("2", ""), ("2", "even")]) == ["no output", ""]


def test_labels_are_balanced() -> None:
    more = "more of one label"
    pairs = [("a", "good"), ("b", "good"), ("c", "good"), ("d", "bad")]
    assert reasons(pairs, classification=True) == ["", "", more, ""]
    assert reasons(pairs) == [""] * 4
    assert reasons(pairs[:3], classification=True) == ["", more, more]  # one label alone teaches nothing


def test_no_more_than_wanted() -> None:
    assert reasons([("a", "1"), ("b", "2"), ("c", "3")], most=2) == ["", "", "more instances than wanted"]


def test_repeated_share_of_small_cases() -> None:
    assert repeated_share("one two three") == 0.0
    assert repeated_share("a b c d e f g h i j") == 0.0
    assert repeated_share("a b c " * 4) == pytest.approx(1 - 3 / 10)  # ten runs of three words, three kinds


def test_real_rows_pass(shared_data: Path) -> None:
    """Of 999 rows three are refused, with good reason: two outputs are the input, one input ends in a colon."""
    rows = json.loads((shared_data / "alpaca-en-1k.json").read_text(encoding="utf-8"))
    refused = [refuse_instance(row["instruction"], row["input"], row["output"]) for row in rows]
    found = sorted(refusal.reason for refusal in refused if refusal)
    assert found == ["output equals input", "output equals input", "unfinished"]
    assert not any(refuse_instruction(row["instruction"]) for row in rows)
