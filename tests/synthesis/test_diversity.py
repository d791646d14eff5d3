"""Verbs and nouns of instructions: the rules on sentences that people wrote, and how often they find something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lilliput.synthesis.diversity import Deed, Variety, deed_of, rings, singular

CASES = {
    "Write a short story about a fox.": ("write", "story"),
    "Please write a short, funny story.": ("write", "story"),
    "Give me three tips for staying healthy.": ("give", "tip"),
    "Could you please summarise the following article in two lines?": ("summarise", "article"),
    "Given a list of numbers, find all possible subsets that sum to ten.": ("find", "subset"),
    "Using the facts given, write a question-answer pair.": ("write", "pair"),
    "You are given a sentence. Rewrite it so that it rhymes. Keep the verb.": ("keep", "verb"),
    "In this task, you need to compare the meaning of two sentences.": ("compare", "meaning"),
    "Come up with a name for a bakery": ("come", "name"),
    "Turn down a job offer by letter": ("turn", "offer"),
    "Describe the kinds of clouds.": ("describe", "cloud"),
    "Re-write this paragraph as a poem": ("rewrite", "paragraph"),
    "Generate a reply given the history.": ("generate", "reply"),
    "Sort the given list ascendingly.": ("sort", "list"),
    "How do I remove a coffee stain from silk?": ("remove", "stain"),
    "Explain why the sky is blue.": ("explain", ""),
    "Tell me whether this is true.": ("tell", ""),
    "What is the capital of France?": ("", ""),
    "Answer: 42": ("", ""),
    "Order of the planets?": ("", ""),
    "Schreibe ein Gedicht über Regen.": ("", ""),
    "写一首关于雨的诗。": ("", ""),
    "…": ("", ""),
    "": ("", ""),
}


@pytest.mark.parametrize(("text", "expected"), CASES.items())
def test_verb_and_noun(text: str, expected: tuple[str, str]) -> None:
    assert deed_of(text) == Deed(*expected)


@pytest.mark.parametrize(
    ("plural", "one"),
    [
        ("stories", "story"), ("boxes", "box"), ("classes", "class"), ("wishes", "wish"), ("sketches", "sketch"),
        ("children", "child"), ("analysis", "analysis"), ("bus", "bus"), ("students", "student"), ("boy's", "boy"),
        ("glass", "glass"), ("gas", "gas"), ("movies", "movie"),
    ],
)  # fmt: skip
def test_singular(plural: str, one: str) -> None:
    assert singular(plural) == one


def test_counting_and_rings() -> None:
    texts = ["Write a poem.", "Write poems.", "Write a letter.", "List three birds.", "Explain why.", "Who was it?"]
    found = Variety.of(texts)
    assert (found.instructions, found.with_verb, found.with_noun) == (6, 5, 4)
    assert found.pairs == (("write", "poem", 2), ("list", "bird", 1), ("write", "letter", 1))
    assert rings(found.pairs) == [("write", 3, [("poem", 2), ("letter", 1)]), ("list", 1, [("bird", 1)])]
    assert rings(found.pairs, verbs=1, nouns=1) == [("write", 3, [("poem", 2)])]
    assert found.to_json()["pairs"][0] == ["write", "poem", 2]
    assert Variety.of([]) == Variety(0, 0, 0, ())


def test_how_often_something_is_found(shared_data: Path) -> None:
    """The shares that docs/evol-instruct.md states; a better rule moves them up."""
    seeds = [json.loads(line) for line in (shared_data / "self-instruct-seed-tasks.jsonl").read_text().splitlines()]
    alpaca = json.loads((shared_data / "alpaca-en-1k.json").read_text())
    found = [Variety.of(row["instruction"] for row in rows) for rows in (seeds, alpaca)]
    assert [(each.instructions, each.with_verb, each.with_noun) for each in found] == [(175, 158, 133), (999, 905, 827)]
