"""A LoRA training step beside its peers: time, tokens a second, peak memory.

r 16 on all seven linear layers of SmolLM2-135M, 4 rows of 256 tokens, every token a label, AdamW. Each stack runs in a
process of its own; a round's figure is the median of its steps, the first left out.
Peers: PEFT on a float32 base, on bitsandbytes NF4 (double quantization, float32 compute) and on bitsandbytes int8 (in
float32, far quicker than float16 and bfloat16 where those are slow; in training mode its layers dequantize their
weights, and round no inputs; ours round them, with the threshold of 6).

    python benchmarks/training_step.py [--rounds 3] [--steps 3] [--stacks lilliput ...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common import Report, Side, compare, in_process, main, not_installed
from lilliput.data import Pack
from lilliput.lora import LoraConfig, add_adapter
from lilliput.memory import held
from lilliput.models import load_model
from lilliput.training.fused import fused
from lilliput.training.trainer import LabelLoss, batch_of
from peers import LORA, MODEL, dense_checkpoint, load_bitsandbytes, load_bitsandbytes_int8, load_dense

ROWS, TOKENS = 4, 256
STACKS = {
    "lilliput": "Lilliput, NF4",
    "lilliput-plain": "Lilliput, NF4, norms and activations unfused",
    "lilliput-int8": "Lilliput, int8",
    "lilliput-fp32": "Lilliput, float32 base",
    "peft-bitsandbytes": "PEFT on bitsandbytes NF4",
    "peft-bnb-int8": "PEFT on bitsandbytes int8",
    "peft-fp32": "PEFT on a float32 base",
}
FORMATS = {"lilliput-int8": "int8", "lilliput-fp32": "none"}  # of our base; else NF4
BASES = {"peft-bitsandbytes": load_bitsandbytes, "peft-bnb-int8": load_bitsandbytes_int8, "peft-fp32": load_dense}
NEEDS = dict.fromkeys(("peft-bitsandbytes", "peft-bnb-int8"), ("peft", "bitsandbytes")) | {"peft-fp32": ("peft",)}


def ours(stack: str, ids: Tensor) -> tuple[PreTrainedModel, Callable[[], Tensor]]:
    """Our model and its loss, as `tune` trains it."""
    model = load_model(MODEL, format=FORMATS.get(stack, "nf4"), progress=False)
    add_adapter(model, LoraConfig(**LORA))
    loss = LabelLoss(model)
    packs = [Pack(row, [True] * TOKENS, list(range(TOKENS)), [0] * TOKENS) for row in ids.tolist()]
    return model, lambda: loss(**batch_of(packs, 0))["loss"]


def theirs(stack: str, ids: Tensor, checkpoint: str) -> tuple[PreTrainedModel, Callable[[], Tensor]]:
    """PEFT's model and transformers' own loss."""
    import peft

    model = peft.get_peft_model(BASES[stack](checkpoint), peft.LoraConfig(**LORA))
    return model, lambda: model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss


def child(stack: str, steps: int, checkpoint: str) -> dict[str, Any]:
    """The figures of a stack, in this process."""
    torch.manual_seed(0)
    ids = torch.randint(100, 40_000, (ROWS, TOKENS))
    model, loss_of = ours(stack, ids) if stack.startswith("lilliput") else theirs(stack, ids, checkpoint)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    loaded = held()[0]
    seconds, losses = [], []
    with fused(model) if stack.startswith("lilliput") and stack != "lilliput-plain" else nullcontext():
        for _ in range(steps + 1):
            start = time.perf_counter()
            loss = loss_of()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
            del loss
    took = statistics.median(seconds[1:])
    sizes = {"peak GB": held()[0] / 1e9, "loaded GB": loaded / 1e9}
    return {"seconds": took, **sizes, "tokens/s": ROWS * TOKENS / took, "first loss": losses[0]}


def run(arguments: argparse.Namespace) -> Report:
    """All stacks in turn."""
    with tempfile.TemporaryDirectory(prefix="lilliput-") as folder:
        checkpoint = dense_checkpoint(folder)
        sides: dict[str, Side | str] = {}
        for stack in arguments.stacks:
            sides[STACKS[stack]] = not_installed(*NEEDS.get(stack, ())) or (
                lambda stack=stack: in_process(__file__, stack=stack, steps=arguments.steps, checkpoint=checkpoint)
            )
        rows = compare(f"{ROWS} x {TOKENS} tokens", sides, arguments.rounds)
    mine = tuple(STACKS[stack] for stack in arguments.stacks if stack.startswith("lilliput"))
    better = {"seconds": "less", "peak GB": "less", "loaded GB": "", "tokens/s": "", "first loss": ""}
    return Report(rows, better, ours=mine)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__, options=options, quick={"steps": 1}, child=child))
