"""What a teacher is shown in Self-Instruct, and how its answers are read. Structure: arXiv 2212.10560, appendix A.2
(tables 6 to 9), and Stanford Alpaca for `alpaca_prompt`; the words are ours.

Every prompt is a list that breaks off where the teacher is to go on, so that it suits a model that only continues
text; a line above it says what the list is, for a model that follows instructions. Such models like to greet, to
begin the line again at which they were to go on, and to set headings in bold: the readers allow for that. They
guess at nothing else; what they cannot read is missing in what they return. Not here: what is good (`filters.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lilliput.synthesis.seeds import Instance, SeedTask

NEW_TASKS = 8  # the list of eight tasks breaks off at task 9 and is stopped at task 16
ALPACA_TASKS = 20  # tasks in the list of the Alpaca variant, those shown included
_NOTHING = re.compile(r"\W*(none|n/a|no ?input|empty|not (needed|applicable|required))?\W*", re.IGNORECASE)

# Markers begin a line, perhaps in bold or as a heading: "Task 12:", "12.", "**Input:**", "### 4".
_NUMBER = re.compile(
    r"^[ \t]*(?:\*\*|#+[ \t]*)?(?:Task[ \t]*)?(\d+)[ \t]*[.:)](?:\*\*)?(?=\s|$)", re.MULTILINE | re.IGNORECASE
)
_EXAMPLE = r"^[ \t]*(?:\*\*|#+[ \t]*)?(Example)[ \t]*\d+(?:\*\*)?[ \t]*[.:]?(?:\*\*)?[ \t]*$"
_FIELD = r"^[ \t]*(?:\*\*|#+[ \t]*)?({})[ \t]*\d*(?:\*\*)?[ \t]*:(?:\*\*)?"
_EXAMPLES = re.compile(f"{_EXAMPLE}|{_FIELD.format('Input|Output')}", re.MULTILINE | re.IGNORECASE)
_LABELS = re.compile(f"{_EXAMPLE}|{_FIELD.format('Class label|Label|Input')}", re.MULTILINE | re.IGNORECASE)
_HASHES = re.compile(r"^[ \t]*#{2,}[ \t]*(?:Task[ \t]*)?(\d*)[.:]?[ \t]*$", re.MULTILINE | re.IGNORECASE)
_PARTS = re.compile(_FIELD.format("Instruction|Input|Output"), re.MULTILINE | re.IGNORECASE)


class Parsed(NamedTuple):
    """One task as the Alpaca variant gets it, complete."""

    instruction: str
    input: str
    output: str


def one_line(text: str) -> str:
    """`text` without line breaks and doubled spaces."""
    return " ".join(text.split())


# ---- step 1: new instructions ------------------------------------------------------------------------------------


def instructions_prompt(shown: Sequence[str]) -> str:
    """The tasks that are shown, numbered, and the number at which the teacher goes on."""
    lines = [f"Task {number}: {one_line(text)}" for number, text in enumerate(shown, start=1)]
    first, last = len(shown) + 1, len(shown) + NEW_TASKS - 1
    return (
        "This is a list of tasks for an assistant that reads and writes text. Write tasks "
        f"{first} to {last}. None of them repeats a task of the list: each is about something else and asks for "
        "something else, and words are enough to do it.\n\n" + "\n".join(lines) + f"\nTask {first}:"
    )


def instructions_stop(shown: int) -> str:
    """The text at which the list is long enough: "Task 16" where eight tasks are shown."""
    return f"Task {shown + NEW_TASKS}"


def read_instructions(text: str, shown: int, *, cut: bool) -> list[str]:
    """The new instructions in a teacher's answer, each in one line; without the last one where the answer was `cut`.

    Numbers count upwards from `shown` + 1, or from 1 where the teacher began anew; others belong to an instruction.
    """
    first = shown + 1
    marks = list(_NUMBER.finditer(text))
    begins = int(marks[0][1]) if marks else 0
    expected = begins if begins in (1, first) else first + 1
    pieces, start = [], None if begins in (1, first) else 0  # text before the number it should begin with is a greeting
    for mark in marks:
        if int(mark[1]) == expected:
            if start is not None:
                pieces.append(text[start : mark.start()])
            start, expected = mark.end(), expected + 1
    pieces.append(text[start or 0 :])
    if cut:
        pieces.pop()
    return [line for piece in pieces if (line := one_line(piece).strip("*").strip())]


# ---- step 2: classification or not -------------------------------------------------------------------------------


def classification_prompt(shown: Sequence[tuple[str, bool]], instruction: str) -> str:
    """Tasks with the answer to "is it a classification?", and the task that is asked about."""
    asked = "".join(f"Task: {one_line(text)}\nClassification: {'Yes' if known else 'No'}\n\n" for text, known in shown)
    return (
        "A task is a classification if every answer to it is one of a few labels that are known beforehand. Is the "
        f"last task one? Answer Yes or No.\n\n{asked}Task: {instruction}\nClassification:"
    )


def read_classification(text: str) -> bool | None:
    """What was answered: yes or no; None for anything else."""
    found = re.match(r"\W*(?:Classification\W+)?(yes|no)\b", text, re.IGNORECASE)
    return found[1].lower() == "yes" if found else None


# ---- step 3: instances -------------------------------------------------------------------------------------------


def input_first_prompt(shown: Sequence[SeedTask], instruction: str) -> str:
    """Tasks with examples of their input and output, and the task that needs some (table 8)."""
    return (
        "Write examples of each task: an input, where the task needs one, and then the right output. A task that "
        "says all by itself has no input.\n\n"
        + "\n\n".join(f"Task: {one_line(task.instruction)}\n{_examples(task.instances)}" for task in shown)
        + f"\n\nTask: {instruction}\n"
    )


def _examples(instances: Sequence[Instance]) -> str:
    if len(instances) == 1 and not instances[0].input:
        return f"Output: {instances[0].output}"
    return "\n".join(
        f"Example {number}\n" + (f"Input: {one.input}\n" if one.input else "") + f"Output: {one.output}"
        for number, one in enumerate(instances, start=1)
    )


def output_first_prompt(shown: Sequence[SeedTask], instruction: str) -> str:
    """Classification tasks with a label and then an input for it, and the task that needs some (table 9)."""
    blocks = (
        f"Task: {one_line(task.instruction)}\n"
        + "\n".join(f"Class label: {one.output}\nInput: {one.input}" for one in task.instances)
        for task in shown
    )
    return (
        "For each task and each of its possible labels, write the label and then an input for which it is right. "
        "Every label has its turn before one comes again.\n\n" + "\n\n".join(blocks) + f"\n\nTask: {instruction}\n"
    )


def own_part(text: str, instruction: str) -> str:
    """An answer with examples without the line that repeats the task; "" where that line names another task."""
    again = re.match(r"\s*(?:\*\*)?Task:(?:\*\*)?(.*)(?:\n|$)", text)
    if again is None:
        return text
    return text[again.end() :] if one_line(again[1]).strip("*") == instruction else ""


def read_examples(text: str, *, cut: bool) -> list[tuple[str, str]]:
    """(input, output) of each example in an answer, input "" for none; without the last one where it was `cut`."""
    return [
        (case.get("input", ""), case.get("output", "")) for case in _cases(text, _EXAMPLES, ("input", "output"), cut)
    ]


def read_labelled(text: str, *, cut: bool) -> list[tuple[str, str]]:
    """(input, label) of each example in an answer to `output_first_prompt`; also where the input stands first."""
    text = _with_inputs(text)
    marks = [name for name in map(_name, _LABELS.finditer(text)) if name != "example"]
    order = ("input", "label") if marks[:1] == ["input"] else ("label", "input")
    return [(case.get("input", ""), one_line(case.get("label", ""))) for case in _cases(text, _LABELS, order, cut)]


def _with_inputs(text: str) -> str:
    """A text whose lines behind a class label name no input, with the marker put there: label line, then input."""
    lines: list[str] = []
    for line in text.splitlines():
        previous = _LABELS.match(lines[-1]) if lines else None
        after_label = previous is not None and "label" in previous[0].lower() and lines[-1][previous.end() :].strip()
        lines.append(f"Input: {line}" if after_label and line.strip() and not _LABELS.match(line) else line)
    return "\n".join(lines)


def _cases(text: str, markers: re.Pattern[str], order: tuple[str, str], cut: bool) -> list[dict[str, str]]:
    """The fields of each case in a text. A case begins at "Example n", where a field comes again, and where the
    first of `order` comes after the second."""
    cases: list[dict[str, str]] = [{}]
    for mark, body in _fields(text, markers):
        name = _name(mark)
        if name in ("example", *cases[-1]) or (name == order[0] and order[1] in cases[-1]):
            cases.append({})
        if name != "example":
            cases[-1][name] = _or_nothing(body.strip(), name)
    if cut:
        cases.pop()
    return [case for case in cases if case]


def _fields(text: str, markers: re.Pattern[str]) -> Iterator[tuple[re.Match[str], str]]:
    """Each marker in a text and what stands between it and the next."""
    found = list(markers.finditer(text))
    ends = [mark.start() for mark in found[1:]] + [len(text)]
    for mark, end in zip(found, ends, strict=False):  # without any marker there is one end
        yield mark, text[mark.end() : end]


def _name(mark: re.Match[str]) -> str:
    """Which marker it is: example, input, output or label."""
    return next(group for group in mark.groups() if group).lower().removeprefix("class ")


def _or_nothing(text: str, name: str = "input") -> str:
    """The text of a field, or "" where it is an input that only says that there is none."""
    return "" if name == "input" and _NOTHING.fullmatch(text) else text


# ---- the Alpaca variant: all in one ------------------------------------------------------------------------------

NO_INPUT = "(none)"
_ALPACA_HEAD = f"""\
Write a list of {ALPACA_TASKS} different tasks for an assistant that reads and writes text, each with a good answer.

