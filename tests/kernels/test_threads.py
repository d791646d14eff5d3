"""The core's threads are torch's in number: what a person sets for torch holds for it, and no bit depends on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from lilliput.kernels import core

pytestmark = pytest.mark.skipif(not core.status().loaded, reason=f"no compiled core: {core.status().reason}")

# Products of one row (our pool) and of many rows between torch's operators (torch's OpenMP), and what they leave.
PROGRAM = """
import hashlib, json, os, sys
if sys.argv[2] == "one-core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from lilliput import kernels
if sys.argv[1]:
    torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
q = kernels.quantize(torch.randn(1024, 512))
digest = hashlib.sha256()
for rows in (1, 300):
    x = torch.randn(rows, 512, requires_grad=True)
    for _ in range(3):
        y = kernels.linear_4bit(x, q)
        y.relu().sum().backward()
        digest.update(y.detach().numpy().tobytes() + x.grad.numpy().tobytes())
tasks = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None
print(json.dumps({"threads": torch.get_num_threads(), "tasks": tasks, "digest": digest.hexdigest()}))
"""


def run(threads: int | str = "", where: str = "anywhere", **environment: str) -> dict[str, Any]:
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(threads), where],
        capture_output=True,
        text=True,
        timeout=120,
        env={**inherited, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_set_num_threads_and_the_environment_hold_and_change_no_bit() -> None:
    one, two, four = run(1), run(2), run(4)
    by_environment = run(OMP_NUM_THREADS="1")
    assert [r["threads"] for r in (one, two, four, by_environment)] == [1, 2, 4, 1]
    assert one["digest"] == two["digest"] == four["digest"] == by_environment["digest"]
    if one["tasks"] is not None:
        assert one["tasks"] <= by_environment["tasks"] + 1
        assert one["tasks"] < two["tasks"] < four["tasks"]  # one thread starts no worker; more start as many as asked


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no processor affinity")
def test_a_process_bound_to_one_core_works_and_gives_the_same() -> None:
    bound = run(where="one-core")
    assert bound["threads"] == 1  # torch counts the cores that it may use
    assert bound["digest"] == run(2)["digest"] == run(2, where="one-core")["digest"]
