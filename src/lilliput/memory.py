"""How much memory this process has held, and how much the machine has; by the system's own accounts.

Not here: what a model will need (nothing runs for it yet), memory of a GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_STATUS, _MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")


def held() -> tuple[int, int]:
    """The most bytes that the process has held so far, and those it holds now; 0 where the system does not say.

    Linux' own accounts are read where they are: what getrusage calls the maximum begins with the parent's. Elsewhere
    the second number is getrusage's maximum too.
    """
    lines = _lines(_STATUS)
    if "VmHWM" in lines:
        return _bytes(lines["VmHWM"]), _bytes(lines["VmRSS"])
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0, 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most


def total() -> int:
    """Bytes of memory in this machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def available() -> int:
    """Bytes that programs can still take without swapping; 0 where the system does not say (all but Linux)."""
    return _bytes(_lines(_MEMINFO).get("MemAvailable", "0"))


def _lines(file: Path) -> dict[str, str]:
    """The lines `name: value` of one of Linux' accounts; none where there is no such file."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return {}
    return {name: value for name, _, value in (line.partition(":") for line in text.splitlines())}


def _bytes(value: str) -> int:
    """`"123 kB"` in bytes."""
    return int(value.split()[0]) * 1024
