"""The 4-bit linear layer beside its peers: forward and gradient to the input, from one row to 1024.

The shapes are SmolLM2-135M's and one of a 7B model. Layers are compared as they are used: ours, bitsandbytes' (NF4,
double quantization, float32 compute) and torch's dense one in float32. In evaluation mode, on a processor with
AVX512-BF16, bitsandbytes repacks its weight and computes in bfloat16 whatever it was told, so it stands here twice.

`share` is that of the machine's limit, measured in the same round. For many rows it is the rate of torch's float32
product of 2048 x 2048. For up to 16 rows it is the bandwidth of reading, counted on the bytes of the weight as it is
stored: codes and constants; floats for torch. There a ring of copies of the weight is gone round, so that it comes from
memory and from no cache, as when a model generates (`--ring 0`: the same weight again and again).

    python benchmarks/linear_4bit.py [--shapes 576x1536 4096x4096] [--rows 1 1024] [--seconds 0.1] [--ring 128]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from itertools import cycle

import torch
from torch import Tensor, nn

from common import OURS, Report, Row, Side, by_reference, compare, main, not_installed, timed
from lilliput.layers import QuantizedLinear
from limits import product, reading
from peers import bitsandbytes_linear

SHAPES = ("576x576", "576x192", "576x1536", "1536x576", "4096x4096")  # in x out
ROWS = (1, 4, 16, 256, 1024)
FEW = 16  # rows; up to here memory is the limit
NOTE = f"share: of the limit in the same round. Up to {FEW} rows that is reading, with more a float32 product."
BETTER = {"ms": "less", "GFLOP/s": "", "GB/s": "", "share": ""}
MOST_COPIES = 2048
TORCH, LIMIT = "torch float32", "(the limit)"
EVALUATED = "bitsandbytes, evaluation mode"
BITSANDBYTES = {"bitsandbytes": False, EVALUATED: True}
REFERENCE = "Lilliput's reference"


Layers = dict[str, nn.Module | str]


def run(arguments: argparse.Namespace) -> Report:
    """All shapes and rows, forward and gradient."""
    return Report(over(arguments, make_layers, torch.randn, forward_only={EVALUATED}), BETTER, notes=[NOTE])


def over(
    arguments: argparse.Namespace,
    make: Callable[[int, int], Layers],
    inputs: Callable[[int, int], Tensor],
    *,
    forward_only: Collection[str],
) -> list[Row]:
    """The rows of all shapes and counts of rows.

    Args:
        make: the same weight [out, in] in each stack's layer, from (in, out); the first is ours.
        inputs: x [rows, in], from (rows, in).
        forward_only: the stacks whose gradient is not measured.
    """
    rows: list[Row] = []
    for shape in arguments.shapes:
        columns, out = map(int, shape.split("x"))
        layers = make(columns, out)
        for count in arguments.rows:
            ring = arguments.ring * 10**6 if count <= FEW else 0
            for what, sides in works(layers, inputs(count, columns), ring, arguments.seconds, forward_only):
                limit = reading(arguments.seconds) if count <= FEW else product(2048, arguments.seconds)
                found = compare(f"{what}, {count} x {columns} x {out}", {LIMIT: limit, **sides}, arguments.rounds)
                rows += with_shares(found)
    return rows


def make_layers(columns: int, out: int) -> Layers:
    """The same weight in each stack's layer; a text where the stack is not installed."""
    dense = nn.Linear(columns, out, bias=False).requires_grad_(False)
    lacking = not_installed("bitsandbytes")
    theirs = {name: lacking or bitsandbytes_linear(dense.weight, inference=mode) for name, mode in BITSANDBYTES.items()}
    return {OURS: QuantizedLinear.from_linear(dense), **theirs, TORCH: dense}


def works(
    layers: Layers, x: Tensor, ring: int, seconds: float, forward_only: Collection[str]
) -> Iterator[tuple[str, dict[str, Side | str]]]:
    """The pieces of work on x [rows, in], each with its sides; the first layer is ours."""
    ours = next(iter(layers.values()))
    assert isinstance(ours, QuantizedLinear)
    (count, columns), out = x.shape, ours.out_features
    flops = 2.0 * count * columns * out

    def stored(name: str) -> int:
        if name == TORCH:
            return columns * out * 4
        layer = layers.get(name)
        return layer.quantized.nbytes if isinstance(layer, QuantizedLinear) else ours.quantized.nbytes

    def side(name: str, call: Callable[[], object]) -> Side:
        work = {"GFLOP/s": flops} | ({"GB/s": float(stored(name))} if count <= FEW else {})
        return timed(call, seconds, **work)

    sides: dict[str, Side | str] = {}
    for name, layer in layers.items():
        sides[name] = layer if isinstance(layer, str) else side(name, forward(copies(layer, ring // stored(name)), x))
    sides[REFERENCE] = side(REFERENCE, by_reference(forward([ours], x)))
    yield "forward", sides
    if count > FEW:
        trained = {name: layer for name, layer in layers.items() if name not in forward_only}
        yield (
            "gradient",
            {n: layer if isinstance(layer, str) else side(n, gradient(layer, x)) for n, layer in trained.items()},
        )


def copies(layer: nn.Module, count: int) -> list[nn.Module]:
    """The layer and copies of it, at least one."""
    return [layer, *(deepcopy(layer) for _ in range(min(count, MOST_COPIES) - 1))]


def forward(layers: list[nn.Module], x: Tensor) -> Callable[[], object]:
    """One layer's forward, the next one's at the next call; each was called before."""
    ring = cycle(layers)

    @torch.no_grad()
    def call() -> object:
        return next(ring)(x)

    for _ in layers:
        call()
    return call


def gradient(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """The backward alone, to the input."""
    x = x.clone().requires_grad_()
    y = layer(x)
    towards = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, x, towards, retain_graph=True)


def with_shares(rows: list[Row]) -> list[Row]:
    """Each row's rate over the limit's, round by round."""
    limit = next(row for row in rows if row.who == LIMIT)
    rate = "GB/s" if "GB/s" in limit.samples else "GFLOP/s"
    limit.samples.pop("ms", None)  # of other work
    for row in rows:
        if rate in row.samples and row is not limit:
            row.samples["share"] = [a / b for a, b in zip(row.samples[rate], limit.samples[rate], strict=True)]
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="INxOUT")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each in a round")
    parser.add_argument("--ring", type=int, default=128, help="MB of weights to go round for few rows; 0: one weight")


if __name__ == "__main__":
    small = {"shapes": ("576x192",), "rows": (1, 256), "seconds": 0.02, "ring": 8}
    sys.exit(main(run, __file__, __doc__, options=options, quick=small, rounds=5))
