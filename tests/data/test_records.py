"""Reading rows: every kind of file, and every way in which one can be broken."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.data import read_records
from lilliput.errors import DataError

ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": 'Say "hi"\nin a new line, please', "input": "", "output": "hi é 日本 🙂\u2028;"},
    {"instruction": "Stop.", "input": "", "output": "Stopped."},
]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def jsonl(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_as(kind: str, path: Path) -> Path:
    """ROWS in a file of the kind, under a name that says so."""
    if kind == "json":
        return write(path / "rows.json", json.dumps(ROWS, indent=2))
    if kind == "json object":
        return write(path / "rows.json", json.dumps({"version": 1, "data": ROWS}))
    if kind == "jsonl":
        return write(path / "rows.jsonl", jsonl(ROWS))
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path / "rows.parquet")
        return path / "rows.parquet"
    delimiter = {"csv": ",", "csv semicolon": ";", "tsv": "\t"}[kind]
    target = path / ("rows.tsv" if kind == "tsv" else "rows.csv")
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return target


KINDS = ["json", "json object", "jsonl", "csv", "csv semicolon", "tsv", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_hold_the_same_rows_and_fingerprint(kind: str, tmp_path: Path) -> None:
    records = read_records(write_as(kind, tmp_path))
    assert [record.fields for record in records] == ROWS
    assert records.sha256 == read_records(write(tmp_path / "other.jsonl", jsonl(ROWS))).sha256
    assert records.skipped == []
    assert len(records) == 3


ORIGINS = {
    "json": ["rows.json:2 (row 1)", "rows.json:7 (row 2)", "rows.json:12 (row 3)"],
    "json object": ["rows.json:data, row 1", "rows.json:data, row 2", "rows.json:data, row 3"],
    "jsonl": ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"],
    "csv": ["rows.csv:2", "rows.csv:3", "rows.csv:5"],  # the second row has a line break in it
    "parquet": ["rows.parquet:row 1", "rows.parquet:row 2", "rows.parquet:row 3"],
}


@pytest.mark.parametrize("kind", ORIGINS)
def test_every_row_knows_where_it_stands(kind: str, tmp_path: Path) -> None:
    assert [record.origin for record in read_records(write_as(kind, tmp_path))] == ORIGINS[kind]


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(rows: list[dict[str, str]]) -> str:
        return read_records(write(tmp_path / "rows.jsonl", jsonl(rows))).sha256

    turned = [dict(reversed(row.items())) for row in ROWS]
    assert fingerprint(ROWS) == fingerprint(turned)
    assert fingerprint(ROWS) != fingerprint(ROWS[::-1])
    assert fingerprint(ROWS) != fingerprint(ROWS[:2])
    assert fingerprint(ROWS[:1]) != fingerprint([ROWS[0] | {"output": "4"}])


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows"])
def test_a_byte_order_mark_is_no_part_of_the_rows(name: str, tmp_path: Path) -> None:
    text = "prompt,completion\na,b\n" if name.endswith("csv") else '{"prompt": "a", "completion": "b"}\n'
    records = read_records(write(tmp_path / name, b"\xef\xbb\xbf" + text.encode()))
    assert [record.fields for record in records] == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.txt", "rows"])
def test_content_decides_where_the_suffix_is_wrong(name: str, tmp_path: Path) -> None:
    assert [r.fields for r in read_records(write(tmp_path / name, jsonl(ROWS)))] == ROWS
    assert [r.fields for r in read_records(write(tmp_path / name, json.dumps(ROWS, indent=1)))] == ROWS
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)
    assert [r.fields for r in read_records(tmp_path / name)] == ROWS


def test_an_object_with_messages_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}]}
    assert [r.fields for r in read_records(write(tmp_path / "one.json", json.dumps(row, indent=1)))] == [row]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    records = read_records(write(tmp_path / "rows.jsonl", '\n{"a": 1}\r\n\n   \n{"a": 2}'))
    assert [(record.origin, record.row) for record in records] == [("rows.jsonl:2", 1), ("rows.jsonl:5", 2)]


def test_parquet_lists_and_nulls(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "id": None}, {"messages": None, "id": 3}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [record.fields for record in read_records(tmp_path / "rows.parquet")] == rows


def test_a_long_csv_field_is_read_and_the_modules_limit_left_alone(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    records = read_records(write(tmp_path / "rows.csv", f"prompt,completion\n{'x' * 300_000},y\n"))
    assert len(records[0].fields["prompt"]) == 300_000
    assert csv.field_size_limit() == limit


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none(), max_size=4), min_size=1))
def test_json_and_jsonl_give_back_any_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    path = tmp_path_factory.mktemp("rows")
    array = read_records(write(path / "rows.json", json.dumps(rows)))
    lines = read_records(write(path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert [r.fields for r in array] == [r.fields for r in lines] == rows
    assert array.sha256 == lines.sha256


# ---- refused -----------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "a", "completion": "b"}\n'
BROKEN_FILES = {
    "empty": ("rows.jsonl", "", r"rows.jsonl: is empty"),
    "white space": ("rows.json", " \n\n ", r"rows.json: is empty"),
    "a BOM alone": ("rows.csv", b"\xef\xbb\xbf", r"rows.csv: is empty"),
    "no rows": ("rows.json", "[]", r"rows.json: holds no rows"),
    "no rows in list": ("rows.json", '{"data": []}', r"rows.json: holds no rows"),
    "header alone": ("rows.csv", "prompt,completion\n", r"rows.csv: holds no rows"),
    "unknown kind": ("rows.txt", "just words", r"rows.txt: is of no kind that is understood.*TSV and Parquet"),
    "a number": ("rows.json", "17", r"is a number, not a list of rows"),
    "two lists": ("rows.json", '{"train": [{}], "test": [{}]}', r"several lists \('train', 'test'\)"),
    "UTF-16": ("rows.csv", "a,b\n1,2\n".encode("utf-16"), r"is UTF-16, not UTF-8"),
    "array cut short": ("rows.json", '[\n{"a": 1},\n{"a": 2', r"rows.json:3: broken JSON"),
    "array without comma": (
        "rows.json",
        '[\n{"a": 1}\n{"a": 2}]',
        r"rows.json:3: broken JSON: Expecting ',' delimiter",
    ),
    "array with rest": ("rows.json", '[\n{"a": 1}]\n[]', r"rows.json:3: broken JSON: Extra data"),
    "object cut short": ("rows.json", '{\n"data": [\n{"a": 1}', r"rows.json:3: broken JSON"),
    "array not UTF-8": ("rows.json", b'[\n{"a": "ok"},\n{"a": "\xe9"}]', r"rows.json:3: is not UTF-8 \(byte 0xe9\)"),
    "CSV not UTF-8": ("rows.csv", b"a,b\n1,2\n\xe9,2\n", r"rows.csv:3: is not UTF-8 \(byte 0xe9\)"),
    "CSV quote": ("rows.csv", 'a,b\n1,2\n"1,2\n3,4\n', r"rows.csv:4: broken CSV.*double quote"),
    "CSV header": ("rows.csv", "a,,a\n1,2,3\n", r"rows.csv:1: the header has an empty or a repeated name"),
    "no Parquet": ("rows.parquet", "PAR0 and so on", r"rows.parquet: is not a Parquet file"),
    "Parquet cut short": ("rows.parquet", b"PAR1\x00\x00", r"rows.parquet: is a broken Parquet file"),
    "deep": ("rows.json", "[" * 200_000, r"rows.json: JSON that cannot be read"),
    "one bad row": ("rows.jsonl", "17\n", r"rows.jsonl:1: is a number, not an object.*the only row is bad"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
@pytest.mark.parametrize("skip", [False, True])
def test_a_broken_file_is_refused_with_place_and_reason(case: str, skip: bool, tmp_path: Path) -> None:
    name, content, message = BROKEN_FILES[case]
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path / name, content), skip_bad_rows=skip)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl: no such file"):
        read_records(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="is a folder, not a file"):
        read_records(tmp_path)


BAD_ROWS = {
    "cut short": ("rows.jsonl", GOOD + '{"prompt": "a"\n' + GOOD, r"rows.jsonl:2: broken JSON: .* \(column 15\)"),
    "an array": ("rows.jsonl", GOOD + "[1, 2]\n" + GOOD, r"rows.jsonl:2: is a list, not an object"),
    "null": ("rows.json", f"[{GOOD},\nnull,\n{GOOD}]", r"rows.json:3 \(row 2\): is null, not an object"),
    "not UTF-8": ("rows.jsonl", GOOD.encode() + b'{"prompt": "\xff"}\n' + GOOD.encode(), r"rows.jsonl:2: is not UTF-8"),
    "half a character": (
        "rows.jsonl",
        GOOD + '{"prompt": "\\ud83d"}\n' + GOOD,
        r"rows.jsonl:2: holds half a character",
    ),
    "a huge number": (
        "rows.jsonl",
        GOOD + '{"a": ' + "9" * 5000 + "}\n" + GOOD,
        r"rows.jsonl:2: JSON that cannot be r",
    ),
    "too few fields": (
        "rows.csv",
        "prompt,completion\na,b\nc\nd,e\n",
        r"rows.csv:3: has 1 fields where the header has 2",
    ),
    "too many fields": ("rows.csv", "prompt,completion\na,b\nc,d,e\nd,e\n", r"rows.csv:3: has 3 fields where"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_or_skipped_and_listed(case: str, tmp_path: Path) -> None:
    name, content, message = BAD_ROWS[case]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message + r".*; 1 of 3 rows is bad\. .*--skip-bad-rows"):
        read_records(path)
    records = read_records(path, skip_bad_rows=True)
    assert len(records) == 2
    (skipped,) = records.skipped
    with pytest.raises(DataError, match=message):
        raise DataError(skipped.reason, where=skipped.origin)


def test_the_first_bad_row_is_named_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD * 999 + "oops\n" + GOOD * 500 + "5\n" * 2)
    with pytest.raises(DataError, match=r"rows.jsonl:1000: broken JSON.*; 3 of 1,502 rows are bad"):
        read_records(path)
    with pytest.raises(DataError, match="all 2 rows are bad"):
        read_records(write(tmp_path / "bad.jsonl", "1\n2\n"), skip_bad_rows=True)


REAL_FILES = {
    "alpaca-en-1k.json": 999,
    "alpaca-gsm8k-train.json": 7473,
    "gsm8k-test.jsonl": 1319,
    "c4-sample.jsonl": 300,
}


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files(name: str, shared_data: Path) -> None:
    assert len(read_records(shared_data / name)) == REAL_FILES[name]
