"""A run from a model's name to an adapter, in a screen: load, attach, read, check, train, save, report.

Not here: how each of these is done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from lilliput.data import Example, ExampleSet, Pack, figures, load_examples, pack
from lilliput.errors import UsageError
from lilliput.files import read_json, write_json
from lilliput.lora import LoraConfig, add_adapter, make_passport, save_adapter, trainable_parameters
from lilliput.models import load_model, load_tokenizer
from lilliput.models.causal import longest_row, require_causal
from lilliput.progress import say, warn
from lilliput.training.checks import CheckResult, require, run_checks
from lilliput.training.classify import check_labelled, tune_classifier
from lilliput.training.fused import fused
from lilliput.training.held_out import note_files
from lilliput.training.loop import (
    base_footprint,
    checked,
    identity_of_run,
    list_skipped,
    quiet_libraries,
    run_numbers,
    same_base,
    split,
    train_or_resume,
    within_positions,
)
from lilliput.training.optimizer import make_optimizer
from lilliput.training.prefix import plan
from lilliput.training.recipe import Recipe
from lilliput.training.report import RunResult, plot, read_journal, write_report, write_versions
from lilliput.training.resume import (
    RUN_FILE,
    alone,
    claim,
    finish,
)
from lilliput.training.trainer import LabelLoss, LabelTrainer, Rows, can_pack, count_steps, pad_id, refuse_packing


@dataclass(frozen=True)
class _Data:
    """The rows of a run: `train` as read, and its two parts."""

    whole: ExampleSet
    train: list[Example]
    held_out: list[Example]


def tune(
    model: str,
    data: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    check: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    eval_data: str | Path | None = None,
) -> RunResult:
    """Fine-tune an adapter on the rows of a file; everything about the run lies in the folder `out` afterwards.

    Args:
        model: a MODEL argument.
        data: rows in JSON, JSONL, CSV, TSV or Parquet: chats, or texts with labels where the recipe's `data.task` is
            "classify".
        out: the run's folder; see docs/training.md for what is in it.
        recipe: from `load_recipe`.
        check: first check the promises of exactness on these rows (not again when resuming).
        resume: go on with the unfinished run in `out`; its weights will equal an uninterrupted run's bit for bit.
        overwrite: remove the run in `out` first.
        progress: show bars and lines on standard error.
        eval_data: rows to evaluate on; None holds out `data.eval_fraction` of the examples.

    Raises:
        UsageError: `out` holds something else or is in use by a run, or a recipe that does not fit the model.
        DataError: rows that cannot be used.
        CheckFailed: a promise is broken; nothing was trained.
        Interrupted: Ctrl-C; a checkpoint was saved, and the message says how to go on.
        KeyboardInterrupt: a second Ctrl-C, or one outside of training.
    """
    if recipe.data.task == "classify":
        return tune_classifier(
            model, data, out, recipe, check=check, resume=resume, overwrite=overwrite, progress=progress,
            eval_data=eval_data,
        )  # fmt: skip
    began, data, out = time.perf_counter(), Path(data), Path(out)
    identity = identity_of_run(model, data, recipe, eval_data)
    with quiet_libraries(), ExitStack() as held:
        tokenizer = load_tokenizer(model)
        held.enter_context(alone(out))
        checkpoint = claim(out, identity, resume=resume, overwrite=overwrite)
        recipe.save(out / "recipe.yaml")
        note_files(out, data, eval_data)
        if (other := write_versions(out / "versions.json")) and checkpoint:
            warn(f"this run goes on with other versions, so not bit for bit: {'; '.join(other)}")
        rows = _read(data, eval_data, tokenizer, recipe, out, progress)
        base = load_base(model, recipe, progress=progress)
        held.enter_context(fused(base))
        passport = make_passport(base, tokenizer, rows.whole.sha256)
        same_base(out, passport)
        within_positions(base, [*rows.train, *rows.held_out])
        checks = _check(out, base, tokenizer, rows.whole, progress) if check and checkpoint is None else checked(out)
        loss = LabelLoss(base)
        best_step = _train(loss, tokenizer, rows, recipe, out, checkpoint, progress)
    save_adapter(base, out / "adapter", passport=passport)
    result = _result(base, rows, out, best_step, time.perf_counter() - began)
    plot(read_journal(out / "metrics.jsonl"), out / "loss.png")
    files = [data] if eval_data is None else [data, Path(eval_data)]
    write_report(result, model, files, recipe, _notes(rows), checks)
    finish(out)
    return result


def check_data(model: str, data: str | Path, recipe: Recipe, *, progress: bool = True) -> list[CheckResult]:
    """The exactness checks alone, on a model and rows as `tune` would take them. Raises what loading them raises."""
    if recipe.data.task == "classify":
        return check_labelled(model, data, recipe, progress=progress)
    with quiet_libraries():
        tokenizer = load_tokenizer(model)
        section = recipe.data
        rows = load_examples(
            data, tokenizer, max_length=section.max_length, overlong=section.overlong,
            skip_bad_rows=section.skip_bad_rows, progress=progress,
        )  # fmt: skip
        base = load_base(model, recipe, progress=progress)
        within_positions(base, rows.examples)
        with fused(base):
            return run_checks(base, tokenizer, rows, show=progress, progress=progress)


def load_base(model: str, recipe: Recipe, *, progress: bool = True) -> PreTrainedModel:
    """The base in the recipe's number format with a new adapter on it, its first numbers drawn by the recipe's seed.

    Raises UsageError for a model that is no causal language model, or that cannot have the packed rows of the recipe.
    """
    base = load_model(model, **recipe.model.model_dump(), progress=progress)
    require_causal(base, "training")
    if recipe.data.packing:
        _check_packing(base, recipe.data.max_length)
    set_seed(recipe.train.seed)
    add_adapter(base, LoraConfig(**{**recipe.lora.model_dump(), "task_type": "CAUSAL_LM"}))
    trained, total = trainable_parameters(base)
    if progress:
        say(f"{model}: {base_footprint(base) / 1e6:,.1f} MB, {trained:,} of {total:,} weights are trained")
    return base


def _read(
    data: Path,
    eval_data: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    out: Path,
    progress: bool,
) -> _Data:
    """Rows become examples; some are held out; those that were skipped are listed in the run's folder."""
    section = recipe.data
    options: dict[str, Any] = {
        "max_length": section.max_length,
        "overlong": section.overlong,
        "skip_bad_rows": section.skip_bad_rows,
        "progress": progress,
    }
    whole = load_examples(data, tokenizer, **options)
    skipped = list(whole.skipped)
    if eval_data is not None:
        other = load_examples(eval_data, tokenizer, **options)
        skipped += other.skipped
        parts = _Data(whole, whole.examples, other.examples)
    else:
        parts = _Data(whole, *split(whole.examples, section.eval_fraction, section.eval_limit, recipe.train.seed))
    if recipe.train.early_stop and not parts.held_out:
        raise UsageError(
            "train.early_stop needs held-out rows, and there are too few", where=str(data), todo="Give --eval-data."
        )
    list_skipped(out, skipped)
    return parts


