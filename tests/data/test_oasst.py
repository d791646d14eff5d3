"""OpenAssistant: which chats a tree gives, what is filtered, single messages made trees, deep trees, wrong fields."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lilliput.data import Chat, Choices, Record, SkippedRow, read_records
from lilliput.data.chats import check_chat
from lilliput.data.oasst import MessageFile, check_paths, read_messages_tree, read_tree
from lilliput.data.reading import Reading
from lilliput.errors import DataError, UsageError

Node = dict[str, Any]


def node(text: Any, *replies: Node, rank: int | None = None, **fields: Any) -> Node:
    """A message; its role is found by `tree`."""
    return {"text": text, "rank": rank, "review_result": True, "lang": "en", "replies": list(replies), **fields}


def tree(root: Node) -> Node:
    def name(message: Node, role: str) -> Node:
        other = "assistant" if role == "prompter" else "prompter"
        return {"role": role, **message, "replies": [name(reply, other) for reply in message["replies"]]}

    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": name(root, "prompter")}


def words(chats: list[Chat]) -> list[str]:
    return ["".join(turn.content for turn in chat.turns) for chat in chats]


def chats_of(root: Node, **choices: Any) -> tuple[list[str], dict[str, int]]:
    reading = Reading(Choices(**choices))
    found = read_tree(tree(root), reading)
    for chat in found:
        check_chat(chat, answered=True)
    return words(found), dict(reading.dropped)


# a ─┬─ b2 (rank 1) ── c ── d
#    ├─ b1 (rank 0) ─┬─ e                     nobody answered
#    │               ├─ f ─┬─ h (rank 1)
#    │               │     └─ g (rank 0)
#    │               └─ i ── j
#    └─ b3 (no rank)
TREE = node(
    "a",
    node("B", node("c", node("d")), rank=1),
    node("b", node("e"), node("f", node("h", rank=1), node("g", rank=0)), node("i", node("j")), rank=0),
    node("z"),
)
PATHS = {
    "best": ["abfg"],
    "top-1": ["abfg", "abij"],
    "top-2": ["abfg", "abfh", "abij", "aBcd"],
    "all": ["abfg", "abfh", "abij", "aBcd", "az"],
    "top-9": ["abfg", "abfh", "abij", "aBcd", "az"],
}


@pytest.mark.parametrize("paths", PATHS)
def test_which_chats_a_tree_gives(paths: str) -> None:
    assert chats_of(TREE, paths=paths) == (PATHS[paths], {})


FILTERS: dict[str, tuple[Node, dict[str, Any], list[str], dict[str, int]]] = {
    "deleted": (node("a", node("b", deleted=True), node("c")), {}, ["ac"], {"deleted messages": 1}),
    "deleted without text": (
        node("a", node(None, deleted=True), node("c")),
        {},
        ["ac"],
        {"deleted messages": 1},
    ),
    "with all below": (
        node("a", node("b", node("c", node("d")), deleted=True), node("e")),
        {},
        ["ae"],
        {"deleted messages": 1, "replies below dropped messages": 2},
    ),
    "refused": (node("a", node("b", review_result=False)), {},
                [], {"messages that reviewers refused": 1, "trees without an answer": 1}),
    "unreviewed": (node("a", node("b", review_result=None), node("c")), {},
                   ["ac"], {"messages that nobody reviewed": 1}),
    "unreviewed but wanted": (node("a", node("b", review_result=None)), {"unreviewed": True}, ["ab"], {}),
    "synthetic": (node("a", node("b", synthetic=True, review_count=0)), {}, ["ab"], {}),
    "language": (
        node("a", node("b", lang="de"), node("c", lang="EN")),
        {"languages": ("en",)},
        ["ac"],
        {"messages in other languages": 1},
    ),
    "capitals": (node("a", node("b", lang="pt-br"), lang="de"), {"languages": ("pt-BR", "De")}, ["ab"], {}),
    "languages": (node("a", node("b", lang="pt-BR"), lang="de"), {"languages": ("pt", "de")}, ["ab"], {}),
    "blank": (node("a", node(" \n"), node("c")), {}, ["ac"], {"messages without words": 1}),
    "the first": (
        node("a", node("b"), deleted=True),
        {},
        [],
        {"deleted messages": 1, "replies below dropped messages": 1, "trees without an answer": 1},
    ),
    "no answer": (node("a"), {}, [], {"trees without an answer": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", FILTERS)
@pytest.mark.parametrize("paths", ["best", "all"])
def test_what_is_left_out_is_counted(case: str, paths: str) -> None:
    root, choices, expected, counts = FILTERS[case]
    assert chats_of(root, paths=paths, **choices) == (expected, counts)


def test_a_tree_that_was_given_up() -> None:
    reading = Reading()
    assert read_tree({**tree(TREE), "tree_state": "aborted_low_grade"}, reading) == []
    assert reading.dropped == {"trees that were given up": 1}


WRONG: dict[str, tuple[Any, str]] = {
    "no tree": (None, "prompt is null, not an object"),
    "no text": ({"role": "prompter"}, "prompt.text is missing, not text"),
    "no role": ({"text": "a"}, "prompt.role is missing"),
    "role": ({"text": "a", "role": "promptr"}, "prompt.role is 'promptr', not prompter or assistant; did you mean"),
    "null": (
        tree(node("a", node("b"), node("c"), node(None)))["prompt"],
        r"^replies\[2\].text is null, not text",
    ),
    "deep": (
        tree(node("a", node("b", node("c"), node(3))))["prompt"],
        r"^replies\[0\].replies\[1\].text is of",
    ),
    "rank": (tree(node("a", node("b", rank="1")))["prompt"], r"replies\[0\].rank is of type str, not a number"),
    "deleted": (tree(node("a", deleted="False"))["prompt"], "prompt.deleted is of type str, not true or false"),
    "reviewed": (
        tree(node("a", node("b", review_result="False")))["prompt"],
        r"replies\[0\].review_result is of type str, not true or false",
    ),
    "replies": (tree(node("a"))["prompt"] | {"replies": "b"}, "prompt.replies is of type str, not a list of messages"),
    "a reply": (tree(node("a"))["prompt"] | {"replies": [4]}, r"replies\[0\] is of type int, not an object"),
    "same role": (
        tree(node("a", node("b", role="prompter")))["prompt"] | {"role": "prompter"},
        r"replies\[0\].role is prompter, as that of the message above it",
    ),
    "assistant first": ({"text": "a", "role": "assistant"}, "the first message is the assistant's"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_wrong_field_is_named(case: str) -> None:
    prompt, said = WRONG[case]
    with pytest.raises(DataError, match=said):
        read_tree({"message_tree_id": "t", "prompt": prompt}, Reading())


def test_a_tree_may_be_as_deep_as_it_likes() -> None:
    deep: Node = node("z", role="assistant")
    for level in range(5000):
        deep = node("x", deep, role="assistant" if level % 2 else "prompter")
    deep = node("x", deep, role="prompter") if deep["role"] == "assistant" else deep
    for paths in ("best", "all", "top-1"):
        (chat,) = read_tree({"prompt": deep}, Reading(Choices(paths=paths)))
        assert len(chat.turns) in (5000, 5002)
    at = deep
    while at["replies"]:
        at = at["replies"][0]
    at["text"] = None
    with pytest.raises(DataError, match=r"^(replies\[0\].){3}… 4995 more ….(replies\[0\].){3}text is null"):
        read_tree({"prompt": deep}, Reading())
    at["text"] = "z"
    while deep["replies"]:  # taken apart from the top: Python frees what is nested by calling itself
        deep = deep["replies"].pop()


@pytest.mark.parametrize("word", ["worst", "top", "top-0", "top-x", "", "top--1"])
def test_an_unknown_path(word: str) -> None:
    with pytest.raises(UsageError, match="--paths: unknown value .*Known: best, all, and top-1"):
        check_paths(word)


def answers_without_answers(message: Node) -> int:
    """Of a tree: answers below which there is no other one. An outsider's count of what `all` must give."""
    below = sum(map(answers_without_answers, message["replies"]))
    return below or int(message["role"] == "assistant")


