"""Peak memory and time of loading a model while it is quantized: is it near the quantized size?

Makes a Llama-shaped checkpoint of random weights in bfloat16 shards (1.1 B parameters unless told otherwise) in a
temporary directory, loads it in a process of its own for every way of loading, and prints what that process's memory
peaked at. The bar: peak resident memory at most 1.3 x the quantized footprint + 700 MB, what Python and its libraries
take included.

    python benchmarks/load_memory.py [--layers 22] [--formats nf4 fp4 none] [--ways load_model from_pretrained] [--keep
    DIR]

`from_pretrained` maps the shards into memory, so that its peak counts their pages too; the system takes those back when
it needs them. `load_model` reads the files instead, and exits with 1 when it is above the bar.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

MB = 1_000_000
SHARD_BYTES = 500 * MB
ALLOWED = (1.3, 700 * MB)  # times the footprint, plus


def make_checkpoint(directory: Path, layers: int) -> int:
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


CHILD = """
import json, sys, time
def peak():
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0]) * 1024, int(lines["VmRSS"].split()[0]) * 1024
way, directory, format = sys.argv[1:]
import torch, transformers, lilliput
from lilliput.models.load import load_model
from transformers import AutoModelForCausalLM
imported = peak()[1]
started = time.perf_counter()
if way == "load_model":
    model = load_model(directory, format=format, progress=False)
else:
    config = {"nf4": lilliput.NF4Config, "fp4": lilliput.FP4Config, "none": lambda: None}[format]()
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)
seconds = time.perf_counter() - started
high, after = peak()
print(json.dumps({"imported": imported, "peak": high, "after": after, "seconds": seconds,
                  "footprint": model.get_memory_footprint(), "threads": torch.get_num_threads()}))
"""


def measure(way: str, directory: Path, format: str) -> dict[str, float]:
    """Load in a process of its own and return what it reports; bytes and seconds."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, way, str(directory), format], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def report(rows: list[tuple[str, str, dict[str, float]]], parameters: int) -> bool:
    """Print the table; True when every quantized load by load_model is within the bar."""
    machine = platform.processor() or platform.machine()
    print(f"{parameters / 1e9:.2f} B parameters, bfloat16 shards; torch {torch.__version__}; {machine}")
    print(f"{'way':<16}{'format':<8}{'footprint':>11}{'imports':>10}{'peak':>10}{'allowed':>10}{'seconds':>10}")
    good = True
    for way, format, row in rows:
        allowed = ALLOWED[0] * row["footprint"] + ALLOWED[1]
        good &= way != "load_model" or format == "none" or row["peak"] <= allowed
        sizes = "".join(
            f"{row[key] / MB:>{width}.0f}" for key, width in (("footprint", 11), ("imported", 10), ("peak", 10))
        )
        print(f"{way:<16}{format:<8}{sizes}{allowed / MB:>10.0f}{row['seconds']:>10.1f}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--ways", nargs="+", default=["load_model", "from_pretrained"])
    parser.add_argument("--formats", nargs="+", default=["nf4"])
    parser.add_argument("--keep", type=Path, help="leave the checkpoint in this directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        parameters = make_checkpoint(directory, options.layers)
        rows = [(way, f, measure(way, directory, f)) for f in options.formats for way in options.ways]
    return 0 if report(rows, parameters) else 1


if __name__ == "__main__":
    sys.exit(main())
