"""A model in llama.cpp, from the GGUF files that Lilliput writes: perplexity, greedy tokens, an adapter's logits.

SmolLM2-135M-Instruct as F32, F16, Q8_0, Q4_1 and Q4_0, each written by `save_gguf` and read by llama-cpp-python. Both
are given the same tokens: WikiText-2 test in segments of 512, each scored on its own, without BOS; `ratio` is theirs to
ours of the float32 model, `read back` our own perplexity of the numbers in the file. llama.cpp keeps keys and values in
float32 here, as Lilliput does; it rounds what it multiplies Q8_0 and Q4 blocks with to 8 bits. Greedy: steps until the
first other token, of several prompts. The adapter is a random one over all linear layers, as a file for `--lora`.

The marks: Q8_0 within 0.5 % of ours, 32 greedy tokens equal in F32; the exit status is 1 when one is missed.

    python benchmarks/gguf_llama_cpp.py [--types f32 q8_0 ...] [--segments 4] [--steps 32] [--keep DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import Report, Row, in_process, main, not_installed
from lilliput import lora
from lilliput.evaluation.perplexity import perplexity, read_text, token_windows
from lilliput.models import load_model, load_tokenizer, save_gguf, save_lora_gguf
from lilliput.models.gguf_write import TYPES
from peers import MODEL, SHARED_DATA

CONTEXT = 512
WITHIN = 0.005  # of our perplexity, for Q8_0
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "def fibonacci(n):",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
)
FLOAT32 = 0  # ggml's number of the type
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False}


def run(arguments: argparse.Namespace) -> Report:
    """All types, then the adapter over the first one."""
    better = dict.fromkeys(("perplexity", "ratio", "read back", "greedy steps", "MB", "write, s"), "")
    if lacking := not_installed("llama_cpp"):
        return Report([Row(MODEL, "llama.cpp", missing=lacking.replace("llama_cpp", "llama-cpp-python"))], better)
    model, tokenizer = load_model(MODEL, progress=False), load_tokenizer(MODEL)
    work = Work.of(model, tokenizer, arguments.segments, arguments.steps)
    rows = [Row("float32", "Lilliput", {"perplexity": [work.perplexity]})]
    with tempfile.TemporaryDirectory(prefix="lilliput-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for type in arguments.types:
            figures = measured(model, tokenizer, work, type, folder / f"{type}.gguf")
            rows.append(Row(type.upper(), "llama.cpp", {name: [figure] for name, figure in figures.items()}))
        notes = [adapter_note(model, work, folder / f"{arguments.types[0]}.gguf")]
    return Report(rows, better, notes=notes, failures=missed(rows, arguments.steps))


@dataclass(frozen=True)
class Work:
    """What both do, and what Lilliput makes of it in float32.

    Attributes:
        text: scored in `segments` of CONTEXT tokens, at `perplexity`.
        prompts: continued greedily, as in `continued`.
    """

    text: str
    segments: list[list[int]]
    perplexity: float
    prompts: list[list[int]]
    continued: list[list[int]]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, segments: int, steps: int) -> Work:
        """Let Lilliput do it."""
        text = read_text(SHARED_DATA / "wikitext2-test.txt")
        ids, windows = token_windows(model, tokenizer, text, CONTEXT, None, segments)
        prompts = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]
        return cls(
            text,
            [ids[window.start : window.stop].tolist() for window in windows],
            our_perplexity(model, tokenizer, text, segments),
            prompts,
            [greedy(model, prompt, steps) for prompt in prompts],
        )


def measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, work: Work, type: str, path: Path
) -> dict[str, float]:
    """Write one type, and let llama.cpp do the work."""
    began = time.perf_counter()
    written = save_gguf(model, path, tokenizer, type, progress=False)
    took = time.perf_counter() - began
    found = by_llama_cpp(work, path)
    again = our_perplexity(load_model(path, progress=False), tokenizer, work.text, len(work.segments))
    return {
        "perplexity": found["perplexity"],
        "ratio": found["perplexity"] / work.perplexity,
        "read back": again,
        "greedy steps": min(map(equal_steps, found["continued"], work.continued)),
        "MB": written.nbytes / 1e6,
        "write, s": took,
    }


def by_llama_cpp(work: Work, path: Path, adapter: Path | None = None, logits: Path | None = None) -> dict[str, Any]:
    """What `child` finds in a process of its own: two pools of threads in one wait for each other."""
    task = path.with_suffix(".json")
    task.write_text(json.dumps({"segments": work.segments, "prompts": work.prompts, "steps": len(work.continued[0])}))
    given = {"path": path, "task": task, "adapter": adapter, "logits": logits}
    return in_process(__file__, **{name: str(value) for name, value in given.items() if value})


def child(path: str, task: str, adapter: str | None = None, logits: str | None = None) -> dict[str, Any]:
    """Perplexity and greedy tokens; with `logits`, those of the first segment into that file instead."""
    work = json.loads(Path(task).read_text())
    with closing(their(path, adapter)) as theirs:
        if logits:
            np.save(logits, their_logits(theirs, work["segments"][0]))
            return {}
        return {
            "perplexity": their_perplexity(theirs, work["segments"]),
            "continued": their_greedy(theirs, work["prompts"], work["steps"]),
        }


def our_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, segments: int) -> float:
    return perplexity(model, tokenizer, text, context=CONTEXT, segments=segments, progress=False).perplexity


def their(path: str, adapter: str | None = None) -> Any:
    """A file in llama.cpp, with as many threads as torch has."""
    import llama_cpp

    threads = torch.get_num_threads()
    return llama_cpp.Llama(
        path, lora_path=adapter, n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=threads, n_threads_batch=threads,
        logits_all=True, type_k=FLOAT32, type_v=FLOAT32, verbose=False,
    )  # fmt: skip


def their_logits(theirs: Any, ids: Sequence[int]) -> np.ndarray:
    """Of all tokens, float32 [tokens, vocabulary]."""
    theirs.reset()
    theirs.eval(ids)
    return theirs.scores[: len(ids)]


def their_perplexity(theirs: Any, segments: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood, as lilliput.evaluation.perplexity has it."""
    total, tokens = 0.0, 0
    for ids in segments:
        rows = their_logits(theirs, ids)[:-1]
        most = rows.max(axis=1)
        sums = np.log(np.exp(rows - most[:, None]).sum(axis=1, dtype=np.float64)) + most
        total += float((sums - rows[np.arange(len(rows)), ids[1:]]).sum())
        tokens += len(ids) - 1
    return math.exp(total / tokens)


