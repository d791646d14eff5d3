"""Seed tasks: ours are many, diverse and sound; those of others load; every way to be wrong says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lilliput.errors import DataError
from lilliput.synthesis.filters import refuse_instance, refuse_instruction
from lilliput.synthesis.rouge import RougePool
from lilliput.synthesis.seeds import BUILT_IN, Instance, SeedTask, read_seeds

FIELDS = {"id", "name", "instruction", "instances", "is_classification"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_there_are_enough_of_all_kinds() -> None:
    seeds = read_seeds()
    assert len(seeds) >= 60
    assert sum(task.classification is True for task in seeds) >= 15
    assert all(task.classification is not None for task in seeds)
    assert len({task.name for task in seeds}) == len(seeds)
    assert sum(not task.instances[0].input for task in seeds) >= 15  # tasks that need no input
    assert all(set(json.loads(line)) == FIELDS for line in BUILT_IN.read_text(encoding="utf-8").splitlines())


def test_ours_pass_our_own_filter() -> None:
    for task in read_seeds():
        assert refuse_instruction(task.instruction) is None, task.name
        assert len(task.instruction.split()) < 40
        for one in task.instances:
            assert refuse_instance(task.instruction, one.input, one.output) is None, task.name
        inputs = [one.input for one in task.instances]
        assert len(set(inputs)) == len(inputs), task.name


def test_every_classification_names_its_labels_or_has_few() -> None:
    for task in read_seeds():
        if task.classification:
            assert all(len(one.output.split()) <= 3 for one in task.instances), task.name
            assert len({one.output for one in task.instances}) >= 2, task.name


def test_no_two_are_near_each_other() -> None:
    pool = RougePool()
    for task in read_seeds():
        assert not pool.any_above(task.instruction, 0.5), task.instruction
        pool.add(task.instruction)


def test_none_is_near_a_public_one(shared_data: Path) -> None:
    pool = RougePool(task.instruction for task in read_seeds(shared_data / "self-instruct-seed-tasks.jsonl"))
    assert max(pool.nearest(task.instruction)[0] for task in read_seeds()) < 0.5


def test_public_ones_load(shared_data: Path) -> None:
    seeds = read_seeds(shared_data / "self-instruct-seed-tasks.jsonl")
    assert len(seeds) == 175
    assert sum(task.classification is True for task in seeds) == 26
    assert seeds[1] == SeedTask(
        "antonym_relation",
        "What is the relation between the given pairs?",
        (Instance("Night : Day :: Right : Left", "The relation between the given pairs is that they are opposites."),),
        False,
    )


def test_alpaca_rows_load(shared_data: Path) -> None:
    seeds = read_seeds(shared_data / "alpaca-en-1k.json")
    assert len(seeds) == 999
    assert seeds[0].classification is None
    assert all(len(task.instances) == 1 for task in seeds)


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    row = {"instruction": "Say hello.", "output": "Hello."}
    first, same = read_seeds(write(tmp_path / "a.jsonl", row)), read_seeds(write(tmp_path / "b.jsonl", row))
    other = read_seeds(write(tmp_path / "c.jsonl", {**row, "output": "Hi."}))
    assert first.sha256 == same.sha256 != other.sha256
    assert first[0] == SeedTask("row 1", "Say hello.", (Instance("", "Hello."),))


GOOD = {"instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}]}
WRONG = {
    "no instruction": ({"instances": GOOD["instances"]}, "has no 'instruction'"),
    "nearly": ({"instructions": "Add.", "output": "3"}, "did you mean 'instructions'"),
    "instruction null": ({**GOOD, "instruction": None}, "'instruction' is null"),
    "instruction empty": ({**GOOD, "instruction": " "}, "'instruction' is empty"),
    "no instances": ({"instruction": "Add."}, "has neither 'instances' nor 'output'"),
    "none": ({**GOOD, "instances": []}, "'instances' is empty"),
    "no list": ({**GOOD, "instances": "3"}, "'instances' is of type str"),
    "no object": ({**GOOD, "instances": ["3"]}, "'instances[0]' is of type str"),
    "no output": ({**GOOD, "instances": [{"input": "1"}]}, "has no 'instances[0].output'"),
    "output a number": ({**GOOD, "instances": [{"output": 3}]}, "'instances[0].output' is of type int"),
    "input a number": ({**GOOD, "instances": [{"input": 3, "output": "3"}]}, "'instances[0].input' is of type int"),
    "alpaca": ({"instruction": "Add.", "output": ""}, "'output' is empty"),
    "yes": ({**GOOD, "is_classification": "yes"}, "'is_classification' is of type str"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_said_with_its_place(fault: str, tmp_path: Path) -> None:
    row, said = WRONG[fault]
    with pytest.raises(DataError, match=said.replace("[", r"\[")) as caught:
        read_seeds(write(tmp_path / "seeds.jsonl", GOOD, row))
    assert str(caught.value).startswith("seeds.jsonl:2: ")


def test_a_file_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        read_seeds(write(tmp_path / "seeds.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        read_seeds(tmp_path / "none.jsonl")
