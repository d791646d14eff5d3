"""The real model on real text: the figures of float32, NF4 and int8 on WikiText-2, first 16 segments of 1024 tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lilliput.cli.main import app


@pytest.mark.parametrize(
    ("number_format", "lowest", "highest", "megabytes"),
    [
        ("none", 19.88, 19.90, 538.1),  # transformers in float32 has 19.887
        ("nf4", 19.90, 23.95, 168.2),  # bitsandbytes' NF4 with double quantization has 23.942
        ("int8", 19.90, 19.95, 220.2),  # bitsandbytes' LLM.int8() has 20.279, int8 weights alone have 19.941
    ],
)
def test_wikitext2_in_the_first_sixteen_segments(
    smollm2: str, shared_data: Path, number_format: str, lowest: float, highest: float, megabytes: float
) -> None:
    text = shared_data / "wikitext2-test.txt"
    words = [
        "eval",
        "perplexity",
        smollm2,
        "--format",
        number_format,
        "--text",
        str(text),
        "--segments",
        "16",
        "--json",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    scored = json.loads(done.stdout.splitlines()[-1])
    assert (scored["tokens"], scored["segments"]) == (16 * 1023, 16)
    assert lowest <= scored["perplexity"] <= highest
    assert scored["footprint_bytes"] == pytest.approx(megabytes * 1e6, rel=1e-3)
