"""The rows that a run held out, found again: what its adapter is judged on where nobody gives another text.

A run notes where its rows lie; which of them were held out follows from the recipe's share and seed, as it did then.
Rows that have changed since are refused by their fingerprint: some of the "held out" might have been trained on.
Not here: the split itself (loop.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lilliput.data import Example, load_examples
from lilliput.data.records import gather
from lilliput.errors import DataError, UsageError
from lilliput.files import read_json, write_json
from lilliput.lora import Passport, read_passport
from lilliput.training.loop import split
from lilliput.training.recipe import Recipe, load_recipe
from lilliput.training.resume import RUN_FILE

_FILES = "files"  # the key of run.json with the paths of the rows
_RECIPE = "recipe.yaml"
_OTHER_TEXT = "Give --text FILE, or the rows with --data FILE."


def note_files(out: Path, data: Path, eval_data: str | Path | None) -> None:
    """Remember in a run's folder where its rows lie."""
    paths = {"data": str(data.resolve()), "eval_data": str(Path(eval_data).resolve()) if eval_data else None}
    write_json(out / RUN_FILE, {**read_json(out / RUN_FILE), _FILES: paths})


def held_out_rows(adapter: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The held-out examples of the run that trained `adapter` (its folder, or `adapter/` in it), in the file's order.

    Raises DataError when it is no run, when its rows are gone or have changed, and when none of them was held out.
    """
    run = _run_folder(Path(adapter))
    if run is None:
        raise DataError("is no run's folder, so that no held-out rows are known", where=str(adapter), todo=_OTHER_TEXT)
    files: dict[str, Any] = read_json(run / RUN_FILE).get(_FILES) or {}
    path = files.get("eval_data") or files.get("data")
    if path is None or not Path(path).is_file():
        fault = f"the rows of this run are not at {path} any more" if path else "does not say where its rows lie"
        raise DataError(fault, where=str(run), todo=_OTHER_TEXT)
    recipe = _recipe_of(run)
    if files.get("eval_data"):
        return _read(path, tokenizer, recipe)[0]
    return _apart(path, tokenizer, recipe, read_passport(run))


def rows_to_compare(
    data: str | Path, tokenizer: PreTrainedTokenizerBase, *, adapter: str | Path | None = None, max_length: int
) -> list[Example]:
    """The examples of a file; of rows that `adapter` was trained on only those that its run held out.

    Args:
        data: rows that `lilliput tune` takes.
        tokenizer: the model's.
        adapter: a run's folder, or any other adapter.
        max_length: longer rows are cut, unless a run's recipe says otherwise.

    Raises DataError for rows that cannot be used, and when nothing was held out of those of the run.
    """
    passport = read_passport(adapter) if adapter is not None else None
    if adapter is None or passport is None or passport.data_sha256 != gather(Path(data)).sha256:
        return load_examples(data, tokenizer, max_length=max_length, overlong="truncate", progress=False).examples
    run = _run_folder(Path(adapter))
    if run is None:
        todo = "Give the run's whole folder as adapter, or other rows."
        raise DataError("the adapter was trained on these rows, and the run that held some out is not here",
                        where=str(data), todo=todo)  # fmt: skip
    return _apart(data, tokenizer, _recipe_of(run), passport)


def _apart(
    data: str | Path, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, passport: Passport | None
) -> list[Example]:
    """What a run with this recipe holds out of these rows, which must be those of the passport."""
    examples, sha256 = _read(data, tokenizer, recipe)
    if passport is None or passport.data_sha256 != sha256:
        raise DataError("has changed since the adapter was trained on it", where=str(data), todo=_OTHER_TEXT)
    section = recipe.data
    _, apart = split(examples, section.eval_fraction, section.eval_limit, recipe.train.seed)
    if not apart:
        raise DataError("the run held none of these rows out", where=str(data), todo="Give --text FILE, or other rows.")
    return apart


def _read(data: str | Path, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[list[Example], str]:
    """All examples as the run read them, and the rows' fingerprint."""
    section = recipe.data
    rows = load_examples(
        data, tokenizer, max_length=section.max_length, overlong=section.overlong,
        skip_bad_rows=section.skip_bad_rows, progress=False,
    )  # fmt: skip
    return rows.examples, rows.sha256


def _recipe_of(run: Path) -> Recipe:
    recipe = load_recipe(run / _RECIPE)
    if recipe.data.task != "chat":
        raise UsageError("is a classifier's run, which predicts no next token", where=str(run))
    return recipe


def _run_folder(adapter: Path) -> Path | None:
    """The run that an adapter lies in, or None."""
    for folder in (adapter, adapter.resolve().parent):
        if (folder / RUN_FILE).is_file() and (folder / _RECIPE).is_file():
            return folder
    return None