1. No two tasks begin with the same verb; some are questions, some are requests.
2. They are of many kinds: open questions, writing, rewriting, summaries, extraction, classification, planning, code.
3. A language model can do each of them without seeing, hearing, making a call or remembering anything.
4. The instruction is one or two sentences long.
5. The input is what the instruction is to be done with: realistic and particular, less than 100 words.
   It is {NO_INPUT} where the instruction needs none.
6. The output is the right answer to instruction and input, less than 100 words.

"""


def alpaca_prompt(shown: Sequence[SeedTask]) -> str:
    """What a good list is, its first tasks complete, and the number at which the teacher goes on."""
    blocks = [
        f"### {number}\nInstruction: {one_line(task.instruction)}\nInput: {task.instances[0].input or NO_INPUT}\n"
        f"Output: {task.instances[0].output}"
        for number, task in enumerate(shown, start=1)
    ]
    return _ALPACA_HEAD + "\n".join(blocks) + f"\n### {len(shown) + 1}\nInstruction:"


ALPACA_STOP = f"### {ALPACA_TASKS + 1}"


def read_alpaca(text: str, *, cut: bool) -> list[Parsed]:
    """The tasks of an answer; a missing field is "". Without the last one where the answer was `cut`."""
    begins = _PARTS.search(text)
    if begins is None or begins[1].lower() != "instruction":  # it went on behind the marker that it was shown
        text = f"Instruction: {text}"
    tasks: list[dict[str, str]] = [{}]
    for mark, body in _fields(text, _PARTS):
        name = mark[1].lower()
        if name == "instruction":
            tasks.append({})
        tasks[-1].setdefault(name, _HASHES.split(body)[0].strip())
    if cut:
        tasks.pop()
    return [
        Parsed(one_line(task["instruction"]), _or_nothing(task.get("input", "")), task.get("output", ""))
        for task in tasks
        if task.get("instruction")
    ]
