"""Errors say where, what and what to do; suggestions come only when they are near."""

from __future__ import annotations

import pytest

from lilliput import errors


def test_the_parts_stand_in_order() -> None:
    error = errors.DataError("'output' is empty", where="alpaca.json:17", todo="Fix the file.")
    assert str(error) == "alpaca.json:17: 'output' is empty. Fix the file."
    assert str(errors.LilliputError("plain")) == "plain"
    assert str(errors.UsageError("x; did you mean 'y'?", todo="Try y.")) == "x; did you mean 'y'? Try y."


def test_exit_statuses() -> None:
    assert errors.UsageError("x").exit_status == 2
    kinds = (errors.DataError, errors.FormatError, errors.CheckpointError, errors.WrongBaseError, errors.DiskError)
    assert {kind("x").exit_status for kind in (*kinds, errors.CheckFailed)} == {1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lora.rank", "; did you mean 'lora.r'?"), ("learning_rat", "; did you mean 'learning_rate'?")],
)
def test_nearest_suggests(name: str, expected: str) -> None:
    assert errors.nearest(name, ["lora.r", "learning_rate", "epochs"]) == expected


def test_nearest_is_silent_when_nothing_is_near() -> None:
    assert errors.nearest("zzz", ["lora.r", "epochs"]) == ""
    assert errors.nearest("x", []) == ""
