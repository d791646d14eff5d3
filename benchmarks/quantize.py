"""Quantizing a 4096 x 4096 matrix to NF4 and back, beside bitsandbytes and our own reference.

python benchmarks/quantize.py [--size 4096] [--seconds 0.3] [--rounds 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common import OURS, Report, Row, Side, by_reference, compare, main, not_installed, timed
from lilliput import kernels

BITSANDBYTES = "bitsandbytes"
REFERENCE = "Lilliput's reference"


def run(arguments: argparse.Namespace) -> Report:
    """With and without double quantization, from and to float32 and bfloat16."""
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(arguments.size, arguments.size).to(dtype)
        for double in (False, True):
            name = f"{str(dtype).removeprefix('torch.')}{', double quantization' if double else ''}"
            for what, sides in pieces(weight, double, arguments.seconds):
                rows += compare(f"{what} {name}", sides, arguments.rounds)
    return Report(rows, {"ms": "less", "GB/s": ""}, notes=["GB/s: of the dense matrix."])


def pieces(weight: Tensor, double: bool, seconds: float) -> Iterator[tuple[str, dict[str, Side | str]]]:
    """Quantizing and dequantizing, each with its sides."""
    lacking, work = not_installed("bitsandbytes"), {"GB/s": float(weight.nbytes)}
    q = kernels.quantize(weight, "nf4", double)
    there = lambda: kernels.quantize(weight, "nf4", double)  # noqa: E731
    back = lambda: kernels.dequantize(q, weight.dtype)  # noqa: E731
    their_there, their_back = (None, None) if lacking else bitsandbytes_calls(weight, double)
    for what, ours, theirs in (("quantize", there, their_there), ("dequantize", back, their_back)):
        yield (
            what,
            {
                OURS: timed(ours, seconds, **work),
                BITSANDBYTES: timed(theirs, seconds, **work) if theirs else lacking,
                REFERENCE: timed(by_reference(ours), seconds, **work),
            },
        )


def bitsandbytes_calls(weight: Tensor, double: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """Its quantizing and dequantizing of the same weight."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    there = lambda: quantize_4bit(weight, quant_type="nf4", compress_statistics=double)  # noqa: E731
    return there, lambda: dequantize_4bit(codes, state)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=4096, help="rows and columns")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each in a round")


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__, options=options, quick={"size": 512, "seconds": 0.05}, rounds=5))
