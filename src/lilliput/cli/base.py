"""What several commands begin and end with: a base with perhaps an adapter on it, and a table of facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lilliput.errors import WrongBaseError
from lilliput.progress import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lilliput.lora import Passport
    from lilliput.models import Classifier


@dataclass(frozen=True)
class Base:
    """A model ready to answer, its tokenizer, its base's number format, and the base's bytes without the adapter."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: str
    footprint_bytes: int


def open_base(
    name: str,
    *,
    number_format: str | None,
    adapter: str | None,
    allow_other_base: bool,
    labels: Sequence[str] | None = None,
) -> Base:
    """Load MODEL and put the adapter on it; with `labels` it is loaded as a classifier of these.

    Without `number_format` an adapter's base is loaded in the format that the adapter was trained over, as its passport
    says; a base alone is loaded as its checkpoint is ("none").
    """
    from lilliput.lora import load_adapter, read_passport, tokenizer_notes
    from lilliput.models import load_model, load_tokenizer

    passport = read_passport(adapter) if adapter else None  # before the model: a wrong path is told at once
    if number_format is None:
        number_format = passport.format if passport else "none"
    tokenizer = load_tokenizer(name)
    model = load_model(name, format=number_format, labels=labels)
    if passport and _other_constants(model, passport):
        model = load_model(name, format=number_format, double_quant=False, labels=labels)
    footprint = model.get_memory_footprint()
    if adapter:
        try:
            load_adapter(model, adapter, allow_other_base=allow_other_base)
        except WrongBaseError as error:
            todo = "Load it over its own base, or add --allow-other-base if you are sure."
            raise WrongBaseError(error.what, where=error.where, todo=todo) from error
    for note in tokenizer_notes(passport, tokenizer) if passport else ():
        warn(note)
    model.eval()
    return Base(model, tokenizer, number_format, footprint)


def open_classifier(
    name: str, *, number_format: str | None, adapter: str | None, allow_other_base: bool
) -> tuple[Base, Classifier]:
    """Load MODEL as a classifier: with an adapter of `tune --task classify`, or one that is a classifier by itself."""
    from lilliput.models import Classifier
    from lilliput.models.heads import classifier_of

    known = Classifier.read(adapter) if adapter else None
    base = open_base(
        name, number_format=number_format, adapter=adapter, allow_other_base=allow_other_base,
        labels=known.labels if known else None,
    )  # fmt: skip
    known = known or classifier_of(base.model, base.tokenizer)
    base.model.config.pad_token_id = known.pad_token_id
    return base, known


def _other_constants(model: PreTrainedModel, passport: Passport) -> bool:
    """Whether `model` is the adapter's base in its number format, but with block constants that are not the same.

    A passport knows the numbers by their hash only, and there are two kinds: quantized twice (the default) or not.
    """
    from lilliput.formats import FORMATS
    from lilliput.layers import identity_of

    base = identity_of(model)
    same = (base.weights_sha256, base.format) == (passport.base_weights_sha256, passport.format)
    has_two_kinds = base.format in FORMATS and "double_quant" in FORMATS[base.format].options
    return same and has_two_kinds and base.quantized_sha256 != passport.base_quantized_sha256


def size(count: float) -> str:
    """Bytes for people, in the units of disks: 98.3 MB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def facts(title: str, rows: Mapping[str, str]) -> Table:
    """A table of names and what is to be said about them, as plain text: a path may hold brackets."""
    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in rows.items():
        table.add_row(name, Text(said))
    return table
