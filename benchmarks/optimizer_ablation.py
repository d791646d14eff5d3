"""What each part of the 8-bit optimizers is good for: losses of AdamW in 8 and in 32 bits, side by side.

Two pieces of work. A small Llama (2 M weights, its own BPE of 4,096 tokens) learns WikiText-2's validation text from
scratch; a round is a seed, which sets first weights and the order of the data for all sides alike. It is the ablation
of arXiv 2110.02861, table 3, at this scale: a linear codebook, the dynamic tree, one absmax a tensor or a block, the
embedding in 8 bits, in 32 bits, or stable. And QLoRA: adapters (r 16, all linear layers) on SmolLM2-135M in NF4 learn
Alpaca rows, as benchmarks/epoch.py trains them, with torch's AdamW and with ours in 8 bits.

Losses are nats a token of held-out text. A run that ends above what token frequencies alone give, or in NaN, counts as
diverged; its loss is then that of guessing. Tensors of fewer than 4,096 numbers have 32-bit state everywhere.
One absmax a tensor and linear steps are not in the product: their optimizer stands here.

    python benchmarks/optimizer_ablation.py [--rounds 3] [--steps 150] [--lr 3e-3] [--sides ...] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import epoch
from common import Report, Row, Side, compare, main
from lilliput.data import Example
from lilliput.errors import FormatError
from lilliput.formats import codebooks
from lilliput.formats.blockwise import dequantize_dynamic, quantize_dynamic
from lilliput.kernels.optimizer_rules import RULES
from lilliput.layers import StableEmbedding
from lilliput.models import load_tokenizer
from lilliput.optim import AdamW, AdamW8bit
from lilliput.training.fused import fused
from peers import MODEL, SHARED_DATA

VOCABULARY, HIDDEN, LAYERS, TOKENS, ROWS = 4096, 128, 4, 128, 8
EVALUATION_ROWS = 128
BETAS, EPS, WEIGHT_DECAY, WARMUP = (0.9, 0.995), 1e-8, 0.01, 0.1
SMALL = 4096  # numbers below which a tensor's state has 32 bits
Curve = list[float]
Named = list[tuple[str, nn.Parameter]]

# ---- the sides ---------------------------------------------------------------------------------------------------


class TensorWise(torch.optim.Optimizer):
    """AdamW whose moments are codes of any codebook, with one absmax a tensor: what the paper started from."""

    def __init__(self, named: Named, lr: float, book: Callable[[bool], Tensor]) -> None:
        super().__init__([parameter for _, parameter in named], {"lr": lr})
        self.books = [book(moment.signed) for moment in RULES["adam"].moments]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                self._step(parameter, state, group["lr"])

    def _step(self, p: Tensor, state: dict[str, Any], lr: float) -> None:
        kept = state.get("moments") or [self._kept(torch.zeros_like(p), book) for book in self.books]
        moments = [
            codes if absmax is None else dequantize_dynamic(codes, absmax, book, p.numel())
            for (codes, absmax), book in zip(kept, self.books, strict=True)
        ]
        hyper = {"lr": lr, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": WEIGHT_DECAY}
        RULES["adam"].update(p, p.grad, moments, {**hyper, "step": state["step"], "decoupled": 1.0})
        state["moments"] = [self._kept(moment, book) for moment, book in zip(moments, self.books, strict=True)]

    def _kept(self, moment: Tensor, book: Tensor) -> tuple[Tensor, Tensor | None]:
        if moment.numel() < SMALL:
            return moment, None
        codes, absmax = quantize_dynamic(moment.reshape(-1), book, moment.numel())
        return codes.view(moment.shape), absmax


def ours(named: Named, lr: float, kind: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
    """An optimizer of the product with this benchmark's options."""
    return kind(named, lr=lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **options)


@dataclass(frozen=True)
class Variant:
    """A row of the ablation: its name, its optimizer, and whether the embedding is a stable one."""

    name: str
    make: Callable[[Named, float], torch.optim.Optimizer]
    stable: bool = False


EMBEDDING_TOO = {"*embed*": {"bits": 8}}
VARIANTS = {
    "fp32": Variant("32 bits", partial(ours, kind=AdamW)),
    "fp32-stable": Variant("32 bits, stable embedding", partial(ours, kind=AdamW), stable=True),
    "linear": Variant("8 bits: linear, tensor-wise", partial(TensorWise, book=codebooks.linear8)),
    "dynamic": Variant("8 bits: dynamic, tensor-wise", partial(TensorWise, book=codebooks.dynamic8)),
    "block": Variant("8 bits: dynamic, block-wise", partial(ours, kind=AdamW8bit, overrides=EMBEDDING_TOO)),
    "default": Variant("the same, embedding in 32 bits (AdamW8bit)", partial(ours, kind=AdamW8bit)),
    "stable": Variant("the same, stable embedding", partial(ours, kind=AdamW8bit), stable=True),
}
BASE = VARIANTS["fp32"].name
QLORA = {"qlora": BASE, "qlora-8bit": "AdamW8bit"}  # the first is torch's

