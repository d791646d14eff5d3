"""What Evol-Instruct asks a teacher: to make an instruction harder, to invent a new one, whether two are the same.

Source: WizardLM, arXiv 2304.12244, section 3.1 and appendices, whose prompts these follow part by part in our own
words: five in-depth operations under one frame, one in-breadth mutation, and the question of elimination evolving.
Not here: what is done with the answers (`evol_instruct.py`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

GIVEN, REWRITTEN, CREATED = "Given prompt", "Rewritten prompt", "Created prompt"
LEAKS = tuple(name.lower() for name in (GIVEN, REWRITTEN, CREATED))  # an evolved instruction with one of them copied us
EVOLVE_STOPS = (f"### {GIVEN}",)  # a model that only continues text would go on with an example of its own
SAME, OTHER = "equal", "different"
VERDICT = {  # for teachers that offer structured output
    "type": "object",
    "properties": {"verdict": {"type": "string", "enum": [SAME, OTHER]}},
    "required": ["verdict"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Operation:
    """One way to evolve an instruction: in depth by `method`, a sentence or two; or in breadth."""

    name: str
    about: str  # a line for people
    method: str = ""
    in_breadth: bool = False


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "constraints",
            "one more condition or requirement",
            f"put one more condition, limit or requirement into the {GIVEN}.",
        ),
        Operation(
            "deepen",
            "a question asked wider and deeper",
            f"where the {GIVEN} asks about some matter, ask about it more deeply and more broadly.",
        ),
        Operation(
            "concretise",
            "general ideas replaced by specific ones",
            f"replace a general idea in the {GIVEN} by a more specific one.",
        ),
        Operation(
            "reasoning",
            "several steps of thought where one was enough",
            f"if a few simple steps of thought are enough for the {GIVEN}, change it so that it takes several steps, "
            "and the answer has to go through each of them.",
        ),
        Operation(
            "input",
            "data to work on: a table, code, JSON, a formula",
            f"put {{data}} into the {GIVEN}, made up but complete, as the input that has to be worked on.",
        ),
        Operation("breadth", "a brand new instruction of the same field, about something rarer", in_breadth=True),
    )
}

_IN_DEPTH = f"""Make a prompt harder. Rewrite the {GIVEN} into a version that gives well-known AI assistants somewhat \
more trouble, but still makes sense, and that people can understand and answer.

Do it in this way: {{method}}

What is no plain prose in the {GIVEN}, such as a table, code, data or a formula, must stay in it, and so must its input.
Keep it short: the {REWRITTEN} has {{words}} words more than the {GIVEN}{{beside}}.
The {REWRITTEN} stands alone, and "{GIVEN}" and "{REWRITTEN}" must not be named in it.
Write the {REWRITTEN} only; do not answer it.

{{shown}}### {GIVEN}:
{{instruction}}

### {REWRITTEN}:
"""

_IN_BREADTH = f"""Invent a prompt. Take the {GIVEN} as inspiration for one that is brand new.

The {CREATED} belongs to the same field as the {GIVEN}, but is about something rarer in it, seldom asked for.
It is about as long and as difficult as the {GIVEN}.
It must make sense, and people must be able to understand and answer it.
It stands alone, and "{GIVEN}" and "{CREATED}" must not be named in it.
Write the {CREATED} only; do not answer it.

### {GIVEN}:
{{instruction}}

### {CREATED}:
"""

_IS_NEW = f"""Compare two instructions for an AI assistant. They are {SAME} when both are true:
1. They make the same demands, under the same conditions.
2. They ask equally deeply and equally broadly.
Otherwise they are {OTHER}.

First instruction:
{{first}}

Second instruction:
{{second}}

Your verdict in one word, {SAME} or {OTHER}:
"""


def evolving_prompt(instruction: str, operation: Operation, dice: random.Random) -> str:
    """The prompt that asks for an instruction's next form. `dice` picks the kind of data that complicates an input."""
    if operation.in_breadth:
        return _IN_BREADTH.format(instruction=instruction)
    fill = {"method": operation.method, "words": "10 to 20", "beside": "", "shown": "", "instruction": instruction}
    if "{data}" in operation.method:  # the one operation that is shown by examples, as in the paper
        data, shown = dice.choice(_DATA)
        fill |= {"method": operation.method.format(data=data), "beside": ", the new input not counted", "shown": shown}
    return _IN_DEPTH.format(**fill)


def comparing_prompt(first: str, second: str) -> str:
    """The prompt that asks whether the second instruction holds anything that the first does not."""
    return _IS_NEW.format(first=first, second=second)


def _shown(given: str, rewritten: str) -> str:
    return f"### {GIVEN}:\n{given}\n\n### {REWRITTEN}:\n{rewritten}\n\n"


_TABLE = _shown(
    "Which of my houseplants should I water today?",
    """Here is when I last watered my houseplants. Which of them should I water on the 14th, and in which order?

| plant | last watered | days between |
|---|---|---|
| fern | the 10th | 3 |
| cactus | the 1st | 20 |
| basil | the 13th | 1 |""",
)
_JSON = _shown(
    "How do I add up the prices in a list?",
    """How do I add up what is to be paid for this order in Python, without the articles that are out of stock?

{"order": 71, "articles": [
  {"name": "kettle", "price": 24.5, "count": 1, "stock": 3},
  {"name": "mug", "price": 6.0, "count": 4, "stock": 0},
  {"name": "tray", "price": 11.25, "count": 2, "stock": 9}]}""",
)
_CODE = _shown(
    "Why is my loop slow?",
    """Why does this loop get slower with every word, and how would you change it so that the order of words is kept?

words = open("words.txt").read().split()
seen = []
for word in words:
    if word not in seen:
        seen.append(word)
print(len(seen))""",
)
_FORMULA = _shown(
    "When do two cars meet?",
    """Two cars drive towards each other, and after t hours they are at x(t) = 60 t and y(t) = 210 - 80 t - 5 t^2 \
kilometres on the same road. When and where do they meet?""",
)
_LETTER = _shown(
    "Help me answer a complaint.",
    """Help me answer this complaint so that the guest comes again:

"We booked a quiet room for three nights. On the first night the band in your bar played until two. On the second we
were moved, to a room without hot water. Nobody has said a word about our money. R. and T., room 12, then 31\"""",
)
# What an input may be complicated with, and two examples, the first of that kind.
_DATA = (
    ("a table", _TABLE + _JSON),
    ("data in JSON", _JSON + _TABLE),
    ("a piece of code", _CODE + _LETTER),
    ("a formula", _FORMULA + _TABLE),
    ("a text such as a letter, a log or a report", _LETTER + _CODE),
)
