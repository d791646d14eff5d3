"""A LoRA training step beside its peers: tokens a second, peak memory; a table of ratios, and JSON with `--json FILE`.

r 16 on all seven linear layers of SmolLM2-135M, 4 rows of 256 tokens, every token a label, AdamW. Each stack runs in a
process of its own, all in turn, `--rounds` times; the figures are medians over the rounds of each round's median step.
A ratio of speed above 1 means that Lilliput is quicker, a ratio of memory below 1 that it needs less.
Peers: PEFT on a float32 base and on bitsandbytes NF4 (double quantization, float32 compute), where installed.

    python benchmarks/training_step.py [--rounds 3] [--steps 3] [--stacks lilliput ...] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROWS, TOKENS = 4, 256
MODEL = "smollm2-135m-instruct"
STACKS = {
    "lilliput": "Lilliput, NF4",
    "lilliput-recompute": "Lilliput, NF4, recomputing all but products",
    "lilliput-fp32": "Lilliput, float32 base",
    "peft-bitsandbytes": "PEFT on bitsandbytes NF4",
    "peft-fp32": "PEFT on a float32 base",
}
NEEDS = {"peft-bitsandbytes": ("peft", "bitsandbytes"), "peft-fp32": ("peft",)}
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def ours(stack: str, ids: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Our model and its loss, as `tune` trains it."""
    from lilliput.data import Pack
    from lilliput.lora import LoraConfig, add_adapter
    from lilliput.models import load_model
    from lilliput.training.trainer import LabelLoss, batch_of

    model = load_model(MODEL, format="none" if stack.endswith("fp32") else "nf4", progress=False)
    add_adapter(model, LoraConfig(**LORA))
    if stack.endswith("recompute"):
        from lilliput.training.recompute import keep_products_only

        keep_products_only(model)
    loss = LabelLoss(model)
    packs = [Pack(row, [True] * TOKENS, list(range(TOKENS)), [0] * TOKENS) for row in ids.tolist()]
    return model, lambda: loss(**batch_of(packs, 0))["loss"]


def theirs(stack: str, ids: Tensor, checkpoint: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """PEFT's model and transformers' own loss."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32}
    if stack == "peft-bitsandbytes":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint, **options), peft.LoraConfig(**LORA))
    return model, lambda: model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss


def child(stack: str, steps: int, checkpoint: str) -> None:
    """Run a stack in this process and print its figures as JSON. The first step is not counted."""
    torch.manual_seed(0)
    ids = torch.randint(100, 40_000, (ROWS, TOKENS))
    model, loss_of = ours(stack, ids) if stack.startswith("lilliput") else theirs(stack, ids, checkpoint)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, losses = [], []
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"seconds": statistics.median(seconds[1:]), "losses": losses, "loaded_gb": loaded / 1e6}
    print(json.dumps({**figures, "peak_gb": peak / 1e6}))


def measure(stack: str, steps: int, checkpoint: str) -> dict[str, Any]:
    """One run of a stack in a process of its own."""
    command = [sys.executable, __file__, "--child", stack, "--steps", str(steps), "--checkpoint", checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{stack}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    seconds = statistics.median(run["seconds"] for run in runs)
    return {
        "tokens_per_second": ROWS * TOKENS / seconds,
        "seconds": seconds,
        "peak_gb": statistics.median(run["peak_gb"] for run in runs),
        "loaded_gb": statistics.median(run["loaded_gb"] for run in runs),
        "first_loss": runs[0]["losses"][0],
        "runs": runs,
    }


def dense_checkpoint(directory: Path) -> str:
    """The same model as float32 safetensors, which the peers read."""
    from lilliput.models import load_model, save_model

    save_model(load_model(MODEL, progress=False), directory)
    return str(directory)


def print_table(results: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """A row a stack; the ratios are ours over theirs for each of our stacks."""
    mine = [stack for stack in results if stack.startswith("lilliput")]
    table = Table("stack", "tokens/s", "peak GB", "loaded GB", title=", ".join(f"{k} {v}" for k, v in about.items()))
    for stack in mine:
        table.add_column(f"{stack}: speed, memory")
    for stack, row in results.items():
        ratios = []
        for other in mine:
            speed = results[other]["tokens_per_second"] / row["tokens_per_second"]
            ratios.append(f"x {speed:.2f}, x {results[other]['peak_gb'] / row['peak_gb']:.2f}")
        figures = (f"{row['tokens_per_second']:.0f}", f"{row['peak_gb']:.2f}", f"{row['loaded_gb']:.2f}")
        table.add_row(STACKS[stack], *figures, *ratios)
    Console(width=150).print(table)


def about() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    from lilliput.kernels import core

    packages = ("lilliput", "torch", "transformers", "peft", "bitsandbytes")
    versions = {name: metadata.version(name) for name in packages if util.find_spec(name)}
    machine = {"processor": platform.processor() or platform.machine(), "date": time.strftime("%Y-%m-%d")}
    return {
        **machine,
        "threads": torch.get_num_threads(),
        "instruction_set": core.status().instruction_set,
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", choices=STACKS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help="a float32 directory of the model for the peers; made when not given")
    options = parser.parse_args()
    if options.child:
        child(options.child, options.steps, options.checkpoint or "")
        return
    stacks = []
    for stack in options.stacks:
        missing = [name for name in NEEDS.get(stack, ()) if not util.find_spec(name)]
        if missing:
            print(f"{STACKS[stack]}: left out, {', '.join(missing)} is not installed", file=sys.stderr)
        else:
            stacks.append(stack)
    with tempfile.TemporaryDirectory() as folder:
        peers = any(not stack.startswith("lilliput") for stack in stacks)
        checkpoint = options.checkpoint or (dense_checkpoint(Path(folder)) if peers else "")
        runs: dict[str, list[dict[str, Any]]] = {stack: [] for stack in stacks}
        for number in range(options.rounds):
            for stack in stacks:
                runs[stack].append(measure(stack, options.steps, checkpoint))
                print(f"round {number + 1}, {STACKS[stack]}: {runs[stack][-1]}", file=sys.stderr)
    results = {stack: summary(runs[stack]) for stack in stacks}
    print_table(results, about())
    if options.json:
        options.json.write_text(json.dumps({"machine": about(), "stacks": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
