"""Frozen-prefix reuse against the same run without it: real Alpaca rows, adapters on SmolLM2's upper half.

Both runs are `tune` with the qlora recipe, one after the other in this process, and differ in train.reuse_prefix only.
`steps` are the seconds spent in training steps (the prefix's own runs are among them), `call` those of all that `tune`
does: loading, evaluations, saving. The held-out losses must agree.

    python benchmarks/prefix_reuse.py [--rows 100] [--epochs 3] [--threads 2] [--pack]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import Report, Side, compare, main
from lilliput.models import load_model
from lilliput.training import load_recipe, tune
from peers import MODEL, SHARED_DATA

REUSE, PLAIN = "with reuse", "without"


def run(arguments: argparse.Namespace) -> Report:
    """Both runs in turn."""
    with tempfile.TemporaryDirectory(prefix="lilliput-") as name:
        folder, said = Path(name), set()
        rows = folder / "rows.json"
        rows.write_text(json.dumps(json.loads(arguments.data.read_text(encoding="utf-8"))[: arguments.rows]))
        layers = load_model(arguments.model, progress=False).config.num_hidden_layers

        def tuning(reuse: str) -> Side:
            settings = (
                f"lora.layers_to_transform={list(range(layers // 2, layers))}",
                f"train.epochs={arguments.epochs}",
                f"train.reuse_prefix={reuse}",
                f"data.packing={str(arguments.pack).lower()}",
                "data.max_length=512",
            )
            recipe = load_recipe("qlora", settings)

            def side() -> dict[str, float]:
                out = folder / reuse
                result = tune(arguments.model, rows, out, recipe, check=False, progress=False, overwrite=True)
                said.add(f"{reuse}: {result.prefix}")
                lost = {} if result.eval_loss is None else {"held-out loss": result.eval_loss}
                speed = result.train_tokens_per_second
                return {"steps, s": result.seconds, "call, s": result.total_seconds, "tokens/s": speed, **lost}

            return side

        what = f"{arguments.rows} rows, {arguments.epochs:g} epochs"
        found = compare(what, {REUSE: tuning("on"), PLAIN: tuning("off")}, arguments.rounds)
    better = {"steps, s": "less", "call, s": "less", "tokens/s": "", "held-out loss": ""}
    return Report(found, better, ours=(REUSE,), notes=sorted(said))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=100, help="of the Alpaca file")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--pack", action="store_true", help="fill rows of 512 tokens")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", type=Path, default=SHARED_DATA / "alpaca-en-1k.json")


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__, options=options, quick={"rows": 12, "epochs": 2}, rounds=1))
