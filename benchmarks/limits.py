"""The machine's limits: float32 matrix products and memory traffic, as torch reaches them with all threads.

    python benchmarks/limits.py [--seconds 0.3] [--rounds 5]

`linear_4bit` measures them again in each of its rounds and gives its figures as shares of them.
"""

from __future__ import annotations

import argparse
import sys

import torch

from common import Report, Side, compare, main, timed

SIZES = (1024, 1536, 2048)
BIG = 64 * 1024 * 1024  # floats: 256 MB, more than any cache


def product(n: int, seconds: float) -> Side:
    """GFLOP/s of a float32 product of two n x n matrices."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return timed(lambda: a @ b, seconds, **{"GFLOP/s": 2.0 * n**3})


def reading(seconds: float) -> Side:
    """GB/s of a sum over an array that fits no cache."""
    numbers = torch.ones(BIG)
    return timed(numbers.sum, seconds, **{"GB/s": 4.0 * BIG})


def copying(seconds: float) -> Side:
    """GB/s, what is read and what is written together, of copying such an array."""
    source, target = torch.ones(BIG), torch.empty(BIG)
    return timed(lambda: target.copy_(source), seconds, **{"GB/s": 8.0 * BIG})


def run(arguments: argparse.Namespace) -> Report:
    """Measure them in turn."""
    sides: dict[str, Side | str] = {f"float32 product, n = {n}": product(n, arguments.seconds) for n in SIZES}
    sides["sum of 256 MB"] = reading(arguments.seconds)
    sides["copy of 256 MB"] = copying(arguments.seconds)
    return Report(compare("torch", sides, arguments.rounds), {"ms": "", "GFLOP/s": "", "GB/s": ""})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=0.3, help="of each in a round")


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__, options=options, quick={"seconds": 0.05}, rounds=5))
