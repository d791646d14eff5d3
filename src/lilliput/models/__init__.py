"""A base: find it, stream it, quantize it, save it.

What loads and saves is imported when it is first used: `import lilliput` only needs `hf`, which registers our formats.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lilliput.models.catalogue import CATALOGUE, pull
from lilliput.models.locate import Source, locate

if TYPE_CHECKING:
    from lilliput.models.heads import Classifier
    from lilliput.models.hf import FP4Config, Int8Config, NF4Config
    from lilliput.models.load import load_model
    from lilliput.models.save import save_model
    from lilliput.models.tokenizer import load_tokenizer

_WHERE = {
    "Classifier": "heads",
    "FP4Config": "hf",
    "Int8Config": "hf",
    "NF4Config": "hf",
    "load_model": "load",
    "load_tokenizer": "tokenizer",
    "save_model": "save",
}

__all__ = [
    "CATALOGUE",
    "Classifier",
    "FP4Config",
    "Int8Config",
    "NF4Config",
    "Source",
    "load_model",
    "load_tokenizer",
    "locate",
    "pull",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
