"""Quantizing SmolLM2 with GPTQ: perplexity, size and time of bits, groups and ways, beside rounding and GPTQModel.

Calibration: segments of WikiText-2 valid; perplexity: segments of 1024 tokens of its test text, each scored on its own.
GPTQModel wants another torch than ours: LILLIPUT_GPTQMODEL_PYTHON names the interpreter of an environment that has it,
and its row is left out otherwise. Each row is a process of its own; `seconds` is the quantization alone, without
loading tokenizers and texts.

    python benchmarks/gptq.py [--ways gptq-4 ...] [--samples 32] [--length 512] [--segments 16]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import Report, Side, compare, in_process, main
from peers import MODEL, SHARED_DATA

GPTQMODEL = "GPTQModel, 4 bits, g128, sym"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq-4": ("Lilliput, 4 bits, g128, asym (default)", {}),
    "gptq-4-sym": ("Lilliput, 4 bits, g128, sym", {"symmetric": True}),
    "gptq-4-g64": ("Lilliput, 4 bits, g64, asym", {"group": 64}),
    "gptq-4-g32": ("Lilliput, 4 bits, g32, asym", {"group": 32}),
    "gptq-4-row": ("Lilliput, 4 bits, rows, asym", {"group": -1}),
    "published-4-sym": (
        "Lilliput, 4 bits, g128, sym, as published",
        {
            "symmetric": True,
            "correct": 0.0,
            "refine": 0,
            "search": False,
            "act_order": False,
            "static_groups": False,
        },
    ),
    "no-correct-4": ("Lilliput, 4 bits, g128, asym, correct 0", {"correct": 0.0}),
    "no-refine-4": ("Lilliput, 4 bits, g128, asym, refine 0", {"refine": 0}),
    "gptq-3": ("Lilliput, 3 bits, g128, asym", {"bits": 3}),
    "gptq-2-g32": ("Lilliput, 2 bits, g32, asym", {"bits": 2, "group": 32}),
    "gptq-8": ("Lilliput, 8 bits, g128, asym", {"bits": 8}),
    "nearest-4": ("to nearest, 4 bits, g128, asym", {"rounding": "nearest", "search": False}),
    "nearest-4-sym": (
        "to nearest, 4 bits, g128, sym",
        {"rounding": "nearest", "search": False, "symmetric": True},
    ),
    "nearest-3": ("to nearest, 3 bits, g128, asym", {"rounding": "nearest", "search": False, "bits": 3}),
}


def run(arguments: argparse.Namespace) -> Report:
    """A row each way; all figures of ours beside GPTQModel's."""
    sides: dict[str, Side | str] = {}
    for way in arguments.ways:
        sides[WAYS[way][0]] = _side(arguments, way=way)
    python = os.environ.get("LILLIPUT_GPTQMODEL_PYTHON", "")
    sides[GPTQMODEL] = _side(arguments, way="", python=python) if python else "LILLIPUT_GPTQMODEL_PYTHON is not set"
    rows = compare(f"{arguments.samples} x {arguments.length} tokens", sides, arguments.rounds)
    units = {"seconds": "less", "perplexity": "less", "bits": "", "MB": ""}
    return Report(rows, units, notes=["MB: model.safetensors, the table of embeddings in float16 in it (56.6 MB)."])


def _side(arguments: argparse.Namespace, **which: str) -> Side:
    text = {name: getattr(arguments, name) for name in ("samples", "length", "segments")}

    def side() -> Mapping[str, float]:
        return in_process(__file__, **which, **text)

    return side


# ---- one row, in a process of its own ----


def measure(way: str, samples: int, length: int, segments: int, python: str = "") -> dict[str, float]:
    """What in_process runs: quantize, load what was written, score it."""
    from lilliput.data.calibration import load_calibration
    from lilliput.models import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    ids = load_calibration(SHARED_DATA / "wikitext2-valid.txt", tokenizer, samples=samples, length=length).ids
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quantized"
        found = _by_gptqmodel(python, ids, folder, out) if python else _by_us(way, ids, out)
        return {**found, "perplexity": _perplexity(out, segments)}


def _by_us(way: str, ids: Any, out: Path) -> dict[str, float]:
    from lilliput.models import Gptq, load_tokenizer, quantize_gptq

    chosen = dict(WAYS[way][1])
    rounding = chosen.pop("rounding", "gptq")
    text = ids if rounding == "gptq" else None
    report = quantize_gptq(
        MODEL, out, text, Gptq(**chosen), tokenizer=load_tokenizer(MODEL), rounding=rounding, progress=False
    )
    return {"seconds": report.seconds, "bits": report.bits_per_weight, "MB": report.file_bytes / 1e6}


PROGRAM = """
import json, sys, time, torch
from gptqmodel import GPTQModel, QuantizeConfig
dense, out, rows = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
config = QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False)
model = GPTQModel.load(dense, config, device="cpu")
started = time.perf_counter()
model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
seconds = time.perf_counter() - started
model.save(out)
json.dump(seconds, open(sys.argv[4], "w"))
"""


def _by_gptqmodel(python: str, ids: Any, folder: str, out: Path) -> dict[str, float]:
    import json
    import subprocess

    from peers import dense_checkpoint

    dense, rows, seconds = dense_checkpoint(f"{folder}/dense"), Path(folder) / "rows.json", Path(folder) / "seconds"
    rows.write_text(json.dumps(ids.tolist()))
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    call = [python, "-c", PROGRAM, dense, str(out), str(rows), str(seconds)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    if done.returncode:
        raise RuntimeError(f"GPTQModel failed: {done.stderr[-2000:]}")
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {"seconds": json.loads(seconds.read_text()), "bits": float("nan"), "MB": size / 1e6}


def _perplexity(out: Path, segments: int) -> float:
    from lilliput.evaluation.perplexity import perplexity, read_text
    from lilliput.models import load_model, load_tokenizer

    model = load_model(out, progress=False)
    text = read_text(SHARED_DATA / "wikitext2-test.txt")
    found = perplexity(model, load_tokenizer(MODEL), text, context=1024, segments=segments, progress=False)
    return found.perplexity


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--samples", type=int, default=32, help="segments of the calibration text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a segment")
    parser.add_argument("--segments", type=int, default=16, help="of 1024 tokens that are scored")


if __name__ == "__main__":
    sys.exit(
        main(
            run,
            __file__,
            __doc__,
            options=options,
            child=measure,
            quick={"samples": 2, "length": 64, "segments": 1},
            rounds=1,
        )
    )
