"""Rows through frozen layers together, each token with the numbers that it has in its row alone, bit for bit.

    rows    a a a | b b b b b | c c     padded, attention sums a row in other parts than alone: equal to rounding
    joined  a a a b b b b b c c         one row without padding, attention for 3, 5 and 2 tokens by themselves

Attention is then the very computation of the row alone (attention.py). All else must give a token what it gives it in
any other company. `ALIKE` lists operations of which that is known by construction; a dense product is not among them,
since its library chooses the order of its sums by the number of rows. Which operations a model's layers run is watched,
not guessed, and the result is tried on rows of the run besides.
Not here: when states are computed and where they are kept (prefix.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lilliput.data import Pack
from lilliput.kernels import dispatch
from lilliput.training.attention import unread_mask

FEW = 8  # rows for which the 4-bit product sums in another order (csrc/ops/ops.h, few_rows_limit)
MOST_TOKENS = 1024  # joined at once: products gain nothing beyond, and the memory for them stays small
# Copies and views; arithmetic that rounds each number once; our kernels, which take a token or a number at a time;
# attention, of which joined rows get the same calls as rows alone. Not torch's silu and gelu: the last numbers of a
# thread's share go through another exp.
ALIKE = frozenset(
    f"aten::{name}"
    for name in (
        "_to_copy", "_unsafe_view", "alias", "cat", "clone", "copy_", "detach", "empty_like", "expand", "permute",
        "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unsqueeze", "view",
        "add", "add_", "mul", "mul_", "neg", "sub",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
) | {"lilliput::linear_4bit", "lilliput::rms_norm", "lilliput::swiglu"}  # fmt: skip


def lengths_of(packs: Sequence[Pack]) -> list[int]:
    """The tokens of each sequence in the rows, in order; unlike `blocks_of`, without padding."""
    starts = [0]
    at = 0
    for pack in packs:
        starts += [at + place for place, position in enumerate(pack.position_ids) if position == 0 and at + place]
        at += len(pack)
    return [end - start for start, end in zip(starts, [*starts[1:], at], strict=True)]


def called_with(packs: Sequence[Pack], device: torch.device) -> dict[str, Any]:
    """What a decoder is to be called with for rows side by side; inside `block_by_block`."""

    def row(numbers: Iterator[int]) -> Tensor:
        return torch.tensor(list(numbers), device=device).unsqueeze(0)

    return {
        "input_ids": row(token for pack in packs for token in pack.input_ids),
        "position_ids": row(position for pack in packs for position in pack.position_ids),
        "attention_mask": unread_mask(device),
        "use_cache": False,
        "blocks": [lengths_of(packs)],
    }


def groups(packs: Sequence[Pack]) -> Iterator[list[Pack]]:
    """The rows in groups of at most MOST_TOKENS, or of one."""
    group: list[Pack] = []
    for pack in packs:
        if group and sum(map(len, group)) + len(pack) > MOST_TOKENS:
            yield group
            group = []
        group.append(pack)
    if group:
        yield group


def operations_in(layers: Sequence[nn.Module], run: Callable[[], Any]) -> set[str]:
    """The names of the operations that these layers do while `run` is called, those within other ones too."""
    seen: set[str] = set()
    with ExitStack() as watched:
        for layer in layers:
            watched.enter_context(_watched(layer, seen))
        run()
    return seen


def unlike(operations: set[str], device: torch.device) -> list[str]:
    """Those of the operations that may give a token other bits in other company, sorted."""
    if device.type != "cpu" or dispatch.backend() != "core":  # the references multiply as torch does
        return sorted(operations)
    return sorted(operations - ALIKE)


class _Names(TorchDispatchMode):
    def __init__(self, seen: set[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(layer: nn.Module, seen: set[str]) -> Iterator[None]:
    stack: list[_Names] = []

    def enter(*_: Any) -> None:
        stack.append(_Names(seen).__enter__())

    def leave(*_: Any) -> None:
        stack.pop().__exit__(None, None, None)

    hooks = [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
