"""How answers are read: as they should be, and as models of all kinds write them."""

from __future__ import annotations

import pytest

from lilliput.synthesis import prompts
from lilliput.synthesis.prompts import Parsed
from lilliput.synthesis.seeds import Instance, SeedTask

LISTS = {
    "goes on": " Name a tree.\nTask 10: Add two\n numbers.\nTask 11: Why?",
    "begins the line again": "Task 9: Name a tree.\nTask 10: Add two\n numbers.\nTask 11: Why?",
    "greets": "Sure! Here are more tasks:\n\nTask 9: Name a tree.\n\nTask 10: Add two numbers.\n\nTask 11: Why?",
    "counts anew": "1. Name a tree.\n2. Add two numbers.\n3. Why?",
    "numbers only": "Name a tree.\n10. Add two numbers.\n11) Why?",
    "bold": "**Task 9:** Name a tree.\n**Task 10:** Add two numbers.\n**Task 11:** Why?",
}


@pytest.mark.parametrize("way", LISTS)
def test_a_list_of_instructions(way: str) -> None:
    assert prompts.read_instructions(LISTS[way], 8, cut=False) == ["Name a tree.", "Add two numbers.", "Why?"]
    assert prompts.read_instructions(LISTS[way], 8, cut=True) == ["Name a tree.", "Add two numbers."]


def test_numbers_inside_an_instruction_stay() -> None:
    text = " Sort these steps: 1. boil 2. pour\n3. drink\nTask 10: Is 12. May a Monday?"
    assert prompts.read_instructions(text, 8, cut=False) == [
        "Sort these steps: 1. boil 2. pour 3. drink",
        "Is 12. May a Monday?",
    ]


@pytest.mark.parametrize("text", ["", "  \n", "Task 9:"])
def test_no_instruction(text: str) -> None:
    assert prompts.read_instructions(text, 8, cut=False) == []


def test_the_list_that_is_shown() -> None:
    prompt = prompts.instructions_prompt([f"Do thing\n{number}." for number in range(8)])
    assert prompt.endswith("Task 8: Do thing 7.\nTask 9:")
    assert prompts.instructions_stop(8) == "Task 16"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (" Yes", True),
        ("no.", False),
        ("**Yes**", True),
        ("Classification: No", False),
        ("Not sure", None),
        ("", None),
        ("It is, yes", None),
        ("yesterday", None),
    ],
)
def test_yes_or_no(text: str, meant: bool | None) -> None:
    assert prompts.read_classification(text) is meant


EXAMPLES = {
    "as shown": "Example 1\nInput: 1, 2\nOutput: 3\nExample 2\nInput: 4\nOutput: 4\nand no more",
    "fields only": "Input: 1, 2\nOutput: 3\nInput: 4\nOutput: 4\nand no more",
    "numbered": "Input 1: 1, 2\nOutput 1: 3\n\nInput 2: 4\nOutput 2: 4\nand no more",
    "headings": "Here you go.\n\n### Example 1:\n"
    "**Input:** 1, 2\n**Output:** 3\n\n**Example 2**\nInput: 4\nOutput:\n4\nand no more",
}


@pytest.mark.parametrize("way", EXAMPLES)
def test_examples(way: str) -> None:
    assert prompts.read_examples(EXAMPLES[way], cut=False) == [("1, 2", "3"), ("4", "4\nand no more")]
    assert prompts.read_examples(EXAMPLES[way], cut=True) == [("1, 2", "3")]


def test_examples_without_input() -> None:
    assert prompts.read_examples("Output: a poem", cut=False) == [("", "a poem")]
    assert prompts.read_examples("Output: one\nOutput: two", cut=False) == [("", "one"), ("", "two")]
    assert prompts.read_examples("Example 1\nOutput: one\nExample 2\nOutput: two", cut=False) == [
        ("", "one"),
        ("", "two"),
    ]
    assert prompts.read_examples("Input: None\nOutput: one", cut=False) == [("", "one")]
    assert prompts.read_examples("Output: one\nInput: 5\nOutput: two", cut=False) == [("", "one"), ("5", "two")]


