"""A classifier's run, in a screen: count the labels, put a head on the base, train adapter and head, score, save.

The base stays as it is, quantized or not; LoRA sits on its projections, and what begins afresh (the head) is trained
whole and saved in the adapter (PEFT's `modules_to_save`). The loss of a step is the mean cross entropy of its rows,
counted over all batches that it accumulates. What all runs share is in loop.py.
Not here: chats (run.py), several labels to a row, regression.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from lilliput.data import ClassExample, ClassSet, Confusion, collate_labelled, encode_labelled, read_labelled
from lilliput.data.labelled import check_classes, class_counts, length_batches
from lilliput.errors import UsageError
from lilliput.files import read_json, write_json
from lilliput.lora import LoraConfig, add_adapter, make_passport, save_adapter, trainable_parameters
from lilliput.lora.config import TASK_HEADS
from lilliput.models import Classifier, load_model, load_tokenizer
from lilliput.models.heads import class_logits, classifier_pad, fresh_modules
from lilliput.progress import say, warn
from lilliput.training.checks import CheckResult, require
from lilliput.training.class_checks import run_class_checks
from lilliput.training.fused import fused
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
from lilliput.training.recipe import Recipe
from lilliput.training.report import ClassifyResult, plot, read_journal, write_report, write_versions
from lilliput.training.resume import RUN_FILE, alone, claim, finish
from lilliput.training.trainer import ClassLoss, Rows, RunTrainer, count_steps

_TASK = "SEQ_CLS"


@dataclass(frozen=True)
class _Data:
    """The rows of a run: `train` as read, and its two parts."""

    whole: ClassSet
    train: list[ClassExample]
    held_out: list[ClassExample]
    overlong: int
    note: str


def tune_classifier(
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
) -> ClassifyResult:
    """Train a classifier: an adapter and a head for the labels of a file of texts. What `tune` does for such recipes.

    The arguments, the run's folder and the errors are those of `tune`. DataError also says: no column with the text or
    the label, a text or a label that is missing, all rows of one class, a label that only `eval_data` has.
    """
    began, data, out = time.perf_counter(), Path(data), Path(out)
    identity = identity_of_run(model, data, recipe, eval_data)
    with quiet_libraries(), ExitStack() as held:
        tokenizer = load_tokenizer(model)
        held.enter_context(alone(out))
        checkpoint = claim(out, identity, resume=resume, overwrite=overwrite)
        recipe.save(out / "recipe.yaml")
        if (other := write_versions(out / "versions.json")) and checkpoint:
            warn(f"this run goes on with other versions, so not bit for bit: {'; '.join(other)}")
        rows = _read(data, eval_data, tokenizer, recipe, out, progress)
        base = load_classifier(model, recipe, rows.whole.labels, tokenizer, progress=progress)
        held.enter_context(fused(base))
        passport = make_passport(base, tokenizer, rows.whole.sha256)
        same_base(out, passport)
        within_positions(base, [*rows.train, *rows.held_out])
        checks = _check(out, base, rows.whole, progress) if check and checkpoint is None else checked(out)
        best_step = _train(ClassLoss(base), rows, recipe, out, checkpoint, progress)
        confusion = _score(base, rows, recipe.train.batch_size)
    save_adapter(base, out / "adapter", passport=passport)
    Classifier(rows.whole.labels, recipe.data.max_length, _pad(base)).save(out / "adapter")
    result = _result(base, rows, confusion, out, best_step, time.perf_counter() - began)
    plot(read_journal(out / "metrics.jsonl"), out / "loss.png", unit="row")
    files = [data] if eval_data is None else [data, Path(eval_data)]
    write_report(result, model, files, recipe, _notes(rows), checks)
    finish(out)
    return result


def check_labelled(model: str, data: str | Path, recipe: Recipe, *, progress: bool = True) -> list[CheckResult]:
    """The exactness checks alone, on a model and labelled rows. Raises what loading them raises."""
    with quiet_libraries():
        tokenizer = load_tokenizer(model)
        rows = _examples(Path(data), None, tokenizer, recipe, progress)[0]
        base = load_classifier(model, recipe, rows.labels, tokenizer, progress=progress)
        within_positions(base, rows.examples)
        with fused(base):
            return run_class_checks(base, rows, pad_token_id=_pad(base), progress=progress)


def load_classifier(
    model: str, recipe: Recipe, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, progress: bool = True
) -> PreTrainedModel:
    """The base in the recipe's number format under a head for `labels`, with a new adapter, drawn by the recipe's seed.

    Raises UsageError where the family has no classifier, or the tokenizer nothing to pad with.
    """
    section = recipe.model
    set_seed(recipe.train.seed)
    base = load_model(model, **section.model_dump(), progress=progress, labels=labels)
    base.config.pad_token_id = classifier_pad(tokenizer, base)
    if hasattr(base.config, "use_cache"):
        base.config.use_cache = False
    set_seed(recipe.train.seed)
    add_adapter(base, _lora(recipe, base))
    trained, total = trainable_parameters(base)
    if progress:
        fresh = fresh_modules(base)
        head = f"new and trained whole: {', '.join(fresh)}" if fresh else "the head is the checkpoint's"
        say(f"{model}: {base_footprint(base) / 1e6:,.1f} MB; {head}; {trained:,} of {total:,} weights are trained")
    return base


def _lora(recipe: Recipe, base: PreTrainedModel) -> LoraConfig:
    """The recipe's adapter; whatever of the model begins afresh is trained whole."""
    heads = TASK_HEADS[_TASK]
    others = [name for name in fresh_modules(base) if not set(heads) & set(name.split("."))]
    saved = list(dict.fromkeys([*(recipe.lora.modules_to_save or []), *others]))
    return LoraConfig(**{**recipe.lora.model_dump(), "task_type": _TASK, "modules_to_save": saved or None})


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
    whole, note = _examples(data, None, tokenizer, recipe, progress)
    skipped, overlong = list(whole.skipped), len(whole.overlong)
    if eval_data is not None:
        other, _ = _examples(Path(eval_data), whole.labels, tokenizer, recipe, progress)
        skipped, overlong = skipped + other.skipped, overlong + len(other.overlong)
        train, held_out = whole.examples, other.examples
    else:
        train, held_out = split(whole.examples, section.eval_fraction, section.eval_limit, recipe.train.seed)
    if recipe.train.early_stop and not held_out:
        raise UsageError(
            "train.early_stop needs held-out rows, and there are too few", where=str(data), todo="Give --eval-data."
        )
    list_skipped(out, skipped)
    if overlong and progress:
        fate = "dropped" if section.overlong == "drop" else "truncated"
        say(f"{overlong:,} rows have more than {section.max_length:,} tokens (data.max_length): {fate}")
    return _Data(whole, train, held_out, overlong, note)


