"""What every run does, whatever is learned: claims its folder's past, trains or goes on, keeps the best adapter.

Not here: the story of a run (run.py, classify.py), what a checkpoint is (resume.py), the Trainer (trainer.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from lilliput.data import SkippedRow
from lilliput.errors import DataError, UsageError
from lilliput.files import read_json, sha256_file, write_json, write_text
from lilliput.lora import Passport, trainable_parameters
from lilliput.models.causal import context_length
from lilliput.progress import bar
from lilliput.training.checks import CheckResult
from lilliput.training.recipe import Recipe, TrainSection
from lilliput.training.report import Journal, read_journal
from lilliput.training.resume import (
    RUN_FILE,
    Checkpoints,
    Guard,
    Interrupted,
    disk_errors,
    interrupts,
    load_trained,
    read_state,
    stopped_early,
)
from lilliput.training.trainer import Loss, RunTrainer, make_arguments

_FEWEST_TO_SPLIT = 20  # examples; below it a held-out share would say nothing and cost much


class _HasIds(Protocol):
    """An example of any kind."""

    @property
    def input_ids(self) -> list[int]: ...


E = TypeVar("E", bound=_HasIds)


class _HasOrigin(Protocol):
    """An example that knows its length and where it stands."""

    @property
    def origin(self) -> str: ...

    def __len__(self) -> int: ...


L = TypeVar("L", bound=_HasOrigin)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """transformers says nothing below an error, and draws no bars of its own, inside the block."""
    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


def identity_of_run(model: str, data: Path, recipe: Recipe, eval_data: str | Path | None) -> dict[str, Any]:
    """What must be the same for a run to be resumed; plain JSON values."""
    for path in (data, eval_data):
        if path is not None and not Path(path).is_file():
            raise DataError("no such file", where=str(path))
    named = {
        "MODEL": str(model),
        "the data's SHA-256": sha256_file(data),
        "the evaluation data's SHA-256": sha256_file(eval_data) if eval_data else None,
    }
    return json.loads(json.dumps({**named, **recipe.settings()}))


def list_skipped(out: Path, skipped: Sequence[SkippedRow]) -> None:
    """Write the rows that were left out into the run's folder; nothing where there are none."""
    if skipped:
        lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in skipped)
        write_text(out / "skipped_rows.jsonl", "".join(lines))


def split(examples: Sequence[E], fraction: float, limit: int, seed: int) -> tuple[list[E], list[E]]:
    """(to train on, held out): a random share, both parts in the order of the file.

    Nothing is held out of fewer than 20 examples. Rows with the same tokens stay on one side.
    """
    if not fraction or len(examples) < _FEWEST_TO_SPLIT:
        return list(examples), []
    distinct = list(dict.fromkeys(tuple(example.input_ids) for example in examples))
    count = min(limit, max(1, round(fraction * len(distinct))))
    apart = set(random.Random(seed).sample(distinct, count))
    train = [example for example in examples if tuple(example.input_ids) not in apart]
    return (train, [e for e in examples if tuple(e.input_ids) in apart]) if train else (list(examples), [])


def same_base(out: Path, passport: Passport) -> None:
    """Remember the base's hash with the run, or compare it with what a resumed run began from."""
    run = read_json(out / RUN_FILE)
    here = {"weights": passport.base_weights_sha256, "quantized": passport.base_quantized_sha256}
    if run.setdefault("base", here) != here:
        raise UsageError(
            "the base is not the one that this run began with",
            where=str(out),
            todo="Restore its files, or begin again with --overwrite.",
        )
    write_json(out / RUN_FILE, run)


def checked(out: Path) -> list[CheckResult]:
    """What was checked before a run was interrupted."""
    return [CheckResult(**result) for result in read_json(out / RUN_FILE).get("checks", [])]


