"""The compiled core is optional: without it one warning and the same results; and every instruction set is tested."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lilliput.kernels import core

ROOT = Path(__file__).resolve().parents[2]
SAME_RESULTS = """
import warnings, torch
from lilliput.kernels import core, linear_4bit, quantize
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    q = quantize(torch.linspace(-1, 1, 128).view(2, 64))
    y = linear_4bit(torch.ones(2, 64), q)
print(core.status().loaded, len(caught), *(str(w.message) for w in caught))
print(q.codes.sum().item(), *y[0].tolist())
"""


def run(code: str, **environment: str) -> list[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True, timeout=120
    )
    return done.stdout.splitlines()


def test_status_says_what_it_runs_on() -> None:
    status = core.status()
    assert status.threads == torch.get_num_threads()
    if status.loaded:
        assert status.instruction_set in ("portable", "avx2", "avx512", "avx512vnni")
        assert status.reason == ""
    else:
        assert status.instruction_set is None
        assert status.reason


def test_without_the_core_one_warning_and_the_same_results() -> None:
    without = run(SAME_RESULTS, LILLIPUT_CORE="off")
    assert without[0].startswith("False 1 Lilliput runs without its compiled core (LILLIPUT_CORE=off)")
    assert "lilliput doctor" in without[0]
    with_core = run(SAME_RESULTS)
    if core.status().loaded:
        assert with_core[0] == "True 0"
    codes, *values = (float(v) for v in without[1].split())
    assert [codes, *values] == pytest.approx([float(v) for v in with_core[1].split()], rel=1e-5, abs=1e-5)


@pytest.mark.skipif(not core.status().loaded, reason="the compiled core is not loaded")
def test_a_wrong_instruction_set_is_said() -> None:
    first = run(SAME_RESULTS, LILLIPUT_ISA="mmx")[0]
    assert "LILLIPUT_ISA=mmx; known: portable, avx2, avx512" in first


@pytest.mark.skipif(not core.status().loaded, reason="the compiled core is not loaded")
@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512", "avx512vnni"])
def test_the_kernels_on_each_instruction_set(instruction_set: str) -> None:
    from lilliput import _core

    order = ["portable", "avx2", "avx512", "avx512vnni"]
    if order.index(instruction_set) > order.index(_core.supported_instruction_set()):
        pytest.skip(f"this processor has no {instruction_set}")
    if instruction_set == core.status().instruction_set:
        pytest.skip("the other tests of this folder run on it")
    names = ("test_blockwise.py", "test_linear_4bit.py", "test_linear_grouped.py", "test_rms_norm.py", "test_swiglu.py")
    files = [str(ROOT / "tests/kernels" / name) for name in names]
    env = {**os.environ, "LILLIPUT_ISA": instruction_set}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "core", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
