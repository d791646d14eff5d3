"""Rows of any table as rows of a task: columns, labels, choices, headers, and every way in which a row can be bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lilliput.data import SkippedRow
from lilliput.errors import DataError, UsageError
from lilliput.synthesis.flan_rows import Part, TaskFile, TaskRow
from lilliput.synthesis.flan_tasks import load_task


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    return write(path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path, task: str, **how: Any) -> list[TaskRow | SkippedRow]:
    return list(TaskFile(Part(path, load_task(task), **how)))


def good(path: Path, task: str, **how: Any) -> list[TaskRow]:
    rows = read(path, task, **how)
    assert all(isinstance(row, TaskRow) for row in rows), rows
    return rows  # type: ignore[return-value]


def reason(path: Path, task: str, **how: Any) -> str:
    """Why the first bad row is bad, with its place."""
    bad = next(row for row in read(path, task, **how) if isinstance(row, SkippedRow))
    return f"{bad.origin}: {bad.reason}"


SENTIMENT = [("a fine film", "1", "positive"), ("dull", "0", "negative")]


def test_all_kinds_of_files_hold_the_same_rows(tmp_path: Path) -> None:
    fields = [{"sentence": text, "label": label} for text, label, _ in SENTIMENT]
    files = [
        write(tmp_path / "a.csv", "sentence,label\na fine film,1\ndull,0\n"),
        write(tmp_path / "b.tsv", "label\tsentence\n1\ta fine film\n0\tdull\n"),
        write(tmp_path / "c.json", json.dumps(fields)),
        jsonl(tmp_path, *fields),
        write(tmp_path / "d.txt", "sentence || label\na fine film||1\n\ndull||0\n"),
        tmp_path / "e.parquet",
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(fields), files[-1])
    for path in files:
        rows = good(path, "sentiment", separator="||" if path.suffix == ".txt" else "")
        assert [row.values for row in rows] == [{"sentence": t, "label": name} for t, _, name in SENTIMENT]
        assert [(row.label, row.row, row.options) for row in rows] == [("positive", 1, ()), ("negative", 2, ())]


def test_a_file_without_a_header_is_read_in_the_tasks_order_and_it_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "sst2.tsv", 'a "fine" film\t1\ndull\t0\n')
    file = TaskFile(Part(path, load_task("sentiment")))
    assert file.note == "sst2.tsv has no header: its columns are read as sentence, label"
    assert [(row.values["sentence"], row.origin) for row in file if isinstance(row, TaskRow)] == [
        ('a "fine" film', "sst2.tsv:1"), ("dull", "sst2.tsv:2"),
    ]  # fmt: skip
    named = write(tmp_path / "turned.csv", "1,a fine film,x\n0,dull,y\n")
    assert [row.label for row in good(named, "sentiment", names=("label", "text", "id"))] == ["positive", "negative"]
    assert TaskFile(Part(named, load_task("sentiment"), names=("label", "text", "id"))).note == ""


def test_columns_by_alias_by_case_by_option_and_constants(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"TEXT": "dull", "Sentiment": "neg", "mine": "great"})
    assert good(path, "sentiment")[0].values == {"sentence": "dull", "label": "negative"}
    assert good(path, "sentiment", columns={"sentence": "mine"})[0].values["sentence"] == "great"
    path = jsonl(tmp_path, {"translation": {"de": "Ja", "en": "Yes"}})
    columns = {"source": "translation.de", "target": "translation.en"}
    languages = {"source_language": "German", "target_language": "English"}
    row = good(path, "translation", columns=columns, constants=languages)[0]
    assert row.values == {"source": "Ja", "target": "Yes", **languages}
    path = jsonl(tmp_path, {"text": "Why?", "label": "person"})
    assert good(path, "classification")[0].values["kind"] == "text"
    assert good(path, "classification", constants={"kind": "question"})[0].values["kind"] == "question"


@pytest.mark.parametrize("label", [1, 1.0, "1", " 1 ", "Positive", "POS"])
def test_a_label_is_known_by_its_value_or_its_name(label: object, tmp_path: Path) -> None:
    assert good(jsonl(tmp_path, {"sentence": "x", "label": label}), "sentiment")[0].label == "positive"


@pytest.mark.parametrize(
    ("row", "how"),
    [
        ({"ctx": "c", "endings": ["x", "y"], "label": 1}, {}),
        ({"ctx": "c", "endings": ["x", "y"], "label": "1"}, {}),
        ({"ctx": "c", "endings": ["x", "y"], "label": "B"}, {}),
        ({"ctx": "c", "endings": ["x", "y"], "label": "y"}, {}),
        ({"ctx": "c", "endings": ["x", " Y "], "label": "y"}, {}),
        ({"ctx": "c", "endings": ["x", "y"], "label": 2}, {"count_from": 1}),
        ({"goal": "c", "sol1": "x", "sol2": "y", "label": 1}, {}),
        ({"question": "c", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, {}),
        ({"a": "c", "b": "x", "c": "y", "label": 1}, {"columns": {"situation": "a", "choices": "b+c"}}),
    ],
)
def test_choices_and_answers_in_all_their_forms(row: dict[str, Any], how: dict[str, Any], tmp_path: Path) -> None:
    found = good(jsonl(tmp_path, row), "commonsense", **how)[0]
    assert found.options[0] == "x"
    assert found.values["answer"] == found.options[1]
    assert found.options[1].lower() == "y"
    assert found.values["situation"] == "c"


def test_a_number_means_a_place_where_the_choices_are_numbers_too(tmp_path: Path) -> None:
    row = {"question": "2+0?", "choices": ["4", "2", "1", "0"], "answer": 1}
    assert good(jsonl(tmp_path, row), "commonsense")[0].values["answer"] == "2"


def test_a_letter_whose_upper_case_is_two_is_no_choice(tmp_path: Path) -> None:
    row = {"question": "which?", "choices": ["a b", "c d"], "answer": "ß"}
    (bad,) = read(jsonl(tmp_path, row), "commonsense")
    assert isinstance(bad, SkippedRow)
    assert "none of the row's 2 choices" in bad.reason


def test_answers_without_choices_and_facts(tmp_path: Path) -> None:
    squad = {"context": "p", "question": "q", "answers": {"text": ["", "first", "second"], "answer_start": [1, 2, 3]}}
    assert good(jsonl(tmp_path, squad), "reading-comprehension")[0].values["answer"] == "first"
    boolq = {"passage": "p", "question": "q", "answer": True}
    assert good(jsonl(tmp_path, boolq), "reading-comprehension")[0].values["answer"] == "yes"
    assert good(jsonl(tmp_path, {"question": "q", "answer": 7.0}), "closed-book-qa")[0].values["answer"] == "7"
    for facts, said in (
        ("name : A", "name : A"),
        (["dog", "run"], "dog, run"),
        ([["A", "born", "1900"], ["A", "died", "1980"]], "A, born, 1900 | A, died, 1980"),
        ({"name": "A", "price": 3}, "name: A; price: 3"),
    ):
        path = jsonl(tmp_path, {"facts": facts, "text": "t"})
        assert good(path, "data-to-text")[0].values["facts"] == said


BAD = {
    "missing": ("sentiment", {"label": 1}, "'sentence' is missing"),
    "null": ("sentiment", {"sentence": None, "label": 1}, "'sentence' is missing"),
    "blank": ("sentiment", {"sentence": " ", "label": 1}, "'sentence' is empty"),
    "an object": ("sentiment", {"sentence": {"a": 1}, "label": 1}, "'sentence' is an object without 'text'"),
    "alias": ("sentiment", {"text": "", "label": 1}, "'sentence' is empty (the file's 'text')"),
    "half a character": ("sentiment", {"sentence": "\ud800", "label": 1}, "half a character"),
    "label missing": ("sentiment", {"sentence": "x", "label": None}, "'label' is missing"),
    "label of a wrong type": ("sentiment", {"sentence": "x", "label": 0.5}, "'label' is of type float"),
    "label unknown": ("sentiment", {"sentence": "x", "label": "positiv"}, "did you mean 'positive'?"),
    "label known": ("sentiment", {"sentence": "x", "label": 2}, "none of negative (0, neg, bad), positive"),
    "one choice": ("commonsense", {"ctx": "c", "endings": ["x"], "label": 0}, "not a list of two choices"),
    "no list": ("commonsense", {"ctx": "c", "endings": "x, y", "label": 0}, "not a list of two choices"),
    "empty choice": ("commonsense", {"ctx": "c", "endings": ["x", ""], "label": 0}, "choice 2 of 'choices' is empty"),
    "same choice": ("commonsense", {"ctx": "c", "endings": ["x", "x "], "label": 0}, "the same choice twice"),
    "choice beyond": ("commonsense", {"ctx": "c", "endings": ["x", "y"], "label": 2}, "say --count-from 1"),
    "choice unknown": ("commonsense", {"ctx": "c", "endings": ["x", "y"], "label": "z"}, "none of the row's 2 choices"),
    "no choice": ("commonsense", {"ctx": "c", "endings": ["x", "y"], "label": ""}, "'answer' is empty"),
    "names": (
        "commonsense", {"question": "c", "choices": {"text": ["x", "y"], "label": ["A"]}, "answer": "A"}, "1 names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_says_its_place_its_field_and_its_fault(fault: str, tmp_path: Path) -> None:
    task, row, said = BAD[fault]
    whole = {"sentence": "x", "text": "x", "ctx": "c", "question": "c", "endings": ["x", "y"], "label": 0}
    first = {name: whole.get(name, {"text": ["x", "y"]} if name == "choices" else "x") for name in {*row, "label"}}
    if fault == "missing":
        first["sentence"] = "x"
    found = reason(jsonl(tmp_path, first, row), task)
    assert found.startswith("rows.jsonl:2: ")
    assert said in found


def test_bad_lines_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"facts||text\nname : A||A.\nname : B\nname : \xff||C.\n")
    rows = read(path, "data-to-text", separator="||")
    assert isinstance(rows[0], TaskRow)
    assert [f"{row.origin}: {row.reason}" for row in rows[1:] if isinstance(row, SkippedRow)] == [
        "rows.txt:3: has 1 fields cut at '||' where 2 are expected (facts, text)",
        "rows.txt:4: is not UTF-8",
    ]


def refused(kind: type[Exception], path: Path, task: str, **how: Any) -> str:
    with pytest.raises(kind) as error:
        read(path, task, **how)
    return str(error.value)


def test_a_missing_column_says_which_is_needed_and_what_there_is(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "premise,hypothesys,label\na,b,0\n")
    said = refused(DataError, path, "nli")
    assert "has no column 'hypothesis'" in said
    assert "columns are premise, hypothesys, label; did you mean 'hypothesys'?" in said
    assert "--columns hypothesis=NAME" in said
    said = refused(DataError, write(tmp_path / "de.csv", "source,target\nJa,Yes\n"), "translation")
    assert "--constants source_language=WORDS" in said
    said = refused(DataError, path, "nli", columns={"hypothesis": "hypothesis"})
    assert "has no column 'hypothesis'" in said


def test_wrong_mappings(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text,label\na,0\n")
    assert "did you mean 'sentence'" in refused(UsageError, path, "sentiment", columns={"sentense": "text"})
    assert "stands first: sentence=text" in refused(UsageError, path, "sentiment", columns={"text": "sentence"})
    assert "is no column" in refused(UsageError, path, "sentiment", constants={"language": "German"})
    assert "differs from row to row" in refused(UsageError, path, "sentiment", constants={"label": "good"})
    assert "both read from the column 'label'" in refused(UsageError, path, "sentiment", columns={"sentence": "label"})
    rows = jsonl(tmp_path, {"text": "a", "label": 0})
    assert "--names" in refused(UsageError, rows, "sentiment", names=("text", "label"))
    assert "--separator" in refused(UsageError, rows, "sentiment", separator="||")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in refused(DataError, tmp_path / "none.csv", "sentiment")
    assert "no such file" in refused(DataError, tmp_path / "none.txt", "sentiment", separator="||")
    assert "is empty" in refused(DataError, write(tmp_path / "empty.csv", ""), "sentiment")
    assert "is empty" in refused(DataError, write(tmp_path / "empty.txt", "\n"), "sentiment", separator="||")
