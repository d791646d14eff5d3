"""Records become chats: the forms, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lilliput.data import Chat, Record, Turn, to_chat
from lilliput.data.chats import check_chat
from lilliput.data.forms import FORMS
from lilliput.errors import DataError


def chat(fields: dict[str, Any]) -> Chat:
    return to_chat(Record(fields, "rows.jsonl:7"))


def messages(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_alpaca() -> None:
    found = chat({"instruction": "Add.", "input": "1 and 2", "output": "3"})
    assert found == Chat((Turn("user", "Add.\n\n1 and 2"), Turn("assistant", "3")), "rows.jsonl:7", input="1 and 2")


@pytest.mark.parametrize("blank", [{}, {"input": ""}, {"input": None}, {"input": " \n"}])
def test_alpaca_without_input(blank: dict[str, Any]) -> None:
    found = chat({"instruction": "Go.", "output": "Gone.", **blank})
    assert found == Chat((Turn("user", "Go."), Turn("assistant", "Gone.")), "rows.jsonl:7")


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_prompt_and_answer(answer: str) -> None:
    assert chat({"prompt": " Hi", answer: "Ho ", "id": 3}).turns == (Turn("user", " Hi"), Turn("assistant", "Ho "))


def test_messages() -> None:
    turns = (("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert chat(messages(*turns)).turns == tuple(Turn(*turn) for turn in turns)


def test_the_prompt_is_the_chat_without_its_answer() -> None:
    found = chat({"instruction": "Add.", "input": "1 and 2", "output": "3"})
    assert found.prompt == Chat(found.turns[:1], "rows.jsonl:7", input="1 and 2")
    assert found.prompt.prompt == found.prompt


def test_the_table_has_no_two_forms_of_the_same_keys() -> None:
    assert len({form.keys for form in FORMS}) == len({form.name for form in FORMS}) == len(FORMS)


REFUSED = {
    "empty output": ({"instruction": "a", "input": "", "output": ""}, "'output' is empty"),
    "blank instruction": ({"instruction": " \n", "output": "b"}, "'instruction' is empty"),
    "number": ({"instruction": "a", "output": 3}, "'output' is of type int, not text"),
    "null": ({"prompt": None, "completion": "b"}, "'prompt' is null, not text"),
    "list as input": ({"instruction": "a", "input": ["b"], "output": "c"}, "'input' is of type list, not text"),
    "missing output": (
        {"instruction": "a", "ouput": "b"},
        r"has no 'output', which a row of the form alpaca needs; its keys are 'instruction', "
        r"'ouput' \(did you mean 'output'\?\); forms understood: messages \(messages\); "
        r"alpaca \(instruction, output\); dolly \(instruction, response\); sharegpt \(conversations\); prompt-com",
    ),
    "unknown": ({"zzz": "b"}, r"is of no known form; its keys are 'zzz'; forms understood: messages"),
    "no keys": ({}, "its keys are none"),
    "messages null": ({"messages": None}, "'messages' is null, not a list of messages"),
    "no messages": ({"messages": []}, "'messages' is empty"),
    "a text": ({"messages": ["Hi"]}, r"messages\[0\] is of type str, not an object"),
    "no role": (
        {"messages": [{"from": "human", "content": "a"}]},
        r"messages\[0\] has no 'role' \(it has 'from', 'content'\)",
    ),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'"),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        r"messages\[0\].content is of type list, not text",
    ),
    "unknown role": (
        messages(("user", "a"), ("asistant", "b")),
        r"turn 2 has the unknown role 'asistant'.*'assistant'\?",
    ),
    "unknown role known": (messages(("user", "a"), ("bot", "b")), r"\(known are system, user, assistant, tool\)"),
    "tool unasked": (messages(("user", "a"), ("tool", "b")), "turn 2 is the tool's where the assistant's was expected"),
    "tool first": (messages(("tool", "a"), ("assistant", "b")), "turn 1 is the tool's where the user's was expected"),
    "user behind a tool": (
        messages(("user", "a"), ("assistant", "b"), ("tool", "c"), ("user", "d")),
        "turn 4 is the user's where the assistant's",
    ),
    "tool at the end": (
        messages(("user", "a"), ("assistant", "b"), ("tool", "c")),
        "the last turn is the tool's, not the assistant's",
    ),
    "tool calls": (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        r"messages\[0\] has 'tool_calls', which are not read: write the call as the assistant's words",
    ),
    "tools": ({"messages": [{"role": "user", "content": "a"}], "tools": 3}, "'tools' is of type int, not a list of"),
    "empty words": (messages(("user", " "), ("assistant", "b")), r"turn 1 \(user\) has no words"),
    "two questions": (
        messages(("user", "a"), ("user", "b"), ("assistant", "c")),
        "turn 2 is the user's where the assistant's",
    ),
    "assistant first": (messages(("assistant", "a")), "turn 1 is the assistant's where the user's was expected"),
    "answer to system": (messages(("system", "s"), ("assistant", "a")), "turn 2 is the assistant's where the user's"),
    "late system": (
        messages(("user", "a"), ("system", "b"), ("assistant", "c")),
        "turn 2 is a system turn; only the first",
    ),
    "no answer": (messages(("user", "a")), "the last turn is the user's, not the assistant's"),
    "system alone": (messages(("system", "a")), "the last turn is the system's, not the assistant's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_place_and_reason(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(DataError, match=r"^rows.jsonl:7: .*" + message):
        chat(fields)


def test_a_chat_without_turns() -> None:
    with pytest.raises(DataError, match="has no turns"):
        check_chat(Chat(()), answered=True)


def test_a_suggestion_stands_only_behind_the_misspelt_key() -> None:
    with pytest.raises(DataError) as caught:
        to_chat(Record({"prompt": "Hi", "completon": "Hello"}, "rows.jsonl:3"))
    assert "its keys are 'prompt', 'completon' (did you mean 'completion'?);" in str(caught.value)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(DataError, match=r"x:1: turn 1 \(user\) holds half a character"):
        check_chat(Chat((Turn("user", "caf\udce9"),), "x:1"), answered=False)
