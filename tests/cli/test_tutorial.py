"""The tutorial tells the truth: its rows, its mistake and what is said about it, word for word, on the tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lilliput.cli.main import app

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tutorial-first-adapter.md").read_text(encoding="utf-8")


def test_the_tutorials_mistake_is_told_as_written_there(tiny_model_dir, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    [program] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(program, "tutorial", "exec"), {})
    done = CliRunner().invoke(app, ["check", str(tiny_model_dir), "--data", "ahoy.jsonl"])
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] in PAGE.splitlines()


@pytest.mark.parametrize("promise", ["packed loss = unpacked loss", "one BOS", "save, load, same logits"])
def test_the_mended_rows_keep_the_promises_shown_there(tiny_model_dir, tmp_path, promise: str) -> None:
    rows = tmp_path / "ahoy.jsonl"
    shown = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0]
    rows.write_text(shown, encoding="utf-8")
    done = CliRunner().invoke(app, ["check", str(tiny_model_dir), "--data", str(rows)])
    assert done.exit_code == 0, done.stderr
    assert f"kept │ {promise}" in done.stdout
    assert f"kept │ {promise}" in PAGE
