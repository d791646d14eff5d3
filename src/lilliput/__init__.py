"""Lilliput fine-tunes, shrinks and runs large language models on the computer you already own.

`import lilliput` makes our number formats known to transformers (registration.py) and does nothing else: each name
below is imported from its room when it is first used, so that `lilliput --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lilliput import registration
from lilliput.errors import LilliputError

if TYPE_CHECKING:
    from lilliput.evaluation.perplexity import perplexity
    from lilliput.lora import (
        LoraConfig,
        add_adapter,
        detach,
        load_adapter,
        merge,
        print_trainable_parameters,
        save_adapter,
        set_adapter,
        unmerge,
    )
    from lilliput.models import (
        FP4Config,
        GroupedConfig,
        Int8Config,
        NF4Config,
        load_model,
        load_tokenizer,
        pull,
        save_model,
    )
    from lilliput.training import tune

__version__ = "0.1.0"

_ROOMS = {
    "models": (
        "FP4Config",
        "GroupedConfig",
        "Int8Config",
        "NF4Config",
        "load_model",
        "load_tokenizer",
        "pull",
        "save_model",
    ),
    "lora": (
        "LoraConfig",
        "add_adapter",
        "detach",
        "load_adapter",
        "merge",
        "print_trainable_parameters",
        "save_adapter",
        "set_adapter",
        "unmerge",
    ),
    "training": ("tune",),
    "evaluation": ("perplexity",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "FP4Config",
    "GroupedConfig",
    "Int8Config",
    "LilliputError",
    "LoraConfig",
    "NF4Config",
    "add_adapter",
    "detach",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge",
    "perplexity",
    "print_trainable_parameters",
    "pull",
    "save_adapter",
    "save_model",
    "set_adapter",
    "tune",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'lilliput' has no attribute '{name}'")
    return getattr(import_module(f"lilliput.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.register_when_needed()
