"""A recipe: everything a run depends on, beside the model and the data. Configuration stops here.

A recipe is a YAML file with five sections (model, lora, data, train, optim). A file says only what differs from the
recipe it names under `like` (`qlora` when it names none); `--set section.key=value` changes one value on top. Unknown
keys are refused.
Not here: what the lora fields mean (lora/config.py has them under PEFT's names).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from lilliput.errors import UsageError, nearest
from lilliput.files import write_text
from lilliput.formats import get_format
from lilliput.lora import LoraConfig
from lilliput.lora.config import NOT_SUPPORTED
from lilliput.optim.paging import parse_bytes

DEFAULT = "qlora"
RECIPE_OF_TASK = {"chat": DEFAULT, "classify": "classify"}  # the recipe of a task where none is named
# What the same things are called elsewhere, so that the suggestion is right where spelling alone would mislead.
_CALLED_ELSEWHERE = {
    "rank": "r",
    "lora_r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "steps": "max_steps",
    "micro_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "grad_accum": "accumulation",
    "gradient_accumulation_steps": "accumulation",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "patience": "early_stop",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "val_set_size": "eval_fraction",
    "quantization": "format",
    "bits": "format",
    "optim": "name",
    "optimizer": "name",
}
# Fields of LoraConfig that a run fills in itself.
_FILLED_BY_US = ("inference_mode", "base_model_name_or_path", "fan_in_fan_out", "task_type")


class Section(BaseModel):
    """One section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelSection(Section):
    """How the base is held in memory."""

    format: str = Field("nf4", description="number format of the base (int4-g64 and the like too); none: as stored")
    double_quant: bool | None = Field(
        None, description="nf4, fp4: quantize the block constants too, 4.127 instead of 4.5 bits a weight; null: yes"
    )
    threshold: float | None = Field(
        None, ge=0, description="int8: input columns with a larger number are multiplied in float32; null: 6.0"
    )
    embeddings: bool | None = Field(
        None, description="int8: the token table too, and the head where it is tied to that; null: no"
    )

    @model_validator(mode="after")
    def _options_of_the_format(self) -> ModelSection:
        if self.format != "none":
            number_format = get_format(self.format)
            for option in ("double_quant", "threshold", "embeddings"):
                number_format.option(option, getattr(self, option))
        return self


class DataSection(Section):
    """How rows become batches."""

    task: Literal["chat", "classify"] = Field(
        "chat", description="what rows are: chats to answer, or texts with labels"
    )
    text_column: str | None = Field(None, description="classify: the column with the text; null: text or sentence")
    label_column: str | None = Field(None, description="classify: the column with the label; null: label")
    max_length: int = Field(1024, ge=8, description="tokens of the longest example, and of a packed row")
    packing: bool = Field(False, description="fill rows of max_length with several examples that do not see each other")
    overlong: Literal["drop", "truncate", "error"] = Field("drop", description="what to do with longer examples")
    skip_bad_rows: bool = Field(False, description="skip and list unusable rows instead of stopping at the first")
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="share of the examples that is held out for evaluation")
    eval_limit: int = Field(100, ge=1, description="hold out at most so many examples")


