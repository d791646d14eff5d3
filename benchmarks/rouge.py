"""ROUGE-L of a new instruction against a pool of 50,000, beside a loop over `rouge-score`; and a whole file of them.

The pool is made of the instructions in ../shared/data (Alpaca, GSM8K, role play): each as it stands, then copies with a
fifth of their words exchanged, until there are enough. The package is the loop of Self-Instruct's released code, one
`score` a pair, over a part of the pool (its time is that many times longer: pairs do not know of each other); the
scores of that part are compared to the last bit. All of this runs on one core. The file is the pool itself: its
near-duplicates by all pairs, and by candidates of MinHash, on the cores there are.

    python benchmarks/rouge.py [--pool 50000] [--queries 10] [--part 1000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common import OURS, Report, Row, Side, compare, main, not_installed
from lilliput.synthesis.near import Near, find_near
from lilliput.synthesis.rouge import RougePool, split_words

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
FILES = ("alpaca-en-1k.json", "alpaca-gsm8k-train.json", "alpaca-gpteacher-roleplay.json")
CHANGED = 0.2  # of a copy's words
PACKAGE = "rouge-score"
WHOLE_POOL, WHOLE_FILE = "one text, whole pool", "a file, near-duplicates"


def instructions() -> list[str]:
    """The real ones, in the order of the files."""
    rows = [row for name in FILES for row in json.loads((DATA / name).read_text(encoding="utf-8"))]
    return list(dict.fromkeys(row["instruction"] for row in rows))


def grow(real: list[str], count: int) -> list[str]:
    """`count` texts in a random order: all real ones, and copies with some words exchanged."""
    dice = random.Random(0)
    words = sorted({word for text in real for word in split_words(text)})
    texts = real[:count]
    while len(texts) < count:
        copy = split_words(dice.choice(real))
        texts.append(" ".join(dice.choice(words) if dice.random() < CHANGED else word for word in copy))
    dice.shuffle(texts)
    return texts


def package_side(pool: list[str], queries: list[str], part: int) -> tuple[Side, list[list[float]]]:
    """The loop over the package for a part of the pool, scaled to all of it; its scores are gathered in the list."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores: list[list[float]] = []

    def side() -> dict[str, float]:
        start = time.perf_counter()
        scores[:] = [[scorer.score(text, query)["rougeL"].fmeasure for text in pool[:part]] for query in queries]
        return {"ms": (time.perf_counter() - start) / len(queries) * len(pool) / part * 1e3}

    return side, scores


def our_side(call: Callable[[str], object], queries: list[str]) -> Side:
    """The mean time of a call over the queries, after one that does not count."""

    def side() -> dict[str, float]:
        call(queries[0])
        start = time.perf_counter()
        for query in queries:
            call(query)
        return {"ms": (time.perf_counter() - start) / len(queries) * 1e3}

    return side


def file_side(texts: list[str], exact: bool, found: dict[bool, Near]) -> Side:
    """Near-duplicates of all texts, with the cores there are; what was found is put into `found`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def side() -> dict[str, float]:
        start, used = time.perf_counter(), time.process_time()
        found[exact] = find_near(texts, exact=exact, threads=cores)
        took = time.perf_counter() - start
        return {"ms": took * 1e3, "core seconds": time.process_time() - used}

    return side


def run(arguments: argparse.Namespace) -> Report:
    """Measure; an unequal score is a failure."""
    real = instructions()
    texts = grow(real, arguments.pool)
    dice = random.Random(1)
    queries = [dice.choice(real) for _ in range(arguments.queries)]
    pool = RougePool(texts)
    sides: dict[str, Side | str] = {
        OURS: our_side(pool.scores, queries),
        f"{OURS}, nearest": our_side(pool.nearest, queries),
        f"{OURS}, any above 0.7": our_side(pool.any_above, queries),
        PACKAGE: not_installed("rouge_score"),
    }
    scores: list[list[float]] = []
    if not sides[PACKAGE]:
        sides[PACKAGE], scores = package_side(texts, queries, arguments.part)
    rows = compare(WHOLE_POOL, sides, arguments.rounds)
    unequal = sum(
        int((pool.scores(query)[: arguments.part] != np.array(expected)).sum())
        for query, expected in zip(queries, scores, strict=False)
    )
    compared = len(scores) * arguments.part
    notes = [f"{compared:,} scores compared with {PACKAGE}'s, {unequal} of them not the same float"]
    failures = [f"{unequal} scores differ from {PACKAGE}'s"] if unequal else []
    rows += file_rows(texts, arguments, notes)
    return Report(rows, {"ms": "less", "core seconds": ""}, notes=notes, failures=failures)


def file_rows(texts: list[str], arguments: argparse.Namespace, notes: list[str]) -> list[Row]:
    """The whole file, both ways, once."""
    found: dict[bool, Near] = {}
    names = {True: f"{OURS}, all pairs", False: f"{OURS}, MinHash"}
    sides: dict[str, Side | str] = {names[exact]: file_side(texts, exact, found) for exact in (False, True)}
    rows = compare(WHOLE_FILE, sides, 1)
    gone = {exact: ~near.stays for exact, near in found.items()}
    missed = int((gone[True] & ~gone[False]).sum())
    notes.append(
        f"of {len(texts):,} texts {int(gone[True].sum()):,} go by all pairs; MinHash keeps {missed:,} of these "
        f"({found[False].bands}, at most {found[False].missed:.2%} of pairs at the threshold)"
    )
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--pool", type=int, default=50_000, help="texts in the pool (50000)")
    parser.add_argument("--queries", type=int, default=10, help="new instructions (10)")
    parser.add_argument("--part", type=int, default=1000, help="texts of the pool that the package is given (1000)")


if __name__ == "__main__":
    if not DATA.is_dir():
        sys.exit(f"real data is not on this machine: {DATA}")
    sys.exit(main(run, __file__, __doc__, options=options, quick={"pool": 3000, "queries": 2, "part": 200}))
