"""The optimizers are what their names say: torch's own, the papers' formulas, and 8 bits follow 32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lilliput import optim
from lilliput.errors import FormatError, UsageError
from lilliput.optim.optimizers import slow_beta

SHAPE = (48, 100)  # 4800 numbers: kept in 8 bits, with a ragged last block


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in (SHAPE, (7,), ())]


def gradients(params: list[nn.Parameter], steps: int) -> Iterator[None]:
    """Sets the same gradients each time it is called, of sizes that differ from step to step."""
    rng = torch.Generator().manual_seed(1)
    for step in range(steps):
        for p in params:
            p.grad = (torch.randn(p.shape, generator=rng) * (0.1 + step % 3)).to(p.dtype)
        yield


def trained(make: Callable[..., torch.optim.Optimizer], steps: int = 12, **options: Any) -> list[nn.Parameter]:
    params = parameters()
    optimizer = make(params, **options)
    for _ in gradients(params, steps):
        optimizer.step()
    return params


AS_TORCH: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {}),
    ("Adam", {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    ("AdamW", {}),
    ("AdamW", {"lr": torch.tensor(0.1), "betas": (0.0, 0.9), "weight_decay": 0.3}),
    ("SGD", {}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), AS_TORCH)
def test_32_bits_are_torchs_own(name: str, options: dict[str, Any]) -> None:
    ours, theirs = trained(getattr(optim, name), **options), trained(getattr(torch.optim, name), **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad"])
def test_names_and_defaults_are_torchs(name: str) -> None:
    theirs = getattr(torch.optim, name)(parameters()).defaults
    ours = getattr(optim, name)(parameters()).defaults
    own = {"bits", "block", "min_8bit_size", "percentile_clipping"}
    assert {key: value for key, value in ours.items() if key not in own}.items() <= theirs.items()


# ---- float64 formulas, as the papers have them; x is the parameter, g the gradient, s what is remembered ----


def lion(x: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    m = s.get("m", torch.zeros_like(x))
    s["m"] = 0.99 * m + 0.01 * g
    return x - 0.01 * (torch.sign(0.9 * m + 0.1 * g) + 0.1 * x)


def lamb(x: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    s["v"] = 0.999 * s.get("v", 0) + 0.001 * g**2
    u = s["m"] / (1 - 0.9**t) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-8) + 0.1 * x
    return x - 0.01 * x.norm() / u.norm() * u


def lars(x: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    rate = 0.02 * x.norm() / (g.norm() + 0.1 * x.norm() + 1e-8)
    s["m"] = 0.9 * s.get("m", 0) + 0.01 * rate * (g + 0.1 * x)
    return x - s["m"]


def ademamix(x: Tensor, g: Tensor, s: dict[str, Any], t: int) -> Tensor:
    alpha = 5 * min(t / 8, 1)
    b3 = min(math.exp(math.log(0.9) * math.log(0.99) / ((1 - t / 8) * math.log(0.99) + t / 8 * math.log(0.9))), 0.99)
    b3 = 0.99 if t > 8 else b3
    s["m1"] = 0.9 * s.get("m1", 0) + 0.1 * g
    s["m2"] = b3 * s.get("m2", 0) + (1 - b3) * g
    s["v"] = 0.999 * s.get("v", 0) + 0.001 * g**2
    step = (s["m1"] / (1 - 0.9**t) + alpha * s["m2"]) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-8)
    return x - 0.01 * (step + 0.1 * x)


FORMULAS: list[tuple[str, Callable[..., Tensor], dict[str, Any]]] = [
    ("Lion", lion, {"lr": 0.01, "weight_decay": 0.1}),
    ("LAMB", lamb, {"lr": 0.01, "weight_decay": 0.1}),
    ("LARS", lars, {"lr": 0.01, "weight_decay": 0.1, "trust_coefficient": 0.02}),
    (
        "AdEMAMix",
        ademamix,
        {"lr": 0.01, "betas": (0.9, 0.999, 0.99), "weight_decay": 0.1, "t_alpha": 8, "t_beta3": 8},
    ),
]


@pytest.mark.parametrize(("name", "formula", "options"), FORMULAS)
def test_32_bits_are_the_papers_formula(name: str, formula: Callable[..., Tensor], options: dict[str, Any]) -> None:
    steps = 12
    expected, source = [p.detach().double() for p in parameters()], parameters()
    remembered: list[dict[str, Any]] = [{} for _ in source]
    for step, _ in enumerate(gradients(source, steps), start=1):
        expected = [formula(x, p.grad.double(), s, step) for x, p, s in zip(expected, source, remembered, strict=True)]
    for ours, right in zip(trained(getattr(optim, name), steps, **options), expected, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=2e-6)


def test_the_slow_momentum_of_ademamix_begins_like_the_fast_one() -> None:
    assert slow_beta(0.9, 0.9999, 0.0) == pytest.approx(0.9)
    assert slow_beta(0.9, 0.9999, 1.0) == pytest.approx(0.9999)
    half_life = [math.log(0.5) / math.log(slow_beta(0.9, 0.9999, share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    gaps = [b - a for a, b in pairwise(half_life)]
    assert gaps == pytest.approx([gaps[0]] * 4, rel=1e-3)  # it grows linearly


# ---- 8 bits ----

EVERY = sorted(optim.OPTIMIZERS)


def regression(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 40) -> float:
    """The final loss of a small regression whose one weight has 8192 numbers."""
    rng = torch.Generator().manual_seed(0)
    x, target = torch.randn(256, 64, generator=rng), torch.randn(64, 128, generator=rng)
    model = nn.Linear(64, 128, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(128, 64, generator=rng) * 0.1)
    optimizer = optimizer_of(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - x @ target).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", EVERY)
def test_8_bits_follow_32(name: str) -> None:
    rates = {"sgd": 2.0, "lars": 20.0, "lamb": 0.02, "rmsprop": 0.01, "adagrad": 0.3}
    options: dict[str, Any] = {"lr": rates.get(name, 0.02)}
    if name == "sgd":
        options["momentum"] = 0.9
    kind = optim.OPTIMIZERS[name]
    wide, narrow = (
        regression(lambda model, bits=bits: kind(model.named_parameters(), bits=bits, **options)) for bits in (32, 8)
    )
    assert wide < 57  # from 65: it learns
    assert narrow == pytest.approx(wide, abs=0.65)  # 1 % of where it began


def test_the_names_with_8bit_and_paged_are_options() -> None:
    for name in ("AdamW", "Adam", "Lion"):
        assert getattr(optim, f"{name}8bit")(parameters()).defaults["bits"] == 8
        both = getattr(optim, f"Paged{name}8bit")(parameters())
        assert (both.paged, both.defaults["bits"]) == (True, 8)
        assert getattr(optim, f"Paged{name}")(parameters()).paged
    for name in ("SGD", "RMSprop", "Adagrad", "LAMB", "LARS", "AdEMAMix"):
        assert getattr(optim, f"{name}8bit")(parameters()).defaults["bits"] == 8


def test_adamw8bit_takes_two_bytes_a_number_and_little_more() -> None:
    weight = nn.Parameter(torch.zeros(512, 512))
    optimizer = optim.AdamW8bit([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state_bytes() / weight.numel() == 2 + 2 * 4 / 256


def test_sgd_without_momentum_keeps_nothing() -> None:
    params = parameters()
    optimizer = optim.SGD8bit(params)
    for _ in gradients(params, 1):
        optimizer.step()
    assert optimizer.state_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 32])
def test_half_precision_parameters_move_by_float32_arithmetic(dtype: torch.dtype, bits: int) -> None:
    params, wide = parameters(dtype=dtype), parameters()
    for p, w in zip(params, wide, strict=True):
        w.data.copy_(p)
    optimizer, exact = optim.AdamW(params, lr=0.05, bits=bits), optim.AdamW(wide, lr=0.05, bits=bits)
    for _ in gradients(params, 1):
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()
        optimizer.step()
        exact.step()
    for p, w in zip(params, wide, strict=True):
        assert torch.equal(p, w.to(dtype))
        state = optimizer.state[p]
        assert state["exp_avg"].dtype == (torch.uint8 if bits == 8 and p.numel() >= 4096 else torch.float32)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("budget", [None, 20_000])
def test_paged_equals_unpaged(budget: int | None, steps: int, tmp_path: Any) -> None:
    plain = trained(optim.AdamW8bit, steps)
    paged = trained(optim.PagedAdamW8bit, steps, budget=budget, page_folder=tmp_path)
    for a, b in zip(plain, paged, strict=True):
        assert torch.equal(a, b)


# ---- as torch's optimizers behave ----


def test_parameters_without_gradient_are_left_alone_and_count_their_own_steps() -> None:
    params = parameters()
    optimizer = optim.AdamW8bit(params)
    for step, _ in enumerate(gradients(params, 3)):
        if step < 2:
            params[0].grad = None
        before = params[0].clone()
        optimizer.step()
        assert torch.equal(params[0], before) is (step < 2)
    assert [optimizer.state[p]["step"] for p in params] == [1, 3, 3]


def test_a_closure_gives_its_loss_and_has_gradients() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([weight], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert torch.equal(weight, torch.zeros(3))


def test_groups_have_their_own_options_and_schedulers_move_them() -> None:
    one, two = parameters()[:2]
    optimizer = optim.AdamW([{"params": [one]}, {"params": [two], "lr": 0.5, "bits": 8}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in gradients([one, two], 1):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.25]
    three = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": three, "weight_decay": 0.0})
    assert optimizer.param_groups[2]["param_bits"] == [32]


def test_a_gradient_that_is_not_contiguous_is_taken() -> None:
    weight, same = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(4, 6))
    grad = torch.arange(24.0).view(6, 4).t()
    for p, g in ((weight, grad), (same, grad.contiguous())):
        p.grad = g
        optim.SGD([p], lr=1.0).step()
    assert torch.equal(weight, same)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("AdamW", {"lr": -1}, "AdamW: lr=-1: expected a finite number, at least 0"),
        ("AdamW", {"lr": float("nan")}, "lr=nan"),
        ("AdamW", {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): expected numbers from 0 to below 1"),
        ("AdamW", {"betas": (0.9,)}, r"betas=\(0.9,\): expected 2 numbers"),
        ("AdEMAMix", {"betas": (0.9, 0.9)}, "expected 3 numbers"),
        ("AdEMAMix", {"t_beta3": 0}, "t_beta3=0: expected a number of steps"),
        ("AdEMAMix", {"t_beta3": 10, "betas": (0.9, 0.9, 0.5)}, "t_beta3 needs 0 < b1 <= b3"),
        ("AdamW", {"bits": 4}, "bits=4: expected 8 or 32"),
        ("AdamW", {"block": 100}, "block=100: expected a multiple of 64"),
        ("AdamW", {"min_8bit_size": -1}, "min_8bit_size=-1"),
        ("AdamW", {"percentile_clipping": 0}, "percentile_clipping=0: expected 1 to 99"),
        ("AdamW", {"budget": "2GB"}, "budget and page_folder are of paged state. Set paged=True"),
        ("AdamW8bit", {"amsgrad": True}, "AdamW8bit: amsgrad=True is not supported"),
        ("AdamW8bit", {"fused": True}, "fused=True is not supported. Each step is one pass"),
        ("AdamW8bit", {"foreach": True}, "foreach=True is not supported"),
        ("SGD", {"maximize": True}, "maximize=True is not supported. Minimise the negative loss"),
        ("RMSprop", {"centered": True}, "centered=True is not supported"),
        ("RMSprop", {"momentum": 0.9}, "RMSprop: momentum=0.9 is not supported"),
        ("Adam", {"decoupled_weight_decay": True}, "Take AdamW"),
        ("SGD", {"nesterov": True}, "nesterov needs a momentum and no dampening"),
        ("AdamW", {"optim_bits": 8}, "no option 'optim_bits'; did you mean 'bits'"),
        ("AdamW", {"weight_decai": 0.1}, "no option 'weight_decai'; did you mean 'weight_decay'"),
    ],
)
def test_an_option_that_is_wrong_is_said(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        getattr(optim, name)(parameters(), **options)


def test_what_changes_nothing_is_taken() -> None:
    optim.AdamW8bit(parameters(), amsgrad=False, fused=None, foreach=False, maximize=False, capturable=False)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(4, 4, dtype=torch.float64), r"parameter 'w' \[4, 4\]: is float64. Known: float32"),
        (torch.zeros(4, dtype=torch.complex64), "is complex64"),
        (torch.zeros(4, 6).t(), r"parameter 'w' \[6, 4\]: is not contiguous"),
    ],
)
def test_a_parameter_that_cannot_be_trained_is_named(tensor: Tensor, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        optim.AdamW([("w", nn.Parameter(tensor))])


def test_frozen_parameters_of_other_kinds_are_no_trouble() -> None:
    codes = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    weight = nn.Parameter(torch.zeros(4))
    optimizer = optim.AdamW8bit([codes, weight])
    weight.grad = torch.ones(4)
    optimizer.step()
    assert list(optimizer.state) == [weight]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [optim.AdamW8bit, optim.PagedAdamW, optim.SGD])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_changes(kind: Any, bad: float, tmp_path: Any) -> None:
    params = parameters()
    where = {"page_folder": tmp_path} if kind is optim.PagedAdamW else {}
    optimizer = kind([("one", params[0]), ("two", params[1])], **where)
    steps = gradients(params, 2)
    next(steps)
    optimizer.step()
    before = [p.clone() for p in params]
    kept = {key: value.clone() for key, value in optimizer.state[params[0]].items() if key != "step"}
    next(steps)
    params[1].grad[3] = bad
    with pytest.raises(
        FormatError, match=r"parameter 'two' \[7\]: its gradient has 1 numbers that are NaN or Inf, of 7"
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert all(torch.equal(optimizer.state[params[0]][key], value) for key, value in kept.items())
    assert optimizer.state[params[0]]["step"] == 1


def test_a_sparse_gradient_is_named() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = optim.AdamW(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        FormatError, match=r"parameter 0 of group 0 \[10, 4\]: its gradient is sparse. Take sparse=False"
    ):
        optimizer.step()