class TrainSection(Section):
    """How the weights move."""

    epochs: float = Field(3, gt=0, description="passes over the data; max_steps, when given, decides instead")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps")
    batch_size: int = Field(4, ge=1, description="rows in memory at once")
    accumulation: int = Field(4, ge=1, description="batches to an optimizer step; 1x8 and 8x1 are the same step")
    learning_rate: float = Field(2e-4, gt=0, description="at the end of the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="learning rate after the warm-up")
    warmup: float = Field(0.03, ge=0, description="below 1: share of all steps; from 1: number of steps")
    weight_decay: float = Field(0.0, ge=0, description="the optimizer's; AdamW's is decoupled")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="adamw, adam, lamb: memory of the mean gradient")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="adamw, adam, lamb: of the squared gradient")
    max_grad_norm: float = Field(1.0, ge=0, description="longer gradients are scaled down to it; 0: never")
    gradient_checkpointing: bool = Field(False, description="compute activations twice and keep few: a third slower")
    reuse_prefix: Literal["auto", "on", "off"] = Field(
        "auto", description="run the layers below the lowest trained one once a row and keep their output over epochs"
    )
    prefix_memory_gb: float = Field(1.0, ge=0, description="of that output kept in memory, in 10^9 bytes; then a file")
    prefix_cache_gb: float = Field(8.0, ge=0, description="of that output kept in all, in memory and in the file")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; null: ten in a run")
    early_stop: int | None = Field(None, ge=1, description="stop after so many evaluations without a better one")
    keep_best: bool = Field(True, description="the adapter is the one with the lowest evaluation loss, not the last")
    save_every: int = Field(50, ge=1, description="steps between checkpoints; Ctrl-C and kill lose at most so many")
    seed: int = Field(0, ge=0, lt=2**32, description="of initial weights, dropout, order and the held-out share")

    @field_validator("reuse_prefix", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class OptimSection(Section):
    """Which optimizer, and where its state lives."""

    name: Literal["adamw", "adam", "sgd", "lion", "rmsprop", "adagrad", "lamb", "lars", "ademamix"] = Field(
        "adamw", description="adamw with bits 32, not paged, is torch's fused one; all others are ours"
    )
    bits: Literal[8, 32] = Field(32, description="of each moment; 8: small tensors and embeddings keep 32")
    paged: bool = Field(False, description="keep moments in a mapped file, of which budget stays in memory")
    budget: int | str | None = Field(None, description='paged: "2GB", "512MiB" or bytes; null: the system decides')
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd and lars: the memory of the gradient")

    @property
    def is_torchs(self) -> bool:
        """Whether torch's fused AdamW is meant, the default."""
        return (self.name, self.bits, self.paged) == ("adamw", 32, False)

    @model_validator(mode="after")
    def _budget_of_pages(self) -> OptimSection:
        if self.budget is not None:
            if not self.paged:
                raise UsageError("optim.budget is of paged state", todo="Set optim.paged=true.")
            parse_bytes(self.budget)
        return self


class Recipe(Section):
    """A complete training configuration. `load_recipe` reads one; `dump` writes one down."""

    model: ModelSection = Field(default_factory=ModelSection)
    lora: LoraConfig = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    optim: OptimSection = Field(default_factory=OptimSection)

    @model_validator(mode="after")
    def _what_fits_the_task(self) -> Recipe:
        data, where = self.data, f"data.task={self.data.task}"
        if data.task == "chat" and (data.text_column or data.label_column):
            raise UsageError(
                "data.text_column and data.label_column belong to texts with labels, and the rows are chats",
                todo="Set data.task=classify (--task classify).",
            )
        if data.task == "classify" and data.packing:
            raise UsageError(f"data.packing does not go with {where}", todo="Set data.packing=false.")
        if data.task == "classify" and self.train.reuse_prefix == "on":
            raise UsageError(f"train.reuse_prefix=on does not go with {where}", todo="Set train.reuse_prefix=auto.")
        return self

    @model_validator(mode="after")
    def _evaluation_for_early_stop(self) -> Recipe:
        if self.train.early_stop and not self.data.eval_fraction:
            raise UsageError(
                "train.early_stop needs evaluations, and data.eval_fraction is 0", todo="Set data.eval_fraction=0.05."
            )
        return self

    def settings(self) -> dict[str, dict[str, Any]]:
        """Sections of plain values, as in the YAML file."""
        return self.model_dump(exclude={"lora": set(_FILLED_BY_US)})

    def dump(self) -> str:
        """The recipe as YAML, each train, data and model value with its help behind it."""
        lines = ["# Written by lilliput: the complete recipe of this run.\n"]
        for name, values in self.settings().items():
            lines.append(f"{name}:\n")
            fields = _section_fields(name)
            for key, value in values.items():
                text = yaml.safe_dump({key: value}, default_flow_style=True, width=10_000).strip()[1:-1]
                lines.append(f"  {text}  # {fields[key].description}\n")
        return "".join(lines)

    def save(self, path: str | Path) -> None:
        """Write `dump()` to a file."""
        write_text(path, self.dump())


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("lilliput.training") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path = DEFAULT, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its name or from a YAML file, and change single values.

    Args:
        name_or_path: one of `recipe_names()`, or the path of a YAML file.
        settings: changes such as "lora.r=16" or "lora.target_modules=[q_proj, v_proj]"; the value is YAML.

    Raises UsageError for an unknown recipe or key (with the nearest name) and for a value that does not fit (with the
    field's help).
    """
    values, where = _read(str(name_or_path)), str(name_or_path)
    for setting in settings:
        section, key, value = _parse_setting(setting)
        values.setdefault(section, {})[key] = value
        where = "--set"
    return make_recipe(values, where if settings else str(name_or_path))


def make_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Check sections of plain values and make a Recipe of them; `where` says in errors where they come from."""
    _refuse_unknown(values, where)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(fault) for fault in error.errors()), where=where) from error
    except UsageError as error:  # LoraConfig speaks for itself, but does not know where it stands
        raise UsageError(error.what, where=where + (": lora" if error.where else ""), todo=error.todo) from error


