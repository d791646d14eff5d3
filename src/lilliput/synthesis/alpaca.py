"""The Alpaca variant of Self-Instruct: instruction, input and output in one answer, many tasks at once.

Source: Stanford Alpaca's description of its data (Taori et al., 2023): a request shows three seed tasks complete and
asks for the rest of a list of twenty; no step finds out what is a classification, each task has a single instance. So
one request may bring many rows, where `self_instruct.py` needs two more for each task. The filter is the same.
Not here: the loop around the rounds (`growing.py`), the prompt and how answers are read (`prompts.py`), the filter's
rules (`filters.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from lilliput.synthesis import prompts
from lilliput.synthesis.growing import Growth, Outcome, Plan, grow, no_answer
from lilliput.synthesis.run import Run
from lilliput.synthesis.seeds import SeedTasks, read_seeds
from lilliput.synthesis.self_instruct import NOTHING_WHOLE, keep_instances
from lilliput.synthesis.teacher import Decoding

METHOD = "alpaca"
SHOWN = 3  # seed tasks in a request
INVENT = Decoding(temperature=1.0, max_tokens=3072, stop=(prompts.ALPACA_STOP,))


def alpaca(
    run: Run, seeds: SeedTasks | None = None, plan: Plan | None = None, save: Callable[[], None] | None = None
) -> Outcome:
    """Generate instruction data, from the built-in seed tasks by default. The rest as `grow`.

    The run's settings are those of `plan.settings(METHOD, seeds)`.
    """
    return grow(run, seeds or read_seeds(), plan or Plan(), one_round, save)


def one_round(growth: Growth, number: int) -> None:
    """`batch` requests; every task of their answers becomes a row or a refusal."""
    name = f"round {number}/tasks"
    shown = [growth.sample_seeds(f"{name}/{place}", SHOWN) for place in range(growth.plan.batch)]
    decoding = growth.inventing(growth.decoding(INVENT))
    requests = [
        growth.request(f"{name}/{place}", prompts.alpaca_prompt(seeds), decoding) for place, seeds in enumerate(shown)
    ]
    for request, reply, seeds in zip(requests, growth.ask(requests), shown, strict=True):
        found = prompts.read_alpaca(reply.text, cut=reply.finish == "length")
        if not found:
            growth.refuse(request.key, "instructions", no_answer(reply) or NOTHING_WHOLE, reply.text)
        parents = {"parents": [seed.name for seed in seeds]}
        for place, (instruction, given, output) in enumerate(found):
            task = growth.consider(f"{request.key}/{place}", instruction, "instructions", parents)
            if task is not None:
                birth = growth.run.provenance(request, reply, method=METHOD)
                keep_instances(growth, task, [(given, output)], classification=False, birth=birth)
