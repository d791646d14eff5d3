"""`lilliput quantize --format gptq`: its answer, its files, going on, and options that do not belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lilliput.models import calibrate, load_model
from tests.cli.test_commands import answer, refusal, run

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 60


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def words(model: Path, text: Path, out: Path) -> list[object]:
    return ["quantize", model, "--format", "gptq", "--group", 32, "--calibration", text, "--length", 32, "-o", out]


def test_the_answer_and_the_files(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    found = answer(*words(tiny_model_dir, text, tmp_path / "out"))
    assert found["rounding"] == "gptq"
    assert found["settings"]["bits"] == 4
    assert len(found["modules"]) == 14
    assert (tmp_path / "out" / "gptq.png").read_bytes().startswith(b"\x89PNG")
    assert load_model(tmp_path / "out", progress=False).config.quantization_config.format == "int4-g32"
    said = run("quantize", tiny_model_dir, "--format", "gptq", "--rounding", "nearest", "-o", tmp_path / "n").stdout
    assert "rounded to nearest" in said
    assert "mlp.down_proj" in said


def test_a_stopped_run_says_how_to_go_on(
    tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(calibrate, "_finish", stop)
        assert "same command again" in refusal(*words(tiny_model_dir, text, tmp_path / "out"))
    assert "is not empty" in refusal("quantize", tiny_model_dir, "-o", tmp_path / "out", status=2)
    assert answer(*words(tiny_model_dir, text, tmp_path / "out"))["tokens"] > 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--format", "gptq"], "--calibration"),
        (["--format", "gptq", "--rounding", "nearest", "--samples", 3], "--samples is of no use"),
        (["--format", "gptq", "--rounding", "best"], "--rounding"),
        (["--format", "gptq", "--rounding", "nearest", "--bits", 5], "5 bits"),
        (["--format", "gptq", "--rounding", "nearest", "--dtype", "int8"], "--dtype"),
        (["--format", "gptq", "--rounding", "nearest", "--double-quant"], "--double-quant belongs to another"),
        (["--format", "nf4", "--bits", 4], "--bits belongs to --format gptq"),
        (["--format", "nf4", "--sym"], "symmetric"),
        (["--format", "gptq-g64"], "gptq-g64"),
        (["--format", "gptq", "--calibration", "x.txt", "--memory", 0], "--memory"),
        (["--format", "gptq", "--rounding", "nearest", "--group", -2], "group"),
        (["--format", "gptq", "--calibration", "x.txt", "--correct", 2], "correct"),
        (["--format", "gptq", "--rounding", "nearest", "--correct", 0.5], "--correct is of no use"),
        (["--format", "gptq", "--rounding", "nearest", "--no-act-order"], "--act-order is of no use"),
        (["--format", "nf4", "--correct", 0.5], "--correct belongs to --format gptq"),
    ],
)
def test_options_that_do_not_belong_together(
    more: list[object], said: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert said in refusal("quantize", tiny_model_dir, *more, "-o", tmp_path / "out", status=2)
    assert not (tmp_path / "out").exists()


def test_a_segment_longer_than_the_model_can_read_is_refused(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    given = [*words(tiny_model_dir, text, tmp_path / "out"), "--length", 4096]
    assert "512 positions" in refusal(*given, status=2)


def test_a_directory_that_holds_something_is_refused(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    given = words(tiny_model_dir, text, tmp_path / "out")
    assert "is not empty" in refusal(*given, status=2)
    assert answer(*given, "--overwrite")["path"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert "is a file" in refusal(*words(tiny_model_dir, text, text), status=2)


def test_a_text_that_is_missing_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert "no such file" in refusal(*words(tiny_model_dir, tmp_path / "none.txt", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