def _examples(
    path: Path, labels: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, progress: bool
) -> tuple[ClassSet, str]:
    """The examples of a file, and what is to be said about how it was read; `labels` are its own when None."""
    section = recipe.data
    texts = read_labelled(
        path,
        text_column=section.text_column,
        label_column=section.label_column,
        skip_bad_rows=section.skip_bad_rows,
    )
    if texts.note and progress:
        say(texts.note)
    if labels is None:
        labels = texts.labels()
        check_classes(path, labels)
    found = encode_labelled(
        texts, tokenizer, labels, max_length=section.max_length, overlong=section.overlong, progress=progress
    )
    return found, texts.note


def _check(out: Path, model: PreTrainedModel, rows: ClassSet, progress: bool) -> list[CheckResult]:
    results = run_class_checks(model, rows, pad_token_id=_pad(model), progress=progress)
    write_json(out / RUN_FILE, {**read_json(out / RUN_FILE), "checks": [asdict(result) for result in results]})
    require(results)
    if progress:
        say(f"all {len(results)} checks passed")
    return results


class ClassTrainer(RunTrainer):
    """The Trainer of a classifier's run. `model` is a ClassLoss; datasets hold ClassExamples."""

    def __init__(self, model: ClassLoss, args: TrainingArguments, *, pad_token_id: int, **kwargs: Any) -> None:
        super().__init__(model, args, data_collator=lambda rows: collate_labelled(rows, pad_token_id), **kwargs)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean cross entropy over all rows held out, and the share that is predicted right."""
        self.loss.eval()
        total, right, rows = 0.0, 0, 0
        for batch in self.get_eval_dataloader(eval_dataset):
            found = self.loss(**batch, num_items_in_batch=1)
            total += found["loss"].item()
            right += int(found["logits"].argmax(-1).eq(batch["labels"]).sum())
            rows += len(batch["labels"])
        return self.say_metrics(
            {f"{metric_key_prefix}_loss": total / rows, f"{metric_key_prefix}_accuracy": right / rows}
        )


def _train(loss: ClassLoss, data: _Data, recipe: Recipe, out: Path, checkpoint: Path | None, progress: bool) -> int:
    """Train from the start or from a checkpoint; afterwards `loss` has the weights to keep. Returns their step."""
    train, held_out = recipe.train, sorted(data.held_out, key=len)

    def trainer(arguments: TrainingArguments, callbacks: list[TrainerCallback]) -> ClassTrainer:
        return ClassTrainer(
            loss,
            arguments,
            pad_token_id=_pad(loss.model),
            train_dataset=Rows(data.train, step_rows=train.batch_size * train.accumulation, seed=train.seed),
            eval_dataset=held_out or None,
            make=partial(make_optimizer, optim=recipe.optim, train=train),
            callbacks=callbacks,
        )

    steps = count_steps(len(data.train), train)
    return train_or_resume(loss, trainer, train, steps, out, checkpoint, evaluate=bool(held_out), progress=progress)


def _score(model: PreTrainedModel, data: _Data, batch_size: int) -> Confusion | None:
    """The classifier's predictions of the rows held out; None where there are none."""
    if not data.held_out:
        return None
    true, predicted = [], []
    for rows in length_batches(data.held_out, batch_size):
        true += [data.held_out[row].label for row in rows]
        logits = class_logits(model, collate_labelled([data.held_out[row] for row in rows], _pad(model)))
        predicted += logits.argmax(-1).tolist()
    return Confusion.of(data.whole.labels, true, predicted)


def _pad(model: PreTrainedModel) -> int:
    pad = model.config.pad_token_id
    assert isinstance(pad, int)
    return pad


def _result(
    model: PreTrainedModel, data: _Data, confusion: Confusion | None, out: Path, best_step: int, seconds: float
) -> ClassifyResult:
    return ClassifyResult(
        **run_numbers(model, out, best_step, seconds),
        examples=len(data.train),
        eval_examples=len(data.held_out),
        skipped_rows=len(data.whole.skipped),
        overlong_rows=data.overlong,
        labels=len(data.train),
        train_counts=class_counts(data.train, data.whole.labels),
        confusion=confusion,
    )


def _notes(data: _Data) -> list[str]:
    """Lines on the data for the report."""
    counted = ", ".join(f"{name}: {count:,}" for name, count in class_counts(data.train, data.whole.labels).items())
    lengths = sorted(map(len, data.train))
    return [
        f"{data.whole.report()}, {len(data.held_out):,} held out",
        f"to train on, by class: {counted}",
        f"tokens of a row: median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}",
        *([data.note] if data.note else []),
    ]