def test_an_answer_that_repeats_its_task_or_names_another() -> None:
    assert prompts.own_part("Output: 3", "Add.") == "Output: 3"
    assert prompts.own_part("Task: Add.\nOutput: 3", "Add.") == "Output: 3"
    assert prompts.own_part("**Task:** Add.\nOutput: 3", "Add.") == "Output: 3"
    assert prompts.own_part("Task: Multiply.\nOutput: 3", "Add.") == ""
    assert prompts.own_part("Task: Add.", "Add.") == ""


def test_what_is_missing_stays_missing() -> None:
    assert prompts.read_examples("I cannot do that.", cut=False) == []
    assert prompts.read_examples("Input: 5", cut=False) == [("5", "")]
    assert prompts.read_examples("Output: only the beginni", cut=True) == []


LABELLED = {
    "as shown": "Class label: good\nInput: nice soup\nClass label: bad\nInput: cold soup",
    "no marker": "Class label: good\nnice soup\nClass label: bad\ncold soup",
    "input first": "Input: nice soup\nClass label: good\nInput: cold soup\nClass label: bad",
    "bold": "**Class label:** good\n**Input:** nice soup\n\n**Class label:** bad\n**Input:** cold soup",
    "examples": "Example 1\nLabel: good\nInput: nice soup\nExample 2\nLabel: bad\nInput: cold soup",
}


@pytest.mark.parametrize("way", LABELLED)
def test_labelled_inputs(way: str) -> None:
    assert prompts.read_labelled(LABELLED[way], cut=False) == [("nice soup", "good"), ("cold soup", "bad")]
    assert prompts.read_labelled(LABELLED[way], cut=True) == [("nice soup", "good")]


def test_a_long_input_behind_a_label() -> None:
    text = "Class label: good\nnice soup\nand bread\nClass label: bad"
    assert prompts.read_labelled(text, cut=False) == [("nice soup\nand bread", "good"), ("", "bad")]


ALPACA = {
    "goes on": " Name a tree.\nInput: (none)\nOutput: An oak.\n### 5\nInstruction: Add.\n"
    "Input: 1, 2\nOutput: 3\nas said",
    "begins again": "### 4\nInstruction: Name a tree.\nInput: (none)\nOutput: An oak.\n### 5\nInstruction: Add.\n"
    "Input: 1, 2\nOutput: 3\nas said\n",
    "greets, bold": "Of course!\n\n### 4.\n**Instruction:** Name a tree.\n**Input:** None\n**Output:** An oak.\n\n"
    "### Task 5\n**Instruction:** Add.\n**Input:** 1, 2\n**Output:** 3\nas said",
}


@pytest.mark.parametrize("way", ALPACA)
def test_whole_tasks(way: str) -> None:
    tree, addition = Parsed("Name a tree.", "", "An oak."), Parsed("Add.", "1, 2", "3\nas said")
    assert prompts.read_alpaca(ALPACA[way], cut=False) == [tree, addition]
    assert prompts.read_alpaca(ALPACA[way], cut=True) == [tree]


def test_half_tasks() -> None:
    assert prompts.read_alpaca(" Name a tree.\nInput: (none)", cut=False) == [Parsed("Name a tree.", "", "")]
    assert prompts.read_alpaca(" Name a tr", cut=True) == []
    assert prompts.read_alpaca("", cut=False) == []


def test_what_is_shown_can_be_read_back() -> None:
    """Prompt and reader agree: what a prompt shows, its reader finds."""
    tasks = [
        SeedTask("one", "Add the\nnumbers.", (Instance("1, 2", "3"), Instance("4", "4"))),
        SeedTask("two", "Name a tree.", (Instance("", "An oak."),)),
    ]
    shown = prompts.input_first_prompt(tasks, "Next.")
    assert prompts.read_examples(shown.split("Task: ")[1], cut=False) == [("1, 2", "3"), ("4", "4")]
    assert prompts.read_examples(shown.split("Task: ")[2], cut=False) == [("", "An oak.")]
    assert shown.endswith("\n\nTask: Next.\n")
    labelled = prompts.output_first_prompt(tasks[:1], "Next.")
    assert prompts.read_labelled(labelled.split("Task: ")[1], cut=False) == [("1, 2", "3"), ("4", "4")]
    whole = prompts.alpaca_prompt(tasks)
    assert prompts.read_alpaca(whole[whole.index("### 1") :], cut=True) == [
        Parsed("Add the numbers.", "1, 2", "3"),
        Parsed("Name a tree.", "", "An oak."),
    ]
    assert whole.endswith("\n### 3\nInstruction:")
