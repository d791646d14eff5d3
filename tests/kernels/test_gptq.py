"""GPTQ's loops: the compiled core against the references, code for code, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput import kernels
from lilliput.errors import FormatError
from lilliput.formats.grids import on_grid
from lilliput.kernels import gptq
from tests.nasty import NASTY


def case(rows: int, columns: int, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """w, H, U, scale, zero and the columns' groups."""
    torch.manual_seed(rows * columns + bits)
    w = torch.randn(rows, columns)
    x = torch.randn(2 * columns + 8, columns) @ (torch.eye(columns) + 0.2 * torch.randn(columns, columns))
    hessian = (x.T @ x / len(x)).double() + 0.1 * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    scale, zero = gptq.search_grid(w, torch.ones(columns), group, bits, False)
    return w, hessian.float(), upper, scale, zero, (torch.arange(columns) // group).int()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (16, 64), (33, 100), (0, 8)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_core_and_reference_find_the_same_codes(rows: int, columns: int, bits: int) -> None:
    w, hessian, upper, scale, zero, group = case(rows, columns, 16, bits)
    codes, errors = gptq.gptq_block(w, upper, scale, zero, group, bits)
    with kernels.use("reference"):
        expected, expected_errors = gptq.gptq_block(w, upper, scale, zero, group, bits)
    assert torch.equal(codes, expected)
    assert torch.equal(errors, expected_errors)
    residual = (w - scale[:, group.long()] * (codes - zero[:, group.long()])) @ hessian
    better = gptq.gptq_descend(codes, residual, hessian, scale, zero, group, bits, 3)
    with kernels.use("reference"):
        assert torch.equal(better, gptq.gptq_descend(codes, residual, hessian, scale, zero, group, bits, 3))


def test_descent_lessens_the_error_of_every_row() -> None:
    w, hessian, _, scale, zero, group = case(20, 64, 32, 3)
    at = group.long()
    codes = (w / scale[:, at]).round().add(zero[:, at]).clamp(0, 7).to(torch.uint8)

    def errors(codes: Tensor) -> Tensor:
        rest = w - scale[:, at] * (codes - zero[:, at])
        return ((rest @ hessian) * rest).sum(-1)

    residual = (w - scale[:, at] * (codes - zero[:, at])) @ hessian
    better = gptq.gptq_descend(codes, residual, hessian, scale, zero, group, 3, 10)
    assert bool((errors(better) <= errors(codes) * (1 + 1e-5)).all())
    assert errors(better).sum() < 0.9 * errors(codes).sum()
    # where it has ended no single step of a code is an improvement
    for move in (-1, 1):
        for column in range(0, 64, 7):
            other = better.clone().int()
            other[:, column] = (other[:, column] + move).clamp(0, 7)
            assert bool((errors(other) >= errors(better) * (1 - 1e-4)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [1, 31, 64, 90])
def test_search_is_the_references(bits: int, symmetric: bool, columns: int) -> None:
    torch.manual_seed(bits)
    w, importance = torch.randn(9, columns), torch.rand(columns)
    scale, zero = gptq.search_grid(w, importance, 32, bits, symmetric)
    with kernels.use("reference"):
        expected = gptq.search_grid(w, importance, 32, bits, symmetric)
    # sums in another order may prefer the other one of two grids that are equally good
    errors = [
        sum(
            (importance[first : first + 32] * (part - on_grid(part, s[:, g], z[:, g], bits)) ** 2).sum().double()
            for g, first in enumerate(range(0, columns, 32))
            for part in (w[:, first : first + 32],)
        )
        for s, z in ((scale, zero), expected)
    ]
    assert float(errors[0]) == pytest.approx(float(errors[1]), rel=1e-4, abs=1e-9)
    assert (scale == expected[0]).float().mean() > 0.9


@pytest.mark.parametrize("name", NASTY)
def test_nasty_weights_have_codes(name: str) -> None:
    w = NASTY[name]().contiguous()
    w = w.reshape(len(w) if w.dim() == 2 else 1, -1)
    columns = w.shape[1]
    scale, zero = gptq.search_grid(w, torch.ones(columns), 32, 4, False)
    with kernels.use("reference"):
        expected = gptq.search_grid(w, torch.ones(columns), 32, 4, False)
    assert bool((scale > 0).all())
    at = torch.arange(columns) // 32

    def error(scale: Tensor, zero: Tensor) -> float:
        q = scale[:, at] * ((w / scale[:, at]).round().clamp(-zero[:, at], 15 - zero[:, at]))
        return float((w - q).double().square().sum())

    assert error(scale, zero) <= error(*expected) * (1 + 1e-4) + 1e-12


def test_opcheck() -> None:
    w, hessian, upper, scale, zero, group = case(4, 24, 16, 4)
    codes = torch.full(w.shape, 8, dtype=torch.uint8)
    for operation, arguments in (
        (torch.ops.lilliput.gptq_block, (w, upper, scale, zero, group, 4)),
        (torch.ops.lilliput.gptq_descend, (codes, w @ hessian, hessian, scale, zero, group, 4, 2)),
        (torch.ops.lilliput.search_grid, (w, torch.ones(24), 16, 4, False)),
    ):
        torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused() -> None:
    w, hessian, upper, scale, zero, group = case(4, 24, 16, 4)
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    with pytest.raises(FormatError, match="do not fit"):
        gptq.gptq_block(w, upper[:5], scale, zero, group, 4)
    with pytest.raises(FormatError, match="do not fit"):
        gptq.gptq_block(w, upper, scale[:2], zero[:2], group, 4)
    with pytest.raises(FormatError, match="at most 512"):
        gptq.gptq_block(torch.ones(1, 600), torch.eye(600), scale[:1], zero[:1], torch.zeros(600).int(), 4)
    with pytest.raises(FormatError, match="codes are"):
        gptq.gptq_descend(codes[:, :3], w, hessian, scale, zero, group, 4, 1)
    with pytest.raises(FormatError, match="groups of 0"):
        gptq.search_grid(w, torch.ones(24), 0, 4, False)
    with pytest.raises(FormatError, match="not finite"):
        gptq.search_grid(w.fill_(float("nan")), torch.ones(24), 8, 4, False)
