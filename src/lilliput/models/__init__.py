"""A base: find it, stream it, quantize it, save it.

What loads and saves is imported when it is first used: `import lilliput` only needs `hf`, which registers our formats.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lilliput.models.catalogue import CATALOGUE, pull
from lilliput.models.locate import Source, locate

if TYPE_CHECKING:
    from lilliput.models.bnb_files import save_bnb
    from lilliput.models.calibrate import quantize_gptq
    from lilliput.models.gguf_lora import save_lora_gguf
    from lilliput.models.gguf_write import save_gguf
    from lilliput.models.gptq import Gptq
    from lilliput.models.gptq_files import save_gptq
    from lilliput.models.gptq_report import GptqReport
    from lilliput.models.heads import Classifier
    from lilliput.models.hf import FP4Config, GroupedConfig, Int8Config, NF4Config
    from lilliput.models.load import load_model
    from lilliput.models.save import save_model, save_tensors
    from lilliput.models.tokenizer import load_tokenizer

_WHERE = {
    "Classifier": "heads",
    "FP4Config": "hf",
    "Gptq": "gptq",
    "GptqReport": "gptq_report",
    "GroupedConfig": "hf",
    "Int8Config": "hf",
    "NF4Config": "hf",
    "load_model": "load",
    "load_tokenizer": "tokenizer",
    "quantize_gptq": "calibrate",
    "save_bnb": "bnb_files",
    "save_gguf": "gguf_write",
    "save_gptq": "gptq_files",
    "save_lora_gguf": "gguf_lora",
    "save_model": "save",
    "save_tensors": "save",
}

__all__ = [
    "CATALOGUE",
    "Classifier",
    "FP4Config",
    "Gptq",
    "GptqReport",
    "GroupedConfig",
    "Int8Config",
    "NF4Config",
    "Source",
    "load_model",
    "load_tokenizer",
    "locate",
    "pull",
    "quantize_gptq",
    "save_bnb",
    "save_gguf",
    "save_gptq",
    "save_lora_gguf",
    "save_model",
    "save_tensors",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
