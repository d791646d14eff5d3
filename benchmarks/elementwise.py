"""`swiglu` and `rms_norm` beside torch's silu times up and transformers' LlamaRMSNorm, forward and backward.

GB/s counts what must be read and written once, as float32.

    python benchmarks/elementwise.py [--rows 1024] [--seconds 0.3] [--rounds 5]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from common import OURS, Report, Row, compare, main, timed
from lilliput.kernels import rms_norm, swiglu

WIDTHS = (1536, 576)
EPS = 1e-5
TORCH = "torch and transformers"
Case = tuple[str, int, Callable[[], object], Callable[[], object]]  # what, tensors read and written, ours, theirs


def backward(make: Callable[[], Tensor], wanted: tuple[Tensor, ...], grad: Tensor) -> Callable[[], object]:
    """Backward alone, again and again over one graph."""
    out = make()
    return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)


def cases(rows: int, width: int) -> Iterator[Case]:
    """Both operations, forward and backward."""
    gate, up = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width, requires_grad=True)
    grad, norm = torch.randn(rows, width), LlamaRMSNorm(width, EPS).requires_grad_(False)

    def ours_swiglu() -> Tensor:
        return swiglu(gate, up)

    def their_swiglu() -> Tensor:
        return torch.nn.functional.silu(gate) * up

    def ours_norm() -> Tensor:
        return rms_norm(gate, norm.weight, EPS)

    def their_norm() -> Tensor:
        return norm(gate)

    both = (gate, up)
    yield "swiglu", 3, ours_swiglu, their_swiglu
    yield "swiglu, backward", 5, backward(ours_swiglu, both, grad), backward(their_swiglu, both, grad)
    yield "rms_norm", 2, ours_norm, their_norm
    yield "rms_norm, backward", 3, backward(ours_norm, (gate,), grad), backward(their_norm, (gate,), grad)


def run(arguments: argparse.Namespace) -> Report:
    """Two widths, each operation."""
    found: list[Row] = []
    for width in WIDTHS:
        for what, tensors, ours, theirs in cases(arguments.rows, width):
            work = {"GB/s": 4.0 * tensors * arguments.rows * width}
            sides = {OURS: timed(ours, arguments.seconds, **work), TORCH: timed(theirs, arguments.seconds, **work)}
            found += compare(f"{what}, {arguments.rows} x {width}", sides, arguments.rounds)
    return Report(found, {"ms": "less", "GB/s": ""})


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1024, help="tokens")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each in a round")


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__, options=options, quick={"rows": 64, "seconds": 0.02}, rounds=5))
