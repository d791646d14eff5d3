"""What every command does alike: one line for an error, the right status, JSON as the last line; on a toy program."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from typing import Annotated

import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner

from lilliput.cli.door import Answer, Door, choose, command, one_line
from lilliput.errors import DataError, UsageError

app = typer.Typer(cls=Door)
ERRORS = {
    "usage": UsageError("unknown key 'lora.rr'", where="my.yaml", todo="Fix it."),
    "data": DataError("broken\n  JSON", where="my.jsonl:3"),
    "strange": ValueError("some\nstrange thing"),
    "silent": RuntimeError(),
    "interrupt": KeyboardInterrupt(),
    "memory": MemoryError(),
}


@app.command()
@command
def work(
    fail: Annotated[str | None, typer.Option()] = None,
    count: Annotated[int, typer.Option()] = 1,
    fault: Annotated[str, typer.Option()] = "",
) -> Answer:
    """Do nothing much."""
    print("a library prints on standard output")
    if fail:
        raise ERRORS[fail]
    table = Table("count")
    table.add_row(str(count))
    return Answer({"count": count, "name": "Größe", "loss": math.inf}, table, fault)


@app.command()
@command
def grumble(whose: Annotated[str, typer.Option()] = "") -> None:
    """Warn."""
    warnings.warn(f"{whose} is slower here", RuntimeWarning, stacklevel=1)


@app.command()
@command
def idle() -> None:
    """Nothing to say."""


def run(*words: str):
    return CliRunner().invoke(app, list(words))


def test_without_json_the_table_is_on_standard_output() -> None:
    done = run("work", "--count", "3")
    assert done.exit_code == 0
    assert "3" in done.stdout
    assert "{" not in done.stdout
    assert done.stderr == ""


def test_with_json_only_json_is_on_standard_output() -> None:
    done = run("work", "--count", "3", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"count": 3, "name": "Größe", "loss": None}
    assert "count" in done.stderr
    assert "a library prints" in done.stderr


def test_a_command_without_results_still_ends_in_json() -> None:
    assert json.loads(run("idle", "--json").stdout) == {}


def test_a_bad_verdict_is_a_line_and_status_one_beside_its_results() -> None:
    done = run("work", "--fault", "two promises are broken", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["count"] == 1
    assert done.stderr.splitlines()[-1] == "error: two promises are broken"


def test_our_warnings_are_told_and_other_libraries_ones_only_with_debug() -> None:
    ours, theirs = run("grumble", "--whose", "Lilliput"), run("grumble", "--whose", "Torch")
    assert ours.stderr == "warning: Lilliput is slower here\n"
    assert theirs.stderr == ""
    with pytest.warns(RuntimeWarning, match="Torch is slower here"):
        run("grumble", "--whose", "Torch", "--debug")


@pytest.mark.parametrize(
    ("kind", "status", "line"),
    [
        ("usage", 2, "error: my.yaml: unknown key 'lora.rr'. Fix it."),
        ("data", 1, "error: my.jsonl:3: broken JSON"),
        (
            "strange",
            1,
            "error: unexpected ValueError: some strange thing. Run again with --debug for the traceback",
        ),
        ("silent", 1, "error: unexpected RuntimeError: no message. Run again with --debug for the traceback"),
        ("interrupt", 1, "error: stopped (Ctrl-C)"),
        ("memory", 1, "error: not enough memory."),
    ],
)
def test_an_error_is_one_line_and_a_status(kind: str, status: int, line: str) -> None:
    done = run("work", "--fail", kind)
    assert done.exit_code == status
    assert done.stderr == line + "\n"
    as_json = run("work", "--fail", kind, "--json")
    assert as_json.exit_code == status
    assert as_json.stderr.splitlines()[-1] == line
    assert json.loads(as_json.stdout.splitlines()[-1])["error"] == line.removeprefix("error: ")


def test_a_long_error_is_not_broken_into_lines() -> None:
    ERRORS["long"] = DataError("x " * 400 + "end [red]no markup[/red] /a/path.json:17")
    [line] = run("work", "--fail", "long").stderr.splitlines()
    assert line.endswith("end [red]no markup[/red] /a/path.json:17")


def test_debug_shows_the_traceback_and_still_the_line() -> None:
    done = run("work", "--fail", "strange", "--debug")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: unexpected ValueError")
    assert "Traceback" not in run("work", "--fail", "strange").output


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["work", "--cuont", "3"], "--cuont"),
        (["work", "--count", "three"], "--count"),
        (["wrok"], "wrok"),
        (["work", "--count"], "--count"),
        (["work", "surplus"], "surplus"),
    ],
)
def test_wrong_options_are_one_line_and_status_two(words: list[str], named: str) -> None:
    done = run(*words)
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert "--help`" in line
    assert done.stdout == ""
    assert json.loads(run(*words, "--json").stdout)["kind"] == "UsageError"


def test_help_names_the_common_options_and_is_no_error() -> None:
    done = run("work", "--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout
    assert "--debug" in done.stdout


def test_choose_suggests_the_nearest() -> None:
    assert choose("nf4", ("nf4", "fp4"), "--format") == "nf4"
    with pytest.raises(UsageError, match="did you mean 'nf4'"):
        choose("nf-4", ("nf4", "fp4"), "--format")


def test_a_file_that_cannot_be_opened_is_named() -> None:
    assert one_line(PermissionError(13, "Permission denied", "a/my.jsonl")) == "a/my.jsonl: Permission denied"


def test_one_line_has_no_line_breaks() -> None:
    assert "\n" not in one_line(ValueError("a\nb\r\nc"))


def test_a_reader_that_goes_away_is_not_an_error_to_talk_about() -> None:
    program = (
        "import sys, typer\n"
        "from lilliput.cli.door import Answer, Door, command\n"
        "app = typer.Typer(cls=Door)\n"
        "@app.command()\n@command\n"
        "def a() -> Answer:\n    return Answer({}, 'x' * 70 + chr(10) + ('y' * 70 + chr(10)) * 100000)\n"
        "@app.command()\n@command\ndef b() -> None: ...\n"
        "app(['a'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # unbuffered, Python itself drops what a pipe did not take
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 1
