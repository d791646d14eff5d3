"""A teacher that evolves: a function of the prompt, good for most instructions, bad for those that name a fault.

`answer` is a brain of the fake endpoint (`endpoint_server.py`) and, through `Scripted`, of teachers in this process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

from lilliput.errors import TeacherError
from lilliput.synthesis.evol_prompts import CREATED, GIVEN, OTHER, REWRITTEN, SAME
from lilliput.synthesis.teacher import Reply, Request

ROWS = [
    {"instruction": "Name three birds.", "input": "", "output": "Robin, wren, crow."},
    {"instruction": "Add up the numbers.", "input": "3, 4, 5", "output": "12"},
    {"instruction": "Write a poem about rain.", "input": "", "output": "It falls and falls."},
    {"instruction": "Say why bread rises.", "input": "", "output": "Yeast makes gas."},
    {"instruction": "Sort these words.", "input": "pear apple fig", "output": "apple fig pear"},
]


def stage(prompt: str) -> str:
    """What a prompt asks for: "rewrite", "create", "compare" or "respond"."""
    if prompt.endswith(f"### {REWRITTEN}:\n"):
        return "rewrite"
    if prompt.endswith(f"### {CREATED}:\n"):
        return "create"
    return "compare" if prompt.startswith("Compare two instructions") else "respond"


def given(prompt: str) -> str:
    """The instruction that a prompt is about."""
    if stage(prompt) == "compare":
        return prompt.split("First instruction:\n")[1].split("\n\nSecond instruction:")[0]
    return prompt.rsplit(f"### {GIVEN}:\n", 1)[-1].rsplit("\n\n### ", 1)[0]


def answer(prompt: str) -> str:
    """Mostly good; by the prompt's hash every fifth thing goes wrong in some way."""
    number = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
    trouble = number % 5 == 0
    if stage(prompt) == "compare":
        return SAME if trouble else OTHER
    if stage(prompt) == "respond":
        return ("I am sorry, no." if number % 2 else "It is the.") if trouble else f"Answer {number % 1000}: yes."
    if trouble:
        return f"### {REWRITTEN}: {given(prompt)}" if number % 2 else ""
    return f"Take {number % 97} steps: {given(prompt)}" if stage(prompt) == "rewrite" else f"Name {number % 97} owls."


class Scripted:
    """A teacher with a brain, last request first; after `breath` answers it is out of reach, or `end` is called."""

    def __init__(
        self,
        brain: Callable[[str], str | Reply] = answer,
        breath: int = 1_000_000,
        end: Callable[[], None] | None = None,
    ) -> None:
        self.name, self.brain, self.breath, self.end, self.asked = "script", brain, breath, end, list[Request]()

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in reversed(list(enumerate(requests))):
            if self.breath == 0:
                if self.end:
                    self.end()
                raise TeacherError("is away", where="script")
            self.breath -= 1
            self.asked.append(request)
            said = self.brain(request.prompt)
            yield number, said if isinstance(said, Reply) else Reply(said, prompt_tokens=7, completion_tokens=3)
