"""Memory by the system's accounts: what was held is seen after it went; where the system is silent, no number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lilliput import memory

PEAK = """
from lilliput import memory
block = bytearray(200_000_000)
block[::4096] = b"x" * len(block[::4096])
held = memory.held()[1]
del block
peak, now = memory.held()
assert now < held - 190_000_000, (now, held)
assert peak > held - 5_000_000, (peak, held)  # the system counts pages by the dozen
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere only the peak is known")
def test_what_was_held_is_seen_after_it_went() -> None:
    """In a process of its own: how exactly the system counts depends on what else a process has done."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_process_and_the_machine_are_those_of_psutil() -> None:
    _, now = memory.held()
    assert now == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert memory.total() == psutil.virtual_memory().total
    assert 0 < memory.available() <= memory.total()


def test_without_linux_accounts_the_library_of_unix_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", Path("no/such/file"))
    monkeypatch.setattr(memory, "_MEMINFO", Path("no/such/file"))
    most, now = memory.held()
    assert most == now > 0
    assert memory.available() == 0


def test_where_the_system_says_nothing_there_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", Path("no/such/file"))
    monkeypatch.delattr("os.sysconf")
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows: importing it fails
    assert memory.held() == (0, 0)
    assert memory.total() == 0
