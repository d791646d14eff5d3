"""LoraConfig: what an adapter is, under PEFT's field names and defaults, so that PEFT's files mean the same here.

Source of the names and defaults: the fields of `peft.LoraConfig` (0.21) and of its `adapter_config.json`.
Not here: PEFT's variants (DoRA, PiSSA, LoftQ, single tokens...). Their fields are refused by name when they are set,
since an adapter that silently ignored one would give other numbers than its author's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lilliput.errors import CheckpointError, UsageError, nearest

# Fields of PEFT that change the numbers and that we do not compute, with the value that means "not used".
NOT_SUPPORTED: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
# Fields of PEFT's file that say where an adapter comes from and change no number.
_BOOKKEEPING = ("auto_mapping", "peft_type", "peft_version", "revision", "runtime_config")
# Starts that leave the base as it is: for an adapter that is already trained they mean nothing.
_STARTS_OF_OTHERS = ("eva", "orthogonal")
_OFF: tuple[Any, ...] = (None, False, {}, [], "")

TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# Heads that start from random numbers; PEFT trains and saves them whole with these tasks, and so do we.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class LoraConfig(BaseModel):
    """What to adapt and how: `LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")`.

    Raises UsageError for a misspelt field (with the nearest name), a PEFT field that is not supported, or a bad value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    r: int = Field(8, ge=1, description="rank of the update: A is [r, in], B is [out, r]")
    lora_alpha: int | float = Field(8, gt=0, description="scaling is lora_alpha / r, or / sqrt(r) with use_rslora")
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout on the adapter's input, linear layers only")
    target_modules: list[str] | str | None = Field(
        None, description="endings of names, a regular expression for whole names, 'all-linear', or None: PEFT's choice"
    )
    exclude_modules: list[str] | str | None = Field(None, description="endings or a regular expression; never adapted")
    modules_to_save: list[str] | None = Field(None, description="modules trained and saved whole, e.g. a new head")
    layers_to_transform: list[int] | int | None = Field(None, description="only the blocks with these indices")
    layers_pattern: list[str] | str | None = Field(None, description="name of the list of blocks, e.g. 'layers'")
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="name or pattern -> r for these modules")
    alpha_pattern: dict[str, int | float] = Field(default_factory=dict, description="name or pattern -> lora_alpha")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which of the base's biases are trained too")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) (arXiv 2312.03732)")
    task_type: str | None = Field(None, description="CAUSAL_LM, SEQ_CLS...; SEQ_CLS and its like train their head")
    init_lora_weights: bool | Literal["gaussian"] = Field(
        True, description="True: Kaiming-uniform A, zero B; 'gaussian': normal A, deviation 1/r; False: random B too"
    )
    inference_mode: bool = Field(False, description="True: the adapter is attached frozen")
    base_model_name_or_path: str | None = Field(None, description="filled from the model when empty")
    fan_in_fan_out: bool = Field(False, description="set by us: True when a Conv1D ([in, out] weight) is adapted")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UsageError(_said(error), where="LoraConfig") from error

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for name, value in fields.items():
            if name in NOT_SUPPORTED and value not in (NOT_SUPPORTED[name], *_OFF):
                raise UsageError(f"{name}={value!r} is a field of PEFT that is not supported here", where="LoraConfig")
            if name not in cls.model_fields and name not in NOT_SUPPORTED:
                raise UsageError(f"unknown field '{name}'{nearest(name, cls.model_fields)}", where="LoraConfig")
        return {name: value for name, value in fields.items() if name not in NOT_SUPPORTED}

    @field_validator("target_modules", "exclude_modules", "modules_to_save", mode="before")
    @classmethod
    def _sets_are_sorted(cls, names: Any) -> Any:
        return sorted(names) if isinstance(names, (set, frozenset)) else names

    @model_validator(mode="after")
    def _check_together(self) -> LoraConfig:
        _check_regex("target_modules", self.target_modules)
        _check_regex("exclude_modules", self.exclude_modules)
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field):
                _check_regex(field, pattern)
        by_layer = self.layers_to_transform is not None or self.layers_pattern is not None
        if by_layer and isinstance(self.target_modules, str) and not self.wants_all_linear:
            raise UsageError(
                "layers_to_transform and layers_pattern cannot be combined with a regular expression in target_modules",
                where="LoraConfig",
                todo="Put the layer numbers into the expression, or give target_modules as a list.",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UsageError("layers_pattern needs layers_to_transform", where="LoraConfig")
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            said = f"unknown task_type '{self.task_type}'{nearest(self.task_type, TASK_TYPES)}"
            raise UsageError(said, where="LoraConfig", todo=f"Known: {', '.join(TASK_TYPES)}.")
        return self

    @property
    def wants_all_linear(self) -> bool:
        """True when target_modules is the word "all-linear" (in any case)."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """r and lora_alpha of the module `name`: the first pattern that ends its name wins, else the config's own."""
        rank = next((r for key, r in self.rank_pattern.items() if _ends_name(key, name)), self.r)
        alpha = next((a for key, a in self.alpha_pattern.items() if _ends_name(key, name)), self.lora_alpha)
        return rank, alpha

    def to_peft(self) -> dict[str, Any]:
        """The content of PEFT's `adapter_config.json`."""
        return {"peft_type": "LORA", "auto_mapping": None, **self.model_dump(), "inference_mode": True}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], where: str) -> LoraConfig:
        """Read the content of an `adapter_config.json`.

        Fields of newer PEFT versions that are switched off are passed over. Raises CheckpointError, with `where` in
        front, when the adapter is no LoRA, or uses something that we do not compute.
        """
        kind = fields.get("peft_type")
        if str(kind).upper() != "LORA":
            raise CheckpointError(f"an adapter of type {kind!r}; only LORA can be loaded", where=where)
        ours = {name: value for name, value in fields.items() if name not in _BOOKKEEPING}
        known = {**cls.model_fields, **NOT_SUPPORTED}
        ours = {name: value for name, value in ours.items() if name in known or value not in _OFF}
        if ours.get("init_lora_weights") in _STARTS_OF_OTHERS:
            ours["init_lora_weights"] = True
        try:
            return cls(**ours)
        except UsageError as error:
            raise CheckpointError(error.what, where=where, todo=error.todo) from error


def _said(error: ValidationError) -> str:
    """pydantic's findings in one line."""
    faults = ((".".join(str(part) for part in fault["loc"]), fault) for fault in error.errors())
    return "; ".join(f"{place}={fault['input']!r}: {fault['msg']}" for place, fault in faults)


def _check_regex(field: str, value: list[str] | str | None) -> None:
    if not isinstance(value, str):
        return
    try:
        re.compile(value)
    except re.error as error:
        raise UsageError(f"{field}={value!r} is no regular expression ({error})", where="LoraConfig") from error


def _ends_name(pattern: str, name: str) -> bool:
    """True when `pattern` (a name or an expression) matches the end of `name`, from a dot or from its start."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
