"""Teachers that are functions of the prompt: they write tasks in the forms that Self-Instruct asks for, good and bad.

`answer` is the brain of the fake endpoint (`endpoint_server.py`) and, through `Scripted`, of teachers in this process.
Its tasks are made of words drawn by the prompt's hash, so that no two runs differ and most tasks are new; now and
then one is a copy, too short, about a picture, or has instances that contradict each other.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lilliput.synthesis.teacher import Reply, Request

_VERBS = "List Explain Compare Rewrite Translate Sort Summarise Invent Describe Correct Name Plan Count Praise Doubt"
_WORDS = (
    "apples rivers engines poems winter teachers bridges clocks islands pepper ladders violins owls deserts letters "
    "gardens boots candles markets tunnels storms ferries museums blankets orchards lanterns kettles harbours meadows "
    "puzzles anchors feathers pillows cellars glaciers hammers ribbons saddles turnips walnuts"
)
VERBS, WORDS = _VERBS.split(), _WORDS.split()
BAD = (
    "Draw a picture of the sea.",
    "Too short.",
    "What is the relation between the given pairs?",
    "é is a fine letter",
)


def answer(prompt: str) -> str:
    """What a diligent and sometimes careless teacher writes."""
    draw = random.Random(hashlib.sha256(prompt.encode()).digest())
    if prompt.rstrip().endswith("Classification:"):
        return " Yes" if "Sort" in prompt.rsplit("Task:", 1)[1] else " No"
    if re.search(r"\nTask \d+:$", prompt):
        return instructions(draw, first=int(prompt.rsplit("Task ", 1)[1][:-1]))
    if re.search(r"### \d+\nInstruction:$", prompt):
        return alpaca(draw, first=int(prompt.rsplit("### ", 1)[1].split("\n")[0]))
    return labelled(draw) if "label" in prompt.split("\n")[0] else examples(draw)


def instruction(draw: random.Random) -> str:
    """A new instruction, or now and then a bad one."""
    if draw.random() < 0.15:
        return draw.choice(BAD)
    return f"{draw.choice(VERBS)} {' '.join(draw.sample(WORDS, 5))} for somebody who likes {draw.choice(WORDS)}."


def instructions(draw: random.Random, first: int) -> str:
    """The rest of the list, up to the stop text, which an endpoint cuts off."""
    lines = [instruction(draw), *(f"Task {first + more}: {instruction(draw)}" for more in range(1, 7))]
    return " " + "\n".join(lines) + f"\nTask {first + 7}: never to be seen"


def examples(draw: random.Random) -> str:
    """Two examples; sometimes one without input, sometimes one that contradicts another."""
    words = draw.sample(WORDS, 6)
    if draw.random() < 0.3:
        return f"Output: {' '.join(words)}"
    second = words[0] if draw.random() < 0.2 else words[1]
    return (
        f"Example 1\nInput: {words[0]}\nOutput: {words[2]}\nExample 2\nInput: {second}\nOutput: {words[3]} {words[4]}"
    )


def labelled(draw: random.Random) -> str:
    """Inputs of two labels, more of the first."""
    words = draw.sample(WORDS, 4)
    labels = ("tool", "tool", "tool", "food")
    return "\n".join(f"Class label: {label}\nInput: {word}" for label, word in zip(labels, words, strict=True))


def alpaca(draw: random.Random, first: int) -> str:
    """The rest of the list of twenty."""
    blocks = []
    for number in range(first, first + 6):
        given = draw.choice((draw.choice(WORDS), "(none)"))
        block = f"Instruction: {instruction(draw)}\nInput: {given}\nOutput: {' '.join(draw.sample(WORDS, 4))}"
        blocks.append(block if number > first else block.removeprefix("Instruction:"))
    return f"\n### {first}\n".join(blocks)


@dataclass
class Scripted:
    """A teacher in this process: a brain, cut at the first stop text. `asked` are all requests it has seen."""

    brain: Callable[[str], str] = answer
    name: str = "scripted"
    finish: str = "stop"
    asked: list[Request] = field(default_factory=list)

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Answers last first: no order is promised."""
        for number in reversed(range(len(requests))):
            request = requests[number]
            self.asked.append(request)
            text = self.brain(request.prompt)
            for stop in request.decoding.stop:
                text = text.partition(stop)[0]
            yield number, Reply(text, finish=self.finish, model=self.name)
