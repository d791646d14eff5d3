"""Each form of rows in and out, and how a form is told by its keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lilliput.data import FORMS, Chat, Record, Turn, read_records, to_chat
from lilliput.data.chats import check_chat
from lilliput.data.forms import PARTS, TARGETS, Form, form_named, form_of_columns, forms_of
from lilliput.data.reading import Fields, Reading
from lilliput.errors import DataError, UsageError

ASKED = (Turn("user", "Add.\n\n1 and 2"), Turn("assistant", "3"))
PLAIN = (Turn("user", "Hi"), Turn("assistant", "Ho"))
SEED = {"id": "s1", "instruction": "Add.", "instances": [{"input": "1 and 2", "output": "3"}, {"output": "?"}]}


def read(name: str, fields: Fields) -> list[Chat]:
    return form_named(name).read(fields, Reading())


ROWS: dict[str, tuple[dict[str, Any], Chat]] = {
    "alpaca": ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, Chat(ASKED, input="1 and 2")),
    "dolly": ({"instruction": "Add.", "context": "1 and 2", "response": "3"}, Chat(ASKED, input="1 and 2")),
    "prompt-completion": ({"prompt": "Hi", "completion": "Ho"}, Chat(PLAIN)),
    "prompt-response": ({"prompt": "Hi", "response": "Ho"}, Chat(PLAIN)),
    "p3": ({"inputs": "Hi", "targets": "Ho"}, Chat(PLAIN)),
    "messages": (
        {
            "messages": [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}],
            "input": "1 and 2",
            "tools": '[{"name": "sum"}]',
        },
        Chat(ASKED, input="1 and 2", tools='[{"name": "sum"}]'),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "tools": "[{}]"},
        Chat(PLAIN, tools="[{}]"),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_and_its_chat_say_the_same_in_both_directions(name: str) -> None:
    fields, chat = ROWS[name]
    form = form_named(name)
    assert form.read(fields, Reading()) == [chat]
    assert form.write is not None
    assert form.write(chat) == fields


def test_every_form_that_is_written_is_in_the_table_above() -> None:
    assert set(ROWS) == set(TARGETS)


@pytest.mark.parametrize("name", ROWS)
def test_a_training_takes_the_row_as_it_is(name: str) -> None:
    fields, chat = ROWS[name]
    assert to_chat(Record(fields | {"id": 7}, "x:1")).turns == chat.turns


def test_dolly_without_context_and_with_a_category() -> None:
    assert read("dolly", {"instruction": "Hi", "context": "", "response": "Ho", "category": "open_qa"}) == [Chat(PLAIN)]


def test_p3_takes_the_texts_where_inputs_are_token_ids() -> None:
    texts = {"inputs_pretokenized": "Hi", "targets_pretokenized": "Ho"}
    assert read("p3", {"inputs": [3, 4], "targets": [5], **texts}) == [Chat(PLAIN)]
    with pytest.raises(DataError, match="'inputs' is of type list, not text"):
        read("p3", {"inputs": [3, 4], "targets": [5]})
    assert read("p3", {"inputs": "Hi", "targets": "Ho", **dict.fromkeys(texts)}) == [Chat(PLAIN)]
    assert read("p3", {"inputs": "Hi", "targets": "Ho", "inputs_pretokenized": "H i"}) == [Chat(PLAIN)]


def test_self_instruct_gives_a_chat_for_each_instance() -> None:
    first, second = read("self-instruct", SEED)
    assert first == Chat(ASKED, input="1 and 2")
    assert second == Chat((Turn("user", "Add."), Turn("assistant", "?")))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"instruction": "a", "instances": []}, "'instances' is empty"),
        ({"instruction": "a", "instances": {}}, "'instances' is of type dict, not a list of instances"),
        ({"instruction": "a", "instances": ["b"]}, r"instances\[0\] is of type str, not an object"),
        ({"instruction": "a", "instances": [{"input": "b"}]}, r"instances\[0\] has no 'output' \(it has 'input'\)"),
        ({"instruction": "a", "instances": [{"output": "b"}, {"output": None}]}, r"instances\[1\].output is null"),
        ({"instruction": "a", "instances": [{"output": " "}]}, r"instances\[0\]: 'output' is empty"),
        ({"instruction": None, "instances": [{"output": "b"}]}, "'instruction' is null, not text"),
    ],
)
def test_wrong_instances_are_named(fields: Fields, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read("self-instruct", fields)


def test_an_input_that_is_not_the_end_of_the_question_is_another_field() -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "input": "else"}
    assert read("messages", row) == [Chat(PLAIN)]


def test_tools_may_be_a_list() -> None:
    (chat,) = read("messages", {**ROWS["messages"][0], "tools": [{"name": "é"}]})
    assert json.loads(chat.tools) == [{"name": "é"}]


@pytest.mark.parametrize("tools", [None, "", " ", [], {}, "[]", "{}", "null", '""'])
@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_no_tools(name: str, tools: Any) -> None:
    assert read(name, {**ROWS[name][0], "tools": tools})[0].tools == ""


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (3, "'tools' is of type int, not a list of tools"),
        ("search", r"'tools' is no JSON \(Expecting value"),
        (["search"], "'tools' is no list of objects"),
        ('["search"]', "'tools' is no list of objects"),
        ("7", "'tools' is no list of objects"),
        ([{"name": "\ud83d"}], "'tools' holds half a character"),
        ('[{"name": "\ud83d"}]', "'tools' holds half a character"),
        ('[{"name": "\\ud83d"}]', "'tools' holds half a character"),
    ],
)
@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_wrong_tools(name: str, tools: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(name, {**ROWS[name][0], "tools": tools})


def test_tool_turns_are_read() -> None:
    said = [("user", "a"), ("assistant", "call"), ("tool", "1"), ("tool", "2"), ("assistant", "b"), ("user", "c")]
    rows = [{"role": role, "content": content} for role, content in [*said, ("assistant", "d")]]
    chat = to_chat(Record({"messages": rows}, "x:1"))
    assert [turn.role for turn in chat.turns].count("tool") == 2
    check_chat(Chat(chat.turns[:4]), answered=False)  # the assistant may answer a tool
    assert chat.prompt.turns == chat.turns[:-1]


# ---- what a form cannot say --------------------------------------------------------------------------------------

LONG = Chat((*PLAIN, Turn("user", "c"), Turn("assistant", "d")))
WITH_SYSTEM = Chat((Turn("system", "s"), *PLAIN))


@pytest.mark.parametrize("name", ["alpaca", "dolly", "prompt-completion", "prompt-response", "p3"])
@pytest.mark.parametrize(
    ("chat", "said"), [(LONG, "has 4 turns"), (WITH_SYSTEM, "has 3 turns"), (Chat(PLAIN, tools="[]"), "has tools")]
)
def test_a_chat_that_a_pair_cannot_say(name: str, chat: Chat, said: str) -> None:
    write = form_named(name).write
    assert write is not None
    with pytest.raises(DataError, match=said + ".* one question, one answer"):
        write(chat)


def test_an_input_goes_into_the_question_where_a_form_has_no_place_for_it() -> None:
    write = form_named("p3").write
    assert write is not None
    assert write(ROWS["alpaca"][1]) == {"inputs": "Add.\n\n1 and 2", "targets": "3"}


# ---- which form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ("instruction input output", "alpaca"),
        ("instruction instances is_classification", "self-instruct"),
        ("message_tree_id tree_state prompt", "oasst"),
        ("message_id parent_id text role message_tree_id", "oasst-messages"),
        ("prompt_id prompt messages", "messages"),
        ("instruction output response", "alpaca dolly"),
        ("question answer", ""),
    ],
)
def test_forms_are_told_by_their_keys(keys: str, names: str) -> None:
    assert [form.name for form in forms_of(keys.split())] == names.split()


def test_several_chats_a_row_are_no_training_row() -> None:
    with pytest.raises(DataError, match=r"x:1: .*form self-instruct, which may hold several chats.*data convert"):
        to_chat(Record(SEED, "x:1"))


def test_a_conversation_of_which_nothing_is_left_is_no_training_row() -> None:
    with pytest.raises(DataError, match="x:1: no chat is left of it"):
        to_chat(Record({"conversations": [{"from": "gpt", "value": "Hi"}]}, "x:1"))


def test_an_unknown_form_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown form 'alpacca'; did you mean 'alpaca'"):
        form_named("alpacca")


def test_the_real_seeds(shared_data: Path) -> None:
    records = read_records(shared_data / "self-instruct-seed-tasks.jsonl")
    assert sum(len(read("self-instruct", record.fields)) for record in records) == 175


@pytest.mark.parametrize("form", [form for form in FORMS if form.name != "oasst-messages"], ids=lambda form: form.name)
def test_a_row_of_another_form_is_told_what_it_lacks(form: Form) -> None:
    with pytest.raises(DataError, match=r"has no '\w+' \(it has 'x'\)"):
        form.read({"x": 1}, Reading())


# ---- columns of one's own ----------------------------------------------------------------------------------------


def test_columns_of_ones_own() -> None:
    form = form_of_columns({"user": "q", "assistant": "a", "input": "about", "system": "who"})
    assert form.read({"q": "Add.", "a": "3", "about": "1 and 2", "who": "s"}, Reading()) == [
        Chat((Turn("system", "s"), *ASKED), input="1 and 2")
    ]
    assert form.read({"q": "Hi", "a": "Ho", "about": "", "who": None}, Reading()) == [Chat(PLAIN)]
    with pytest.raises(DataError, match=r"has no 'a' \(it has 'q'\)"):
        form.read({"q": "Hi"}, Reading())


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"user": "q"}, "no column is said to be the assistant"),
        ({"human": "q", "assistant": "a"}, "'human=q': unknown part 'human'"),
        ({"q": "user", "a": "assistant"}, "the part stands first: user=q"),
        ({"usr": "q", "assistant": "a"}, "did you mean 'user'"),
    ],
)
def test_wrong_columns(columns: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        form_of_columns(columns)
    assert all(part in str(caught.value) for part in PARTS)


def test_the_table_reads_what_it_says() -> None:
    for form in FORMS:
        assert form.keys
        assert not set(form.keys) & set(form.also)
