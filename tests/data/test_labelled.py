"""Texts with labels: found in every kind of file, named, ordered, encoded; each fault with its row."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from lilliput.data import ClassExample, collate_labelled, encode_labelled, read_labelled
from lilliput.data.labelled import check_classes, in_order, length_batches
from lilliput.errors import DataError
from tests.classifiers import make_wordpiece, write_tsv

ROWS = [("a good film", 1), ("a dull plot", 0), ('he said "fine"', 1)]


def write_as(kind: str, folder: Path) -> Path:
    """ROWS in a file of this kind."""
    path = folder / f"rows.{kind.split()[-1]}"
    named = [{"sentence": text, "label": label} for text, label in ROWS]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(named), path)
    elif kind == "csv":
        path.write_text('label,sentence\n1,a good film\n0,a dull plot\n1,"he said ""fine"""\n')
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in named))
    elif kind == "json":
        path.write_text(json.dumps(named))
    else:
        header = "sentence\tlabel\n" if kind == "with header tsv" else ""
        write_tsv(path, [(text, str(label)) for text, label in ROWS], header)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "with header tsv", "tsv"])
def test_every_kind_of_file_holds_the_same_texts(kind: str, tmp_path: Path) -> None:
    found = read_labelled(write_as(kind, tmp_path))
    assert [(row.text, row.label) for row in found.rows] == [(text, str(label)) for text, label in ROWS]
    assert found.labels() == ["0", "1"]
    assert found.sha256
    assert ("has no header" in found.note) == (kind == "tsv")


def test_quotes_and_commas_of_a_tsv_are_literal(tmp_path: Path) -> None:
    rows = [('"quoted" at the start', "1"), ('an open " quote', "0"), ("a, b", "1"), ('""', "0")]
    found = read_labelled(write_tsv(tmp_path / "rows.tsv", rows))
    assert [(row.text, row.label) for row in found.rows] == rows
    assert found.rows[1].origin == "rows.tsv:2"


def test_columns_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,review,stars\n1,fine,5\n2,poor,1\n")
    found = read_labelled(path, text_column="review", label_column="stars")
    assert [(row.text, row.label) for row in found.rows] == [("fine", "5"), ("poor", "1")]
    with pytest.raises(
        DataError, match=r"rows.csv: has no column 'text' or 'sentence'.*id, review, stars.*--text-column"
    ):
        read_labelled(path)
    with pytest.raises(DataError, match=r"no column 'reviews'; did you mean 'review'\?"):
        read_labelled(path, text_column="reviews", label_column="stars")
    with pytest.raises(DataError, match=r"has no column 'label'.*--label-column"):
        read_labelled(path, text_column="review")


def test_a_header_that_was_not_known_for_one_is_noticed(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "rows.tsv", [("fine", "pos"), ("poor", "neg"), ("good", "pos")], "review\topinion\n")
    with pytest.raises(DataError, match=r"rows.tsv:1: the label 'opinion' stands nowhere else.*--text-column 'review'"):
        read_labelled(path)
    assert len(read_labelled(path, text_column="review", label_column="opinion").rows) == 3


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "'label' is missing"),
        ({"text": "x", "label": None}, "'label' is missing"),
        ({"text": "x", "label": float("nan")}, "'label' is missing"),
        ({"text": "x", "label": " "}, "'label' is empty"),
        ({"text": "x", "label": 0.5}, "'label' is 0.5, expected a text or a whole number"),
        ({"text": "x", "label": ["a"]}, r"'label' is \['a'\], expected a text or a whole number"),
        ({"label": 1}, "'text' is missing"),
        ({"text": " \t", "label": 1}, "'text' is empty"),
        ({"text": 3, "label": 1}, r"'text' is no text \(int\)"),
    ],
)
def test_a_bad_row_is_told_by_line_or_left_out(row: dict, said: str, tmp_path: Path) -> None:
    good = {"text": "a film", "label": 1}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (good, row, good)))
    with pytest.raises(DataError, match=rf"^rows.jsonl:2: {said}; 1 of 3 rows is bad.*--skip-bad-rows"):
        read_labelled(path)
    found = read_labelled(path, skip_bad_rows=True)
    assert len(found.rows) == 2
    assert [bad.origin for bad in found.skipped] == ["rows.jsonl:2"]


