"""The linear layer in groups of rows (what GPTQ fills) beside NF4 and torch's dense one, from one row to 1024.

The shapes are SmolLM2-135M's and one of a 7B model; groups have 128 numbers, scales of float16 and a zero each. `order`
is int4 whose columns lie in an order of their own, so that x is reordered first. Shares, GB/s (of each layer's own
stored bytes) and the ring of weights are those of `linear_4bit`.

    python benchmarks/linear_grouped.py [--shapes 576x1536 4096x4096] [--rows 1 1024] [--seconds 0.1] [--ring 128]
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

from common import OURS, Report, main
from lilliput.formats import GroupedTensor
from lilliput.layers import QuantizedLinear
from linear_4bit import BETTER, NOTE, TORCH, Layers, options, over

FORMATS = {OURS: "int4", f"{OURS}, int3": "int3", f"{OURS}, int2": "int2", f"{OURS}, int8g": "int8g"}
ORDERED, NF4 = f"{OURS}, order", f"{OURS}, nf4"


def run(arguments: argparse.Namespace) -> Report:
    """All shapes and rows, forward and gradient."""
    rows = over(arguments, make_layers, torch.randn, forward_only=())
    return Report(rows, BETTER, notes=[NOTE, "Groups of 128; int4 where nothing is said."])


def make_layers(columns: int, out: int) -> Layers:
    """The same weight in each format's layer, and dense."""
    dense = nn.Linear(columns, out, bias=False).requires_grad_(False)
    layers: Layers = {name: QuantizedLinear.from_linear(dense, format) for name, format in FORMATS.items()}
    layers[ORDERED] = in_some_order(layers[OURS])
    return layers | {NF4: QuantizedLinear.from_linear(dense, "nf4"), TORCH: dense}


def in_some_order(layer: nn.Module | str) -> QuantizedLinear:
    """The same codes, as those of columns in a random order."""
    assert isinstance(layer, QuantizedLinear)
    codes, scale, zero, _ = layer.quantized.packed
    assert scale is not None
    order = torch.randperm(layer.in_features).to(torch.int32)
    return QuantizedLinear(GroupedTensor(layer.format, layer.weight_shape, codes.clone(), scale, zero, order))


if __name__ == "__main__":
    small = {"shapes": ("576x192",), "rows": (1, 256), "seconds": 0.02, "ring": 8}
    sys.exit(main(run, __file__, __doc__, options=options, quick=small, rounds=5))
