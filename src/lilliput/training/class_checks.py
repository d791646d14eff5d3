"""The promises of exactness for a classifier, on a few rows: padding, accumulation, gradients, saving.

As in checks.py, whose frame runs them: each returns what it measured and what to do when that is not good enough.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lilliput.data import ClassExample, ClassSet, collate_labelled
from lilliput.errors import UsageError
from lilliput.lora import active_adapters, save_adapter, set_adapter
from lilliput.models.heads import class_logits
from lilliput.training.checks import GRADIENT_AGREES, CheckResult, Finding, read_back, run_each
from lilliput.training.trainer import Batch, ClassLoss

_ROWS = 8  # rows in a check
_LOGITS_AGREE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def run_class_checks(
    model: PreTrainedModel, rows: ClassSet, *, pad_token_id: int, progress: bool = True
) -> list[CheckResult]:
    """Check every promise on a classifier with an active adapter, which is left as it is found.

    A broken promise is a result, not an exception. Raises UsageError when the model has no active adapter.
    """
    if not active_adapters(model):
        raise UsageError("the model has no active adapter to check", todo="Call add_adapter first.")
    setup = _Setup(model, rows, pad_token_id)
    return run_each(model, {name: partial(check, setup) for name, check in CLASS_CHECKS.items()}, progress=progress)


class _Setup:
    """What the checks look at."""

    def __init__(self, model: PreTrainedModel, rows: ClassSet, pad_token_id: int) -> None:
        self.model, self.pad_token_id = model, pad_token_id
        self.loss = ClassLoss(model)
        self.rows = _pick(rows.examples)

    def batch(self, rows: Sequence[ClassExample]) -> Batch:
        made = collate_labelled(rows, self.pad_token_id)
        return {name: tensor.to(self.model.device) for name, tensor in made.items()}

    def gradients_of(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Of one optimizer step over these batches, by the trained parameters' names."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            parameter.grad = None
        with torch.enable_grad():
            for batch in batches:
                self.loss(**batch, num_items_in_batch=len(self.rows))["loss"].backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Of all rows in one batch."""
        return self.gradients_of([self.batch(self.rows)])


def _pick(examples: Sequence[ClassExample]) -> list[ClassExample]:
    """Eight rows from the shortest to the middle length, so that there is padding to see, and nothing takes long."""
    order = sorted(examples, key=len)
    half = order[: max(1, len(order) // 2)]
    return [half[at * (len(half) - 1) // (_ROWS - 1)] for at in range(_ROWS)]


def _padding(setup: _Setup) -> Finding:
    """The logits of each row in a padded batch, against the row alone."""
    together = class_logits(setup.model, setup.batch(setup.rows))
    alone = torch.cat([class_logits(setup.model, setup.batch([row])) for row in setup.rows])
    apart = ((together - alone).abs().max() / alone.abs().max().clamp_min(1e-30)).item()
    detail = (
        f"logits of {len(setup.rows)} rows of {len(setup.rows[0])} to {len(setup.rows[-1])} tokens; {apart:.1e} apart"
    )
    todo = "Rows of a batch disturb each other: set train.batch_size=1 and report the model's architecture."
    return Finding(apart <= _LOGITS_AGREE.get(setup.model.dtype, 1e-2), detail, todo)


def _accumulation(setup: _Setup) -> Finding:
    """The gradients of a step in one batch of eight rows and in eight batches of one."""
    at_once = setup.gradients
    one_by_one = setup.gradients_of([setup.batch([row]) for row in setup.rows])
    size = torch.stack([g.double().norm() for g in at_once.values()]).norm().item()
    apart = torch.stack([(at_once[name] - g).double().norm() for name, g in one_by_one.items()]).norm().item()
    detail = f"gradient norm {size:.6g} at once; {apart / max(size, 1e-30):.1e} of it apart"
    todo = "Rows of a batch disturb each other: set train.batch_size=1 and report the model's architecture."
    return Finding(size > 0 and apart <= GRADIENT_AGREES.get(setup.model.dtype, 1e-2) * size, detail, todo)


def _every_trained(setup: _Setup) -> Finding:
    """No matrix of the adapter or the head without a gradient, none with one that is no number."""
    bad = [name for name, gradient in setup.gradients.items() if not (gradient.any() and gradient.isfinite().all())]
    detail = f"{len(setup.gradients) - len(bad):,} of {len(setup.gradients):,} trained tensors"
    if bad:
        detail += f"; none, or not finite, at {', '.join(bad[:3])}{' …' if len(bad) > 3 else ''}"
    todo = "These modules take no part in the forward pass: leave them out with lora.exclude_modules."
    return Finding(bool(setup.gradients) and not bad, detail, todo)


def _save_and_load(setup: _Setup) -> Finding:
    """Adapter and head written, read back, and run: the logits bit for bit."""
    model, active = setup.model, active_adapters(setup.model)
    batch = setup.batch(setup.rows)
    try:
        with tempfile.TemporaryDirectory(prefix="lilliput-") as folder:
            set_adapter(model, active[0])
            before = class_logits(model, batch)
            save_adapter(model, folder, active[0])
            with read_back(model, folder, active[0]):
                after = class_logits(model, batch)
    finally:
        set_adapter(model, active)
    apart = (before - after).abs().max().item()
    todo = "The saved adapter would not be the trained one: report lora's settings and the model's architecture."
    return Finding(apart == 0.0, f"logits differ by {apart:.3g} at most", todo)


CLASS_CHECKS: dict[str, Callable[[_Setup], Finding]] = {
    "padded rows = rows alone": _padding,
    "accumulation 1 x 8 = 8 x 1": _accumulation,
    "gradients at everything trained": _every_trained,
    "save, load, same logits": _save_and_load,
}
