"""Find and load the compiled core, `lilliput._core`; say once what is slower without it. Not here: any arithmetic."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

_SLOWER = (
    "Lilliput runs without its compiled core ({reason}): the results are the same, but products with 4-bit weights are "
    "{linear} times slower and quantizing is {quantize} times slower. `lilliput doctor` says how to get it."
)
# benchmarks/linear_4bit.py, reference against core: 1024 rows and one row; 2048 x 2048.
_LINEAR_SLOWER, _QUANTIZE_SLOWER = "2 to 6 (training) or 20 to 250 (generating)", "about 25"


@dataclass(frozen=True)
class CoreStatus:
    """What `lilliput doctor` shows.

    Attributes:
        loaded: whether the compiled core answers.
        instruction_set: "avx512", "avx2" or "portable"; None when it is not loaded.
        reason: why it is not loaded; empty when it is.
        threads: how many threads a call may use now (torch.get_num_threads()).
    """

    loaded: bool
    instruction_set: str | None
    reason: str
    threads: int


def status() -> CoreStatus:
    """Whether the compiled core is there, what it runs on, and if it is not, why. Warns of nothing."""
    module, reason = _load()
    name = module.instruction_set() if module else None
    return CoreStatus(module is not None, name, reason, torch.get_num_threads())


def module() -> ModuleType | None:
    """The compiled core, or None after the one warning that says what is slower without it."""
    loaded, reason = _load()
    if loaded is None:
        _warn_once(reason)
    return loaded


def arrays(*tensors: Tensor | None) -> list[object]:
    """Tensors as the core takes them quickest: contiguous (copied only if they are not) and wrapped by DLPack here.

    Left to itself the core asks each tensor's `__dlpack__`, a Python function: 3 us a tensor where this takes 0.2.
    """
    return [None if tensor is None else to_dlpack(tensor.detach().contiguous()) for tensor in tensors]


_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}  # csrc/bindings.cpp: Addressed


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """A long list of contiguous CPU tensors as the core takes it: address, size and type of each.

    0.4 us a tensor, where `arrays` takes 3. Whoever calls keeps the tensors alive until the core is done with them.
    """
    return [number for t in tensors for number in (t.data_ptr(), t.numel(), _TYPES[t.dtype])]


@cache
def _load() -> tuple[ModuleType | None, str]:
    """The module and "", or None and the reason. LILLIPUT_CORE=off leaves it out: what a machine without it sees."""
    if os.environ.get("LILLIPUT_CORE", "").lower() in ("off", "0"):
        return None, "LILLIPUT_CORE=off"
    try:
        core = importlib.import_module("lilliput._core")
        core.instruction_set()  # a wrong LILLIPUT_ISA shows here, before the first product
    except ImportError as error:
        return None, f"it is not installed or does not load: {error}"
    except RuntimeError as error:
        return None, str(error)
    return core, ""


@cache
def _warn_once(reason: str) -> None:
    text = _SLOWER.format(reason=reason, linear=_LINEAR_SLOWER, quantize=_QUANTIZE_SLOWER)
    warnings.warn(text, RuntimeWarning, stacklevel=3)