def _check_packing(model: PreTrainedModel, length: int) -> None:
    """Raise UsageError where packed rows of so many tokens would not be to the model what their examples are."""
    if not can_pack(model):
        refuse_packing(model)
    limit = longest_row(model)
    if limit is not None and length > limit:
        raise UsageError(
            f"rows of {length:,} tokens, and {type(model).__name__} has positions for {limit:,} in a row",
            where="data.max_length",
            todo=f"Set data.max_length={limit} (or data.packing=false).",
        )


def _check(
    out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: ExampleSet, progress: bool
) -> list[CheckResult]:
    results = run_checks(model, tokenizer, rows, show=progress, progress=progress)
    write_json(out / RUN_FILE, {**read_json(out / RUN_FILE), "checks": [asdict(result) for result in results]})
    require(results)
    if progress:
        say(f"all {len(results)} checks passed")
    return results


def _rows(examples: Sequence[Example], recipe: Recipe) -> list[Pack]:
    return pack(examples, recipe.data.max_length) if recipe.data.packing else [Pack.of([e]) for e in examples]


def _train(
    loss: LabelLoss, tokenizer: PreTrainedTokenizerBase, data: _Data, recipe: Recipe, out: Path,
    checkpoint: Path | None, progress: bool,
) -> int:  # fmt: skip
    """Train from the start or from a checkpoint; afterwards `loss` has the adapter to keep. Returns its step."""
    train, rows, held_out = recipe.train, _rows(data.train, recipe), _rows(data.held_out, recipe)

    def trainer(arguments: TrainingArguments, callbacks: list[TrainerCallback]) -> LabelTrainer:
        return LabelTrainer(
            loss,
            arguments,
            pad_token_id=pad_id(tokenizer, loss.model),
            train_dataset=Rows(rows, step_rows=train.batch_size * train.accumulation, seed=train.seed),
            eval_dataset=held_out or None,
            make=partial(make_optimizer, optim=recipe.optim, train=train),
            callbacks=callbacks,
        )

    around = partial(_reused_prefix, loss, tokenizer, rows, held_out, recipe, out, progress)
    return train_or_resume(
        loss, trainer, train, count_steps(len(rows), train), out, checkpoint,
        evaluate=bool(held_out), around=around, progress=progress,
    )  # fmt: skip


@contextmanager
def _reused_prefix(
    loss: LabelLoss, tokenizer: PreTrainedTokenizerBase, rows: list[Pack], held_out: list[Pack], recipe: Recipe,
    out: Path, progress: bool,
) -> Iterator[None]:  # fmt: skip
    """Inside the block `loss` reuses its frozen prefix where that pays; the run remembers what became of it."""
    train = recipe.train
    once = count_steps(len(rows), train.model_copy(update={"epochs": 1, "max_steps": None}))
    again = count_steps(len(rows), train) > once
    planned = plan(loss, [*rows, *held_out], train, again, out, pad_id(tokenizer, loss.model))
    if planned.said and progress:
        say(planned.said)
    loss.prefix = planned.prefix
    try:
        yield
        said = planned.said if planned.prefix is None else str(planned.prefix)
        write_json(out / RUN_FILE, {**read_json(out / RUN_FILE), "prefix": said})
    finally:
        loss.prefix = None
        if planned.prefix is not None:
            planned.prefix.close()


def _result(model: PreTrainedModel, data: _Data, out: Path, best_step: int, seconds: float) -> RunResult:
    return RunResult(
        **run_numbers(model, out, best_step, seconds),
        examples=len(data.train),
        eval_examples=len(data.held_out),
        skipped_rows=len(data.whole.skipped),
        overlong_rows=len(data.whole.overlong),
        labels=sum(example.labels for example in data.train),
        prefix=read_json(out / RUN_FILE).get("prefix"),
    )


def _notes(data: _Data) -> list[str]:
    """Lines on the data for the report."""
    return [f"{data.whole.report()}, {len(data.held_out):,} held out", str(figures(data.train))]
