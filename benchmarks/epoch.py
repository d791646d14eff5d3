"""One epoch over real Alpaca rows: wall time of training and held-out loss, beside PEFT, bitsandbytes and the Trainer.

All stacks train r 16 on all linear layers of SmolLM2-135M in NF4 with double quantization, on the same examples with
the same label masks (prompts are no labels), learning rate, schedule, AdamW and clipping. Ours packs them into rows of
`--length` tokens. The peer pads each batch to its longest row, as is usual, in the Trainer's random order. It stands
here twice: with about as many tokens a batch as ours, padding counted, and so more optimizer steps; and with about as
many optimizer steps as ours, and so more tokens a batch. Ours stands here twice too: with `--batch` packed rows a step,
and with as many steps as the peer's first.

Each stack has a process of its own. `training` is the wall time of `train()`, loading and evaluation not counted. The
losses are sums over labelled tokens of the held-out rows, each row alone, over their count: the same code for all.

    python benchmarks/epoch.py [--rows 500] [--held-out 100] [--length 512] [--batch 4] [--stacks lilliput ...]
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from common import Report, Side, compare, in_process, main, not_installed
from lilliput.data import Example, Pack, load_examples, pack
from lilliput.models import load_tokenizer
from lilliput.training import Recipe, load_recipe
from lilliput.training.fused import fused
from lilliput.training.run import load_base
from lilliput.training.trainer import LabelLoss, LabelTrainer, Rows, batch_of, count_steps, make_arguments, pad_id
from peers import LORA, MODEL, SHARED_DATA, dense_checkpoint, load_bitsandbytes

DATA = SHARED_DATA / "alpaca-en-1k.json"
OURS = "Lilliput, packed"
STACKS = {
    "lilliput": OURS,
    "lilliput-steps": f"{OURS}, as many steps as the peer with as many tokens",
    "peft-tokens": "PEFT on bitsandbytes, as many tokens a batch",
    "peft-steps": "PEFT on bitsandbytes, as many steps",
}


# ---- the same for all stacks -------------------------------------------------------------------------------------


def examples(rows: int, held_out: int, length: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list, list]:
    """The first `rows` examples of the file that fit, and the `held_out` after them."""
    found = load_examples(DATA, tokenizer, max_length=length, progress=False).examples
    return found[:rows], found[rows : rows + held_out]


def recipe_of(length: int, batch: int) -> Recipe:
    """The qlora recipe for one epoch without accumulation."""
    train = (f"train.batch_size={batch}", "train.accumulation=1", "train.epochs=1", "train.save_every=1000000")
    return load_recipe("qlora", (*train, "data.packing=true", f"data.max_length={length}"))


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, held_out: Sequence[Example]) -> float:
    """The mean negative log-likelihood of a labelled token, in nats.

    The model stays as it is trained (there is no dropout in it): where bitsandbytes' layers repack themselves in
    evaluation mode they compute in bfloat16 from then on, and no gradient gets through them any more.
    """
    model.train()
    total, count = 0.0, 0
    for example in held_out:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.label_mask[1:])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1][labels]
        total += functional.cross_entropy(logits.float(), ids[0, 1:][labels], reduction="sum").item()
        count += int(labels.sum())
    return total / count


def child(stack: str, arguments: dict[str, int], batch: int, checkpoint: str) -> dict[str, float]:
    """Train a stack in this process."""
    tokenizer = load_tokenizer(MODEL)
    rows, held_out = examples(arguments["rows"], arguments["held_out"], arguments["length"], tokenizer)
    recipe = recipe_of(arguments["length"], batch if stack.startswith("lilliput") else arguments["batch"])
    with tempfile.TemporaryDirectory(prefix="lilliput-") as folder:
        if stack.startswith("lilliput"):
            trainer, model = ours(recipe, rows, tokenizer, folder)
        else:
            trainer, model = theirs(recipe, rows, tokenizer, folder, batch, checkpoint)
        before = held_out_loss(model, held_out)
        start = time.perf_counter()
        with fused(model) if stack.startswith("lilliput") else nullcontext():
            trainer.train()
        took = time.perf_counter() - start
    tokens = sum(len(example) for example in rows)
    losses = {"held-out loss": held_out_loss(model, held_out), "before": before}
    return {"training, s": took, **losses, "steps": trainer.state.global_step, "tokens/s": tokens / took}


# ---- the stacks --------------------------------------------------------------------------------------------------


def ours(
    recipe: Recipe, rows: list[Example], tokenizer: PreTrainedTokenizerBase, folder: str
) -> tuple[Trainer, PreTrainedModel]:
    """What `tune` trains with, without its checks and checkpoints."""
    base, train = load_base(MODEL, recipe, progress=False), recipe.train
    packs = pack(rows, recipe.data.max_length)
    arguments = make_arguments(train, folder, count_steps(len(packs), train), evaluate=False, resumed=False)
    arguments.save_strategy = "no"
    dataset = Rows(packs, step_rows=train.batch_size, seed=train.seed)
    loss = LabelLoss(base)
    return LabelTrainer(loss, arguments, pad_token_id=pad_id(tokenizer, base), train_dataset=dataset), base


def theirs(
    recipe: Recipe, rows: list[Example], tokenizer: PreTrainedTokenizerBase, folder: str, batch: int, checkpoint: str
) -> tuple[Trainer, PreTrainedModel]:
    """PEFT's model in transformers' Trainer, with the same arguments but for the batch and its random order."""
    import peft

    train = recipe.train.model_copy(update={"batch_size": batch})
    torch.manual_seed(train.seed)
    model = peft.get_peft_model(load_bitsandbytes(checkpoint), peft.LoraConfig(**LORA))
    arguments = make_arguments(train, folder, count_steps(len(rows), train), evaluate=False, resumed=False)
    arguments.save_strategy, arguments.train_sampling_strategy = "no", "random"
    packs = [Pack.of([example]) for example in rows]
    collator = padded(pad_id(tokenizer, model.get_base_model()))
    return Trainer(model, arguments, data_collator=collator, train_dataset=packs), model


def padded(pad_token_id: int) -> Callable[[Sequence[Pack]], dict[str, Tensor]]:
    """Rows padded to the longest, with the attention mask that says so."""

    def collate(packs: Sequence[Pack]) -> dict[str, Tensor]:
        batch = batch_of(packs, pad_token_id)
        lengths = torch.tensor([[len(row)] for row in packs])
        attention = (torch.arange(batch["input_ids"].shape[1]) < lengths).long()
        return {"input_ids": batch["input_ids"], "labels": batch["labels"], "attention_mask": attention}

    return collate


# ---- the peer's batch --------------------------------------------------------------------------------------------


def padded_tokens(lengths: Sequence[int], batch: int) -> float:
    """How many tokens a padded batch of a random order has, on average."""
    rng, sizes = random.Random(0), []
    for _ in range(20):
        order = rng.sample(list(lengths), len(lengths))
        whole = [order[at : at + batch] for at in range(0, len(order) - batch + 1, batch)]
        sizes += [batch * max(rows) for rows in whole]
    return statistics.mean(sizes)


def batches(rows: Sequence[Example], length: int, batch: int) -> tuple[dict[str, int], list[str]]:
    """Rows of a batch for each stack, and what to say about them."""
    packs, lengths = pack(rows, length), [len(example) for example in rows]
    steps = math.ceil(len(packs) / batch)
    tokens = sum(map(len, packs)) / steps
    sizes = range(1, len(rows) + 1)
    by_tokens = min(sizes, key=lambda size: abs(padded_tokens(lengths, size) - tokens))
    by_steps = min(sizes, key=lambda size: abs(len(rows) / size - steps))
    said = [f"{len(rows)} rows, {sum(lengths):,} tokens, {sum(e.labels for e in rows):,} labels."]
    said.append(f"Ours: {len(packs)} packed rows, {batch} a batch, {tokens:,.0f} tokens a step.")
    for size in (by_tokens, by_steps):
        said.append(f"The peer's batch of {size} rows: {padded_tokens(lengths, size):,.0f} tokens, padding counted.")
    smaller = max(1, round(len(packs) * by_tokens / len(rows)))
    return {"lilliput": batch, "lilliput-steps": smaller, "peft-tokens": by_tokens, "peft-steps": by_steps}, said


def run(arguments: argparse.Namespace) -> Report:
    """All stacks in turn."""
    settings = {name: getattr(arguments, name) for name in ("rows", "held_out", "length", "batch")}
    rows, held_out = examples(arguments.rows, arguments.held_out, arguments.length, load_tokenizer(MODEL))
    sizes, notes = batches(rows, arguments.length, arguments.batch)
    notes.append(f"Held out: {len(held_out)} rows, {sum(e.labels for e in held_out):,} labels.")
    lacking = not_installed("peft", "bitsandbytes")
    with tempfile.TemporaryDirectory(prefix="lilliput-") as folder:
        checkpoint = dense_checkpoint(folder)
        sides: dict[str, Side | str] = {}
        for stack in arguments.stacks:
            side = {"stack": stack, "batch": sizes[stack], "checkpoint": checkpoint}
            sides[STACKS[stack]] = (stack.startswith("peft") and lacking) or (
                lambda side=side: in_process(__file__, arguments=settings, **side)
            )
        found = compare(f"{len(rows)} rows", sides, arguments.rounds)
    better = {"training, s": "less", "held-out loss": "", "before": "", "steps": "", "tokens/s": ""}
    mine = tuple(STACKS[stack] for stack in arguments.stacks if stack.startswith("lilliput"))
    return Report(found, better, ours=mine, notes=[*notes, "tokens/s: of the rows, without padding."])


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=500, help="to train on")
    parser.add_argument("--held-out", type=int, default=100, help="rows behind them")
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row; longer examples are left out")
    parser.add_argument("--batch", type=int, default=4, help="packed rows a step")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))


if __name__ == "__main__":
    small = {"rows": 16, "held_out": 4, "batch": 1}
    sys.exit(main(run, __file__, __doc__, options=options, quick=small, child=child, rounds=1))
