"""Frozen-prefix reuse against the same run without it: real Alpaca rows, adapters on SmolLM2's upper half.

Both runs are `tune` with the qlora recipe, one after the other in this process, and differ in train.reuse_prefix only.
`steps` are the seconds spent in training steps (the prefix's own runs are among them), `call` those of all that `tune`
does: loading, evaluations, saving. A ratio above 1 means that reuse is quicker; the held-out losses must agree.

    python benchmarks/prefix_reuse.py [--rows 100] [--epochs 3] [--threads 2] [--pack] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lilliput.models import load_model
from lilliput.training import RunResult, load_recipe, tune

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "alpaca-en-1k.json"
MODEL = "smollm2-135m-instruct"


@dataclass
class Side:
    """One of the two runs: seconds in training steps and of the whole call, tokens a second, loss, what was kept."""

    reuse: str
    steps: float
    call: float
    tokens_per_second: float
    eval_loss: float | None
    prefix: str | None


def run(reuse: str, rows: Path, folder: Path, arguments: argparse.Namespace) -> Side:
    """Train once."""
    layers = load_model(arguments.model, progress=False).config.num_hidden_layers
    settings = (
        f"lora.layers_to_transform={list(range(layers // 2, layers))}",
        f"train.epochs={arguments.epochs}",
        f"train.reuse_prefix={reuse}",
        f"data.packing={str(arguments.pack).lower()}",
        "data.max_length=512",
    )
    recipe = load_recipe("qlora", settings)
    result: RunResult = tune(arguments.model, rows, folder / reuse, recipe, check=False, progress=False)
    return Side(
        reuse,
        result.seconds,
        result.total_seconds,
        result.train_tokens_per_second,
        result.eval_loss,
        result.prefix,
    )


def main() -> None:
    """Run both sides and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, default=100, help="of the Alpaca file")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pack", action="store_true", help="fill rows of 512 tokens")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="lilliput-") as name:
        folder = Path(name)
        rows = folder / "rows.json"
        rows.write_text(json.dumps(json.loads(arguments.data.read_text(encoding="utf-8"))[: arguments.rows]))
        sides = [run(reuse, rows, folder, arguments) for reuse in ("off", "on")]
    show(sides, arguments)


def show(sides: list[Side], arguments: argparse.Namespace) -> None:
    """Print the table of ratios, and write JSON where it was asked for."""
    off, on = sides
    title = f"{arguments.rows} rows, {arguments.epochs:g} epochs, {arguments.threads} threads, upper half of the layers"
    table = Table("reuse", "steps, s", "call, s", "tokens/s", "held-out loss", title=title)
    for side in sides:
        loss = "-" if side.eval_loss is None else f"{side.eval_loss:.5f}"
        table.add_row(side.reuse, f"{side.steps:.1f}", f"{side.call:.1f}", f"{side.tokens_per_second:,.0f}", loss)
    table.add_row("ratio", f"{off.steps / on.steps:.2f}", f"{off.call / on.call:.2f}", "", "")
    console = Console()
    console.print(table)
    console.print(on.prefix)
    if arguments.json:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        numbers = {"rows": arguments.rows, "epochs": arguments.epochs, "threads": arguments.threads}
        arguments.json.write_text(json.dumps({**machine, **numbers, "sides": [asdict(side) for side in sides]}) + "\n")


if __name__ == "__main__":
    main()
