"""What a data set looks like."""

from __future__ import annotations

import pytest

from lilliput.data import Example, figures, make_example, show_example
from lilliput.data.portrait import LABEL_STYLE, OTHER_STYLE
from tests.data.templates import CHAT, CHATML, KINDS, make_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_coloured_and_nothing_else(kind: str) -> None:
    tokenizer = make_tokenizer(CHATML, kind)
    text = show_example(make_example(CHAT, tokenizer), tokenizer)
    coloured = [text.plain[span.start : span.end] for span in text.spans if span.style == LABEL_STYLE]
    assert [part.strip() for part in coloured] == ["Hello there.<|im_end|>", "Because.<|im_end|>"]
    others = [text.plain[span.start : span.end] for span in text.spans if span.style == OTHER_STYLE]
    assert "".join(part for pair in zip(others, [*coloured, ""], strict=True) for part in pair) == text.plain
    assert text.plain.replace(" ", "") == CHATML.text.replace("«", "").replace("»", "").replace(" ", "")


def test_figures() -> None:
    short, long = Example([1, 2], [False, True]), Example([1, 2, 3, 4, 5, 6], [True] * 6)
    found = figures([short, long, short])
    assert (found.examples, found.tokens, found.labels, found.duplicates) == (3, 10, 7, 1)
    assert (found.shortest, found.median, found.longest) == (2, 2, 6)
    assert str(found) == "3 examples, 10 tokens, 70% of them labels; lengths 2 to 6, median 2; 1 duplicate"


def test_figures_of_nothing() -> None:
    assert str(figures([])) == "0 examples, 0 tokens, 0% of them labels; lengths 0 to 0, median 0; 0 duplicates"
