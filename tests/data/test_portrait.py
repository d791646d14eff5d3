"""What a data set looks like."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lilliput.data import Example, figures, make_example, show_example
from lilliput.data.forms import form_named
from lilliput.data.languages import UNSURE, language_of
from lilliput.data.portrait import (
    LABEL_STYLE,
    OTHER_STYLE,
    QUANTILES,
    Bin,
    Lengths,
    Portrait,
    form_of_field,
    portrait,
)
from lilliput.data.portrait_plot import draw_portrait
from lilliput.errors import DataError, UsageError
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


# ---- a whole file ------------------------------------------------------------------------------------------------


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def look(path: Path, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> Portrait:
    return portrait(path, tokenizer, progress=False, **options)


def pair(question: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer}


ROWS = [
    pair("Wer schreibt uns heute einen langen Brief?", "Die Großmutter schreibt uns heute einen langen Brief."),
    pair("Who writes to us today?", "Your grandmother is going to write us a letter today."),
    pair("Who writes to us today?", "Nobody."),
    pair("Who writes to us today?", "Nobody."),
    pair("17 + 4", "21"),
]


def test_counts_of_a_file(tmp_path: Path) -> None:
    found = look(write_lines(tmp_path / "a.jsonl", [*ROWS, pair("", "x"), {"prompt": "y"}]))
    assert (found.form, found.rows, found.chats, found.bad) == ("prompt-completion", 5, 5, 2)
    assert [fault.origin for fault in found.faults] == ["a.jsonl:6", "a.jsonl:7"]
    assert (found.same, found.same_question) == (1, 2)
    assert found.roles == {"user": 5, "assistant": 5}
    assert found.turns == {2: 5}
    assert found.empty == {"prompt": 1, "completion": 1}
    assert found.languages == {UNSURE: 3, "de": 1, "en": 1}  # "Who writes to us today? Nobody." is too little
    assert found.by_role["assistant"].total == 8 + 10 + 1 + 1 + 1
    assert found.longest[0] == (len(ROWS[0]["prompt"] + ROWS[0]["completion"]), "a.jsonl:1")
    assert [place for _, place in found.longest] == [f"a.jsonl:{line}" for line in (1, 2, 3, 4, 5)]
    assert found.tokens is None
    assert json.loads(json.dumps(found.to_json()))["characters"]["most"] == found.longest[0][0]


def test_tokens_and_labels_are_those_of_the_examples(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    found = look(write_lines(tmp_path / "a.jsonl", ROWS), tiny_tokenizer, examples=3)
    assert found.tokens is not None
    assert found.tokens.lengths.count == 5
    assert len(found.examples) == 3
    assert found.examples[1].origin == "a.jsonl:2"
    assert found.tokens.lengths.least <= len(found.examples[2]) <= found.tokens.lengths.most
    assert 0 < found.tokens.labels < found.tokens.lengths.total


def test_the_sample_is_even_and_the_same_each_time(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_lines(tmp_path / "a.jsonl", [pair(f"Question {i}", "x " * (i + 1)) for i in range(100)])
    first, second = (look(path, tiny_tokenizer, sample=30, examples=30) for _ in range(2))
    assert first == second
    assert (first.chats, first.sampled, sum(first.languages.values())) == (100, 30, 30)
    lines = [int(example.origin.split(":")[1]) for example in first.examples]
    assert lines == sorted({*lines})
    assert 35 < sum(lines) / 30 < 65
    assert look(path, sample=0).sampled == 100
    assert first.words == look(path, sample=0).words


def test_other_forms(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "three"}, {"text": 5}])
    with pytest.raises(DataError, match="a.jsonl:1: is of no known form.*look at one field with --field NAME"):
        look(path)
    found = look(path, form=form_of_field("text"))
    assert (found.chats, found.bad, found.words.total, found.roles) == (2, 1, 3, {"text": 2})
    both = write_lines(tmp_path / "b.jsonl", [{"instruction": "a", "output": "b", "response": "c d"}])
    assert look(both, form=form_named("dolly")).by_role["assistant"].total == 2
    seeds = write_lines(
        tmp_path / "c.jsonl", [{"instruction": "Add.", "instances": [{"input": i, "output": i} for i in "12"]}]
    )
    assert (look(seeds).rows, look(seeds).chats) == (1, 2)


def test_texts_that_are_no_chats_have_tokens_and_no_labels(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = look(write_lines(tmp_path / "a.jsonl", [{"text": "one two"}]), tiny_tokenizer, form=form_of_field("text"))
    assert found.tokens is not None
    assert (found.tokens.lengths.total, found.tokens.labels) == (len(tiny_tokenizer("one two")["input_ids"]), 0)


def test_chats_that_the_template_refuses_are_counted(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    strict = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    strict.chat_template = "{{ raise_exception('no') if messages[0]['role'] == 'system' }}" + str(
        tiny_tokenizer.chat_template
    )
    roles = ("system", "user", "assistant")
    chats = [{"messages": [{"role": role, "content": role} for role in roles[start:]]} for start in (0, 1)]
    found = look(write_lines(tmp_path / "a.jsonl", chats), strict)
    assert found.tokens is not None
    assert found.tokens.lengths.count == 1
    assert list(found.tokens.refused.values()) == [1]


def test_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        look(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="a.jsonl:1: 'completion' is of type int, not text; no row can be used"):
        look(write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": 1}]))
    with pytest.raises(UsageError, match="-1 is not a number of chats"):
        look(tmp_path / "a.jsonl", sample=-1)
    with pytest.raises(DataError, match="b.jsonl: no chat is left; dropped were 1 turns before the user's first, 1"):
        look(write_lines(tmp_path / "b.jsonl", [{"conversations": [{"from": "gpt", "value": "a"}]}]))
    with pytest.raises(DataError, match="c.jsonl:1: 'text' holds half a character .*; no row can be used"):
        look(write_lines(tmp_path / "c.jsonl", [{"text": "a\ud83d"}]), form=form_of_field("text"))


def test_orphans_are_counted(tmp_path: Path) -> None:
    message = {"text": "a", "role": "prompter", "review_result": True}
    lost = [{"message_id": name, "parent_id": "x", **message} for name in "ab"]
    with pytest.raises(DataError, match="m.jsonl: no chat is left; dropped were 2 messages whose tree does not begin"):
        look(write_lines(tmp_path / "m.jsonl", lost))
    root = {"message_id": "r", "parent_id": None, **message}
    reply = {"message_id": "s", "parent_id": "r", **message, "role": "assistant"}
    found = look(write_lines(tmp_path / "n.jsonl", [*lost, root, reply]))
    assert (found.chats, found.dropped) == (1, {"messages whose tree does not begin in the file": 2})


def test_lengths() -> None:
    lengths = [3] * 50 + [7] * 49 + [1000]
    found = Lengths.of(lengths)
    assert (found.count, found.total, found.least, found.most) == (100, 1493, 3, 1000)
    assert found.quantiles == tuple(int(np.sort(lengths)[int(np.ceil(share * 100)) - 1]) for share in QUANTILES)
    assert found.bins == (Bin(3, 4, 50), Bin(4, 5, 0), Bin(5, 6, 0), Bin(6, 7, 0), Bin(7, 8, 49), Bin(8, None, 1))
    assert Lengths.of([]).count == Lengths.of([0]).total == 0
    assert Lengths.of([0]).bins == (Bin(0, 1, 1),)


@pytest.mark.parametrize("longest", [1, 14, 16, 149, 151, 5000, 123_456_789])
def test_every_length_is_in_one_bin(longest: int) -> None:
    lengths = np.random.default_rng(0).integers(0, longest + 1, 1000).tolist()
    bins = Lengths.of(lengths).bins
    assert sum(one.count for one in bins) == 1000
    assert len(bins) <= 18
    for one in bins:
        assert one.count == sum(one.low <= length < (one.high or longest + 1) for length in lengths)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Could you please tell me how many rivers there are in this country?", "en"),
        ("Kannst du mir bitte sagen, wie viele Flüsse es in diesem Land gibt?", "de"),
        ("Pouvez-vous me dire combien de rivières il y a dans ce pays ?", "fr"),
        ("Ok", UNSURE),
        ("def f(x): return x + 1", UNSURE),
        ("", UNSURE),
        ("\ud800", UNSURE),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert language_of(text) == language


def test_a_picture_of_many_kinds(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": role, "content": "w $x$ " * 3} for role in ("system", *("user", "assistant") * turns)]}
        for turns in range(1, 15)
    ]
    draw_portrait(look(write_lines(tmp_path / "$a$.jsonl", chats)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_real_files(shared_data: Path) -> None:
    found = look(shared_data / "oasst-messages-100.jsonl")
    assert (found.form, found.chats) == ("oasst-messages", 100)
    found = look(shared_data / "alpaca-en-1k.json")
    assert (found.chats, found.same, found.empty) == (999, 14, {"input": 587})
    assert found.languages["en"] > 900