def _read(name_or_path: str) -> dict[str, dict[str, Any]]:
    """The values of a named recipe or of a file, laid over those of the recipe it is like."""
    named = name_or_path in recipe_names()
    if not named and not Path(name_or_path).is_file():
        names = recipe_names()
        raise UsageError(
            f"no recipe and no file named '{name_or_path}'{nearest(name_or_path, names)}",
            todo=f"Recipes: {', '.join(names)}.",
        )
    folder = resources.files("lilliput.training") / "recipes"
    source = folder / f"{name_or_path}.yaml" if named else Path(name_or_path)
    values = _parse(source.read_bytes(), name_or_path)
    like = values.pop("like", None if named else DEFAULT)
    _refuse_unknown(values, name_or_path)
    if like is None:
        return values
    if like not in recipe_names():
        raise UsageError(f"like: no recipe named '{like}'{nearest(str(like), recipe_names())}", where=name_or_path)
    base = _read(like)
    return {section: {**base.get(section, {}), **values.get(section, {})} for section in Recipe.model_fields}


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(raw.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"no YAML: {' '.join(str(error).split())}", where=where) from error
    if not isinstance(values, dict):
        raise UsageError(f"expected sections {', '.join(Recipe.model_fields)}, found {values!r}", where=where)
    return values


def _parse_setting(setting: str) -> tuple[str, str, Any]:
    """ "lora.r=16" -> ("lora", "r", 16)."""
    name, equals, text = setting.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        raise UsageError(f"'{setting}' is not of the form section.key=value", where="--set", todo="Example: lora.r=16.")
    try:
        value = _number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UsageError(
            f"the value in '{setting}' is no YAML ({' '.join(str(error).split())})", where="--set"
        ) from error
    _refuse_unknown({section: {key: value}}, "--set")
    return section, key, value


def _number(value: Any) -> Any:
    """YAML 1.1 reads "1e-4" as text, since it wants a point in it; people do not know that."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _section_fields(section: str) -> dict[str, FieldInfo]:
    model = Recipe.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return {name: field for name, field in model.model_fields.items() if name not in _FILLED_BY_US}


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    for section, content in values.items():
        if section not in Recipe.model_fields:
            said = f"{section}: no such section{nearest(str(section), Recipe.model_fields)}"
            raise UsageError(said, where=where, todo=f"Sections: {', '.join(Recipe.model_fields)}.")
        if not isinstance(content, dict):
            raise UsageError(f"{section}: expected keys with values, found {content!r}", where=where)
        fields = _section_fields(section)
        for key in content:
            if key not in fields and not (
                section == "lora" and key in NOT_SUPPORTED
            ):  # LoraConfig refuses those itself
                raise UsageError(f"{section}.{key}: unknown{_suggestion(section, str(key))}", where=where)


def _all_keys() -> Iterator[str]:
    for section in Recipe.model_fields:
        yield from (f"{section}.{key}" for key in _section_fields(section))


def _suggestion(section: str, key: str) -> str:
    """What `section.key` was probably meant to be: a known other name, the key elsewhere, or the nearest spelling."""
    fields = _section_fields(section)
    right = _CALLED_ELSEWHERE.get(key, key)
    for home in (section, *Recipe.model_fields):
        if right in _section_fields(home):
            return f"; did you mean {home}.{right}?"
    close = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {section}.{close[0]}?"
    return nearest(f"{section}.{key}", _all_keys())


def _explain(fault: Any) -> str:
    """One finding of pydantic in our words: which key, its value, what was expected, what the key is for."""
    section, key = str(fault["loc"][0]), str(fault["loc"][1]) if len(fault["loc"]) > 1 else ""
    field = _section_fields(section).get(key)
    if field is None:
        return f"{section}: {fault['msg']}"
    choices = [repr(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
    expected = f"expected one of {', '.join(choices)}" if choices else fault["msg"][0].lower() + fault["msg"][1:]
    return f"{section}.{key}={fault['input']!r}: {expected} ({field.description})"
