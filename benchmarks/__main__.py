"""Run the benchmarks, each in a process of its own: `python -m benchmarks [NAME …] [--list] [--out DIR]`.

Not here: measuring (common.py), what is measured (a file a benchmark).
"""

from __future__ import annotations

import argparse
import ast
import difflib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELPERS = {"common", "peers"}


def names() -> list[str]:
    """All benchmarks."""
    return sorted(file.stem for file in HERE.glob("*.py") if not file.stem.startswith("_") and file.stem not in HELPERS)


def about(name: str) -> str:
    """The first line of a benchmark's docstring."""
    return (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or "").splitlines()[0]


def command(name: str, arguments: argparse.Namespace) -> list[str]:
    """How a benchmark is run."""
    given = {"--rounds": arguments.rounds, "--threads": arguments.threads}
    options = [text for option, value in given.items() if value is not None for text in (option, str(value))]
    quick = ["--quick"] if arguments.quick else []
    return [sys.executable, str(HERE / f"{name}.py"), "--json", str(arguments.out / f"{name}.json"), *options, *quick]


def main() -> int:
    """Run them one after the other; the exit status is 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Lilliput beside its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of --list; default: all")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON files (runs/bench)")
    parser.add_argument("--rounds", type=int, help="instead of each benchmark's own count")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="a trial at small sizes; its figures say little")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in names():
            near = difflib.get_close_matches(name, names(), n=1)
            parser.error(f"no benchmark '{name}'" + (f"; did you mean '{near[0]}'?" if near else f"; {names()}"))
    if arguments.list:
        for name in names():
            print(f"{name:<20}{about(name)}")
        return 0
    failed = []
    for name in arguments.names or names():
        print(f"\n{name}: {about(name)}", flush=True)
        if subprocess.run(command(name, arguments), check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
