"""`optimizer_step`: the core against the reference bit for bit, both against torch's formulas; what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.errors import FormatError, UsageError
from lilliput.formats.blockwise import dequantize_dynamic, quantize_dynamic
from lilliput.formats.codebooks import dynamic8
from lilliput.kernels import core, gradient_norms, optimizer_step, use
from lilliput.kernels.optimizer_rules import RULES
from lilliput.kernels.optimizer_step import zero_codes
from tests.nasty import NASTY

HYPER = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "beta3": 0.9999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "decoupled": 1.0,
    "momentum": 0.9,
    "dampening": 0.1,
    "nesterov": 1.0,
    "alpha": 0.95,
    "trust_coefficient": 0.001,
}
# Parameters of 16 bits are rounded to them at each step; one that falls to the other side stays an ulp away.
WITHIN = {
    torch.float32: {"rtol": 2e-6, "atol": 4e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-4},
}
needs_core = pytest.mark.skipif(not core.status().loaded, reason="the compiled core is not loaded")
exact = core.status().instruction_set != "portable"  # where fma rounds once, as torch's does


class Run:
    """Tensors under one rule, with their state."""

    def __init__(self, rule: str, params: Sequence[Tensor], bits: int = 8, block: int = 256) -> None:
        self.rule, self.block, self.step = rule, block, 0
        self.params = [p.clone() for p in params]
        self.moments, self.absmax = [], []
        for p in params:
            mine = RULES[rule].moments
            if bits == 8:
                codes = [torch.full(p.shape, zero_codes(moment.signed), dtype=torch.uint8) for moment in mine]
                self.moments.append(codes)
                self.absmax.append([torch.zeros(-(p.numel() // -block)) for _ in mine])
            else:
                self.moments.append([torch.zeros(p.shape) for _ in mine])
                self.absmax.append([])

    def go(self, grads: Sequence[Tensor], **changed: float) -> None:
        self.step += 1
        values = {**HYPER, "step": self.step, **changed}
        hyper = {name: values[name] for name in RULES[self.rule].hyper}
        if "grad_scale" in changed:
            hyper["grad_scale"] = changed["grad_scale"]
        optimizer_step(self.rule, self.params, grads, self.moments, self.absmax, hyper, self.block)

    def state(self) -> list[Tensor]:
        return [t for lists in (self.moments, self.absmax) for each in lists for t in each]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(one: Run, other: Run) -> None:
    """State bit for bit; parameters to a few roundings (torch's own sqrt is off by one now and then)."""
    for mine, theirs in zip(one.state(), other.state(), strict=True):
        if mine.dtype == torch.uint8 and not exact:
            assert (mine.int() - theirs.int()).abs().max() <= 1
        elif mine.dtype == torch.uint8 or exact:
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-12)
    for p, q in zip(one.params, other.params, strict=True):
        torch.testing.assert_close(p, q, **WITHIN[p.dtype])


@needs_core
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_core_equals_reference_over_some_steps(rule: str, bits: int, dtype: torch.dtype) -> None:
    params = [draw(100, 77).to(dtype), draw(1).to(dtype), draw(2000, seed=1).to(dtype), torch.empty(0, dtype=dtype)]
    runs = {}
    for backend in ("reference", "core"):
        runs[backend] = Run(rule, params, bits)
        with use(backend):
            for step in range(7):
                runs[backend].go([draw(*p.shape, seed=step).to(dtype) * 0.1 for p in params])
    assert_same(runs["core"], runs["reference"])
    if bits == 8 and exact:
        assert all(map(torch.equal, runs["core"].state(), runs["reference"].state()))


@needs_core
@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("rule", RULES)
def test_nasty_gradients(rule: str, name: str) -> None:
    g = NASTY[name]().contiguous()
    p = draw(*g.shape, seed=3)
    runs = [Run(rule, [p], block=64), Run(rule, [p], block=64)]
    for run, backend in zip(runs, ("core", "reference"), strict=True):
        with use(backend):
            for _ in range(3):
                run.go([g])
    assert_same(*runs)