def test_all_paths_of_real_trees(shared_data: Path) -> None:
    for record in read_records(shared_data / "oasst-trees-100.jsonl"):
        found = read_tree(record.fields, Reading(Choices(paths="all")))
        assert len(found) == len(set(words(found))) == answers_without_answers(record.fields["prompt"])
        (best,) = read_tree(record.fields, Reading())
        assert best in found
        for chat in found:
            check_chat(chat, answered=True)


# ---- single messages ---------------------------------------------------------------------------------------------


def flat(message: Node, parent: str | None = None) -> list[Node]:
    """The messages of a tree as rows of their own, their text as their id."""
    own = {key: value for key, value in message.items() if key != "replies"}
    rows = [{"message_id": message["text"], "parent_id": parent, **own}]
    return rows + [row for reply in message["replies"] for row in flat(reply, message["text"])]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chats_of_file(path: Path, paths: str = "all") -> tuple[list[str], MessageFile, list[SkippedRow]]:
    found = MessageFile(path)
    rows = list(found.trees())
    records = [row for row in rows if isinstance(row, Record)]
    chats = [chat for record in records for chat in read_messages_tree(record.fields, Reading(Choices(paths=paths)))]
    return words(chats), found, [row for row in rows if isinstance(row, SkippedRow)]


def test_messages_in_any_order_are_the_tree_they_came_from(tmp_path: Path) -> None:
    rows = flat(tree(TREE)["prompt"])
    for paths in PATHS:
        assert chats_of_file(write(tmp_path / "m.jsonl", rows), paths)[0] == PATHS[paths]
    random.Random(3).shuffle(rows)
    found, file, bad = chats_of_file(write(tmp_path / "m.jsonl", rows), "all")
    assert sorted(found) == sorted(PATHS["all"])
    assert (file.rows, file.orphans, bad) == (12, [], [])


