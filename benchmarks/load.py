"""Loading a model while it is quantized: seconds and peak memory, beside transformers and bitsandbytes.

SmolLM2-135M in float32, and a Llama-shaped checkpoint of random weights in bfloat16 shards (1.1 B parameters unless
told otherwise), both in a temporary directory; each load in a process of its own. `ready` is the load and one forward
of one token, which reads what was only mapped into memory and repacks what is repacked late. Seconds do not count the
imports, the peak does.

The bar for ours: loading peaks at no more than 1.3 x the quantized footprint + 700 MB, what Python and its libraries
take included; the exit status is 1 when `load_model` is above it. transformers' `from_pretrained` maps the shards into
memory, so that its peaks count their pages too; the system takes those back when it needs them. `load_model` reads.

    python benchmarks/load.py [--checkpoints smollm2 random] [--layers 22] [--ways lilliput ...] [--keep DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lilliput
from common import Report, Row, Side, compare, in_process, main, not_installed
from lilliput.memory import held
from lilliput.models import load_model
from peers import dense_checkpoint, load_bitsandbytes, load_dense

MB = 1_000_000
SHARD_BYTES = 500 * MB
ALLOWED = (1.3, 700 * MB)  # times the footprint, plus
WAYS = {
    "lilliput": "Lilliput's load_model, NF4",
    "lilliput-hf": "from_pretrained with NF4Config",
    "bitsandbytes": "bitsandbytes NF4",
    "transformers": "transformers float32",
}


def child(way: str, directory: str) -> dict[str, Any]:
    """Load in this process."""
    imported = held()[1]
    started = time.perf_counter()
    if way == "lilliput":
        model = load_model(directory, format="nf4", progress=False)
    elif way == "lilliput-hf":
        model = load_dense(directory, quantization_config=lilliput.NF4Config())
    else:
        model = load_bitsandbytes(directory) if way == "bitsandbytes" else load_dense(directory)
    loaded, peak = time.perf_counter() - started, held()[0]
    footprint = float(model.get_memory_footprint())
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[1]]))
    seconds = {"ready, s": time.perf_counter() - started, "load, s": loaded}
    sizes = {"peak MB": held()[0], "load MB": peak, "footprint MB": footprint, "imports MB": imported}
    return {**seconds, **{name: size / MB for name, size in sizes.items()}}


def run(arguments: argparse.Namespace) -> Report:
    """All ways for each checkpoint, in turn."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lilliput-") as temporary:
        for checkpoint in arguments.checkpoints:
            directory = (arguments.keep or Path(temporary)) / checkpoint
            directory.mkdir(parents=True, exist_ok=True)
            what = make(checkpoint, directory, arguments.layers)
            sides: dict[str, Side | str] = {}
            for way in arguments.ways:
                sides[WAYS[way]] = (way == "bitsandbytes" and not_installed("bitsandbytes")) or (
                    lambda way=way, directory=directory: in_process(__file__, way=way, directory=str(directory))
                )
            rows += compare(what, sides, arguments.rounds)
    better = {"ready, s": "less", "peak MB": "less"}
    better |= dict.fromkeys(("load, s", "load MB", "allowed MB", "footprint MB", "imports MB"), "")
    return Report(rows, better, ours=(WAYS["lilliput"],), failures=above_the_bar(rows))


def make(checkpoint: str, directory: Path, layers: int) -> str:
    """Write the checkpoint; returns what to call it."""
    if checkpoint == "smollm2":
        dense_checkpoint(directory)
        return "SmolLM2-135M, float32"
    return f"{random_checkpoint(directory, layers) / 1e9:.2f} B random, bfloat16"


def random_checkpoint(directory: Path, layers: int) -> int:
    """Write random bfloat16 shards, one at a time, with config and index; return the count of parameters."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(directory)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in shapes.items():
        shard[name] = torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def above_the_bar(rows: list[Row]) -> list[str]:
    """Give each of our loads its bar as a figure; a line for those of `load_model` that are above it."""
    found = []
    for row in rows:
        if row.who not in (WAYS["lilliput"], WAYS["lilliput-hf"]) or row.missing:
            continue
        bars = [ALLOWED[0] * footprint + ALLOWED[1] / MB for footprint in row.samples["footprint MB"]]
        row.samples["allowed MB"] = bars
        if row.who == WAYS["lilliput"] and any(
            load > bar for load, bar in zip(row.samples["load MB"], bars, strict=True)
        ):
            found.append(f"{row.what}: {row.who} peaked above the bar")
    return found


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", nargs="+", choices=("smollm2", "random"), default=["smollm2", "random"])
    parser.add_argument("--layers", type=int, default=22, help="of the random checkpoint")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--keep", type=Path, help="leave the checkpoints in this directory")


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__, options=options, quick={"layers": 1}, child=child))
