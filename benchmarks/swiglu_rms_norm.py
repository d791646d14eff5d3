"""`swiglu` and `rms_norm` beside torch's silu times up and transformers' LlamaRMSNorm, forward and with backward.

Both sides in turn in one process, the quickest of many runs; a ratio above 1 means that Lilliput is quicker. GB/s
counts what must be read and written once, as float32.

    python benchmarks/swiglu_rms_norm.py [--threads 2] [--seconds 1.0]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lilliput.kernels import core, rms_norm, swiglu
from linear_4bit import race

SHAPES = [(1024, 1536), (1024, 576), (1, 1536), (1, 576)]
EPS = 1e-5
Case = tuple[str, int, Callable[[], object], Callable[[], object]]  # what, tensors read and written, ours, theirs


def backward(make: Callable[[], Tensor], wanted: tuple[Tensor, ...], grad: Tensor) -> Callable[[], object]:
    """Backward alone, again and again over one graph."""
    out = make()
    return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)


def cases(rows: int, width: int) -> Iterator[Case]:
    gate, up = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width, requires_grad=True)
    grad, norm = torch.randn(rows, width), LlamaRMSNorm(width, EPS)

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
    norm.requires_grad_(False)
    frozen = (gate,)
    yield "rms_norm, backward", 3, backward(ours_norm, frozen, grad), backward(their_norm, frozen, grad)
    norm.requires_grad_(True)
    trained = (gate, norm.weight)
    yield "rms_norm, backward, weight too", 3, backward(ours_norm, trained, grad), backward(their_norm, trained, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="of each line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    status = core.status()
    table = Table(title=f"{status.instruction_set or status.reason}, {options.threads} threads")
    for column in ("what", "shape", "ours us", "torch us", "ratio", "ours GB/s"):
        table.add_column(column, no_wrap=True)
    for rows, width in SHAPES:
        for what, tensors, ours, theirs in cases(rows, width):
            mine, other = race(ours, theirs, options.seconds)
            rate = tensors * rows * width * 4e-9 / mine
            micro = [f"{side * 1e6:.0f}" for side in (mine, other)]
            table.add_row(what, f"{rows} x {width}", *micro, f"{other / mine:.2f}", f"{rate:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
