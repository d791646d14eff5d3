"""The int8 linear layer beside its peers: forward and gradient to the input, one row and many.

The shapes are SmolLM2-135M's, 1024 x 1024 and one of a 7B model. x is normal, but for a few columns of numbers beyond
the threshold (`--outliers`), which leave the product in int8 where the threshold is not 0. SmolLM2 has 0 to 2 of them
in most layers, and in front of `down_proj` 0 to some hundreds of 1536.

bitsandbytes' layer (has_fp16_weights=False) has two ways on a CPU. In evaluation mode it rounds x to int8 and
multiplies in whole numbers where the processor has AVX-512, with the whole numbers as floats elsewhere. In training
mode it multiplies with the dequantized weight and rounds nothing; the threshold then has no meaning. Its gradient is
the same in both, and so is ours for all thresholds. x is float32: float16 and bfloat16 are about as quick for it in
evaluation mode, and far slower in training mode where the processor has no instructions for them.

GFLOP/s count a product's multiplications and sums, of whole numbers or not. `share`, GB/s and the ring of weights are
those of `linear_4bit`: the limit is torch's float32 product, which whole numbers may surpass, or reading.

    python benchmarks/linear_int8.py [--shapes 576x1536 4096x4096] [--rows 1 1024] [--outliers 4] [--ring 128]
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from common import OURS, Report, main, not_installed
from lilliput.layers import QuantizedLinear
from linear_4bit import BETTER, NOTE, TORCH, Layers, over
from peers import bitsandbytes_int8_linear

SHAPES = ("1024x1024", "576x576", "576x1536", "1536x576", "4096x4096")  # in x out
ROWS = (1, 512, 1024)
THRESHOLD = 6.0
OUTLIER = 20.0  # what is added to the numbers of a column of outliers, away from zero
THRESHOLDS = {OURS: THRESHOLD, f"{OURS}, threshold 0": 0.0}
EVALUATED, TRAINED = "bitsandbytes, evaluation mode", "bitsandbytes, training mode"
BITSANDBYTES = {EVALUATED: (THRESHOLD, True), f"{EVALUATED}, threshold 0": (0.0, True), TRAINED: (THRESHOLD, False)}
FORWARD_ONLY = {*THRESHOLDS, *BITSANDBYTES} - {OURS, TRAINED}


def run(arguments: argparse.Namespace) -> Report:
    """All shapes and rows, forward and gradient."""
    inputs = lambda count, columns: normal_but(arguments.outliers, count, columns)  # noqa: E731
    rows = over(arguments, make_layers, inputs, forward_only=FORWARD_ONLY)
    notes = [NOTE, f"Threshold {THRESHOLD} where nothing else is said; {arguments.outliers} columns of x are outliers."]
    return Report(rows, BETTER, ours=tuple(THRESHOLDS), notes=notes)


def make_layers(columns: int, out: int) -> Layers:
    """The same weight in each stack's layer; a text where the stack is not installed."""
    dense = nn.Linear(columns, out, bias=False).requires_grad_(False)
    lacking = not_installed("bitsandbytes")
    layers: Layers = {name: QuantizedLinear.from_linear(dense, "int8", threshold=t) for name, t in THRESHOLDS.items()}
    for name, (threshold, inference) in BITSANDBYTES.items():
        layers[name] = lacking or bitsandbytes_int8_linear(dense.weight, threshold, inference=inference)
    return layers | {TORCH: dense}


def normal_but(outliers: int, count: int, columns: int) -> Tensor:
    """x [count, columns] with normal numbers, `outliers` of its columns beyond the threshold in each row."""
    x = torch.randn(count, columns).clamp_(-THRESHOLD, THRESHOLD)
    chosen = torch.randperm(columns)[:outliers]
    x[:, chosen] += OUTLIER * x[:, chosen].sign()
    return x


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="INxOUT")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--outliers", type=int, default=4, help="columns of x beyond the threshold")
    parser.add_argument("--seconds", type=float, default=0.1, help="of each in a round")
    parser.add_argument("--ring", type=int, default=128, help="MB of weights to go round for few rows; 0: one weight")


if __name__ == "__main__":
    small = {"shapes": ("576x192",), "rows": (1, 256), "seconds": 0.02, "ring": 8}
    sys.exit(main(run, __file__, __doc__, options=options, quick=small, rounds=5))