# ---- a language model from scratch -------------------------------------------------------------------------------


@cache
def texts() -> tuple[Tensor, Tensor]:
    """Token ids of the training and of the held-out text, int64 each."""
    training = (SHARED_DATA / "wikitext2-valid.txt").read_text(encoding="utf-8")
    held_out = (SHARED_DATA / "wikitext2-test.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training.splitlines(keepends=True), trainer)
    ids = [torch.tensor(tokenizer.encode(text).ids) for text in (training, held_out[: len(held_out) // 3])]
    return ids[0], ids[1]


def frequencies_loss(ids: Tensor) -> float:
    """Nats a token of a model that knows how often each token is, and nothing else."""
    share = torch.bincount(ids, minlength=VOCABULARY).double() / len(ids)
    return float(-(share * share.clamp(min=1e-12).log()).sum())


def small_model(seed: int, stable: bool) -> LlamaForCausalLM:
    """A Llama of 2 M weights, random by the seed."""
    torch.manual_seed(seed)
    settings = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN}
    model = LlamaForCausalLM(LlamaConfig(**settings, **sizes, max_position_embeddings=TOKENS, use_cache=False))
    if stable:
        model.set_input_embeddings(StableEmbedding(VOCABULARY, HIDDEN))
    return model


def batches(ids: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Random pieces of the text, int64 [ROWS, TOKENS + 1]; the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - TOKENS - 1, (ROWS,), generator=generator)
        yield torch.stack([ids[start : start + TOKENS + 1] for start in starts])


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean nats a token of rows [n, TOKENS + 1]."""
    logits = model(input_ids=rows[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: Tensor) -> float:
    """Over the first EVALUATION_ROWS rows of a text."""
    rows = ids[: EVALUATION_ROWS * (TOKENS + 1)].view(-1, TOKENS + 1)
    return statistics.mean(loss_of(model, part).item() for part in rows.split(ROWS))


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate: a linear rise, then a cosine down to a tenth."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, steps - rise))


def train(variant: Variant, seed: int, steps: int, lr: float) -> tuple[Curve, dict[str, float]]:
    """Losses by step, and the figures of the run; it ends early where a loss or a gradient is not finite."""
    training, held_out = texts()
    model, began = small_model(seed, variant.stable), time.perf_counter()
    optimizer = variant.make(list(model.named_parameters()), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    curve: Curve = []
    for rows in batches(training, steps, seed):
        loss = loss_of(model, rows)
        curve.append(loss.item())
        loss.backward()
        try:
            optimizer.step()
        except FormatError:  # ours refuses a gradient that is not finite
            break
        optimizer.zero_grad()
        schedule.step()
        if not math.isfinite(curve[-1]):
            break
    took, final = time.perf_counter() - began, held_out_loss(model, held_out)
    diverged = not final < frequencies_loss(training)
    return curve, {"loss": math.log(VOCABULARY) if diverged else final, "diverged": float(diverged), "s": took}


# ---- adapters ----------------------------------------------------------------------------------------------------


@cache
def rows_of(count: int, held_out: int) -> tuple[list[Example], list[Example]]:
    """Alpaca rows to train on and behind them."""
    return epoch.examples(count, held_out, 512, load_tokenizer(MODEL))


def train_adapter(side: str, count: int, held_out: int) -> tuple[Curve, dict[str, float]]:
    """One epoch of the qlora recipe with torch's AdamW or ours in 8 bits, over the Trainer's groups and schedule."""
    rows, others = rows_of(count, held_out)
    with tempfile.TemporaryDirectory(prefix="lilliput-") as folder:
        trainer, model = epoch.ours(epoch.recipe_of(512, 1), rows, load_tokenizer(MODEL), folder)
        trainer.args.logging_steps = 1
        if side == "qlora-8bit":
            groups = trainer.create_optimizer().param_groups
            kept = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
            trainer.optimizer = AdamW8bit(kept, lr=trainer.args.learning_rate)
        began = time.perf_counter()
        with fused(model):
            trainer.train()
        took, final = time.perf_counter() - began, epoch.held_out_loss(model, others)
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return curve, {"loss": final, "diverged": 0.0, "s": took}


# ---- the table and the picture -----------------------------------------------------------------------------------


def side_of(call: Callable[[int], tuple[Curve, dict[str, float]]], curves: list[Curve]) -> Side:
    """A side that trains with the next seed at each call, and keeps the curve."""

    def side() -> dict[str, float]:
        curve, figures = call(len(curves))
        curves.append(curve)
        return figures

    return side


def said(rows: Sequence[Row], base: str) -> list[str]:
    """Means, spreads and distances from the 32-bit losses of the same seeds."""
    reference = next((row.samples["loss"] for row in rows if row.who == base and row.samples), [])
    lines = []
    for row in rows:
        losses = row.samples.get("loss", [])
        if not losses:
            continue
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        away = [100 * (a / b - 1) for a, b in zip(losses, reference, strict=False)]
        against = f"; {statistics.mean(away):+.2f} % of 32 bits ({min(away):+.2f} to {max(away):+.2f})" if away else ""
        lines.append(
            f"{row.who}: {statistics.mean(losses):.4f} ± {spread:.4f}; "
            f"{sum(row.samples['diverged']):.0f} of {len(losses)} diverged{against}"
        )
    return lines


def smoothed(curve: Curve, over: int) -> Curve:
    """Means of the last `over` losses."""
    return [statistics.mean(curve[max(0, i + 1 - over) : i + 1]) for i in range(len(curve))]


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Write a PNG: training losses of the small model, a line a seed, and of the adapters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    scratch, adapters = figure.subplots(1, 2)
    for number, key in enumerate(key for key in VARIANTS if curves.get(key)):
        for i, curve in enumerate(curves[key]):
            label = VARIANTS[key].name if i == 0 else None
            style = "--" if VARIANTS[key].stable else "-"
            scratch.plot(smoothed(curve, 20), style, color=f"C{number}", label=label, linewidth=1, alpha=0.8)
    scratch.set(title="From scratch on WikiText-2, mean of 20 steps", xlabel="step", ylabel="loss, nats a token")
    lowest = min((min(smoothed(curve, 20)) for key in VARIANTS for curve in curves.get(key, [])), default=0.0)
    scratch.set_ylim(lowest - 0.1, math.log(VOCABULARY) + 0.3)
    for key, style in zip(QLORA, ("-", "--"), strict=True):
        for curve in curves.get(key, []):
            adapters.plot(smoothed(curve, 10), style, label=QLORA[key], linewidth=1.2)
    adapters.set(title="QLoRA on SmolLM2-135M, mean of 10 steps", xlabel="step", ylabel="loss, nats a label")
    for axes in (scratch, adapters):
        if axes.lines:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def run(arguments: argparse.Namespace) -> Report:
    """The small model with each seed, then the adapters once."""
    curves: dict[str, list[Curve]] = {side: [] for side in (*VARIANTS, *QLORA)}
    chosen: dict[str, Side | str] = {
        VARIANTS[key].name: side_of(
            lambda seed, key=key: train(VARIANTS[key], seed, arguments.steps, arguments.lr), curves[key]
        )
        for key in VARIANTS
        if key in arguments.sides
    }
    rows = compare(f"from scratch, {arguments.steps} steps", chosen, arguments.rounds) if chosen else []
    chosen = {
        QLORA[key]: side_of(lambda _, key=key: train_adapter(key, arguments.rows, arguments.held_out), curves[key])
        for key in QLORA
        if key in arguments.sides
    }
    adapters = compare(f"QLoRA, {arguments.rows} rows", chosen, 1) if chosen else []
    notes = [f"Token frequencies alone: {frequencies_loss(texts()[0]):.3f}; learning rate {arguments.lr}."]
    notes += [*said(rows, BASE), *said(adapters, BASE)]
    if arguments.plot:
        draw(curves, arguments.plot)
    better = {"loss": "less", "diverged": "", "s": ""}
    return Report([*rows, *adapters], better, ours=(BASE,), notes=notes)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=150, help="of the small model")
    parser.add_argument("--lr", type=float, default=3e-3, help="its highest learning rate")
    parser.add_argument("--rows", type=int, default=120, help="Alpaca rows to train adapters on")
    parser.add_argument("--held-out", type=int, default=60, help="rows behind them")
    parser.add_argument("--sides", nargs="+", choices=[*VARIANTS, *QLORA], default=[*VARIANTS, *QLORA])
    parser.add_argument("--plot", type=Path, help="also draw the curves into this PNG")


if __name__ == "__main__":
    small = {"steps": 20, "rows": 8, "held_out": 4}
    sys.exit(main(run, __file__, __doc__, options=options, quick=small, rounds=3))
