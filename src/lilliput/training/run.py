"""A run from a model's name to an adapter, in a screen: load, attach, read, check, train, save, report.

Not here: how each of these is done.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, set_seed
from transformers.utils import logging as transformers_logging

from lilliput.data import Example, ExampleSet, Pack, figures, load_examples, pack
from lilliput.errors import DataError, UsageError
from lilliput.files import read_json, sha256_file, write_json, write_text
from lilliput.lora import LoraConfig, Passport, add_adapter, make_passport, save_adapter, trainable_parameters
from lilliput.models import load_model, load_tokenizer
from lilliput.models.causal import context_length, longest_row, require_causal
from lilliput.progress import bar, say, warn
from lilliput.training.checks import CheckResult, require, run_checks
from lilliput.training.fused import fused
from lilliput.training.prefix import plan
from lilliput.training.recipe import Recipe, TrainSection
from lilliput.training.report import Journal, RunResult, plot, read_journal, write_report, write_versions
from lilliput.training.resume import (
    RUN_FILE,
    Checkpoints,
    Guard,
    Interrupted,
    alone,
    claim,
    disk_errors,
    finish,
    interrupts,
    load_trained,
    read_state,
    stopped_early,
)
from lilliput.training.trainer import (
    LabelLoss,
    LabelTrainer,
    Rows,
    can_pack,
    count_steps,
    make_arguments,
    pad_id,
    refuse_packing,
)

_FEWEST_TO_SPLIT = 20  # examples; below it a held-out share would say nothing and cost much


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
        data: rows in JSON, JSONL, CSV or Parquet.
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
    began, data, out = time.perf_counter(), Path(data), Path(out)
    identity = _identity(model, data, recipe, eval_data)
    with quiet_libraries(), ExitStack() as held:
        tokenizer = load_tokenizer(model)
        held.enter_context(alone(out))
        checkpoint = claim(out, identity, resume=resume, overwrite=overwrite)
        recipe.save(out / "recipe.yaml")
        if (other := write_versions(out / "versions.json")) and checkpoint:
            warn(f"this run goes on with other versions, so not bit for bit: {'; '.join(other)}")
        rows = _read(data, eval_data, tokenizer, recipe, out, progress)
        base = load_base(model, recipe, progress=progress)
        held.enter_context(fused(base))
        passport = make_passport(base, tokenizer, rows.whole.sha256)
        _same_base(out, passport)
        _within_positions(base, [*rows.train, *rows.held_out])
        checks = _check(out, base, tokenizer, rows.whole, progress) if check and checkpoint is None else _checked(out)
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
    with quiet_libraries():
        tokenizer = load_tokenizer(model)
        section = recipe.data
        rows = load_examples(
            data, tokenizer, max_length=section.max_length, overlong=section.overlong,
            skip_bad_rows=section.skip_bad_rows, progress=progress,
        )  # fmt: skip
        base = load_base(model, recipe, progress=progress)
        _within_positions(base, rows.examples)
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


def _identity(model: str, data: Path, recipe: Recipe, eval_data: str | Path | None) -> dict[str, Any]:
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
    if skipped:
        write_text(
            out / "skipped_rows.jsonl", "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in skipped)
        )
    return parts


def split(examples: Sequence[Example], fraction: float, limit: int, seed: int) -> tuple[list[Example], list[Example]]:
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


def _within_positions(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Raise UsageError for an example with more tokens than the model has positions: nothing good would be learned."""
    positions = context_length(model)
    longest = max(examples, key=len)
    if positions is not None and len(longest) > positions:
        raise UsageError(
            f"{len(longest):,} tokens, and the model has {positions:,} positions",
            where=longest.origin,
            todo=f"Set data.max_length={positions}; data.overlong says what becomes of longer rows.",
        )


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


def _same_base(out: Path, passport: Passport) -> None:
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


