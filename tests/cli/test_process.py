"""The program as a process: quick help, Ctrl-C, and the same results without the compiled core."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from lilliput.cli.main import app
from lilliput.kernels import core
from tests.conftest import make_tiny_llama

PROGRAM = [sys.executable, "-m", "lilliput.cli"]
TUNE = ["--set", "train.batch_size=2", "--set", "data.max_length=64", "--set", "train.save_every=1000", "--no-check"]


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def finish(process: subprocess.Popen[str], status: int = 0, typed: str | None = None) -> tuple[str, str]:
    stdout, stderr = process.communicate(typed, timeout=300)
    assert process.returncode == status, stderr
    return stdout, stderr


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "my.jsonl"
    lines = [{"prompt": f"What is {n} + 1?", "completion": f"It is {n + 1}."} for n in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["tune", "--help"], ["eval", "perplexity", "--help"]])
def test_help_does_not_wait_for_torch(words: list[str]) -> None:
    program = (
        "import sys; from lilliput.cli.main import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert "lilliput" in done.stdout


def test_wrong_use_of_the_program_is_one_line_and_status_two(tmp_path: Path) -> None:
    stdout, stderr = finish(start("tune", tmp_path, "--data", "my.jsonl"), status=2)
    assert stdout == ""
    assert stderr == "error: Missing option '--out' / '-o'; see `lilliput tune --help`\n"


def test_ctrl_c_in_tune_says_how_to_go_on_and_going_on_works(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["tune", tiny_model_dir, "--data", rows, "-o", out, *TUNE, "--set", "train.max_steps=150", "--json"]
    process = start(*words)
    metrics, began = out / "metrics.jsonl", time.monotonic()
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() - began < 120
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = finish(process, status=1)
    assert "--resume" in stderr.splitlines()[-1]
    assert stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in stderr
    assert json.loads(stdout)["kind"] == "Interrupted"
    done = CliRunner().invoke(app, [*map(str, words), "--resume"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 150


def test_ctrl_c_in_chat_stops_the_answer_and_not_the_program(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    slow = make_tiny_llama(num_hidden_layers=24, max_position_embeddings=4096)  # its answer takes half a minute
    one, other = (tiny_tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    slow.lm_head.weight.data[one] = -slow.lm_head.weight.data[other]  # whatever the state, one of the two is positive
    slow.lm_head.weight.data[[token for token in range(slow.config.vocab_size) if token not in (one, other)]] = 0
    slow.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    process = start("chat", tmp_path, "--max-new-tokens", 3000)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("Hello\n")
    process.stdin.flush()
    assert process.stdout.read(5)  # it is answering
    process.send_signal(signal.SIGINT)
    _, stderr = finish(process, typed="/exit\n")
    assert "(stopped)" in stderr
    assert "Traceback" not in stderr


def test_tune_and_eval_give_the_same_without_the_compiled_core(
    tiny_model_dir: Path, rows: Path, tmp_path: Path
) -> None:
    if not core.status().loaded:
        pytest.skip(f"the compiled core is not here to compare with: {core.status().reason}")
    text = tmp_path / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    scored = {}
    for switch in ("on", "off"):
        out = tmp_path / switch
        tune = ["tune", tiny_model_dir, "--data", rows, "-o", out, *TUNE, "--set", "train.max_steps=5", "--json"]
        score = ["eval", "perplexity", tiny_model_dir, "--adapter", out, "--text", text, "--context", "64", "--json"]
        if switch == "on":  # in this process, which has the core
            done = [CliRunner().invoke(app, [str(word) for word in words]) for words in (tune, score)]
            stdout, stderr = done[1].stdout, done[0].stderr
        else:
            _, stderr = finish(start(*tune, LILLIPUT_CORE="off"))
            stdout, _ = finish(start(*score, LILLIPUT_CORE="off"))
        scored[switch] = json.loads(stdout.splitlines()[-1])
        assert ("without its compiled core" in " ".join(stderr.split())) == (switch == "off")
    on, off = (load_file(tmp_path / switch / "adapter" / "adapter_model.safetensors") for switch in ("on", "off"))
    assert on.keys() == off.keys()
    for name in on:
        torch.testing.assert_close(on[name], off[name], rtol=1e-3, atol=1e-5)
    assert scored["off"]["perplexity"] == pytest.approx(scored["on"]["perplexity"], rel=1e-4)
    assert scored["off"]["footprint_bytes"] == scored["on"]["footprint_bytes"]
