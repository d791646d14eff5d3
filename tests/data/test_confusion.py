"""The numbers of the confusion table, against the definitions written out by hand."""

from __future__ import annotations

import pytest

from lilliput.data import Confusion


def test_the_numbers_are_those_of_the_definitions() -> None:
    true, predicted = [0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 2, 1, 0, 2]
    found = Confusion.of(["a", "b", "c"], true, predicted)
    assert found.table == [[2, 1, 1], [1, 1, 0], [0, 0, 1]]
    assert found.accuracy == pytest.approx(4 / 7)
    assert found.majority == pytest.approx(4 / 7)
    # precision and recall of a: 2/3, 2/4; b: 1/2, 1/2; c: 1/2, 1/1
    f1 = [2 * p * r / (p + r) for p, r in ((2 / 3, 2 / 4), (1 / 2, 1 / 2), (1 / 2, 1.0))]
    assert found.macro_f1 == pytest.approx(sum(f1) / 3)
    said = found.to_json()
    assert said["classes"]["a"] == {"rows": 4, "predicted": 3, "right": 2}
    assert said["rows"] == 7


def test_a_class_that_never_occurs_counts_as_zero_and_no_rows_are_no_fault() -> None:
    found = Confusion.of(["a", "b"], [0, 0], [0, 0])
    assert (found.accuracy, found.majority, found.macro_f1) == (1.0, 1.0, 0.5)
    empty = Confusion.of(["a", "b"], [], [])
    assert (empty.rows, empty.accuracy, empty.majority, empty.macro_f1) == (0, 0.0, 0.0, 0.0)


def test_rows_and_predictions_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        Confusion.of(["a", "b"], [0, 1], [0])