def _check(
    out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: ExampleSet, progress: bool
) -> list[CheckResult]:
    results = run_checks(model, tokenizer, rows, show=progress, progress=progress)
    write_json(out / RUN_FILE, {**read_json(out / RUN_FILE), "checks": [asdict(result) for result in results]})
    require(results)
    if progress:
        say(f"all {len(results)} checks passed")
    return results


def _checked(out: Path) -> list[CheckResult]:
    """What was checked before a run was interrupted."""
    return [CheckResult(**result) for result in read_json(out / RUN_FILE).get("checks", [])]


def _rows(examples: Sequence[Example], recipe: Recipe) -> list[Pack]:
    return pack(examples, recipe.data.max_length) if recipe.data.packing else [Pack.of([e]) for e in examples]


def _train(
    loss: LabelLoss, tokenizer: PreTrainedTokenizerBase, data: _Data, recipe: Recipe, out: Path,
    checkpoint: Path | None, progress: bool,
) -> int:  # fmt: skip
    """Train from the start or from a checkpoint; afterwards `loss` has the adapter to keep. Returns its step."""
    train, rows, held_out = recipe.train, _rows(data.train, recipe), _rows(data.held_out, recipe)
    checkpoints, steps = Checkpoints(out / "checkpoints"), count_steps(len(rows), train)
    checkpoints.clean()
    state = read_state(checkpoint) if checkpoint else TrainerState()
    arguments = make_arguments(
        train, str(checkpoints.staging), steps, evaluate=bool(held_out), resumed=checkpoint is not None
    )
    over = _is_over(state, steps, train)
    with (
        nullcontext() if over else _reused_prefix(loss, tokenizer, rows, held_out, recipe, out, progress),
        interrupts() as interrupted,
        bar("training", steps, shown=progress) as advance,
    ):
        journal = Journal(out / "metrics.jsonl", advance, from_step=state.global_step)
        if not over:
            trainer = LabelTrainer(
                loss,
                arguments,
                pad_token_id=pad_id(tokenizer, loss.model),
                train_dataset=Rows(rows, step_rows=train.batch_size * train.accumulation, seed=train.seed),
                eval_dataset=held_out or None,
                callbacks=[journal, Guard(checkpoints, train.early_stop, interrupted)],
            )
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


def _is_over(state: TrainerState, steps: int, train: TrainSection) -> bool:
    return state.global_step >= steps or stopped_early(state, train.early_stop)


def _checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Recompute activations in backward instead of keeping them (transformers renamed it in version 5)."""
    if on:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _result(model: PreTrainedModel, data: _Data, out: Path, best_step: int, seconds: float) -> RunResult:
    lines = read_journal(out / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    evals = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    last_tenth = losses[-max(1, len(losses) // 10) :]
    tokens, spent = lines[-1]["tokens"], lines[-1]["seconds"]
    return RunResult(
        out=out,
        adapter=out / "adapter",
        report=out / "report.md",
        steps=lines[-1]["step"],
        best_step=best_step,
        train_loss=sum(last_tenth) / len(last_tenth),
        eval_loss=evals.get(best_step),
        eval_loss_before=evals.get(0),
        examples=len(data.train),
        eval_examples=len(data.held_out),
        skipped_rows=len(data.whole.skipped),
        overlong_rows=len(data.whole.overlong),
        labels=sum(example.labels for example in data.train),
        tokens=tokens,
        seconds=spent,
        train_tokens_per_second=tokens / spent if spent else 0.0,
        footprint_bytes=base_footprint(model),
        trainable=trainable_parameters(model)[0],
        total_seconds=seconds,
        prefix=read_json(out / RUN_FILE).get("prefix"),
    )


def base_footprint(model: PreTrainedModel) -> int:
    """Bytes of the base, without what is trained."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return model.get_memory_footprint() - trained


def _notes(data: _Data) -> list[str]:
    """Lines on the data for the report."""
    return [f"{data.whole.report()}, {len(data.held_out):,} held out", str(figures(data.train))]
