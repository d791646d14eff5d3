"""The solver: against the published algorithm, written once more from it, and against rounding to nearest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lilliput import kernels
from lilliput.errors import FormatError, UsageError
from lilliput.formats import ROW
from lilliput.formats.grouped import dequantize_groups, unpack_codes
from lilliput.models import gptq
from lilliput.models.gptq import Gptq, Hessian, Solution, refit_scales, round_to_nearest, solve

PUBLISHED = Gptq(search=False, refine=0, act_order=False, static_groups=False)


def inputs(columns: int, rows: int = 600, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mix


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a Hessian."""
    hessian = Hessian(columns)
    hessian.add(inputs(columns, seed=seed))
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)), hessian.mean()


def error_of(w: Tensor, values: Tensor, hessian: Tensor) -> float:
    rest = (w - values).double()
    return float(((rest @ hessian) * rest).sum())


def published(w: Tensor, hessian: Tensor, settings: Gptq) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv 2210.17323, column by column and without blocks, in the weight's own order.

    Returns the codes, and what they stand for.
    """
    w, h, columns = w.clone(), hessian.clone(), w.shape[1]
    h += settings.damp * h.diagonal().mean() * torch.eye(columns)
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if settings.act_order else torch.arange(columns)
    width, top = settings.group or columns, 2**settings.bits - 1

    def grid(part: Tensor) -> tuple[Tensor, Tensor]:
        least, greatest = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if settings.symmetric:
            scale = (2 * torch.maximum(-least, greatest) / top).half().float()
            return scale, torch.full_like(scale, (top + 1) / 2)
        scale = ((greatest - least) / top).half().float()
        return scale, (-least / scale).round().clamp(1, top)

    fixed = [grid(w[:, start : start + width]) for start in range(0, columns, width)]
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True).float()
    w = w[:, order]
    codes, values = torch.empty_like(w), torch.empty_like(w)
    for i in range(columns):
        if settings.static_groups:
            scale, zero = fixed[int(order[i]) // width]
        elif i % width == 0:
            scale, zero = grid(w[:, i : i + width])
        codes[:, i] = ((w[:, i] / scale).round() + zero).clamp(0, top)
        values[:, i] = scale * (codes[:, i] - zero)
        error = (w[:, i] - values[:, i]) / upper[i, i]
        w[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    back = torch.argsort(order)
    return codes[:, back], values[:, back]


@pytest.mark.parametrize("backend", kernels.dispatch.BACKENDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [ROW, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_those_of_the_published_algorithm(bits: int, group: int, symmetric: bool, backend: str) -> None:
    settings = replace(PUBLISHED, bits=bits, group=group, symmetric=symmetric)
    w, hessian = problem(24, 160, seed=bits)
    with kernels.use(backend):
        found = solve(w, hessian, settings)
    codes, values = published(w, hessian, settings)
    assert torch.equal(unpack_codes(found.quantized.codes, (24, 160), bits), codes.to(torch.uint8))
    torch.testing.assert_close(dequantize_groups(found.quantized, torch.float32), values, rtol=0, atol=0)


@pytest.mark.parametrize("static", [True, False])
def test_order_of_columns_by_their_inputs(static: bool) -> None:
    settings = replace(PUBLISHED, act_order=True, static_groups=static, group=32)
    w, hessian = problem(16, 96)
    hessian = hessian * torch.linspace(0.2, 3, 96)[:, None] * torch.linspace(0.2, 3, 96)
    found = solve(w, hessian, settings)
    _, values = published(w, hessian, settings)
    torch.testing.assert_close(dequantize_groups(found.quantized, torch.float32), values, rtol=0, atol=1e-6)
    assert (found.quantized.order is None) == static


def test_blocks_of_any_size_give_the_same_codes() -> None:
    w, hessian = problem(8, 128)
    expected = solve(w, hessian, replace(PUBLISHED, block=128)).quantized
    for block in (1, 7, 32, 512):
        found = solve(w, hessian, replace(PUBLISHED, block=block)).quantized
        same = (unpack_codes(found.codes, (8, 128), 4) == unpack_codes(expected.codes, (8, 128), 4)).float().mean()
        assert same > 0.999  # sums in another order may move a number over the middle between two codes


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_step_lessens_the_error(bits: int, symmetric: bool) -> None:
    w, hessian = problem(32, 192)
    nearest = replace(Gptq(), bits=bits, symmetric=symmetric, group=64, search=False)
    ways = [
        error_of(w, dequantize_groups(round_to_nearest(w, nearest), torch.float32), hessian),
        *(
            error_of(w, dequantize_groups(solve(w, hessian, some).quantized, torch.float32), hessian)
            for some in (
                replace(nearest, refine=0, act_order=False),
                replace(nearest, refine=0, search=True),
                replace(nearest, refine=2, search=True),
            )
        ),
    ]
    assert ways == sorted(ways, reverse=True)
    assert ways[3] < 0.95 * ways[2]


def test_error_is_what_the_outputs_lose() -> None:
    x = inputs(64)
    hessian = Hessian(64)
    for part in x.split(100):
        hessian.add(part)
    w = torch.randn(20, 64, generator=torch.Generator().manual_seed(3))
    found = solve(w, hessian.mean(), Gptq(group=32))
    lost = (x @ (w - dequantize_groups(found.quantized, torch.float32)).T).double().square().sum()
    assert found.error == pytest.approx(float(lost / (x @ w.T).double().square().sum()), rel=1e-4)


def test_refitted_scales_are_the_least_squares_ones() -> None:
    w, hessian = problem(6, 64)
    settings = Gptq(group=32, refine=0, search=False)
    q = solve(w, hessian, settings).quantized
    assert q.zero is not None
    codes, scale, zero = unpack_codes(q.codes, (6, 64), 4), q.scale.float(), q.zero.float()
    new = refit_scales(w, hessian.float(), codes, scale, zero, 32)
    factor = torch.linalg.cholesky(hessian)
    for row in range(6):
        v = torch.zeros(64, 2, dtype=torch.float64)
        for g in range(2):
            v[32 * g : 32 * g + 32, g] = codes[row, 32 * g : 32 * g + 32].double() - zero[row, g]
        best = torch.linalg.lstsq(factor.T @ v, factor.T @ w[row].double()[:, None]).solution[:, 0]
        torch.testing.assert_close(new[row].double(), best, rtol=2e-3, atol=0)


def test_columns_without_inputs_get_zeros_and_are_counted() -> None:
    x = inputs(64)
    x[:, [3, 40]] = 0
    hessian = Hessian(64)
    hessian.add(x)
    w = torch.randn(8, 64)
    found = solve(w, hessian.mean(), Gptq(group=32))
    assert found.dead == 2
    assert not dequantize_groups(found.quantized, torch.float32)[:, [3, 40]].any()


def test_dampening_grows_where_inputs_are_too_few() -> None:
    hessian = Hessian(64)
    hessian.add(torch.ones(2, 64) * 1e4)
    hessian.sums -= 30 * torch.eye(64, dtype=torch.float64) * hessian.sums.diagonal().mean() * 1e-3
    found = solve(torch.randn(4, 64), hessian.mean(), Gptq(group=32))
    assert found.damp > 0.01
    assert found.error < 1


def test_hessian_does_not_depend_on_how_rows_arrive() -> None:
    x = inputs(32, rows=5000)
    one, parts = Hessian(32), Hessian(32)
    one.add(x.view(50, 100, 32))
    for part in x.split(77):
        parts.add(part)
    torch.testing.assert_close(one.mean(), 2 * x.double().T @ x.double() / 5000, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.mean(), parts.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [Gptq(group=32), Gptq(group=32, static_groups=False, symmetric=True)])
def test_stripes_of_rows_are_the_whole(settings: Gptq, monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = problem(50, 96)
    whole = solve(w, hessian, settings)
    monkeypatch.setattr(gptq, "STRIPE", 96 * 7)
    striped = solve(w, hessian, settings)
    assert striped.quantized.codes.equal(whole.quantized.codes)
    assert striped.quantized.scale.equal(whole.quantized.scale)
    assert striped.error == pytest.approx(whole.error)


def test_many_columns_are_solved_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of wide layers, taken by a narrow one: nearly all codes are those of float64, and the error is as low."""
    x, w = inputs(96), torch.randn(64, 96, generator=torch.Generator().manual_seed(5))

    def by_us() -> Solution:
        hessian = Hessian(96)
        for part in x.split(50):
            hessian.add(part)
        return solve(w, hessian.take_mean(), Gptq(group=32))

    exact = by_us()
    monkeypatch.setattr(gptq, "EXACT", 64)
    found = by_us()
    same = unpack_codes(found.quantized.codes, (64, 96), 4) == unpack_codes(exact.quantized.codes, (64, 96), 4)
    assert same.float().mean() > 0.99
    assert found.error == pytest.approx(exact.error, rel=1e-3)


