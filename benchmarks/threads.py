"""Our threads beside torch's: what torch's operators and ours take alone, and what they take in turn.

A round's work is a chain of mid-sized matrix products, softmaxes and GELUs by torch, and 4-bit products on 1 and on 256
rows. `mixed / parts` is the time of both in turn, operator by operator, over the sum of each alone: 1 says that neither
disturbs the other. The same is done with torch's dense product instead of ours, which shows what the figure is worth.
Each count of threads has processes of its own and is set in both ways, by OMP_NUM_THREADS and by torch.set_num_threads;
some may use a single core, from their first product on or from their start.

    python benchmarks/threads.py [--counts 1 2 4] [--seconds 0.3] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common import OURS, Report, Row, Side, compare, in_process, main
from lilliput.layers import QuantizedLinear

TOKENS, WIDTH, MIDDLE, HEADS = 256, 576, 1536, 9
CONTROL = "torch float32 in its place"
Step = Callable[[], object]


def child(who: str, set_threads: int, core: bool, seconds: float) -> dict[str, float]:
    """The three times and their ratio, in this process."""
    if set_threads:
        torch.set_num_threads(set_threads)
    if core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.manual_seed(0)
    torchs, products = torch_steps(), product_steps(quantized=who == OURS)
    in_turn = [step for pair in zip(torchs, products, strict=True) for step in pair]
    with torch.no_grad():
        torch_ms, product_ms, mixed_ms = (took * 1e3 for took in in_slots([torchs, products, in_turn], seconds))
    times = {"torch ms": torch_ms, "products ms": product_ms, "mixed ms": mixed_ms}
    return {**times, "mixed / parts": mixed_ms / (torch_ms + product_ms), "threads": torch.get_num_threads()}


def in_slots(chains: list[list[Step]], seconds: float) -> list[float]:
    """The median seconds of each chain: slots of four calls in turn, the first of which does not count, since the
    threads of the chain before may still be spinning."""
    times: list[list[float]] = [[] for _ in chains]
    stop = time.perf_counter() + seconds * len(chains)
    while not times[-1] or time.perf_counter() < stop:
        for number, steps in enumerate(chains):
            for call in range(4):
                start = time.perf_counter()
                for step in steps:
                    step()
                if call:
                    times[number].append(time.perf_counter() - start)
    return [statistics.median(each) for each in times]


def torch_steps() -> list[Step]:
    """Operators of a transformer's layer that are not ours."""
    hidden, square, scores = torch.randn(TOKENS, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(HEADS, TOKENS, TOKENS)
    wide = torch.randn(TOKENS, MIDDLE)
    return [
        lambda: hidden @ square,
        lambda: scores.softmax(-1),
        lambda: functional.gelu(wide),
        lambda: scores @ scores,
    ]


def product_steps(quantized: bool) -> list[Step]:
    """Up and down again, on 1 row and on many."""
    up, down = (nn.Linear(i, o, bias=False) for i, o in ((WIDTH, MIDDLE), (MIDDLE, WIDTH)))
    layers = [QuantizedLinear.from_linear(layer) if quantized else layer for layer in (up, down)]

    def step(layer: nn.Module, x: Tensor) -> Step:
        return lambda: layer(x)

    inputs = [torch.randn(rows, layer.in_features) for rows in (1, TOKENS) for layer in (up, down)]
    return [step(layer, x) for layer, x in zip(layers * 2, inputs, strict=True)]


def run(arguments: argparse.Namespace) -> Report:
    """All counts of threads, set in both ways, and a single core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    rows: list[Row] = []
    for count in arguments.counts:
        omp = {"OMP_NUM_THREADS": str(count)}
        rows += measured(f"OMP_NUM_THREADS={count}", omp, arguments)
        rows += measured(f"set_num_threads({count})", {}, arguments, set_threads=count)
        if cores:
            rows += measured(f"OMP_NUM_THREADS={count}, one core", omp, arguments, core=True)
    better: dict[str, Any] = dict.fromkeys(("torch ms", "products ms", "mixed ms", "mixed / parts", "threads"), "")
    if cores:
        with one_core():
            rows += measured("one core from the start", {"OMP_NUM_THREADS": ""}, arguments)
    notes = [
        f"{cores or os.cpu_count()} cores. mixed / parts: 1 where neither disturbs the other.",
        "threads: what torch takes; it asks MKL, which takes no more of OMP_NUM_THREADS than there are cores.",
        "one core: what the process may use from its first product on; its threads are as many as before.",
    ]
    return Report(rows, better, notes=notes)


@contextmanager
def one_core() -> Iterator[None]:
    """Processes that are started inside the block may use a single core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measured(
    what: str, environment: dict[str, str], arguments: argparse.Namespace, *, set_threads: int = 0, core: bool = False
) -> list[Row]:
    """Ours and the control in processes of their own."""

    def side(who: str) -> Side:
        settings = {"set_threads": set_threads, "core": core, "seconds": arguments.seconds}
        return lambda: in_process(__file__, environment, who=who, **settings)

    return compare(what, {who: side(who) for who in (OURS, CONTROL)}, arguments.rounds)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4], help="of threads")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each chain in a round")


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__, options=options, quick={"counts": [1, 2], "seconds": 0.05}, child=child))
