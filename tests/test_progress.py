"""Progress goes to standard error and says how much is left; standard output stays for results."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lilliput import progress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    sink = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=sink, width=200))
    return sink


def test_track_yields_everything_and_says_the_end(lines: io.StringIO) -> None:
    assert list(progress.track([1, 2, 3], "counting")) == [1, 2, 3]
    assert "counting: 3/3" in lines.getvalue()


def test_a_hidden_bar_says_nothing(lines: io.StringIO) -> None:
    with progress.bar("hidden", 2, shown=False) as advance:
        advance()
        advance(note="x")
    assert lines.getvalue() == ""


def test_a_terminal_gets_a_bar_with_its_note(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=sink, width=120, force_terminal=True))
    with progress.bar("working", 4) as advance:
        advance(3, note="loss 1.25")
    assert "working" in sink.getvalue()
    assert "3/4" in sink.getvalue()
    assert "loss 1.25" in sink.getvalue()


def test_brackets_are_text_not_markup(lines: io.StringIO) -> None:
    progress.say("row [bold]7[/bold]")
    progress.warn("[x]")
    assert lines.getvalue() == "row [bold]7[/bold]\nwarning: [x]\n"


def test_what_was_done_earlier_does_not_count_as_fast(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar("rows", 1000, done=800) as advance:
        now[0] = 100.0
        advance(10)  # ten in 100 s, 190 are left
    assert "rows: 810/1000, 1900 s left (100 s)" in lines.getvalue()
