"""A run: recipe, loss at labelled positions, checks, resuming, report. The story is in run.py.

result = tune("smollm2-135m-instruct", "my.jsonl", "runs/mine", load_recipe("qlora", ["train.epochs=2"]))
"""

from lilliput.training.checks import CheckResult, require, run_checks
from lilliput.training.held_out import held_out_rows, rows_to_compare
from lilliput.training.recipe import Recipe, load_recipe, recipe_names
from lilliput.training.report import ClassifyResult, RunResult
from lilliput.training.resume import Interrupted
from lilliput.training.run import check_data, tune

__all__ = [
    "CheckResult",
    "ClassifyResult",
    "Interrupted",
    "Recipe",
    "RunResult",
    "check_data",
    "held_out_rows",
    "load_recipe",
    "recipe_names",
    "require",
    "rows_to_compare",
    "run_checks",
    "tune",
]