def test_factoring_takes_the_matrix_over() -> None:
    _, hessian = problem(4, 64)
    kept = hessian.clone()
    found = gptq.factor(hessian, Gptq(group=32))
    assert found.dampened.data_ptr() == hessian.data_ptr()
    torch.testing.assert_close(found.dampened.diagonal() - found.raised, kept.diagonal())
    torch.testing.assert_close(found.raised, torch.full((64,), 0.01 * float(kept.diagonal().mean())).double())


def test_bad_input_is_refused() -> None:
    w, hessian = problem(4, 32)
    with pytest.raises(FormatError, match="Hessian"):
        solve(w, hessian[:5], Gptq(group=32))
    with pytest.raises(FormatError, match="NaN"):
        solve(w.masked_fill(w > 1, float("nan")), hessian, Gptq(group=32))
    with pytest.raises(FormatError, match="NaN or Inf"):
        Hessian(32).add(torch.full((2, 32), float("inf")))
    with pytest.raises(FormatError, match="not positive definite"):
        solve(w, torch.full((32, 32), float("nan"), dtype=torch.float64), Gptq(group=32))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bits": 5}, "5 bits"),
        ({"damp": 0.0}, "damp"),
        ({"correct": -0.1}, "correct"),
        ({"correct": 1.5}, "correct"),
        ({"block": 1000}, "block"),
        ({"refine": -1}, "refine"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Gptq(**wrong)  # type: ignore[arg-type]