def their_greedy(theirs: Any, prompts: Sequence[list[int]], steps: int) -> list[list[int]]:
    """The likeliest next token, `steps` times over."""
    found = []
    for prompt in prompts:
        theirs.reset()
        theirs.eval(prompt)
        made: list[int] = []
        for _ in range(steps):
            made.append(int(theirs.scores[theirs.n_tokens - 1].argmax()))
            theirs.eval(made[-1:])
        found.append(made)
    return found


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], steps: int) -> list[int]:
    """The same by transformers over our layers, whatever token would end a talk."""
    ids, made, cache = torch.tensor([prompt]), [], None
    for _ in range(steps):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        made.append(int(out.logits[0, -1].argmax()))
        ids, cache = torch.tensor([made[-1:]]), out.past_key_values
    return made


def equal_steps(one: list[int], other: list[int]) -> int:
    """How many tokens are the same from the start."""
    return next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


def adapter_note(model: PreTrainedModel, work: Work, base: Path) -> str:
    """Put a random adapter on the model, and compare its logits with llama.cpp's over the base's file."""
    torch.manual_seed(0)
    lora.add_adapter(model, lora.LoraConfig(**ADAPTER))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.mul_(0.1)  # a change of the size that training makes
    file, logits = base.with_name("adapter.gguf"), base.with_name("logits.npy")
    save_lora_gguf(model, file)
    ids = torch.tensor(work.segments[:1])
    with torch.no_grad():
        tuned = model(ids).logits[0]
        with lora.disabled(model):
            plain = model(ids).logits[0]
    by_llama_cpp(work, base, file, logits)
    away, changed = (torch.from_numpy(np.load(logits)) - tuned).abs().max(), (tuned - plain).abs().max()
    return f"adapter over {base.name}: logits are at most {away:.2g} from ours, which it changes by up to {changed:.2g}"


def missed(rows: Sequence[Row], steps: int) -> list[str]:
    """The marks that do not hold."""
    figures = {row.what: {name: values[0] for name, values in row.samples.items()} for row in rows}
    found = []
    if (ratio := figures.get("Q8_0", {}).get("ratio", 1.0)) and abs(ratio - 1) > WITHIN:
        found.append(f"Q8_0: perplexity is {ratio:.4f} of ours, not within {WITHIN:.1%}")
    if (equal := figures.get("F32", {}).get("greedy steps", steps)) < steps:
        found.append(f"F32: greedy tokens are equal for {equal:.0f} steps of {steps}")
    return found


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--segments", type=int, default=4, help=f"of {CONTEXT} tokens (4)")
    parser.add_argument("--steps", type=int, default=32, help="greedy tokens a prompt (32)")
    parser.add_argument("--keep", type=Path, help="leave the files in this directory")


if __name__ == "__main__":
    sys.exit(
        main(run, __file__, __doc__, options=options, quick={"segments": 1, "types": ["f32", "q8_0"]}, child=child)
    )
