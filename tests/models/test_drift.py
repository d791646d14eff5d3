"""What a layer is asked for when its inputs moved: against least squares over the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.models import drift as module
from lilliput.models import gptq
from lilliput.models.drift import Drift
from lilliput.models.gptq import Gptq, Hessian, Inputs, factor


def texts(columns: int, rows: int = 700) -> tuple[Tensor, Tensor]:
    """The inputs of the original model, and those that layers before have changed."""
    generator = torch.Generator().manual_seed(columns)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    original = torch.randn(rows, columns, generator=generator) @ mix
    return original, original + 0.3 * torch.randn(rows, columns, generator=generator)


def factored(x: Tensor, settings: Gptq) -> Inputs:
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return factor(hessian.take_mean(), settings)


def least_squares(w: Tensor, original: Tensor, x: Tensor, inputs: Inputs) -> Tensor:
    """The T of least |x0 W^T - x T^T|^2 + the dampening's |W - T|^2, from its normal equations in float64."""
    w, original, x = w.double(), original.double(), x.double()
    ridge = inputs.raised.double() * len(x) / 2
    return torch.linalg.solve(x.T @ x + ridge.diag(), (x.T @ original + ridge.diag()) @ w.T).T


@pytest.mark.parametrize("rows", [[24], [96], [10, 20, 30], [64, 40]])
@pytest.mark.parametrize("settings", [Gptq(group=32), Gptq(group=32, act_order=False, damp=0.1)])
def test_it_is_the_weight_of_least_squares(rows: list[int], settings: Gptq) -> None:
    original, x = texts(64)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(count, 64, generator=generator) for count in rows]
    inputs, drift = factored(x, settings), Drift(weights)
    for before, now in zip(original.split(100), x.split(100), strict=True):
        drift.add(before, now)
    for place, w in enumerate(weights):
        found, expected = drift.target(w, place, inputs, len(x)), least_squares(w, original, x, inputs)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        half = drift.target(w, place, inputs, len(x), 0.5)
        torch.testing.assert_close(half, (w + found) / 2, rtol=1e-4, atol=1e-4)
        assert drift.target(w, place, inputs, len(x), 0.0).equal(w)
        asked = original @ w.T
        assert (asked - x @ found.T).norm() < (asked - x @ half.T).norm() < (asked - x @ w.T).norm()


@pytest.mark.parametrize("rows", [[8], [5, 9], [20, 30]])
def test_any_shape_and_many_rows_at_once(rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    original, x = texts(32, 600)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(count, 32, generator=generator) for count in rows]
    inputs, whole, shaped = factored(x, Gptq(group=32)), Drift(weights), Drift(weights)
    whole.add(original, x)
    expected = [whole.target(w, place, inputs, 600) for place, w in enumerate(weights)]
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 70)
    monkeypatch.setattr(module, "STRIPE", 96)  # three rows
    shaped.add(original.view(4, 150, 32), x.view(4, 150, 32))
    for place, w in enumerate(weights):
        torch.testing.assert_close(shaped.target(w, place, inputs, 600), expected[place], rtol=1e-4, atol=1e-5)


def test_tokens_that_were_not_added_count_as_unmoved() -> None:
    original, x = texts(32, 600)
    original[400:] = x[400:]
    w = torch.randn(40, 32, generator=torch.Generator().manual_seed(6))
    inputs, some, every = factored(x, Gptq(group=32)), Drift([w]), Drift([w])
    some.add(original[:400], x[:400])
    every.add(original, x)
    torch.testing.assert_close(some.target(w, 0, inputs, 600), every.target(w, 0, inputs, 600), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [24, 96])
def test_many_columns_are_summed_in_float32(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, x = texts(64)
    w = torch.randn(rows, 64, generator=torch.Generator().manual_seed(3))
    inputs = factored(x, Gptq(group=32))
    monkeypatch.setattr(gptq, "EXACT", 32)
    drift = Drift([w])
    drift.add(original, x)
    found = drift.target(w, 0, inputs, len(x))
    torch.testing.assert_close(found.double(), least_squares(w, original, x, inputs), rtol=1e-3, atol=1e-3)


def test_inputs_that_did_not_move_change_nothing() -> None:
    _, x = texts(64)
    w = torch.randn(96, 64, generator=torch.Generator().manual_seed(4))
    drift = Drift([w])
    drift.add(x, x.clone())
    assert drift.target(w, 0, factored(x, Gptq(group=32)), len(x)).equal(w)


def test_a_column_without_inputs_stays() -> None:
    original, x = texts(64)
    x[:, 7] = 0.0
    w = torch.randn(96, 64, generator=torch.Generator().manual_seed(5))
    drift = Drift([w])
    drift.add(original, x)
    found = drift.target(w, 0, factored(x, Gptq(group=32)), len(x))
    torch.testing.assert_close(found[:, 7], w[:, 7])
    assert found.isfinite().all()


def test_other_tokens_are_refused() -> None:
    original, x = texts(32)
    with pytest.raises(FormatError, match="original model's inputs"):
        Drift([torch.zeros(4, 32)]).add(original[:-1], x)
