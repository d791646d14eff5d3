"""Self-Instruct: a language model writes its own instruction data. Wang et al., arXiv 2212.10560, section 2.2.

    8 tasks ──(1)──> new instructions ──(4)──> kept ──(2)──> classification? ──(3)──> instances ──(4)──> rows
    6 from people, 2 of its own   ^                                                                │
                                  └────────────────── tasks with rows may be shown ────────────────┘

The four steps are the four functions below; one round runs them once. Decoding is that of the paper's appendix A.1.
Where the released code does something else than the paper, docs/self-instruct.md says what is done here.
Not here: the loop around the rounds (`growing.py`), prompts and how answers are read (`prompts.py`), the filter's
rules (`filters.py`), all in one answer (`alpaca.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from lilliput.synthesis import prompts
from lilliput.synthesis.filters import Refusal, sift
from lilliput.synthesis.growing import Growth, Outcome, Plan, Task, grow, no_answer
from lilliput.synthesis.run import Run, dice
from lilliput.synthesis.seeds import SeedTask, SeedTasks, read_seeds
from lilliput.synthesis.teacher import Decoding

METHOD = "self-instruct"
PEOPLE, MODEL = 6, 2  # tasks shown in step 1 (section 2.2)
CLASSIFICATIONS, OTHERS = 12, 19  # tasks shown in step 2 (section 2.2)

INVENT = Decoding(temperature=0.7, top_p=0.5, max_tokens=1024, presence_penalty=2.0)
CLASSIFY = Decoding(temperature=0.0, max_tokens=4, stop=("\n",))
INSTANCES = Decoding(temperature=0.0, presence_penalty=1.5, stop=("\nTask:",))

# The built-in tasks that step 3 shows, by name: with several instances where a task has inputs, and some without input.
INPUT_FIRST = ("unit-of-recipe", "polite-decline", "thunder-delay", "past-tense", "first-snow")
OUTPUT_FIRST = ("review-mood", "urgent-or-not", "which-fallacy", "which-language")


def self_instruct(
    run: Run, seeds: SeedTasks | None = None, plan: Plan | None = None, save: Callable[[], None] | None = None
) -> Outcome:
    """Generate instruction data, from the built-in seed tasks by default. The rest as `grow`.

    The run's settings are those of `plan.settings(METHOD, seeds)`.
    """
    return grow(run, seeds or read_seeds(), plan or Plan(), one_round, save)


def one_round(growth: Growth, number: int) -> None:
    """The four steps, once: `batch` requests for new instructions, and then the others, `batch` tasks at a time."""
    name = f"round {number}"
    tasks = generate_instructions(growth, f"{name}/instructions")
    for first in range(0, len(tasks), growth.plan.batch):
        group = tasks[first : first + growth.plan.batch]
        labelled = identify_classification(growth, f"{name}/classification", group)
        generate_instances(growth, f"{name}/instances", labelled)


def generate_instructions(growth: Growth, name: str) -> list[Task]:
    """Step 1: show 8 tasks, get new ones up to task 16; those that pass the filter (step 4) join the pool."""
    shown = [growth.sample(f"{name}/{number}", PEOPLE, MODEL) for number in range(growth.plan.batch)]
    requests = [
        growth.request(
            f"{name}/{number}",
            prompts.instructions_prompt([text for _, text in tasks]),
            growth.inventing(replace(INVENT, stop=(prompts.instructions_stop(len(tasks)),))),
        )
        for number, tasks in enumerate(shown)
    ]
    new = []
    for request, reply, tasks in zip(requests, growth.ask(requests), shown, strict=True):
        found = prompts.read_instructions(reply.text, len(tasks), cut=reply.finish == "length")
        if not found:
            growth.refuse(request.key, "instructions", no_answer(reply) or NOTHING_WHOLE, reply.text)
        parents = {"parents": [parent for parent, _ in tasks]}
        for place, instruction in enumerate(found):
            task = growth.consider(f"{request.key}/{place}", instruction, "instructions", parents)
            new += [task] if task else []
    return new


def identify_classification(growth: Growth, name: str, tasks: Sequence[Task]) -> list[tuple[Task, bool]]:
    """Step 2: is a task a classification? Shown are 12 that are and 19 that are not. No clear answer counts as no."""
    shown = _known_classifications(growth)
    requests = [
        growth.request(_key(name, task), prompts.classification_prompt(shown, task.instruction), CLASSIFY)
        for task in tasks
    ]
    found = [prompts.read_classification(reply.text) for reply in growth.ask(requests)]
    for task, answer in zip(tasks, found, strict=True):
        growth.note(f"{task.key}/classification", "classification", classification=answer)
    return [(task, bool(answer)) for task, answer in zip(tasks, found, strict=True)]


def generate_instances(growth: Growth, name: str, tasks: Sequence[tuple[Task, bool]]) -> None:
    """Step 3: inputs and outputs of each task, input first; for a classification the label first, so that the labels
    are balanced. Those that pass the filter (step 4) are rows, and their task may be shown in step 1."""
    demonstrations = {False: _built_in(INPUT_FIRST), True: _built_in(OUTPUT_FIRST)}
    decoding = growth.decoding(INSTANCES)
    requests = [
        growth.request(_key(name, task), PROMPTS[known](demonstrations[known], task.instruction), decoding)
        for task, known in tasks
    ]
    for (task, known), request, reply in zip(tasks, requests, growth.ask(requests), strict=True):
        text = prompts.own_part(reply.text, task.instruction)
        pairs = READERS[known](text, cut=reply.finish == "length")
        if not pairs:
            growth.refuse(request.key, "instances", no_answer(reply) or NOTHING_WHOLE, reply.text)
        birth = growth.run.provenance(request, reply, method=METHOD, classification=known)
        keep_instances(growth, task, pairs, classification=known, birth=birth)


def keep_instances(
    growth: Growth, task: Task, pairs: Sequence[tuple[str, str]], *, classification: bool, birth: Mapping[str, Any]
) -> None:
    """Step 4 for instances: each (input, output) becomes a row with its `birth` as provenance, or a refusal."""
    most, provenance = growth.plan.instances, {**birth, "task": task.key, **task.about}
    verdicts = sift(task.instruction, pairs, classification=classification, most=most, rules=growth.rules)
    if any(refusal is None for refusal in verdicts):
        growth.tasks.append(task)
    for place, ((given, output), refusal) in enumerate(zip(pairs, verdicts, strict=True)):
        key = f"{task.key}/instance {place}"
        if refusal is not None:
            growth.refuse(key, "instances", refusal, f"{task.instruction}\n{given}\n{output}")
        else:
            row = {"instruction": task.instruction, "input": given, "output": output, "provenance": provenance}
            growth.accept(key, "instances", row)


PROMPTS = {False: prompts.input_first_prompt, True: prompts.output_first_prompt}  # by: is it a classification?
READERS = {False: prompts.read_examples, True: prompts.read_labelled}
NOTHING_WHOLE = Refusal("nothing readable", "no whole task or example in the answer")


def _key(name: str, task: Task) -> str:
    """ "round 3/instructions/1/4" in step "round 3/instances" is "round 3/instances/1/4"."""
    return f"{name}/{task.key.split('/', 2)[2]}"


@cache
def _built_in(names: tuple[str, ...]) -> list[SeedTask]:
    by_name = {task.name: task for task in read_seeds()}
    return [by_name[name] for name in names]


def _known_classifications(growth: Growth) -> list[tuple[str, bool]]:
    """Tasks of people and what they are, the same ones throughout a run; built-in ones where a file does not say it."""
    seeds = growth.seeds if {True, False} <= {task.classification for task in growth.seeds} else read_seeds()
    draw = dice(growth.plan.seed, "classification")
    shown = []
    for known, count in ((True, CLASSIFICATIONS), (False, OTHERS)):
        fitting = [(task.instruction, known) for task in seeds if task.classification is known]
        shown += draw.sample(fitting, min(count, len(fitting)))
    draw.shuffle(shown)
    return shown
