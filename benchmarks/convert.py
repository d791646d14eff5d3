"""Converting Alpaca rows to messages: rows a second of one core, and the memory it takes, at two sizes of file.

Short rows, JSONL to JSONL, written into a temporary directory; each conversion in a process of its own. Beside ours
stands a plain loop over the lines with the standard library's json, which checks nothing: what a script of five lines
would do. A rate is rows by the process's seconds on a processor, so that a busy machine does not hide it; the clock's
stands beside it. The bars: 100,000 rows a second of a core, and memory that does not grow with the file (no more than
10 MB between the sizes); the exit status is 1 when one of them is missed at a million rows or more.

    python benchmarks/convert.py [--rows 1000000] [--keep DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import OURS, Report, Row, Side, compare, in_process, main
from lilliput.data import convert
from lilliput.memory import held

MB = 1_000_000
RATE = 100_000  # rows a second that are promised
FULL = 1_000_000  # rows from which on the promises are held to
GROWTH = 10.0  # MB by which ten times the rows may raise the peak
PLAIN = "json, a plain loop"
_WORDS = ("apples", "boats", "carts", "doors", "eggs", "flutes", "gates", "hats", "inks", "jars")


def child(way: str, source: str, out: str) -> dict[str, Any]:
    """Convert in this process."""
    before = held()[1]
    clock, processor = time.perf_counter(), time.process_time()
    if way == OURS:
        rows = convert(source, out, progress=False).rows
    else:
        rows = plain_loop(source, out)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    return {
        "rows/s of a core": rows / processor,
        "rows/s": rows / clock,
        "peak MB": held()[0] / MB,
        "above the imports, MB": (held()[0] - before) / MB,
    }


def plain_loop(source: str, out: str) -> int:
    """What a script does: no checks, no counts, no words for what is wrong."""
    rows = 0
    with open(source, encoding="utf-8") as lines, open(out, "w", encoding="utf-8") as file:
        for line in lines:
            row = json.loads(line)
            asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
            rows += 1
    return rows


def write_rows(path: Path, rows: int) -> None:
    """Short Alpaca rows, every third with an input, some with letters beyond ASCII."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(rows):
            what = _WORDS[n % len(_WORDS)]
            row = {
                "instruction": f"I had {n % 97} {what} and gave {n % 13} of them away — how many are left?",
                "input": f"The {what} cost {n % 7} each." if n % 3 == 0 else "",
                "output": f"You have {n % 97 - n % 13} {what} left, since {n % 97} less {n % 13} is {n % 97 - n % 13}.",
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run(arguments: argparse.Namespace) -> Report:
    """Both ways at both sizes."""
    rows: list[Row] = []
    sizes = (arguments.rows // 10, arguments.rows)
    with tempfile.TemporaryDirectory(prefix="lilliput-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size in sizes:
            source, out = folder / f"alpaca-{size}.jsonl", folder / "out.jsonl"
            write_rows(source, size)
            sides: dict[str, Side | str] = {
                way: lambda way=way, source=source, out=out: in_process(
                    __file__, way=way, source=str(source), out=str(out)
                )
                for way in (OURS, PLAIN)
            }
            rows += compare(f"{size:,} rows, {source.stat().st_size / MB:,.0f} MB", sides, arguments.rounds)
    better = {"rows/s of a core": "more", "rows/s": "", "peak MB": "", "above the imports, MB": ""}
    return Report(rows, better, failures=missed(rows) if arguments.rows >= FULL else [])


def missed(rows: list[Row]) -> list[str]:
    """Which of the promises were not kept."""
    ours = [row for row in rows if row.who == OURS and row.samples]
    found = []
    for row in ours:
        rate = statistics.median(row.samples["rows/s of a core"])
        if rate < RATE:
            found.append(f"{row.what}: {rate:,.0f} rows a second of a core, promised are {RATE:,}")
    peaks = [statistics.median(row.samples["peak MB"]) for row in ours]
    if len(peaks) > 1 and max(peaks) - min(peaks) > GROWTH:
        found.append(f"memory grows with the file: {', '.join(f'{peak:,.0f} MB' for peak in peaks)}")
    return found


def options(parser: argparse.ArgumentParser) -> None:
    """What can be chosen."""
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the larger file; the other has a tenth")
    parser.add_argument("--keep", type=Path, help="write the files there instead of to a temporary directory")


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__ or "", options=options, quick={"rows": 20_000}, child=child))
