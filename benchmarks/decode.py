"""Generating through transformers' `generate`: greedy, one sequence, a prompt of 16 tokens, 48 new ones.

SmolLM2-135M in our NF4 and int8, in bitsandbytes' (NF4 with double quantization and float32 compute; int8) and in
float32, all in this process, in turn. Seconds are those of a whole call, the prompt included. On a processor with
AVX512-BF16 bitsandbytes generates in bfloat16 from NF4 whatever it was told; in training mode, which changes nothing
else here, it keeps to float32. From int8 it multiplies inputs in int8 in evaluation mode, and dequantizes in training
mode. Both modes are measured.

    python benchmarks/decode.py [--prompt 16] [--new 48] [--rounds 5] [--stacks lilliput-int8 ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

import torch
from transformers import PreTrainedModel

from common import Report, Side, compare, main
from peers import add_stacks, dense_checkpoint, inference_models, our_names


def run(arguments: argparse.Namespace) -> Report:
    """All stacks in turn."""
    with tempfile.TemporaryDirectory(prefix="lilliput-") as folder:
        models = inference_models(arguments.stacks, dense_checkpoint(folder))
        ids = torch.randint(100, 40_000, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
        sides: dict[str, Side | str] = {}
        for who, model in models.items():
            sides[who] = model if isinstance(model, str) else generating(model, ids, arguments.new)
        rows = compare(f"{arguments.prompt} + {arguments.new} tokens", sides, arguments.rounds)
    return Report(rows, {"seconds": "less", "tokens/s": ""}, ours=our_names(arguments.stacks))


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
    add_stacks(parser)


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__, options=options, quick={"new": 4}, rounds=5))
