"""ShareGPT conversations: cleaning by steps, each counted; tool turns; what is no turn."""

from __future__ import annotations

from typing import Any

import pytest

from lilliput.data import Choices
from lilliput.data.chats import check_chat
from lilliput.data.reading import Reading
from lilliput.data.sharegpt import SPEAKERS, read_conversation
from lilliput.errors import DataError


def cleaned(*said: tuple[str, str], **choices: Any) -> tuple[str, Reading]:
    """The chat as `role: words | …`, and what was counted."""
    reading = Reading(Choices(**choices))
    fields = {"conversations": [{"from": speaker, "value": words} for speaker, words in said]}
    chats = read_conversation(fields, reading)
    return " | ".join(f"{turn.role}: {turn.content}" for chat in chats for turn in chat.turns), reading


CASES: dict[str, tuple[list[tuple[str, str]], str, dict[str, int]]] = {
    "as it is": ([("human", "a"), ("gpt", "b")], "user: a | assistant: b", {}),
    "a system turn": ([("system", "s"), ("human", "a"), ("gpt", "b")], "system: s | user: a | assistant: b", {}),
    "other names": ([("User", "a"), ("chatgpt", "b"), ("human", "c"), ("bard", "d")],
                    "user: a | assistant: b | user: c | assistant: d", {}),
    "empty": (
        [("human", "a"), ("gpt", " \n"), ("gpt", "b")],
        "user: a | assistant: b",
        {"turns without words": 1},
    ),
    "joined": (
        [("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d")],
        "user: a\n\nb | assistant: c\n\nd",
        {"turns joined to the same speaker's before": 2},
    ),
    "joined over an empty one": (
        [("human", "a"), ("gpt", ""), ("human", "b"), ("gpt", "c")],
        "user: a\n\nb | assistant: c",
        {"turns joined to the same speaker's before": 1, "turns without words": 1},
    ),
    "leading": (
        [("gpt", "x"), ("human", "a"), ("gpt", "b")],
        "user: a | assistant: b",
        {"turns before the user's first": 1},
    ),
    "leading behind the system": (
        [("system", "s"), ("gpt", "x"), ("human", "a"), ("gpt", "b")],
        "system: s | user: a | assistant: b",
        {"turns before the user's first": 1},
    ),
    "unanswered": (
        [("human", "a"), ("gpt", "b"), ("human", "c")],
        "user: a | assistant: b",
        {"turns without an answer at the end": 1},
    ),
    "nothing left": (
        [("system", "s"), ("human", "a")],
        "",
        {"turns without an answer at the end": 2, "conversations of which nothing is left": 1},
    ),
    "only the assistant": (
        [("gpt", "a")],
        "",
        {"turns before the user's first": 1, "conversations of which nothing is left": 1},
    ),
    "tools": (
        [("human", "a"), ("function_call", "f()"), ("observation", "1"), ("observation", "2"), ("gpt", "b")],
        "user: a | assistant: f() | tool: 1 | tool: 2 | assistant: b",
        {},
    ),
    "words and a call": (
        [("human", "a"), ("gpt", "Let me see."), ("function_call", "f()"), ("function_response", "1"), ("gpt", "b")],
        "user: a | assistant: Let me see.\n\nf() | tool: 1 | assistant: b",
        {"turns joined to the same speaker's before": 1},
    ),
    "html": (
        [("human", "<div> is?"), ("gpt", "<div><p>A <code>div</code>.</p></div>")],
        "user: <div> is? | assistant: A `div`.",
        {"turns of HTML made text": 1},
    ),
    "html without words": (
        [("human", "a"), ("gpt", "<p></p>"), ("gpt", "b")],
        "user: a | assistant: b",
        {"turns of HTML made text": 1, "turns without words": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_cleaning_and_its_counts(case: str) -> None:
    said, expected, counts = CASES[case]
    found, reading = cleaned(*said)
    assert found == expected
    assert dict(+(reading.dropped + reading.changed)) == counts


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1]])
def test_what_is_left_is_a_chat(case: str) -> None:
    fields = {"conversations": [{"from": speaker, "value": words} for speaker, words in CASES[case][0]]}
    check_chat(read_conversation(fields, Reading())[0], answered=True)


def test_html_may_be_kept() -> None:
    assert cleaned(("human", "a"), ("gpt", "<p>b</p>"), keep_html=True)[0] == "user: a | assistant: <p>b</p>"


def test_role_and_content_are_taken_too() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert len(read_conversation({"conversations": turns}, Reading())[0].turns) == 2


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "'conversations' is null, not a list of turns"),
        (["a"], r"conversations\[0\] is of type str, not an object"),
        ([{"value": "a"}], r"conversations\[0\] has no 'from' \(it has 'value'\)"),
        ([{"from": "human"}], r"conversations\[0\] has no 'value'"),
        (
            [{"from": "human", "value": "a"}, {"from": "gpt", "value": 3}],
            r"conversations\[1\].value is of type int, not te",
        ),
        ([{"from": 3, "value": "a"}], r"conversations\[0\].from is of type int, not text"),
        ([{"from": "humann", "value": "a"}], r"conversations\[0\].from is the unknown speaker 'humann'.*mean 'human'"),
        ([{"role": "usr", "content": "a"}], r"conversations\[0\].role is the unknown speaker 'usr'"),
    ],
)
def test_what_is_no_turn_is_named(value: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_conversation({"conversations": value}, Reading())


def test_null_is_a_turn_without_words_and_no_turns_a_conversation_of_which_nothing_is_left() -> None:
    reading = Reading()
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}, {"from": "gpt", "value": "b"}]
    assert len(read_conversation({"conversations": turns}, reading)[0].turns) == 2
    assert read_conversation({"conversations": []}, reading) == []
    assert dict(+reading.dropped) == {"turns without words": 1, "conversations of which nothing is left": 1}


def test_a_tool_that_nobody_called_makes_a_bad_row() -> None:
    turns = [{"from": speaker, "value": "x"} for speaker in ("human", "observation", "gpt")]
    with pytest.raises(DataError, match="turn 2 is the tool's"):
        check_chat(read_conversation({"conversations": turns}, Reading())[0], answered=True)


def test_every_speaker_has_a_role() -> None:
    assert set(SPEAKERS.values()) == {"user", "assistant", "system", "tool"}
