"""`lilliput doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lilliput import memory
from lilliput.cli.base import size
from lilliput.cli.door import Answer

_STYLE = {"ok": "green", "note": "yellow", "bad": "red"}
_OPENMP = re.compile(r"lib(gomp|omp|iomp5)[^/]*\.(so|dylib)")
# What decides how fast a CPU is here, and what llm work is done with it.
_CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve")


@dataclass(frozen=True)
class Finding:
    """One line of the examination: `state` is ok, note (works, but could be better) or bad (lilliput cannot work)."""

    name: str
    state: str
    value: Any
    todo: str = ""


def doctor() -> Answer:
    """Examine this machine: versions, the compiled core, CPU, memory, disk, pulled models.

    Example:  lilliput doctor
    """
    findings = [
        _python(),
        *_packages(),
        _core(),
        _cpu(),
        _memory(),
        _disk(),
        _openmp(),
        _models(),
    ]
    bad = [finding.name for finding in findings if finding.state == "bad"]
    results = {"usable": not bad, **{f.name: {"state": f.state, "value": f.value, "todo": f.todo} for f in findings}}
    return Answer(results, _table(findings), fault=f"lilliput cannot work here: {', '.join(bad)}" if bad else "")


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable}), {platform.platform(terse=True)}")


def _packages() -> list[Finding]:
    """What lilliput requires, against what is installed."""
    from packaging.requirements import Requirement

    try:
        lines = requires("lilliput") or []
    except PackageNotFoundError:
        todo = "Run `make setup`, or `pip install -e .` in the source tree."
        return [Finding("lilliput", "note", "run from a source tree that is not installed", todo)]
    wanted = [need for need in map(Requirement, lines) if need.marker is None or need.marker.evaluate({"extra": ""})]
    return [Finding("lilliput", "ok", version("lilliput")), *(_package(need.name, need) for need in wanted)]


def _package(name: str, need: Any) -> Finding:
    todo = f"Run `pip install '{need}'`."
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "bad", "not installed", todo)
    if need.specifier.contains(found, prereleases=True):
        return Finding(name, "ok", found)
    return Finding(name, "bad", f"{found}, but {need.specifier} is needed", todo)


def _core() -> Finding:
    from lilliput.kernels.core import status

    core = status()
    if core.loaded:
        return Finding("compiled core", "ok", f"{core.instruction_set}, {core.threads} threads")
    todo = "Install a C++20 compiler and run `make setup` (or `pip install -e .`) again. All works without it, slower."
    return Finding("compiled core", "note", f"not loaded: {core.reason}", todo)


def _cpu() -> Finding:
    flags = _cpu_flags()
    has = [name for name in _CPU_FEATURES if name in flags]
    features = ", ".join(has) if has else "features not known on this system"
    return Finding("cpu", "ok", f"{_cpu_name()}, {os.cpu_count()} cores: {features}")


def _cpu_flags() -> set[str]:
    """Feature names as Linux gives them; empty elsewhere."""
    return set(re.sub(r"^.*?:", "", _proc_line("/proc/cpuinfo", "flags", "Features")).split())


def _cpu_name() -> str:
    name = _proc_line("/proc/cpuinfo", "model name").partition(":")[2].strip()
    return name or platform.processor() or platform.machine()


def _proc_line(path: str, *starts: str) -> str:
    """The first line of a file of Linux' /proc that begins with one of `starts`; "" where there is none."""
    if not Path(path).exists():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return next((line for line in file if line.startswith(starts)), "")


def _memory() -> Finding:
    free = memory.available()
    value = size(memory.total()) + (f", {size(free)} free" if free else "")
    if 0 < free < 1e9:
        return Finding("memory", "note", value, "Less than 1 GB is free: close other programs before tuning.")
    return Finding("memory", "ok", value)


def _disk() -> Finding:
    from lilliput.files import cache_dir

    cache = cache_dir()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    value = f"{size(free)} free for the cache {cache}"
    if not os.access(there, os.W_OK):
        return Finding(
            "disk", "bad", f"the cache {cache} cannot be written", "Set LILLIPUT_HOME to a place of your own."
        )
    if free < 1e9:
        return Finding("disk", "note", value, "Free some space, or set LILLIPUT_HOME to a larger disk.")
    return Finding("disk", "ok", value)


def _openmp() -> Finding:
    """OpenMP runtimes in this process, after torch and the core are loaded: two of them fight over the same cores."""
    import torch  # noqa: F401  it brings its runtime along

    loaded = sorted({line.split()[-1] for line in _mapped() if _OPENMP.search(line)})
    if len(loaded) > 1:
        todo = "Two runtimes fight over the cores: start with OMP_NUM_THREADS=1, or reinstall torch and lilliput."
        return Finding("openmp", "note", ", ".join(loaded), todo)
    return Finding("openmp", "ok", ", ".join(loaded) or "none seen")


def _mapped() -> list[str]:
    """The files in this process's memory, as Linux lists them; nothing elsewhere."""
    maps = Path("/proc/self/maps")
    return maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.exists() else []


def _models() -> Finding:
    from lilliput.files import cache_dir

    folder = cache_dir() / "models"
    pulled = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not pulled:
        return Finding("models", "note", "none pulled", "Get one with `lilliput pull smollm2-135m-instruct`.")
    return Finding("models", "ok", ", ".join(pulled))


def _table(findings: list[Finding]) -> Table:
    table = Table(title="lilliput doctor", title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        state = f"[{_STYLE[finding.state]}]{finding.state}[/]"
        table.add_row(state, finding.name, Text(f"{finding.value}" + (f"\n{finding.todo}" if finding.todo else "")))
    return table
