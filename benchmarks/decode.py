"""Generating through transformers' `generate`: greedy, one sequence, a prompt of 16 tokens, 48 new ones.

SmolLM2-135M in our NF4, in bitsandbytes NF4 (double quantization, float32 compute) and in float32, all in this process,
in turn. Seconds are those of a whole call, the prompt included. On a processor with AVX512-BF16 bitsandbytes generates
in bfloat16 whatever it was told; in training mode, which changes nothing else here, it keeps to float32. Both are
measured.

    python benchmarks/decode.py [--prompt 16] [--new 48] [--rounds 5]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

import torch
from transformers import PreTrainedModel

from common import Report, Side, compare, main, not_installed
from lilliput.models import load_model
from peers import MODEL, dense_checkpoint, load_bitsandbytes, load_dense

OURS = "Lilliput, NF4"


def run(arguments: argparse.Namespace) -> Report:
    """All stacks in turn."""
    with tempfile.TemporaryDirectory(prefix="lilliput-") as folder:
        checkpoint = dense_checkpoint(folder)
        lacking = not_installed("bitsandbytes")
        models: dict[str, PreTrainedModel | str] = {
            OURS: load_model(MODEL, format="nf4", progress=False),
            "bitsandbytes NF4, evaluation mode": lacking or load_bitsandbytes(checkpoint).eval(),
            "bitsandbytes NF4, training mode": lacking or load_bitsandbytes(checkpoint).train(),
            "transformers float32": load_dense(checkpoint).eval(),
        }
        ids = torch.randint(100, 40_000, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
        sides = {who: m if isinstance(m, str) else generating(m, ids, arguments.new) for who, m in models.items()}
        rows = compare(f"{arguments.prompt} + {arguments.new} tokens", sides, arguments.rounds)
    return Report(rows, {"seconds": "less", "tokens/s": ""}, ours=(OURS,))


def generating(model: PreTrainedModel, ids: torch.Tensor, new: int) -> Side:
    """Seconds of generating `new` tokens, after a call that does not count."""

    def generate() -> torch.Tensor:
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new)

    def side() -> dict[str, float]:
        start = time.perf_counter()
        made = generate()
        took = time.perf_counter() - start
        assert made.shape[1] == ids.shape[1] + new
        return {"seconds": took, "tokens/s": new / took}

    generate()
    return side


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--new", type=int, default=48, help="tokens")


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__, options=options, quick={"new": 4}, rounds=5))
