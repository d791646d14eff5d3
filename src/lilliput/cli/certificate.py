"""What an export is compared with and what is said of it: the truth, held-out passages, the certificate.

The truth is the adapter as it was trained: its base in the number format of its passport, the adapter beside it. Of
what it predicts only the last hidden states are kept, so that it need not be in memory with the export.
Not here: the numbers themselves (evaluation/agreement.py), the rows of a run (training/held_out.py).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.cli.base import Base, open_base
from lilliput.cli.export_targets import Plan
from lilliput.errors import DataError, UsageError
from lilliput.progress import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lilliput.data import Example
    from lilliput.evaluation import Agreement, Passage

_LONGEST_ROW = 1024  # tokens of a row given with --data where no recipe says otherwise


@dataclass(frozen=True)
class HeldOut:
    """Where the passages to compare on come from: a text, else rows, else what the adapter's run held out."""

    text: Path | None
    data: Path | None
    context: int
    segments: int

    def read(self, plan: Plan) -> str | list[Example]:
        """The text or the examples, before any model is loaded: what is missing is told at once.

        Raises DataError when there are none, or files that cannot be used.
        """
        from lilliput.evaluation import read_text
        from lilliput.models import load_tokenizer
        from lilliput.training import held_out_rows, rows_to_compare

        if self.text is not None:
            return read_text(self.text)
        if self.data is not None:
            tokenizer = load_tokenizer(plan.model)
            return rows_to_compare(self.data, tokenizer, adapter=plan.adapter, max_length=_LONGEST_ROW)
        if plan.adapter is not None:
            return held_out_rows(plan.adapter, load_tokenizer(plan.model))
        raise DataError(
            "there is no held-out text to compare the export on",
            where="--text",
            todo="Give --text FILE (plain text) or --data FILE (rows), which the model was not trained on.",
        )

    def passages(self, base: Base, found: str | list[Example]) -> list[Passage]:
        """What was read, in tokens: the first segments of a text, or rows of as many tokens in all."""
        from lilliput.evaluation import example_passages, text_passages
        from lilliput.models.causal import context_length

        if isinstance(found, str):
            return text_passages(base.model, base.tokenizer, found, context=self.context, segments=self.segments)
        return example_passages(found, tokens=self.context * self.segments, longest=context_length(base.model))

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Which text it was."""
        from lilliput.files import sha256_file

        path = self.text or self.data
        if path is None:
            return {"source": f"rows that {plan.adapter} held out"}
        return {"source": str(path), "sha256": sha256_file(path)}


@dataclass
class Truth:
    """What the export is compared with: `states` from `evaluation.hold`, and what is to be said of the base."""

    states: Any
    passages: Sequence[Passage]
    tokenizer: PreTrainedTokenizerBase
    said: dict[str, Any] = field(default_factory=dict)


def read_and_merge(plan: Plan, held_out: HeldOut, found: str | list[Example], merged: Path) -> Truth:
    """Keep what the tuned model predicts, and write it merged; when this ends the model is gone from memory."""
    from lilliput.evaluation import hold
    from lilliput.layers import identity_of
    from lilliput.lora import read_passport

    base = _open(plan, plan.base_format)
    passages = held_out.passages(base, found)
    passport = read_passport(plan.adapter) if plan.adapter else None
    weights = passport.base_weights_sha256 if passport else identity_of(base.model).weights_sha256
    said = {"base_format": base.format, "base_weights_sha256": weights}
    truth = Truth(hold(base.model, passages), passages, base.tokenizer, said)
    if plan.onto == "original":
        del base
        gc.collect()
        base = _open(plan, "none")
        _require_original(plan, base.model)
    _merge(plan, base, merged)
    return truth


def open_tuned(plan: Plan) -> Base:
    """The adapter as it was trained: its base in its numbers, with the adapter beside it."""
    return _open(plan, plan.base_format)


def _open(plan: Plan, number_format: str | None) -> Base:
    return open_base(
        plan.model, number_format=number_format, adapter=plan.adapter, allow_other_base=plan.allow_other_base
    )


def _require_original(plan: Plan, model: PreTrainedModel) -> None:
    from lilliput.layers import quantized_layers

    if any(True for _ in quantized_layers(model)):
        raise UsageError(
            f"--onto original needs the checkpoint's own numbers, and {plan.model} holds rounded ones",
            todo="Give the model that it was quantized from as MODEL, or leave out --onto.",
        )


def _merge(plan: Plan, base: Base, merged: Path) -> None:
    """Write the merged model as a plain directory: in the wanted type for hf, in float32 for all that follows."""
    import torch

    from lilliput.lora import merged_tensors
    from lilliput.models import save_tensors

    dtype = getattr(torch, plan.options.get("dtype", "float32"))
    save_tensors(base.model, merged_tensors(base.model, dtype), merged, base.tokenizer, dtype=dtype)


def compare(truth: Truth, made: Path) -> Agreement:
    """Load what was written, from its files, and compare it with the truth."""
    from lilliput.evaluation import agreement
    from lilliput.models import load_model

    gc.collect()  # models have cycles, and two of them may be too many
    return agreement(truth.states, load_model(made), truth.passages)


def certify(plan: Plan, truth: Truth, held_out: HeldOut, made: Path) -> dict[str, Any]:
    """Compare, and put down the result: what certificate.json says, but for the files."""
    import lilliput

    found = compare(truth, made)
    same_tokens = _same_tokens(truth, made)
    if not same_tokens:
        warn(f"{plan.out}: its tokenizer cuts the held-out text into other tokens than the model's own")
    return {
        "lilliput": lilliput.__version__,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": plan.model,
        "adapter": plan.adapter,
        **truth.said,
        "onto": plan.onto,
        "format": plan.format,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in plan.options.items()},
        "text": held_out.to_json(plan),
        **found.to_json(),
        "same_tokens": same_tokens,
        "max_kl": plan.max_kl,
        "passed": found.within(plan.max_kl),
        "bytes": sum(file.stat().st_size for file in files_of(made)),
    }


def _same_tokens(truth: Truth, made: Path) -> bool:
    """Whether the exported tokenizer makes the same tokens of the passages' words."""
    from lilliput.models import load_tokenizer

    theirs = load_tokenizer(made)
    words = [truth.tokenizer.decode(passage.ids) for passage in truth.passages]
    return all(
        theirs(text, verbose=False).input_ids == truth.tokenizer(text, verbose=False).input_ids for text in words
    )


def files_of(made: Path) -> list[Path]:
    """The files of an export: itself, or all in its directory."""
    return [made] if made.is_file() else sorted(path for path in made.rglob("*") if path.is_file())
