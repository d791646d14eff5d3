"""The grids of groups: definition, what is searched, what is refused."""

from __future__ import annotations

import pytest
import torch

from lilliput.errors import FormatError
from lilliput.formats.grids import SHARES, codes_on, minmax_grid, on_grid, search_grid


def test_asymmetric_grid_reaches_from_the_least_to_the_greatest_number() -> None:
    scale, zero = minmax_grid(torch.tensor([[-1.0, 0.25, 2.0]]), 4, symmetric=False)
    assert scale.item() == torch.tensor(3 / 15).half().float().item()
    assert zero.item() == 5
    assert codes_on(torch.tensor([[-1.0, 0.0, 2.0]]), scale, zero, 4).tolist() == [[0, 5, 15]]


def test_symmetric_grid_has_the_middle_code_for_zero() -> None:
    scale, zero = minmax_grid(torch.tensor([[-1.0, 0.25, 3.0]]), 4, symmetric=True)
    assert scale.item() == torch.tensor(6 / 15).half().float().item()
    assert zero.item() == 8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constants_are_such_as_files_hold(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    groups = [torch.randn(5, 32), torch.zeros(2, 32), torch.rand(3, 32) + 1, -torch.rand(3, 32) - 1, torch.ones(1, 1)]
    for w in groups:
        for scale, zero in (minmax_grid(w, bits, symmetric), search_grid(w, bits, symmetric)):
            assert torch.equal(scale, scale.half().float())
            assert bool((scale > 0).all())
            assert torch.equal(zero, zero.round())
            assert int(zero.min()) >= 1
            assert int(zero.max()) <= 2**bits - 1


def test_searched_grid_has_the_least_error_of_those_that_are_tried() -> None:
    torch.manual_seed(1)
    w, importance = torch.randn(4, 64), torch.rand(64)
    scale, zero = search_grid(w, 3, False, importance)
    found = (importance * (w - on_grid(w, scale, zero, 3)) ** 2).sum(-1)
    least, greatest = w.amin(-1), w.amax(-1)
    for share in SHARES:
        some = (share * (greatest - least) / 7).half().float()
        for shift in (-1, 0, 1):
            other = ((-share * least / some).round().clamp(1, 7) + shift).clamp(1, 7)
            error = (importance * (w - on_grid(w, some, other, 3)) ** 2).sum(-1)
            assert bool((found <= error * (1 + 1e-5)).all())


def test_importance_moves_the_grid() -> None:
    w = torch.tensor([[0.1, 0.2, 0.3, 10.0]])
    plain = on_grid(w, *search_grid(w, 2, False), 2)
    small = on_grid(w, *search_grid(w, 2, False, torch.tensor([100.0, 100.0, 100.0, 0.0])), 2)
    assert (w - small)[0, :3].abs().max() <= (w - plain)[0, :3].abs().max()
    assert (w - small)[0, 3].abs() > (w - plain)[0, 3].abs()


def test_numbers_that_float16_has_no_scale_for_are_refused() -> None:
    with pytest.raises(FormatError, match="float16"):
        minmax_grid(torch.tensor([[1e9, 0.0]]), 4, symmetric=False)
    with pytest.raises(FormatError, match="float16"):
        minmax_grid(torch.tensor([[float("nan"), 0.0]]), 4, symmetric=False)


def test_groups_without_numbers_have_a_grid() -> None:
    scale, zero = minmax_grid(torch.empty(3, 0), 4, symmetric=False)
    assert scale.shape == zero.shape == (3,)
