"""Reading a prompt: one forward of 512 tokens without gradients, the logits of the last one only.

SmolLM2-135M in our int8 (thresholds 6 and 0) and NF4, in bitsandbytes' (int8 in float32 and in bfloat16; NF4 with
double quantization and float32 compute, in evaluation and training mode, as `decode` has them) and in float32, all in
this process, in turn. The keys and values of all tokens are kept, as generating wants them.

    python benchmarks/prefill.py [--tokens 512] [--rounds 5] [--stacks lilliput-int8 bnb-int8 ...]
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
        ids = torch.randint(100, 40_000, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
        sides: dict[str, Side | str] = {}
        for who, model in models.items():
            sides[who] = model if isinstance(model, str) else reading_prompt(model, ids)
        rows = compare(f"{arguments.tokens} tokens", sides, arguments.rounds)
    return Report(rows, {"seconds": "less", "tokens/s": ""}, ours=our_names(arguments.stacks))


def reading_prompt(model: PreTrainedModel, ids: torch.Tensor) -> Side:
    """Seconds of a forward of ids [1, tokens], after one that does not count."""

    @torch.no_grad()
    def read() -> torch.Tensor:
        return model(ids, use_cache=True, logits_to_keep=1).logits

    def side() -> dict[str, float]:
        start = time.perf_counter()
        logits = read()
        took = time.perf_counter() - start
        assert logits.shape[:2] == (1, 1)
        return {"seconds": took, "tokens/s": ids.shape[1] / took}

    read()
    return side


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt")
    add_stacks(parser)


if __name__ == "__main__":
    sys.exit(main(run, __file__, __doc__, options=options, quick={"tokens": 32}, rounds=5))
