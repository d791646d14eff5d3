"""Quantizing a 4096 x 4096 matrix to NF4 or int8 and back, beside bitsandbytes and our own reference.

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

NAMES = {("nf4", False): "NF4", ("nf4", True): "NF4, double quantization", ("int8", False): "int8"}
BITSANDBYTES = "bitsandbytes"
REFERENCE = "Lilliput's reference"
Calls = tuple[Callable[[], object], Callable[[], object]]


def run(arguments: argparse.Namespace) -> Report:
    """NF4 with and without double quantization, and int8; from and to float32 and bfloat16."""
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(arguments.size, arguments.size).to(dtype)
        for (format, double), name in NAMES.items():
            for what, sides in pieces(weight, format, double, arguments.seconds):
                rows += compare(f"{what} {str(dtype).removeprefix('torch.')}, {name}", sides, arguments.rounds)
    return Report(rows, {"ms": "less", "GB/s": ""}, notes=["GB/s: of the dense matrix."])


def pieces(weight: Tensor, format: str, double: bool, seconds: float) -> Iterator[tuple[str, dict[str, Side | str]]]:
    """Quantizing and dequantizing, each with its sides."""
    lacking, work = not_installed("bitsandbytes"), {"GB/s": float(weight.nbytes)}
    q = kernels.quantize(weight, format, double)
    there = lambda: kernels.quantize(weight, format, double)  # noqa: E731
    back = lambda: kernels.dequantize(q, weight.dtype)  # noqa: E731
    their_there, their_back = (None, None) if lacking else bitsandbytes_calls(weight, format, double)
    for what, ours, theirs in (("quantize", there, their_there), ("dequantize", back, their_back)):
        yield (
            what,
            {
                OURS: timed(ours, seconds, **work),
                BITSANDBYTES: timed(theirs, seconds, **work) if theirs else lacking,
                REFERENCE: timed(by_reference(ours), seconds, **work),
            },
        )


def bitsandbytes_calls(weight: Tensor, format: str, double: bool) -> Calls:
    """Its quantizing and dequantizing of the same weight."""
    if format == "int8":
        return bitsandbytes_int8_calls(weight)
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    there = lambda: quantize_4bit(weight, quant_type="nf4", compress_statistics=double)  # noqa: E731
    return there, lambda: dequantize_4bit(codes, state)


def bitsandbytes_int8_calls(weight: Tensor) -> Calls:
    """The same by rows of int8. Its layers round a weight to float16 first, which is spared here."""
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, absmax, _ = int8_vectorwise_quant(weight)
    return lambda: int8_vectorwise_quant(weight), lambda: int8_vectorwise_dequant(codes, absmax).to(weight.dtype)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=4096, help="rows and columns")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each in a round")


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__, options=options, quick={"size": 512, "seconds": 0.05}, rounds=5))
