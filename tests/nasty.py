"""The nasty inputs by name: what number formats and kernels meet in one list, so that every backend meets them all.

csrc/tests/nasty.h has the same names for the compiled core alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _one_huge_value() -> Tensor:
    x = _random(4, 64)
    x[1, 3] = 6e4  # still a float16
    return x


NASTY: dict[str, Callable[[], Tensor]] = {
    "random": lambda: _random(48, 64),
    "flat": lambda: torch.full((3, 64), 0.37),
    "ramp": lambda: torch.arange(-160.0, 160.0).view(5, 64),
    "plateaus": lambda: (torch.arange(256) // 7 % 5 - 2.0).view(4, 64),
    "one_huge_value": _one_huge_value,
    "all_zero": lambda: torch.zeros(2, 64),
    "negative_zero": lambda: -torch.zeros(2, 64),
    "zero_block_then_ragged_zeros": lambda: torch.cat([torch.zeros(64), torch.ones(64), torch.zeros(9)]),
    "subnormal": lambda: _random(2, 64) * 1e-42,
    "ragged_tail": lambda: _random(5, 30),
    "odd_rows": lambda: _random(7, 33),
    "odd_count": lambda: _random(131),
    "shorter_than_a_block": lambda: _random(7),
    "one_number": lambda: _random(1),
    "scalar": lambda: torch.tensor(-2.5),
    "misaligned": lambda: _random(65 * 3)[1:],
    "not_contiguous": lambda: _random(64, 20).t(),
    "empty": lambda: torch.zeros(0),
    "no_columns": lambda: torch.zeros(3, 0),
    "more_than_a_double_block": lambda: _random(300, 64),
}

NOT_FINITE: dict[str, float] = {"nan": float("nan"), "inf": float("inf"), "minus_inf": float("-inf")}
