"""Beside bitsandbytes: where names are the same and the arithmetic too, numbers are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lilliput import optim
from lilliput.formats.codebooks import dynamic8

bnb = pytest.importorskip("bitsandbytes")

SHAPE = (64, 128)
SAME: list[tuple[str, dict[str, Any], tuple[str, str | None]]] = [
    ("Adam", {"lr": 1e-2}, ("exp_avg", "exp_avg_sq")),
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}, ("exp_avg", "exp_avg_sq")),
    ("SGD", {"lr": 1e-2, "momentum": 0.9}, ("momentum_buffer", None)),
    ("Lion", {"lr": 1e-2, "weight_decay": 0.1}, ("exp_avg", None)),
    ("AdEMAMix", {"lr": 1e-2}, ("exp_avg_fast", "exp_avg_sq")),
]


def trained(kind: Any, steps: int, **options: Any) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    rng = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(SHAPE, generator=rng))
    optimizer = kind([p], **options)
    for step in range(steps):
        p.grad = torch.randn(SHAPE, generator=rng) * (0.1 + step % 3)
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize(("name", "options", "keys"), SAME)
def test_in_32_bits_parameters_are_equal(name: str, options: dict[str, Any], keys: tuple[str, str | None]) -> None:
    theirs, _ = trained(getattr(bnb.optim, name), 20, **{"weight_decay": 0.0, **options})
    ours, _ = trained(getattr(optim, name), 20, **{"weight_decay": 0.0, **options})
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options", "keys"), SAME)
def test_in_8_bits_the_first_step_is_equal_and_codes_too(
    name: str, options: dict[str, Any], keys: tuple[str, str | None]
) -> None:
    theirs, bits = trained(getattr(bnb.optim, f"{name}8bit"), 1, **{"weight_decay": 0.0, **options})
    ours, mine = trained(getattr(optim, f"{name}8bit"), 1, **{"weight_decay": 0.0, **options})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    (there,), (here,) = bits.state.values(), mine.state.values()
    for key, state in zip(keys, ("state1", "state2"), strict=True):
        if key is not None:
            codes, others = here[key].flatten().long(), there[state].flatten()[: here[key].numel()].long()
            book = dynamic8(key != "exp_avg_sq")
            # Theirs are looked up on a grid of 65,536 points over [-1, 1]: a neighbour, or, where codes are finer than
            # the grid, another. Second moments have many numbers so small: 3 % of their codes differ, of others' 0.1 %.
            near = ((codes - others).abs() <= 1) | ((book[codes] - book[others]).abs() <= 2 / 65535)
            assert near.all()
            assert codes.ne(others).float().mean() < (0.04 if key == "exp_avg_sq" else 0.002)


@pytest.mark.parametrize("name", [name for name, _, _ in SAME])
def test_in_8_bits_the_path_is_the_same_to_the_rounding_of_codes(name: str) -> None:
    options = {"lr": 1e-2, **({"momentum": 0.9} if name == "SGD" else {})}
    start, _ = trained(torch.optim.SGD, 1, lr=0.0)
    theirs, _ = trained(getattr(bnb.optim, f"{name}8bit"), 20, **options)
    ours, _ = trained(getattr(optim, f"{name}8bit"), 20, **options)
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()
