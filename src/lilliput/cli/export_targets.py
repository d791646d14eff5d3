"""The formats of `lilliput export`, a row each: its options, its bits a weight, and who writes it.

All of them are written from the merged model, a plain Hugging Face directory in float32 (for hf: in the wanted type).
Not here: the writers themselves (`lilliput.models`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.cli.door import choose
from lilliput.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CERTIFICATE = "certificate.json"
TYPES = {"q8_0": 8.5, "q4_1": 5.0, "q4_0": 4.5, "f16": 16.0, "f32": 32.0}  # of GGUF: bits a weight
DTYPES = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0}
_GPTQ = {"bits": 4, "group": 128, "calibration": None, "samples": None, "length": None}
_KNOWN = {"type": (*TYPES,), "dtype": (*DTYPES,)}


@dataclass(frozen=True)
class Plan:
    """What is to be exported, how and where.

    Attributes:
        base_format: the number format that the adapter was trained over; None: its passport's.
        onto: "trained" or "original": the numbers that the adapter is merged onto.
        options: those of the format, with its defaults filled in.
        max_kl: a larger mean KL divergence is refused.
    """

    model: str
    adapter: str | None
    base_format: str | None
    onto: str
    allow_other_base: bool
    format: str
    options: dict[str, Any]
    out: Path
    max_kl: float
    overwrite: bool

    @property
    def target(self) -> Target:
        """The row of the format."""
        return TARGETS[self.format]

    @property
    def bits(self) -> float:
        """Of an exported weight."""
        return self.target.bits(self.options)

    @property
    def name(self) -> str:
        """What the exported model calls itself."""
        parts = [Path(self.model).name, Path(self.adapter).resolve().name if self.adapter else ""]
        return "-".join(part for part in parts if part)

    @property
    def certificate(self) -> Path:
        """Inside an exported directory, beside an exported file."""
        return self.out.with_suffix(f".{CERTIFICATE}") if self.target.is_file else self.out / CERTIFICATE


@dataclass(frozen=True)
class Target:
    """A format to export to.

    Attributes:
        options: its own options with what they are by default.
        bits: a weight's, for such options.
        write: from the merged directory to what is exported.
        is_file: it is one file, not a directory.
    """

    options: dict[str, Any]
    bits: Callable[[dict[str, Any]], float]
    write: Callable[[Plan, Path, Path], None]
    is_file: bool = False


@dataclass(frozen=True)
class Choice:
    """Another way to export, to be named where one is refused."""

    words: str
    bits: float


CHOICES = (
    Choice("--format gguf --type q8_0", 8.5),
    Choice("--format hf --dtype bfloat16", 16.0),
)


def better_choices(plan: Plan, merged_kl: float | None) -> list[str]:
    """What comes nearer to the tuned model than `plan` did, in words.

    merged_kl: the mean KL of the merged model before it was rounded; None where it is not known.
    """
    found = ["leave out --onto original"] if plan.onto == "original" else []
    if plan.format in ("nf4", "bnb"):
        found.append("--format gptq --calibration FILE (as small, and fitted to what the model reads)")
    found += [f"{choice.words} ({choice.bits:g} bits a weight)" for choice in CHOICES if choice.bits > plan.bits]
    if plan.bits < DTYPES["float32"]:
        found.append("--format hf (exact)" if merged_kl is None else f"--format hf (KL {merged_kl:.2g})")
    if plan.adapter is not None:
        found.append(f"keep the adapter beside its base: lilliput chat {plan.model} --adapter {plan.adapter} (exact)")
    return found


# ---- options -----------------------------------------------------------------------------------------------------


def options_of(to: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the format `to`, defaults filled in.

    Raises UsageError for an unknown format, an option of another one, and a value that it cannot have; DataError for a
    calibration file that is not there.
    """
    own = TARGETS[choose(to, tuple(TARGETS), "--format")].options
    for name, value in given.items():
        if value is not None and name not in own:
            owner = next(target for target, row in TARGETS.items() if name in row.options)
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} belongs to --format {owner}, not to {to}", todo="Leave it out.")
    options = {name: default if given[name] is None else given[name] for name, default in own.items()}
    for name, known in _KNOWN.items():
        if name in options:
            choose(options[name], known, f"--{name}")
    if to == "gptq":
        _check_gptq(options)
    return options


def _check_gptq(options: dict[str, Any]) -> None:
    if options["calibration"] is None:
        raise UsageError(
            "gptq fits the weights to what the model reads, and needs some of it",
            where="--calibration",
            todo="Give a text or a file of rows: --calibration FILE.",
        )
    if not options["calibration"].is_file():
        raise DataError("no such file", where=str(options["calibration"]))
    from lilliput.models import Gptq

    Gptq(bits=options["bits"], group=options["group"])  # raises for what no format has


# ---- who writes --------------------------------------------------------------------------------------------------


def _load_merged(plan: Plan, merged: Path, number_format: str = "none") -> PreTrainedModel:
    """The merged model under the name that its files are to tell."""
    from lilliput.models import load_model

    model = load_model(merged, format=number_format)
    model.name_or_path = model.config.name_or_path = plan.name
    return model


def _write_hf(plan: Plan, merged: Path, made: Path) -> None:
    os.replace(merged, made)


def _write_gguf(plan: Plan, merged: Path, made: Path) -> None:
    from lilliput.models import load_tokenizer, save_gguf

    save_gguf(_load_merged(plan, merged), made, load_tokenizer(merged), type=plan.options["type"])


def _write_gptq(plan: Plan, merged: Path, made: Path) -> None:
    from lilliput.cli.quantize_gptq import read_calibration
    from lilliput.models import Gptq, load_tokenizer, quantize_gptq

    tokenizer = load_tokenizer(merged)
    ids = read_calibration(str(merged), tokenizer, plan.options)
    settings = Gptq(bits=plan.options["bits"], group=plan.options["group"])
    quantize_gptq(merged, made, ids, settings, tokenizer=tokenizer)


def _write_nf4(plan: Plan, merged: Path, made: Path) -> None:
    from lilliput.models import load_tokenizer, save_model

    save_model(_load_merged(plan, merged, "nf4"), made, load_tokenizer(merged))


def _write_bnb(plan: Plan, merged: Path, made: Path) -> None:
    from lilliput.models import load_tokenizer, save_bnb

    save_bnb(_load_merged(plan, merged, "nf4"), made, load_tokenizer(merged))


TARGETS = {
    "hf": Target({"dtype": "float32"}, lambda options: DTYPES[options["dtype"]], _write_hf),
    "gguf": Target(
        {"type": "q8_0", "adapter_only": False}, lambda options: TYPES[options["type"]], _write_gguf, is_file=True
    ),
    "gptq": Target(_GPTQ, lambda options: float(options["bits"]), _write_gptq),
    "nf4": Target({}, lambda options: 4.127, _write_nf4),
    "bnb": Target({}, lambda options: 4.127, _write_bnb),
}