def test_messages_of_other_kinds_of_files(tmp_path: Path) -> None:
    rows = flat(tree(TREE)["prompt"])
    (tmp_path / "m.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m.parquet")
    for name in ("m.json", "m.parquet"):
        assert chats_of_file(tmp_path / name)[0] == PATHS["all"]


def test_trees_come_in_the_order_of_their_first_messages(tmp_path: Path) -> None:
    first, second = flat(tree(node("a", node("b")))["prompt"]), flat(tree(node("c", node("d")))["prompt"])
    rows = [second[1], first[0], second[0], first[1]]
    assert chats_of_file(write(tmp_path / "m.jsonl", rows))[0] == ["ab", "cd"]


def test_messages_with_replies_nested_in_them(tmp_path: Path) -> None:
    root = {"message_id": "1", "parent_id": None, **tree(node("a", node("b")))["prompt"]}
    later = {"message_id": "2", "parent_id": "1", "text": "c", "role": "assistant", "review_result": True}
    assert chats_of_file(write(tmp_path / "m.jsonl", [later, root]))[0] == ["ab", "ac"]


def test_orphans_are_said(tmp_path: Path) -> None:
    rows = flat(tree(TREE)["prompt"])
    lost = [row for row in rows if row["text"] != "b"]
    found, file, _ = chats_of_file(write(tmp_path / "m.jsonl", lost))
    assert found == ["aBcd", "az"]
    assert file.orphans == ["m.jsonl:5", "m.jsonl:6", "m.jsonl:7", "m.jsonl:8", "m.jsonl:9", "m.jsonl:10"]
    circle = [{**rows[0], "message_id": name, "parent_id": other} for name, other in (("p", "q"), ("q", "p"))]
    found, file, _ = chats_of_file(write(tmp_path / "m.jsonl", [*rows, *circle]))
    assert (found, file.orphans) == (PATHS["all"], ["m.jsonl:13", "m.jsonl:14"])


GOOD = {"message_id": "a", "parent_id": None, "text": "a", "role": "prompter", "review_result": True}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**GOOD, "message_id": None}, "'message_id' is null, not text"),
        ({**GOOD, "message_id": "c", "parent_id": 4}, "'parent_id' is of type int, neither text nor null"),
        ({**GOOD, "text": "again"}, "the message_id 'a' stands in the file before"),
        ({**GOOD, "message_id": "c", "text": None}, "text is null, not text"),
        ({**GOOD, "message_id": "c", "role": "bot"}, "role is 'bot', not prompter or assistant"),
        ([], "is a list, not an object"),
    ],
)
def test_a_wrong_message_is_named_and_the_others_stay(row: Any, said: str, tmp_path: Path) -> None:
    answer = {**GOOD, "message_id": "b", "parent_id": "a", "text": "b", "role": "assistant"}
    found, file, (bad,) = chats_of_file(write(tmp_path / "m.jsonl", [GOOD, row, answer]))
    assert found == ["ab"]
    assert (bad.origin, file.rows) == ("m.jsonl:2", 3)
    assert bad.reason.startswith(said)


def test_a_chain_of_five_thousand_messages(tmp_path: Path) -> None:
    rows = [
        {**GOOD, "message_id": str(n), "parent_id": str(n - 1) if n else None, "role": ("prompter", "assistant")[n % 2]}
        for n in range(5000)
    ]
    (found,), file, _ = chats_of_file(write(tmp_path / "m.jsonl", rows[::-1]))
    assert found == "a" * 5000
    assert file.orphans == []


def test_an_answer_without_a_rank_comes_behind_those_with_one() -> None:
    assert chats_of(node("a", node("c", rank=None), node("b", rank=1)), paths="best")[0] == ["ab"]
