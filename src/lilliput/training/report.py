"""A page a run: the journal (metrics.jsonl) while it goes, the curve (loss.png) and report.md when it is over.

Not here: the checks that the report lists (checks.py).
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import lilliput
from lilliput.data import Confusion
from lilliput.files import read_json, replace, write_json, write_text
from lilliput.progress import Advance

if TYPE_CHECKING:
    from lilliput.training.checks import CheckResult
    from lilliput.training.recipe import Recipe
    from lilliput.training.trainer import RunTrainer

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "pydantic")


class Journal(TrainerCallback):
    """One JSON object a step in metrics.jsonl, and the bar.

    A line: step, epoch, loss (mean over the step's labelled tokens, or rows), learning_rate, grad_norm (before
    clipping), tokens and seconds (sums over the run, padding and evaluation aside), tokens_per_second (of this step),
    eval_loss where one was taken, with a classifier's eval_accuracy. Step 0 has the evaluation before training. A line
    is written when its step is over, at the latest before the checkpoint that a resumed run would begin from.
    """

    def __init__(self, path: Path, advance: Advance, *, from_step: int = 0) -> None:
        self.path, self.advance = path, advance
        kept = [entry for entry in read_journal(path) if entry["step"] <= from_step] if from_step else []
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        last = next((entry for entry in reversed(kept) if "tokens" in entry), {"tokens": 0, "seconds": 0.0})
        self.tokens, self.seconds = int(last["tokens"]), float(last["seconds"])
        self.trainer: RunTrainer | None = None  # set when the Trainer exists, which wants its callbacks first
        self._line: dict[str, Any] = {}
        self._began = 0.0
        if from_step:
            advance(from_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The rows are there; the step's time begins."""
        self._write()
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step's tokens and seconds."""
        assert self.trainer is not None
        spent, tokens = time.perf_counter() - self._began, self.trainer.step_tokens
        self.trainer.step_tokens = 0
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + spent
        self._line = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / spent, 1),
        }

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer tells the step's loss, or an evaluation's."""
        logs = kwargs["logs"]
        if self._line.get("step") != state.global_step:  # the evaluation before the first step
            self._line = {"step": state.global_step}
        wanted = ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy")
        self._line.update({name: logs[name] for name in wanted if name in logs})
        if "loss" in logs:
            self.advance(1, f"loss {logs['loss']:.3f}, {self._line['tokens_per_second']:,.0f} tokens/s")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the checkpoint counts."""
        self._write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last line."""
        self._write()

    def _write(self) -> None:
        if len(self._line) > 1:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self._line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._line = {}


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_versions(path: Path) -> list[str]:
    """Write down what the run's numbers depend on beside its recipe: packages, machine, threads.

    Returns what differs from what was written there before: `["threads 2 then, 1 now"]`.
    """
    before = read_json(path) if path.is_file() else {}
    versions = {name: metadata.version(name) for name in _PACKAGES}
    machine = {"python": platform.python_version(), "system": platform.platform(), "threads": torch.get_num_threads()}
    now = {"lilliput": lilliput.__version__, **versions, **machine}
    write_json(path, now)
    return [
        f"{name} {before.get(name)} then, {now[name]} now" for name in now if before and before.get(name) != now[name]
    ]


def plot(journal: Sequence[dict[str, Any]], path: Path, *, unit: str = "labelled token") -> None:
    """The loss curve: every step in the background, its running mean, the evaluations. The loss is per `unit`."""
    # A second that only finished runs pay. Without pyplot no display is asked for.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [(entry["step"], entry["loss"]) for entry in journal if "loss" in entry]
    evals = [(entry["step"], entry["eval_loss"]) for entry in journal if "eval_loss" in entry]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if steps:
        x, y = zip(*steps, strict=True)
        axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(x, _running_mean(y), color="tab:blue", linewidth=2, label="training")
    if evals:
        axes.plot(*zip(*evals, strict=True), color="tab:orange", marker="o", label="held out")
    axes.set(xlabel="step", ylabel=f"loss per {unit}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replace(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the run, without the pull of its first value."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        out: the run's folder; adapter, report: inside it.
        steps: optimizer steps done in all; best_step: the one whose weights the adapter has.
        train_loss: mean over the last tenth of the steps. eval_loss: of the adapter; eval_loss_before: of the base.
        tokens: trained on, padding aside; labels: of an epoch; seconds: spent in training steps.
        skipped_rows: broken, left out; overlong_rows: longer than `data.max_length`, dropped or truncated.
        footprint_bytes: memory of the base. trainable: weights that were trained.
        total_seconds: of this call, with loading, checks and evaluation.
        prefix: what became of the frozen layers below the adapter; None where there are none.
    """

    out: Path
    adapter: Path
    report: Path
    steps: int
    best_step: int
    train_loss: float
    eval_loss: float | None
    eval_loss_before: float | None
    examples: int
    eval_examples: int
    skipped_rows: int
    overlong_rows: int
    labels: int
    tokens: int
    seconds: float
    train_tokens_per_second: float
    footprint_bytes: int
    trainable: int
    total_seconds: float
    prefix: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}

    def verdict(self) -> list[tuple[str, str]]:
        """What the run came to, for the top of the report: (what, the number in words)."""
        if self.eval_loss is None:
            return []
        before = f", {self.eval_loss_before:.4f} before training" if self.eval_loss_before is not None else ""
        return [("held-out loss", f"**{self.eval_loss:.4f}**{before}")]

    def rows_said(self) -> str:
        """How many examples there were."""
        return f"{self.examples:,} to train on ({self.labels:,} labelled tokens), {self.eval_examples:,} held out"

    def use(self, model: str, recipe: Recipe) -> str:
        """How the adapter is used, in Markdown: a command, and Python."""
        options = f"{_loading(recipe)}{self.more_arguments()}"
        python = _PYTHON.format(model=model, adapter=str(self.adapter), options=options)
        return f"```\n{self.command(model)}\n```\n\n{python}"

    def command(self, model: str) -> str:
        """The command that uses the adapter."""
        return f"lilliput chat {quote(model)} --adapter {quote(str(self.out))}"

    def more_arguments(self) -> str:
        """What `load_model` needs beside the number format, as Python."""
        return ""

    def sections(self) -> list[str]:
        """Parts of the report of their own, in Markdown."""
        return []


