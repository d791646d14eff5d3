"""Whole files from form to form: counts, bytes, the report, cutting, and every way in which it is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lilliput.data import Chat, Choices, Converted, Turn, convert, detect, read_records, to_chat
from lilliput.data.conversion import Job, characters, convert_lines, cut
from lilliput.data.forms import form_named
from lilliput.data.reading import Reading
from lilliput.errors import DataError, DiskError, LilliputError, UsageError

ALPACA = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Sagen Sie „hallo“\n\nund 🙂\u2028", "input": "", "output": "hallo é 日本"},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def quietly(path: Path, out: Path, **options: Any) -> Converted:
    return convert(path, out, progress=False, **options)


# ---- real data ---------------------------------------------------------------------------------------------------

# What came out when each of these was first looked at by a person; the hash is of the bytes.
PINNED = {
    ("oasst-trees-100.jsonl", "best"): (100, 100, "022c9d05f1ad89a4fa55e1f1be001872547a15afe46443ad3742f79020998464"),
    ("oasst-trees-100.jsonl", "all"): (100, 546, "a93c1c9635939ff538f00e23a8cc2592cfff2e4fca97b37be89ab26831513663"),
    ("oasst-trees-100.jsonl", "top-2"): (100, 287, "55ddd4dab9fdd7991071cb4d4bf99bd10029850d6cb6f4ef8b64b2e8676863c7"),
    ("oasst-messages-100.jsonl", "best"): (
        100,
        100,
        "022c9d05f1ad89a4fa55e1f1be001872547a15afe46443ad3742f79020998464",
    ),
    ("sharegpt-identity.json", "best"): (500, 500, "0f44ef90ef9d9ecfe83062a6fa84439b690077d28692a9958150f38e162608ed"),
    # 109 of these rows have the tools "[]", which is none: they go out without `tools`.
    ("sharegpt-glaive-toolcall.json", "best"): (
        300,
        300,
        "ddf3eb72eae13cac54cac42d6b122d98436d0358253ef01805853bb5d6473517",
    ),
    ("alpaca-en-1k.json", "best"): (999, 999, "6d7d7f371554d55bef27243b0b6397952aa0fb7b1b3cfed552dd06552fd58421"),
    ("self-instruct-seed-tasks.jsonl", "best"): (
        175,
        175,
        "c88384adfaade52bb4034868df2857aae3c4fdb66d12e34ee4307f17d5e67a08",
    ),
}


@pytest.mark.parametrize(("name", "paths"), PINNED)
def test_real_files_give_the_same_bytes(name: str, paths: str, shared_data: Path, tmp_path: Path) -> None:
    found = quietly(shared_data / name, tmp_path / "out.jsonl", choices=Choices(paths=paths))
    rows, chats, sha256 = PINNED[name, paths]
    assert (found.rows, found.chats, found.bad, found.dropped, found.changed) == (rows, chats, 0, {}, {})
    assert hashlib.sha256((tmp_path / "out.jsonl").read_bytes()).hexdigest() == sha256
    for record in read_records(tmp_path / "out.jsonl"):
        to_chat(record)


def test_alpaca_to_messages_and_back_is_exact(shared_data: Path, tmp_path: Path) -> None:
    there, again = tmp_path / "messages.jsonl", tmp_path / "alpaca.json"
    quietly(shared_data / "alpaca-en-1k.json", there)
    found = quietly(there, again, target="alpaca")
    assert (found.source, found.chats) == ("messages", 999)
    assert json.loads(again.read_bytes()) == json.loads((shared_data / "alpaca-en-1k.json").read_bytes())


@pytest.mark.parametrize("name", ["sharegpt-identity.json", "sharegpt-glaive-toolcall.json"])
def test_sharegpt_to_messages_and_back(name: str, shared_data: Path, tmp_path: Path) -> None:
    quietly(shared_data / name, tmp_path / "a.jsonl")
    quietly(tmp_path / "a.jsonl", tmp_path / "b.jsonl", target="sharegpt")
    quietly(tmp_path / "b.jsonl", tmp_path / "c.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    roles = {"function_call": "gpt"}
    for row, back in zip(json.loads((shared_data / name).read_bytes()), lines(tmp_path / "b.jsonl"), strict=True):
        turns = [{**turn, "from": roles.get(turn["from"], turn["from"])} for turn in row["conversations"]]
        tools = row.get("tools", "[]")  # an empty list is as none
        assert back == {"conversations": turns, **({"tools": tools} if tools != "[]" else {})}


def test_trees_and_messages_give_the_same(shared_data: Path, tmp_path: Path) -> None:
    """The trees of the export, their messages as single rows in the order of a shuffled file."""
    rows, waiting = [], [row["prompt"] for row in lines(shared_data / "oasst-trees-100.jsonl")]
    roots = list(waiting)
    while waiting:
        message = waiting.pop()
        rows.append({"parent_id": None, **{key: value for key, value in message.items() if key != "replies"}})
        waiting += message["replies"]
    order = {message["message_id"]: place for place, message in enumerate(roots)}
    rows.sort(key=lambda row: (order.get(row["message_id"], -1), row["message_id"]))  # replies first
    write(tmp_path / "messages.jsonl", rows)
    found = quietly(tmp_path / "messages.jsonl", tmp_path / "out.jsonl", choices=Choices(paths="all"))
    assert (found.source, found.rows, found.chats, found.orphans) == ("oasst-messages", 1167, 546, [])
    quietly(shared_data / "oasst-trees-100.jsonl", tmp_path / "trees.jsonl", choices=Choices(paths="all"))
    assert sorted((tmp_path / "out.jsonl").read_bytes().splitlines()) == sorted(
        (tmp_path / "trees.jsonl").read_bytes().splitlines()
    )


def test_columns_of_ones_own(shared_data: Path, tmp_path: Path) -> None:
    columns = {"user": "question", "assistant": "answer"}
    found = quietly(shared_data / "gsm8k-test.jsonl", tmp_path / "out.jsonl", columns=columns, target="p3")
    assert (found.source, found.chats) == ("columns", 1319)
    asked = [row["question"] for row in lines(shared_data / "gsm8k-test.jsonl")]
    assert [row["inputs"] for row in lines(tmp_path / "out.jsonl")] == asked


# ---- kinds of files ----------------------------------------------------------------------------------------------


def kinds(folder: Path) -> Iterator[Path]:
    """ALPACA as each kind of file."""
    yield write(folder / "a.jsonl", ALPACA)
    (folder / "a.json").write_text(json.dumps(ALPACA))
    yield folder / "a.json"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ALPACA), folder / "a.parquet")
    yield folder / "a.parquet"
    for suffix, between in (("csv", ","), ("tsv", "\t")):
        rows = [list(ALPACA[0]), *(['"' + value + '"' for value in row.values()] for row in ALPACA)]
        (folder / f"a.{suffix}").write_text("".join(between.join(row) + "\n" for row in rows), encoding="utf-8")
        yield folder / f"a.{suffix}"


def test_every_kind_of_file_gives_the_same_bytes(tmp_path: Path) -> None:
    found = set()
    for path in kinds(tmp_path):
        assert quietly(path, tmp_path / "out.jsonl").rows == 2
        found.add((tmp_path / "out.jsonl").read_bytes())
    assert len(found) == 1
    assert b"\xf0\x9f\x99\x82" in found.pop()  # letters are written as they are, not escaped


def test_an_array_is_written_where_the_name_ends_with_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ALPACA)
    quietly(path, tmp_path / "out.json", target="alpaca")
    assert json.loads((tmp_path / "out.json").read_bytes()) == ALPACA
    quietly(path, tmp_path / "out.ndjson", target="alpaca")
    assert lines(path) == [json.loads(line) for line in (tmp_path / "out.ndjson").read_bytes().split(b"\n")[:-1]]


def test_marks_blank_lines_and_line_ends_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"prompt":"a","completion":"b"}\r\n\n \t\n{"prompt":"c","completion":"d"}'
    )
    assert quietly(tmp_path / "a.jsonl", tmp_path / "out.jsonl").rows == 2


def test_pieces_of_any_size_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [*ALPACA * 20, {"bad": 1}, *ALPACA])
    whole = quietly(path, tmp_path / "whole.jsonl", source="alpaca", skip_bad_rows=True)
    monkeypatch.setattr("lilliput.data.conversion._PIECE_BYTES", 1)
    pieces = quietly(path, tmp_path / "pieces.jsonl", source="alpaca", skip_bad_rows=True)
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "pieces.jsonl").read_bytes()
    assert (whole.rows, whole.chats, whole.bad, whole.skipped) == (43, 42, 1, pieces.skipped)
    assert whole.skipped[0].origin == "a.jsonl:41"


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lilliput.data.conversion._PIECE_BYTES", 10_000)

    def peak(times: int) -> int:
        path = write(tmp_path / "a.jsonl", ALPACA * times)
        tracemalloc.start()
        quietly(path, tmp_path / "out.jsonl")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(4000) < 1.2 * peak(500)


def test_a_job_can_be_sent_to_another_process() -> None:
    job = Job(form_named("alpaca"), form_named("messages"), file="a.jsonl")
    raw = [json.dumps(ALPACA[0]).encode(), b"{", b"\n"]
    function, job = pickle.loads(pickle.dumps((convert_lines, job)))
    piece = pickle.loads(pickle.dumps(function(raw, 7, job)))
    assert (piece.rows, piece.chats, piece.bad, piece.taken) == (2, 1, 1, sum(map(len, raw)))
    assert piece.faults[0].origin == "a.jsonl:8"
    assert json.loads(piece.data)["input"] == "1 and 2"


# ---- bad rows ----------------------------------------------------------------------------------------------------

GOOD = {"prompt": "a", "completion": "b"}
BAD: dict[str, tuple[str, str]] = {
    "broken": ('{"prompt": "a"', "a.jsonl:2: broken JSON: .*column 15"),
    "null": ("null", "a.jsonl:2: is null, not an object"),
    "list": ("[1]", "a.jsonl:2: is a list, not an object"),
    "null field": ('{"prompt": "a", "completion": null}', "a.jsonl:2: 'completion' is null, not text"),
    "number": ('{"prompt": 3, "completion": "b"}', "a.jsonl:2: 'prompt' is of type int, not text"),
    "missing": ('{"prompt": "a"}', r"a.jsonl:2: has no 'completion' \(it has 'prompt'\)"),
    "no keys": ("{}", r"a.jsonl:2: has no 'prompt' \(it has nothing\)"),
    "blank": ('{"prompt": "a", "completion": " \\n"}', "a.jsonl:2: 'completion' is empty"),
    "surrogate": (
        '{"prompt": "a", "completion": "b\\ud83d"}',
        r"a.jsonl:2: turn 2 \(assistant\) holds half a character",
    ),
    "deep": ("[" * 5000 + "]" * 5000, "a.jsonl:2: JSON that cannot be read"),
    "deep row": ('{"prompt":' * 5000 + "1" + "}" * 5000, "a.jsonl:2: JSON that cannot be read"),
    "latin-1": ('{"prompt": "a", "completion": "caf\udce9"}', r"a.jsonl:2: is not UTF-8 \(byte 0xe9"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_refused_or_skipped_and_counted(case: str, tmp_path: Path) -> None:
    line, said = BAD[case]
    text = f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n"
    (tmp_path / "a.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=said + ".*; 1 of the first 3 rows is bad.*--skip-bad-rows"):
        quietly(tmp_path / "a.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    found = quietly(tmp_path / "a.jsonl", tmp_path / "out.jsonl", skip_bad_rows=True)
    assert (found.rows, found.chats, found.bad) == (3, 2, 1)
    assert len(lines(tmp_path / "out.jsonl")) == 2


def test_numbers_that_orjson_does_not_take_are_read_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b", "loss": NaN}\n')
    assert quietly(tmp_path / "a.jsonl", tmp_path / "out.jsonl").left == ["loss"]


def test_a_bad_chat_takes_its_whole_row_along(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "instances": [{"output": "b"}, {"output": ""}]},
        {"instruction": "c", "instances": [{"output": "d"}]},
    ]
    found = quietly(write(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl", skip_bad_rows=True)
    assert (found.chats, found.bad) == (1, 1)
    assert found.skipped[0].reason == "instances[1]: 'output' is empty"


def test_a_bad_row_is_not_counted_among_what_was_dropped(tmp_path: Path) -> None:
    turns = [{"from": speaker, "value": "x"} for speaker in ("gpt", "human", "observation", "gpt")]
    good = [{"from": speaker, "value": "x"} for speaker in ("gpt", "human", "gpt")]
    path = write(tmp_path / "a.jsonl", [{"conversations": turns}, {"conversations": good}])
    found = quietly(path, tmp_path / "out.jsonl", skip_bad_rows=True)
    assert (found.bad, found.dropped) == (1, {"turns before the user's first": 1})


def test_a_chat_that_the_target_cannot_say_is_a_bad_row(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    path = write(tmp_path / "a.jsonl", [{"messages": turns[:2]}, {"messages": turns}])
    with pytest.raises(DataError, match=r"a.jsonl:2: has 4 turns, and a row of instruction and output holds one"):
        quietly(path, tmp_path / "out.jsonl", target="alpaca")
    assert quietly(path, tmp_path / "out.jsonl", target="alpaca", skip_bad_rows=True).bad == 1


def test_many_bad_rows_are_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, *[{"prompt": "a"}] * 50])
    found = quietly(path, tmp_path / "out.jsonl", source="prompt-completion", skip_bad_rows=True)
    assert (found.bad, len(found.skipped)) == (50, 20)


# ---- refused as a whole ------------------------------------------------------------------------------------------


def test_what_was_there_stays_when_something_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("before")
    with pytest.raises(DataError):
        quietly(write(tmp_path / "a.jsonl", [GOOD, {"prompt": 1}]), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.jsonl"]


def test_ctrl_c_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out.jsonl").write_text("before")
    path = write(tmp_path / "a.jsonl", [GOOD])
    monkeypatch.setattr("lilliput.data.conversion._add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quietly(path, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.jsonl"]


FILES: dict[str, tuple[str, str]] = {
    "empty": ("", "a.jsonl: is empty"),
    "bad rows only": ("{}\n{}\n", r"a.jsonl:1: is of no known form"),
    "broken rows only": ("{\n{\n", "a.jsonl:1: broken JSON.*none of the first 2 rows can be read"),
    "unknown": ('{"question": "a", "answer": "b"}\n', "is of no known form.*--columns user=question,assistant=answer"),
    "misspelt": ('{"prompt": "a", "completon": "b"}\n', "did you mean 'completion'"),
    "ambiguous": (
        '{"instruction": "a", "output": "b", "response": "c"}\n',
        r"a.jsonl: may be of several forms: alpaca \(instruction, output\) and dolly.*--from alpaca or --from dolly",
    ),
    "mixed": (
        '{"prompt": "a", "completion": "b"}\n{"inputs": "a", "targets": "b"}\n',
        r"a.jsonl: holds rows of several forms \(prompt-completion, p3\).*--from",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_whose_form_cannot_be_told(case: str, tmp_path: Path) -> None:
    text, said = FILES[case]
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        quietly(tmp_path / "a.jsonl", tmp_path / "out.jsonl")


def test_an_ambiguous_file_is_converted_when_its_form_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(FILES["ambiguous"][0])
    quietly(tmp_path / "a.jsonl", tmp_path / "out.jsonl", source="dolly", target="p3")
    assert lines(tmp_path / "out.jsonl") == [{"inputs": "a", "targets": "c"}]


def test_nothing_left_is_said_with_the_reasons(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"conversations": [{"from": "gpt", "value": "a"}]}])
    with pytest.raises(DataError, match="no chat is left; dropped were 1 turns before.*, 1 conversations of which"):
        quietly(path, tmp_path / "out.jsonl")
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": 1}])
    with pytest.raises(DataError, match=r"a.jsonl:1: has no 'completion'.*; all 2 rows are bad"):
        quietly(path, tmp_path / "out.jsonl", source="prompt-completion", skip_bad_rows=True)


def test_orphans_alone_are_no_empty_file(tmp_path: Path) -> None:
    rows = [{"message_id": name, "parent_id": "x", "text": "a", "role": "prompter"} for name in "ab"]
    path = write(tmp_path / "m.jsonl", rows)
    with pytest.raises(DataError, match="m.jsonl:1: no tree begins in the file; all 2 messages are orphans"):
        quietly(path, tmp_path / "out.jsonl")
    path = write(tmp_path / "m.jsonl", [*rows, rows[0]])
    with pytest.raises(DataError, match="m.jsonl:1: no tree begins .*; 2 messages are orphans and 1 rows are bad"):
        quietly(path, tmp_path / "out.jsonl", skip_bad_rows=True)


def test_a_name_that_is_not_carried_over_can_be_printed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**GOOD, "x\ud83d": 1, "é": 2}])
    assert quietly(path, tmp_path / "out.jsonl").left == ["x\\ud83d", "é"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "from": ({"source": "alpacca"}, "unknown form 'alpacca'; did you mean 'alpaca'"),
    "to": ({"target": "message"}, "--to: unknown form 'message'; did you mean 'messages'"),
    "not written": ({"target": "oasst"}, "--to: unknown form 'oasst'.*Written are: messages"),
    "both": ({"source": "alpaca", "columns": {"user": "a"}}, "--from and --columns both say"),
    "columns": ({"columns": {"user": "a"}}, "no column is said to be the assistant"),
    "length": ({"longest": 0}, "0 is not a length from 1 up"),
    "paths": ({"choices": Choices(paths="most")}, "--paths: unknown value 'most'"),
    "paths of alpaca": ({"choices": Choices(paths="all")}, "--paths: means nothing for rows of the form alpaca"),
    "lang of alpaca": ({"choices": Choices(languages=("en",))}, "--lang: means nothing for rows of the form alpaca"),
    "html of alpaca": ({"choices": Choices(keep_html=True)}, "--keep-html: means nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_use(case: str, tmp_path: Path) -> None:
    options, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        quietly(write(tmp_path / "a.jsonl", ALPACA), tmp_path / "out.jsonl", **options)
    assert not (tmp_path / "out.jsonl").exists()


def test_wrong_places(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ALPACA)
    cases: list[tuple[Path, Path, type[LilliputError], str]] = [
        (path, path, UsageError, "a.jsonl: is the file that is read"),
        (path, tmp_path / "out.csv", UsageError, r"'.csv' is no suffix of what is written.*\.jsonl, or \.json"),
        (tmp_path / "none.jsonl", tmp_path / "out.jsonl", DataError, "none.jsonl: no such file"),
        (tmp_path, tmp_path / "out.jsonl", DataError, "is a folder, not a file"),
        (path, path / "out.jsonl", DiskError, "could not be written"),
    ]
    for source, out, kind, said in cases:
        with pytest.raises(kind, match=said):
            quietly(source, out)


def test_detect(tmp_path: Path) -> None:
    assert detect(write(tmp_path / "a.jsonl", ALPACA)).name == "alpaca"


# ---- chats that are too long -------------------------------------------------------------------------------------


def said(*words: str, system: str = "") -> Chat:
    """User and assistant in turns."""
    turns = [Turn(("user", "assistant")[place % 2], word) for place, word in enumerate(words)]
    return Chat((Turn("system", system), *turns) if system else tuple(turns))


@pytest.mark.parametrize(
    ("chat", "longest", "parts", "counts"),
    [
        (said("aa", "bb"), 4, ["aabb"], {}),
        (said("a", "b", "c", "d", "e", "f"), 4, ["abcd", "ef"], {"chats cut into several": 1}),
        (said("a", "b", "c", "d", system="S"), 3, ["Sab", "Scd"], {"chats cut into several": 1}),
        (said("a", "b", "cc", "dd", "e", "f"), 3, ["ab", "ef"],
         {"exchanges that are too long alone": 1, "chats cut into several": 1}),
        (said("aa", "bb", "c", "d"), 3, ["cd"], {"exchanges that are too long alone": 1}),
        (said("aa", "bb"), 3, [],
         {"exchanges that are too long alone": 1, "chats of which nothing is short enough": 1}),
    ],
)  # fmt: skip
def test_cut(chat: Chat, longest: int, parts: list[str], counts: dict[str, int]) -> None:
    reading = Reading()
    found = cut(chat, longest, characters, reading)
    assert ["".join(turn.content for turn in part.turns) for part in found] == parts
    assert all(characters(part) <= longest for part in found)
    assert dict(reading.changed + reading.dropped) == counts


def test_a_call_and_its_answer_are_not_torn_apart() -> None:
    turns = [Turn(role, "x") for role in ("user", "assistant", "tool", "assistant", "user", "assistant")]
    assert [len(part.turns) for part in cut(Chat(tuple(turns)), 4, characters, Reading())] == [4, 2]


def test_the_input_stays_with_the_first_exchange() -> None:
    chat = Chat(said("aa", "bb", "c", "d").turns, input="a")
    assert [part.input for part in cut(chat, 3, characters, Reading())] == [""]
    assert [part.input for part in cut(chat, 4, characters, Reading())] == ["a", ""]


@pytest.mark.parametrize("roles", [["assistant"], ["assistant", "user", "assistant"], []])
def test_what_is_no_chat_is_not_cut(roles: list[str], tmp_path: Path) -> None:
    row = {"messages": [{"role": role, "content": "I lead. " * 5} for role in roles]}
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=r"turn 1 is the assistant's|'messages' is empty"):
        quietly(path, tmp_path / "out.jsonl", source="messages", longest=35)


def test_long_chats_of_a_file_are_cut(shared_data: Path, tmp_path: Path) -> None:
    found = quietly(shared_data / "sharegpt-glaive-toolcall.json", tmp_path / "out.jsonl", longest=800)
    assert (found.chats, found.changed) == (388, {"chats cut into several": 70})
    assert max(characters(to_chat(record)) for record in read_records(tmp_path / "out.jsonl")) <= 800
