"""Percentile clipping: against the definition, one norm after another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lilliput import optim
from lilliput.optim.clipping import HISTORY, clipped_scale, new_history


def test_a_gradient_is_no_longer_than_the_percentile_of_the_last_hundred() -> None:
    norms = (torch.rand(250, generator=torch.Generator().manual_seed(0)) + 0.1).tolist()
    history = new_history()
    for step, norm in enumerate(norms):
        last = sorted(norms[max(0, step + 1 - HISTORY) : step + 1])
        limit = last[len(last) * 5 // 100]
        assert clipped_scale(history, step, norm**2, 5) == pytest.approx(min(1.0, limit / norm))


def test_a_gradient_of_zeros_is_left_as_it_is() -> None:
    assert clipped_scale(new_history(), 0, 0.0, 5) == 1.0


def test_a_spike_moves_its_own_tensor_less_and_no_other() -> None:
    calm, wild = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    optimizer = optim.SGD([calm, wild], lr=1.0, percentile_clipping=50)
    for size in (1.0, 1.0, 1.0, 100.0):
        before = calm.clone(), wild.clone()
        calm.grad, wild.grad = torch.ones(4), torch.full((4,), size)
        optimizer.step()
        moved = [(now - then).abs() for now, then in zip((calm, wild), before, strict=True)]
        assert torch.allclose(moved[0], torch.ones(4))
        assert torch.allclose(moved[1], torch.ones(4))  # as the median of its own
    assert torch.equal(wild.grad, torch.full((4,), 100.0))  # the gradient itself is nobody's to change