@dataclass(frozen=True, kw_only=True)
class ClassifyResult(RunResult):
    """What a classifier's run came to; `labels` counts the rows that an epoch learns.

    Attributes:
        train_counts: rows to train on, by the name of their class.
        confusion: predictions of the rows held out, by the adapter that was kept; None where none were held out.
    """

    train_counts: dict[str, int]
    confusion: Confusion | None

    def to_json(self) -> dict[str, Any]:
        """Plain values; of the held-out rows accuracy, majority_accuracy, macro_f1, confusion and counts by class."""
        plain = {name: value for name, value in super().to_json().items() if name != "confusion"}
        if self.confusion is None:
            return {**plain, "accuracy": None, "majority_accuracy": None, "macro_f1": None}
        found = self.confusion.to_json()
        del found["rows"]  # eval_examples has it
        return {**plain, **found}

    def verdict(self) -> list[tuple[str, str]]:
        """Accuracy first."""
        if self.confusion is None:
            return []
        score, most = self.confusion, f"{self.confusion.majority:.4f}"
        return [
            ("held-out accuracy", f"**{score.accuracy:.4f}** ({most} by always saying the most frequent class)"),
            ("macro F1", f"{score.macro_f1:.4f}"),
            *super().verdict(),
        ]

    def rows_said(self) -> str:
        """How many rows there were."""
        classes = f"{len(self.train_counts):,} classes"
        return f"{self.examples:,} to train on in {classes}, {self.eval_examples:,} held out"

    def command(self, model: str) -> str:
        """The command that labels a text."""
        return f'lilliput eval classify {quote(model)} --adapter {quote(str(self.out))} --text "…"'

    def more_arguments(self) -> str:
        """The labels, which make a classifier of the base."""
        return f", labels={list(self.train_counts)!r}"

    def sections(self) -> list[str]:
        """The confusion table."""
        if self.confusion is None:
            return []
        names = self.confusion.labels
        lines = [f"| true \\ predicted | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        lines += [
            f"| {name} | {' | '.join(map(str, row))} |" for name, row in zip(names, self.confusion.table, strict=True)
        ]
        return ["## Held-out rows\n", "\n".join([*lines, ""])]


def write_report(
    result: RunResult, model: str, data: Sequence[Path], recipe: Recipe, notes: Iterable[str],
    checks: Sequence[CheckResult],
) -> None:  # fmt: skip
    """Write report.md: what was done, to what data, what was checked, what came out, how it is used.

    `data` is the file of rows and, where there was one, that of the rows to evaluate on.
    """
    again = " ".join(
        f"{option} {quote(str(path))}" for option, path in zip(("--data", "--eval-data"), data, strict=False)
    )
    text = [
        f"# {model} tuned on {data[0].name}\n",
        _table(_what(result, recipe)),
        "![loss](loss.png)\n",
        "## Data\n",
        _list(notes),
        "## Checks\n",
        _list([f"{check.name}: {'passed' if check.passed else 'FAILED'}, {check.detail}" for check in checks])
        or "Not run (`--no-check`).\n",
        *result.sections(),
        "## Use it\n",
        result.use(model, recipe),
        f"`adapter/` is in PEFT's format. `recipe.yaml` is the complete recipe: `lilliput tune {quote(model)} {again} "
        f"--recipe {quote(f'{result.out}/recipe.yaml')} -o DIR` does it again; "
        "`versions.json` says with what it was done.\n",
    ]
    write_text(result.report, "\n".join(text))


_PYTHON = """In Python:

```python
import lilliput

model = lilliput.load_model({model!r}, {options})
lilliput.load_adapter(model, {adapter!r})
```
"""


def _loading(recipe: Recipe) -> str:
    """How the base was loaded, as keyword arguments."""
    return ", ".join(f"{name}={value!r}" for name, value in recipe.model.model_dump().items() if value is not None)


def _what(result: RunResult, recipe: Recipe) -> list[tuple[str, str]]:
    train, lora = recipe.train, recipe.lora
    rows = [
        ("training loss", f"{result.train_loss:.4f} (mean of the last tenth of {result.steps:,} steps)"),
        ("base", f"{recipe.model.format}, {result.footprint_bytes / 1e6:,.1f} MB"),
        (
            "adapter",
            f"r {lora.r}, alpha {lora.lora_alpha:g}, {result.trainable:,} weights, from step {result.best_step:,}",
        ),
        ("examples", result.rows_said()),
        (
            "steps",
            f"{result.steps:,} of {train.batch_size} x {train.accumulation} rows, "
            f"learning rate {train.learning_rate:g} {train.schedule}",
        ),
        (
            "speed",
            f"{result.tokens:,} tokens in {result.seconds:,.0f} s, {result.train_tokens_per_second:,.0f} a second",
        ),
    ]
    if result.prefix is not None:
        rows.append(("frozen prefix", result.prefix))
    return [*result.verdict(), *rows]


def _list(lines: Iterable[str]) -> str:
    return "".join(f"* {line}\n" for line in lines)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])
