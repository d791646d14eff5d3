"""Our quantizers become known to transformers as soon as it can load a model, and not a second earlier.

Registering needs transformers' loader, which takes seconds to import; a program that wants `lilliput --help` should
not wait for it. So: if the loader is imported already, register now; else when it is. That moment is found by Python's
own import protocol (PEP 451: a finder that wraps the loader of one module); nothing of transformers is changed.
Not here: the quantizers themselves (models/hf.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_AWAITED = "transformers.modeling_utils"  # every `from_pretrained` of a model goes through it
_QUANTIZERS = "lilliput.models.hf"


def register_when_needed() -> None:
    """Register our quantizers with transformers, now or when its loader is imported; once, however often called."""
    if _AWAITED in sys.modules:
        import_module(_QUANTIZERS)
    elif not any(isinstance(finder, _Awaiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting())


class _Awaiting(MetaPathFinder):
    """Stands first in the import path until the awaited module is asked for, then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Loads a module as its own loader does, then imports what registers the quantizers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loader  # what others see is the module's own loader
        self._loader.exec_module(module)
        import_module(_QUANTIZERS)
