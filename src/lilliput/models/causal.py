"""What a model can be asked for: whether it continues text, and how much of it."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lilliput.errors import UsageError

_ROW = "max_seq_len"  # MPT: its biases are made for so many tokens of a row, wherever a sequence in it begins
_POSITIONS = ("max_position_embeddings", _ROW)  # how configs call the largest number of tokens


def require_causal(model: PreTrainedModel, job: str) -> None:
    """Raise UsageError unless `model` is a causal language model, which continues a text token by token.

    Args:
        model: adapters attached or not.
        job: what it was wanted for, as a person would say it: "lilliput tune".
    """
    known = {cls.__name__ for cls in type(model).__mro__}.intersection(_causal_classes())
    if known and not model.config.is_encoder_decoder:
        return
    kind = "an encoder and a decoder" if model.config.is_encoder_decoder else "no causal language model"
    raise UsageError(
        f"{type(model).__name__} is {kind}; {job} takes models that continue a text, like Llama or GPT-2",
        where=str(model.name_or_path or "the model"),
        todo="load_model and lilliput.lora work with it: call its forward, its generate, or transformers' Trainer.",
    )


def _causal_classes() -> set[str]:
    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model can look at; None when its architecture sets no limit (BLOOM)."""
    return context_limit(model.config)


def context_limit(config: PreTrainedConfig) -> int | None:
    """The same for a config."""
    return _first_limit(config, _POSITIONS)


def longest_row(model: PreTrainedModel) -> int | None:
    """How many tokens a row of several examples may have; None where only the length of each of them counts."""
    return _first_limit(model.config, (_ROW,))


def _first_limit(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    found = (getattr(config.get_text_config(), name, None) for name in names)
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)
