"""A step of AdamW over 64 M parameters beside torch, bitsandbytes and torchao: speed, state, extra memory.

Sixteen float32 tensors of 4096 x 1024 with float32 gradients. In each round all sides step over the same parameters,
one after the other, in one process. `bytes` of state are counted over the optimizer's tensors. `extra MB a thread` is
how far resident memory rises during a step above what it was before, over the threads, in a process of each side's
own (Linux alone counts it). bitsandbytes and torchao compile their steps at the first call, which does not count.

    python benchmarks/optimizer_step.py [--tensors 16] [--seconds 0.5] [--rounds 7] [--sides ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import OURS, Report, Side, SideFailed, compare, in_process, main, not_installed, seconds_of
from lilliput.memory import held
from lilliput.optim import AdamW, AdamW8bit, PagedAdamW8bit

SHAPE = (4096, 1024)
OPTIONS: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
OURS_32 = f"{OURS}, 32 bits"
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def paged(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Ours in 8 bits with half of its state in memory."""
    return PagedAdamW8bit(parameters, budget=max(1, sum(map(torch.numel, parameters))), **OPTIONS)


def bitsandbytes_8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **OPTIONS)


def torchao_8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """torchao's AdamW8bit."""
    from torchao.optim import AdamW8bit as Theirs

    return Theirs(parameters, **OPTIONS)


# key: name in the table, how it is made, what must be installed
SIDES: dict[str, tuple[str, Make, tuple[str, ...]]] = {
    "lilliput": (OURS, partial(AdamW8bit, **OPTIONS), ()),
    "lilliput-paged": (f"{OURS}, paged, half of the state in memory", paged, ()),
    "lilliput-32": (OURS_32, partial(AdamW, **OPTIONS), ()),
    "torch-fused": ("torch AdamW, fused", partial(torch.optim.AdamW, fused=True, **OPTIONS), ()),
    "torch": ("torch AdamW", partial(torch.optim.AdamW, **OPTIONS), ()),
    "bitsandbytes": ("bitsandbytes AdamW8bit", bitsandbytes_8bit, ("bitsandbytes",)),
    "torchao": ("torchao AdamW8bit", torchao_8bit, ("torchao",)),
}


def parameters_of(tensors: int) -> list[nn.Parameter]:
    """Random parameters with gradients like those of a model: small, and of another size in each tensor."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(SHAPE) * 0.02) for _ in range(tensors)]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.randn(SHAPE) * 1e-3 * 2.0 ** -(number % 8)
    return parameters


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all its tensors, each storage once."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    parts = [part for tensor in tensors for part in plain_parts(tensor)]
    return sum({part.data_ptr(): part.nbytes for part in parts}.values())


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """What a tensor subclass is made of (torchao's states), or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def child(side: str, tensors: int) -> dict[str, float]:
    """State and extra memory of a side, in this process."""
    parameters = parameters_of(tensors)
    optimizer = SIDES[side][1](parameters)
    for _ in range(2):
        optimizer.step()
    figures = {"bytes": state_bytes(optimizer) / sum(map(torch.numel, parameters))}
    peaks = Path("/proc/self/clear_refs")
    if peaks.exists():
        peaks.write_text("5")  # the highest so far is from now on what is resident now
        before = held()[1]
        optimizer.step()
        figures["extra MB a thread"] = max(0.0, held()[0] - before) / 1e6 / torch.get_num_threads()
    return figures


def measured(side: str, parameters: list[nn.Parameter], seconds: float) -> Side | str:
    """A side that steps for some seconds; or why it cannot."""
    _, make, needs = SIDES[side]
    if lacking := not_installed(*needs):
        return lacking
    try:
        fixed = in_process(__file__, side=side, tensors=len(parameters))
    except SideFailed as error:
        return f"failed: {error}"
    optimizer, count = make(parameters), sum(map(torch.numel, parameters))

    def step() -> dict[str, float]:
        took = seconds_of(optimizer.step, seconds)
        return {"ms": took * 1e3, "M parameters/s": count / took / 1e6, **fixed}

    return step


def run(arguments: argparse.Namespace) -> Report:
    """All sides in turn."""
    parameters = parameters_of(arguments.tensors)
    sides = {SIDES[side][0]: measured(side, parameters, arguments.seconds) for side in arguments.sides}
    what = f"AdamW, {arguments.tensors} x {SHAPE[0]} x {SHAPE[1]}"
    rows = compare(what, sides, arguments.rounds)
    mine = tuple(SIDES[side][0] for side in ("lilliput", "lilliput-32") if side in arguments.sides)
    better = {"ms": "less", "M parameters/s": "", "bytes": "", "extra MB a thread": ""}
    return Report(rows, better, ours=mine, notes=["bytes: of state, for each parameter."])


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tensors", type=int, default=16, help=f"of {SHAPE[0]} x {SHAPE[1]}")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each in a round")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))


if __name__ == "__main__":
    small = {"tensors": 1, "seconds": 0.05}
    sys.exit(main(run, __file__, __doc__, options=options, quick=small, child=child, rounds=7))
