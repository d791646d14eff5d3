"""Define an operation once: its schema, its reference, its fake; backends add themselves by torch's dispatch keys.

torch's dispatcher is the registry (`torch.library`, namespace `lilliput`). The reference answers on every device that
has no kernel of its own (CompositeExplicitAutograd); on a CPU the compiled core answers where it is loaded and knows
the types.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from lilliput.errors import UsageError, nearest
from lilliput.kernels import core

LIBRARY = torch.library.Library("lilliput", "DEF")
BACKENDS = ("reference", "core")

_chosen = threading.local()


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Answer with this backend inside the block, in this thread: "reference" or "core". For tests and benchmarks.

    The backward of something computed inside must also be called inside.

    Raises:
        UsageError: no such backend, or "core" where it is not loaded.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend '{backend}'{nearest(backend, BACKENDS)}", todo="Known: reference, core.")
    if backend == "core" and not (status := core.status()).loaded:
        raise UsageError(f"the compiled core is not loaded: {status.reason}", todo="See `lilliput doctor`.")
    before = getattr(_chosen, "backend", None)
    _chosen.backend = backend
    try:
        yield
    finally:
        _chosen.backend = before


def backend() -> str:
    """Which backend answers on the CPU in this thread where it knows the types: "reference" or "core"."""
    chosen = getattr(_chosen, "backend", None)
    return chosen or ("core" if core.status().loaded else "reference")


@contextmanager
def exact() -> Iterator[None]:
    """Inside the block, in this thread, products are computed in float32 also where the core has a quicker way.

    That is one row on AVX2 (linear_4bit.py). For comparing two ways of computing the same, one of which has single
    rows and the other not.
    """
    before = is_exact()
    _chosen.exact = True
    try:
        yield
    finally:
        _chosen.exact = before


def is_exact() -> bool:
    """Whether an `exact` block is open in this thread."""
    return getattr(_chosen, "exact", False)


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Define `lilliput::name(...) -> ...` with its reference and its fake; returns the qualified name."""
    name = f"lilliput::{schema.partition('(')[0]}"
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    return name


def register_core(
    name: str, reference: Callable[..., Any], kernel: Callable[..., Any], knows: Callable[..., bool]
) -> None:
    """Let the compiled core answer `name` on the CPU.

    Args:
        reference: answers where the core is absent or does not know the arguments.
        kernel: called as `kernel(core module, *arguments)`.
        knows: whether the core can take these arguments (types, mostly).
    """

    def on_cpu(*args: Any) -> Any:
        module = _core()
        return kernel(module, *args) if module is not None and knows(*args) else reference(*args)

    LIBRARY.impl(name, on_cpu, "CPU")


def _core() -> ModuleType | None:
    return None if getattr(_chosen, "backend", None) == "reference" else core.module()