@pytest.mark.parametrize("block", [64, 256, 2048])
def test_blocks_of_several_sizes(backend: str, block: int) -> None:
    run = Run("adam", [draw(5000)], block=block)
    run.go([draw(5000, seed=1)])
    (codes, _), (absmax, _) = run.moments[0], run.absmax[0]
    want, scale = quantize_dynamic(0.1 * draw(5000, seed=1), dynamic8(True), block)
    torch.testing.assert_close(absmax, scale)
    assert (codes.int() - want.int()).abs().max() <= 1


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_values(signed: bool) -> None:
    book = dynamic8(signed)
    x = torch.linspace(-1 if signed else 0, 1, 10_001)
    codes, absmax = quantize_dynamic(x, book, x.numel())
    nearest = (x.double()[:, None] - book.double()).abs().min(1).values
    torch.testing.assert_close((x.double() - book[codes.long()].double()).abs(), nearest, rtol=0, atol=1e-7)
    back = dequantize_dynamic(codes, absmax * 3, book, x.numel())
    torch.testing.assert_close(back, book[codes.long()] * 3)


def test_every_code_comes_back_as_itself(backend: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    p, moment, absmax = torch.zeros(256), codes.clone(), torch.ones(1)
    hyper = {"lr": -1.0, "momentum": 1.0, "dampening": 0.0, "nesterov": 0.0, "weight_decay": 0.0, "step": 2}
    optimizer_step("sgd", [p], [torch.zeros(256)], [[moment]], [[absmax]], hyper)
    assert torch.equal(moment, codes)
    assert torch.equal(absmax, torch.ones(1))
    assert torch.equal(p, dynamic8(True))
    squares = codes.clone()
    hyper = {"lr": 0.0, "alpha": 1.0, "eps": 1e-8, "weight_decay": 0.0}
    optimizer_step("rmsprop", [p], [torch.zeros(256)], [[squares]], [[absmax]], hyper)
    assert torch.equal(squares, codes)


@needs_core
@pytest.mark.parametrize("rule", RULES)
def test_the_number_of_threads_changes_no_bit(rule: str) -> None:
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            run = Run(rule, [draw(300, 700), draw(40)])
            run.go([draw(300, 700, seed=1), draw(40, seed=2)])
            runs.append(run)
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, run.state() + run.params, runs[0].state() + runs[0].params))


def test_grad_scale_and_a_list_are_as_one_by_one(backend: str) -> None:
    params, grads = [draw(300), draw(20, 33)], [draw(300, seed=1), draw(20, 33, seed=2)]
    together = Run("adam", params)
    together.go(grads, grad_scale=0.5)
    for i in range(2):
        alone = Run("adam", params[i : i + 1])
        alone.go([grads[i] * 0.5])
        assert torch.equal(alone.params[0], together.params[i])


def test_sgd_without_momentum_keeps_nothing() -> None:
    p, g = draw(50), draw(50, seed=1)
    moved = p.clone()
    hyper = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "nesterov": 0.0, "weight_decay": 0.0, "step": 1}
    optimizer_step("sgd", [moved], [g], [[]], [[]], hyper)
    torch.testing.assert_close(moved, p - 0.1 * g)


def test_gradient_norms(backend: str) -> None:
    grads = [draw(1000), draw(3, 5).bfloat16(), torch.empty(0), torch.full((70_000,), 2e30)]
    got = gradient_norms(grads)
    torch.testing.assert_close(got, torch.stack([g.double().square().sum() for g in grads]))
    for bad in (float("nan"), float("inf")):
        grads[0][77] = bad
        assert gradient_norms(grads).isfinite().tolist() == [False, True, True, True]
    assert gradient_norms([]).shape == (0,)


def test_the_operation_is_a_good_citizen() -> None:
    run = Run("adam", [draw(64, 8)])
    values = [HYPER[name] if name != "step" else 1.0 for name in RULES["adam"].hyper]
    args = ("adam", run.params, [draw(64, 8)], run.moments[0], run.absmax[0], [*values, 1.0], 256)
    torch.library.opcheck(torch.ops.lilliput.optimizer_step, args, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.lilliput.gradient_norms, ([draw(5)],))


