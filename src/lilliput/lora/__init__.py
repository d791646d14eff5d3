"""Adapters: LoRA over any base, in PEFT's names and files, with a passport that remembers the base."""

from lilliput.lora.adapters import (
    active_adapters,
    adapters,
    add_adapter,
    delete_adapter,
    detach,
    disable_adapters,
    disabled,
    enable_adapters,
    merge,
    print_trainable_parameters,
    set_adapter,
    target_layers,
    trainable_parameters,
    unmerge,
)
from lilliput.lora.config import LoraConfig
from lilliput.lora.merging import MergedTensor, merged_tensors
from lilliput.lora.passport import Passport, make_passport, tokenizer_notes
from lilliput.lora.peft_files import load_adapter, read_passport, save_adapter

__all__ = [
    "LoraConfig",
    "MergedTensor",
    "Passport",
    "active_adapters",
    "adapters",
    "add_adapter",
    "delete_adapter",
    "detach",
    "disable_adapters",
    "disabled",
    "enable_adapters",
    "load_adapter",
    "make_passport",
    "merge",
    "merged_tensors",
    "print_trainable_parameters",
    "read_passport",
    "save_adapter",
    "set_adapter",
    "target_layers",
    "tokenizer_notes",
    "trainable_parameters",
    "unmerge",
]
