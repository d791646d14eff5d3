"""Small runs: rows of sums for the tiny model, and recipes that finish in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lilliput.training.recipe import Recipe, load_recipe

QUICK = (
    "model.format=none",
    "lora.r=4",
    "lora.lora_dropout=0.1",
    "data.max_length=128",
    "train.epochs=3",
    "train.batch_size=2",
    "train.accumulation=2",
    "train.learning_rate=1e-2",
    "train.save_every=2",
    "train.eval_every=3",
)


def write_rows(path: Path, count: int = 30) -> Path:
    """Rows of different lengths."""
    rows = [
        {"prompt": f"What is {i} and {i}?", "completion": f"The answer is {2 * i}{', of course' * (i % 4)}."}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quick(*settings: str) -> Recipe:
    """The quick recipe with changes."""
    return load_recipe("qlora", [*QUICK, *settings])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of 30 rows."""
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """`recipe("lora.r=2", …)`: the quick recipe with changes."""
    return quick