def test_a_line_with_too_many_tabs_is_told(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "rows.tsv", [("good", "1"), ("a\tb", "0"), ("bad", "0")])
    with pytest.raises(DataError, match=r"rows.tsv:2: has 3 fields where 2 are expected \(text, label\)"):
        read_labelled(path)


@pytest.mark.parametrize("name", ["rows.tsv", "rows.jsonl", "rows.parquet"])
def test_a_missing_or_an_empty_file_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name}: no such file"):
        read_labelled(tmp_path / name)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"{name}: is empty"):
        read_labelled(tmp_path / name)


def test_labels_of_any_type_are_named_and_ordered() -> None:
    assert in_order(["10", "2", "1", "2"]) == ["1", "2", "10"]
    assert in_order(["pos", "neg", "10"]) == ["10", "neg", "pos"]


def test_numbers_truth_values_and_texts_are_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in (1, 1.0, "1", True, " yes ")))
    assert [row.label for row in read_labelled(path).rows] == ["1", "1", "1", "true", "yes"]


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all rows have the label 'pos'.*two classes"):
        check_classes(tmp_path / "rows.tsv", ["pos"])


# ---- encoding ----------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path):
    return read_labelled(write_tsv(tmp_path / "rows.tsv", [("good " * 9, "pos"), ("bad", "neg"), ("fine", "pos")]))


def test_ids_are_the_tokenizers_and_classes_are_numbered(texts) -> None:
    tokenizer = make_wordpiece()
    found = encode_labelled(texts, tokenizer, texts.labels(), max_length=64, progress=False)
    assert found.labels == ["neg", "pos"]
    assert [example.label for example in found] == [1, 0, 1]
    assert found.examples[1].input_ids == tokenizer("bad").input_ids
    assert found.counts() == {"neg": 1, "pos": 2}
    assert found.report() == "3 examples"


def test_a_long_text_is_truncated_with_its_special_tokens_dropped_or_refused(texts) -> None:
    tokenizer, labels = make_wordpiece(), texts.labels()
    cut = encode_labelled(texts, tokenizer, labels, max_length=6, progress=False)
    first = cut.examples[0].input_ids
    assert len(first) == 6
    assert (first[0], first[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert cut.overlong == ["rows.tsv:1"]
    assert cut.report() == "3 examples, 1 over-long rows truncated"
    dropped = encode_labelled(texts, tokenizer, labels, max_length=6, overlong="drop", progress=False)
    assert [example.origin for example in dropped] == ["rows.tsv:2", "rows.tsv:3"]
    with pytest.raises(DataError, match=r"rows.tsv:1: more than 6 tokens \(data.max_length\); 1 of 3 rows"):
        encode_labelled(texts, tokenizer, labels, max_length=6, overlong="error", progress=False)
    with pytest.raises(DataError, match="all 3 rows have more than 2 tokens"):
        encode_labelled(texts, tokenizer, labels, max_length=2, overlong="drop", progress=False)


def test_a_label_that_was_never_learned_is_told_with_its_row(texts) -> None:
    with pytest.raises(DataError, match=r"rows.tsv:2: the label 'neg' is none that was learned.*pos, neutral"):
        encode_labelled(texts, make_wordpiece(), ["pos", "neutral"], max_length=64, progress=False)


def test_a_batch_is_padded_at_the_right() -> None:
    batch = collate_labelled([ClassExample([7, 8, 9], 1), ClassExample([5], 0)], pad_token_id=4)
    assert torch.equal(batch["input_ids"], torch.tensor([[7, 8, 9], [5, 4, 4]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([1, 0]))
    assert batch["tokens"] == 4


def test_batches_hold_every_row_once_by_length() -> None:
    examples = [ClassExample([0] * length, 0) for length in (3, 1, 2, 5, 4)]
    assert length_batches(examples, 2) == [[1, 2], [0, 4], [3]]