# ---- beside bitsandbytes ----


def theirs(monkeypatch: pytest.MonkeyPatch, exactly: bool) -> Any:
    """bitsandbytes' step; `exactly` with the nearest code, where its CPU quantizer rounds to a grid of 65,536 first."""
    bnb = pytest.importorskip("bitsandbytes")
    ops = pytest.importorskip("bitsandbytes.backends.cpu.ops")
    if exactly:

        def nearest(x: Tensor, code: Tensor, absmax: Tensor, out: Tensor, blocksize: int) -> None:
            codes, scales = quantize_dynamic(x.reshape(-1), code, blocksize)
            out.copy_(codes.view(out.shape))
            absmax.copy_(scales)

        monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", nearest)
    return bnb


def walk(kind: Any, steps: int) -> tuple[Tensor, Any]:
    p = torch.nn.Parameter(draw(512, 256))
    optimizer = kind([p], lr=1e-4, weight_decay=0.01)
    for step in range(steps):
        p.grad = draw(512, 256, seed=step) * 0.1 + draw(512, 256, seed=-1)
        optimizer.step()
    return p.detach(), optimizer.state[p]


def test_codes_after_a_step_of_adamw_equal_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    optim = pytest.importorskip("lilliput.optim")
    ours, state = walk(optim.AdamW8bit, 1)
    there, other = walk(theirs(monkeypatch, True).optim.AdamW8bit, 1)
    for mine, name, scale in (("exp_avg", "state1", "absmax1"), ("exp_avg_sq", "state2", "absmax2")):
        assert torch.equal(state[mine].view(-1), other[name].view(-1))
        assert torch.equal(state[f"{mine}_absmax"].view(-1), other[scale].view(-1))
    torch.testing.assert_close(ours, there, rtol=0, atol=1e-6)


def test_parameters_after_fifty_steps_of_adamw_equal_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    optim = pytest.importorskip("lilliput.optim")
    ours, _ = walk(optim.AdamW8bit, 50)
    there, _ = walk(theirs(monkeypatch, True).optim.AdamW8bit, 50)
    torch.testing.assert_close(ours, there, rtol=0, atol=1e-6)


# ---- what is refused ----


def test_an_unknown_rule() -> None:
    with pytest.raises(UsageError, match=r"unknown optimizer rule 'lyon'; did you mean 'lion'"):
        optimizer_step("lyon", [], [], [], [], {})


def test_a_missing_and_an_unknown_hyper_parameter() -> None:
    with pytest.raises(UsageError, match=r"lion: missing beta1, beta2, weight_decay"):
        optimizer_step("lion", [], [], [], [], {"lr": 1.0})
    with pytest.raises(UsageError, match=r"lion: unknown betas"):
        hyper = {"lr": 1.0, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "betas": 1.0}
        optimizer_step("lion", [], [], [], [], hyper)


@pytest.mark.parametrize("block", [0, 32, 100, 8192])
def test_a_block_that_is_not_allowed(block: int) -> None:
    run = Run("lion", [draw(64)])
    run.block = block
    with pytest.raises(UsageError, match=f"block={block}"):
        run.go([draw(64)])


def test_tensors_that_do_not_belong_together() -> None:
    for spoil in (
        lambda run: run.params.append(draw(3)),
        lambda run: run.moments[0].pop(),
        lambda run: run.absmax[0].__setitem__(0, torch.zeros(3)),
        lambda run: run.moments[0].__setitem__(0, torch.zeros(64, 8)),
        lambda run: run.params.__setitem__(0, draw(8, 64).T),
        lambda run: run.params.__setitem__(0, draw(64, 8).double()),
    ):
        run = Run("adam", [draw(64, 8)])
        spoil(run)
        with pytest.raises(FormatError):
            run.go([draw(64, 8)])
