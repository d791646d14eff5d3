"""`lilliput inspect` and its --compare on a tiny model: JSON, files, tables, and each bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_commands import answer, refusal, run
from tests.evaluation.test_comparison import not_blank


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return path


def test_inspect_writes_what_it_says(tiny_model_dir, text, tmp_path) -> None:
    found = answer("inspect", tiny_model_dir, "--text", text, "--context", 64, "-o", tmp_path / "out")
    assert {"totals", "curve", "layers", "features", "threshold", "seconds", "model", "text"} <= found.keys()
    assert found["totals"]["layers"] == len(found["layers"]) == 14
    assert {"name", "outlier_features", "error", "error_without", "largest"} <= found["layers"][0].keys()
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written == {key: value for key, value in found.items() if key not in ("report", "plot")}
    assert not_blank(found["plot"])


def test_compare_writes_what_it_says(tiny_model_dir, text, tmp_path) -> None:
    words = ("inspect", tiny_model_dir, "--text", text, "--context", 64, "--segments", 1, "--compare")
    found = answer(*words, "-o", tmp_path)
    assert [row["way"] for row in found["rows"][::2]] == ["absmax", "zero-point", "row-wise", "vector-wise"]
    assert [row["decomposition"] for row in found["rows"]] == [False, True] * 4
    scored = answer("eval", "perplexity", tiny_model_dir, "--text", text, "--context", 64, "--segments", 1)
    assert found["float32"] == scored["perplexity"]
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"] == found["rows"]
    assert not_blank(found["plot"])


def test_tables_for_people(tiny_model_dir, text) -> None:
    words = ("inspect", tiny_model_dir, "--text", text, "--context", 64, "--segments", 1)
    shown = run(*words, "--top", 3)
    assert shown.exit_code == 0, shown.stderr
    assert "The 3 layers of 14" in shown.stdout
    assert shown.stdout.count("_proj") == 3
    assert "by the paper" in shown.stdout
    compared = run(*words, "--compare").stdout
    assert compared.count("vector-wise") == 2
    assert "Written" not in shown.stdout + compared


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--threshold", -1], "threshold=-1"),
        (["--threshold", 0, "--compare"], "no decomposition"),
        (["--top", 0], "--top"),
        (["--segments", 0], "segments"),
        (["--context", 4096], "512 positions"),
        (["--treshold", 6], "--threshold"),
    ],
    ids=lambda option: "-".join(map(str, option)) if isinstance(option, list) else "",
)
def test_wrong_options(options, said, tiny_model_dir, text) -> None:
    assert said in refusal("inspect", tiny_model_dir, "--text", text, "--context", 64, *options, status=2)


def test_wrong_texts_and_models(tiny_model_dir, text, tmp_path) -> None:
    assert "--text" in refusal("inspect", tiny_model_dir, status=2)
    assert "no such file" in refusal("inspect", tiny_model_dir, "--text", tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    assert "empty" in refusal("inspect", tiny_model_dir, "--text", tmp_path / "empty.txt", "--compare")
    assert "is a file" in refusal("inspect", tiny_model_dir, "--text", text, "-o", text, status=2)
    answer("quantize", tiny_model_dir, "--format", "int8", "-o", tmp_path / "small")
    for more in ([], ["--compare"]):
        line = refusal("inspect", tmp_path / "small", "--text", text, "--context", 64, *more, status=2)
        assert "int8 already" in line