def within_positions(model: PreTrainedModel, examples: Sequence[L]) -> None:
    """Raise UsageError for an example with more tokens than the model has positions: nothing good would be learned."""
    positions = _positions(model)
    longest = max(examples, key=len)
    if positions is not None and len(longest) > positions:
        raise UsageError(
            f"{len(longest):,} tokens, and the model has {positions:,} positions",
            where=longest.origin,
            todo=f"Set data.max_length={positions}; data.overlong says what becomes of longer rows.",
        )


def _positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model has positions for. RoBERTa's kind begins to count behind the padding's index."""
    positions = context_length(model)
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((m.padding_idx for m in tables if isinstance(m, nn.Embedding)), None)
    return positions if positions is None or padding is None else positions - padding - 1


def train_or_resume(
    loss: Loss,
    make_trainer: Callable[[TrainingArguments, list[TrainerCallback]], RunTrainer],
    train: TrainSection,
    steps: int,
    out: Path,
    checkpoint: Path | None,
    *,
    evaluate: bool,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: bool = True,
) -> int:
    """Train from the start or from a checkpoint; afterwards `loss` has the weights to keep. Returns their step.

    Args:
        loss: what the Trainer sees; its parameters that require gradients are trained.
        make_trainer: from the Trainer's arguments and callbacks; not called when the checkpoint is the end already.
        train: the recipe's section.
        steps: of the whole run.
        out: the run's folder.
        checkpoint: to go on from, or None.
        evaluate: whether rows are held out.
        around: a context for the training itself.
        progress: show a bar.

    Raises Interrupted after Ctrl-C, when a checkpoint was saved; DiskError.
    """
    checkpoints = Checkpoints(out / "checkpoints")
    checkpoints.clean()
    state = read_state(checkpoint) if checkpoint else TrainerState()
    arguments = make_arguments(
        train, str(checkpoints.staging), steps, evaluate=evaluate, resumed=checkpoint is not None
    )
    over = _is_over(state, steps, train)
    with (
        nullcontext() if over else around(),
        interrupts() as interrupted,
        bar("training", steps, shown=progress) as advance,
    ):
        journal = Journal(out / "metrics.jsonl", advance, from_step=state.global_step)
        if not over:
            trainer = make_trainer(arguments, [journal, Guard(checkpoints, train.early_stop, interrupted)])
            journal.trainer = trainer
            _checkpointing(loss.model, train.gradient_checkpointing)
            with disk_errors(out):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            state = trainer.state
    if not _is_over(state, steps, train):
        said = f"interrupted, saved at step {state.global_step:,} of {steps:,}"
        raise Interrupted(said, where=str(out), todo="Run the same command with --resume to go on.")
    keep = state.best_global_step if train.keep_best and state.best_global_step else state.global_step
    load_trained(loss, checkpoints.at(keep))
    loss.eval()
    return keep


def _is_over(state: TrainerState, steps: int, train: TrainSection) -> bool:
    return state.global_step >= steps or stopped_early(state, train.early_stop)


def _checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Recompute activations in backward instead of keeping them (transformers renamed it in version 5)."""
    if on:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def run_numbers(model: PreTrainedModel, out: Path, best_step: int, seconds: float) -> dict[str, Any]:
    """The part of a RunResult that the journal and the model tell; `seconds` are those of the whole call."""
    lines = read_journal(out / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    evals = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    last_tenth = losses[-max(1, len(losses) // 10) :]
    tokens, spent = lines[-1]["tokens"], lines[-1]["seconds"]
    return {
        "out": out,
        "adapter": out / "adapter",
        "report": out / "report.md",
        "steps": lines[-1]["step"],
        "best_step": best_step,
        "train_loss": sum(last_tenth) / len(last_tenth),
        "eval_loss": evals.get(best_step),
        "eval_loss_before": evals.get(0),
        "tokens": tokens,
        "seconds": spent,
        "train_tokens_per_second": tokens / spent if spent else 0.0,
        "footprint_bytes": base_footprint(model),
        "trainable": trainable_parameters(model)[0],
        "total_seconds": seconds,
    }


def base_footprint(model: PreTrainedModel) -> int:
    """Bytes of the base, without what is trained."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return model.get_memory_footprint() - trained
