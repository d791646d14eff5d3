"""One step of each optimizer on numbers in float32, as plain torch: the references that the kernels are tested against.

A rule is a function of the parameter p, its gradient g (already times `grad_scale`) and its moments, which it updates
in place; hyper-parameters are plain numbers. With t the number of the step, from 1, and wd the weight decay:

    adam      m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
              decoupled (AdamW): p *= 1 - lr wd before; else g += wd p at the beginning
    sgd       g += wd p;  m = momentum m + (1 - dampening) g  (m = g at t = 1);  p -= lr m, or lr (g + momentum m)
    lion      p *= 1 - lr wd;  p -= lr sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g
    rmsprop   g += wd p;  v = alpha v + (1 - alpha) g^2;  p -= lr g / (sqrt(v) + eps)
    adagrad   g += wd p;  v = v + g^2;  p -= lr g / (sqrt(v) + eps)
    lamb      m, v as adam;  u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p;  p -= lr |p| / |u| u
    lars      q = trust_coefficient |p| / (|g| + wd |p| + eps);  m = momentum m + lr q (g + wd p);  p -= m
    ademamix  m1, v as adam;  m2 = b3 m2 + (1 - b3) g;  p *= 1 - lr wd;
              p -= lr (m1 / (1 - b1^t) + alpha m2) / (sqrt(v / (1 - b2^t)) + eps)

Sources: Adam arXiv 1412.6980; AdamW arXiv 1711.05101; Lion arXiv 2302.06675; LAMB arXiv 1904.00962, algorithm 2; LARS
arXiv 1708.03888, algorithm 1; AdEMAMix arXiv 2409.03137, algorithm 1; the rest as torch.optim has them. The order of
the roundings is torch.optim's and bitsandbytes', so that parameters equal theirs. Where a norm is 0, LAMB and LARS take
1 for the quotient. Not here: moments in 8 bits (optimizer_step.py), schedules and groups (lilliput.optim).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

Hyper = Mapping[str, float]


@dataclass(frozen=True)
class Moment:
    """What an optimizer remembers of a parameter.

    Attributes:
        name: its key in the optimizer's state.
        signed: whether it can be negative; its codes come from the signed or the unsigned dynamic tree.
    """

    name: str
    signed: bool


@dataclass(frozen=True)
class Rule:
    """An optimizer's arithmetic.

    Attributes:
        name: its key in RULES.
        moments: what it remembers.
        hyper: the hyper-parameters that it needs, beside the optional `grad_scale`.
        update: called as `update(p, g, moments, hyper)` on float32 tensors of one shape; writes p and the moments.
    """

    name: str
    moments: tuple[Moment, ...]
    hyper: tuple[str, ...]
    update: Callable[[Tensor, Tensor, Sequence[Tensor], Hyper], None]


def _adam_moments(g: Tensor, m: Tensor, v: Tensor, h: Hyper) -> tuple[float, Tensor]:
    """Update m and v; returns 1 - b1^t and sqrt(v / (1 - b2^t)) + eps."""
    m.mul_(h["beta1"]).add_(g, alpha=1.0 - h["beta1"])
    v.mul_(h["beta2"]).addcmul_(g, g, value=1.0 - h["beta2"])
    denominator = (v.sqrt() / sqrt(1.0 - h["beta2"] ** h["step"])).add_(h["eps"])
    return 1.0 - h["beta1"] ** h["step"], denominator


def _adam(p: Tensor, g: Tensor, moments: Sequence[Tensor], h: Hyper) -> None:
    if h["decoupled"]:
        p.mul_(1.0 - h["lr"] * h["weight_decay"])
    else:
        g = g.add(p, alpha=h["weight_decay"])
    m, v = moments
    correction, denominator = _adam_moments(g, m, v, h)
    p.addcdiv_(m, denominator, value=-h["lr"] / correction)


def _sgd(p: Tensor, g: Tensor, moments: Sequence[Tensor], h: Hyper) -> None:
    g = g.add(p, alpha=h["weight_decay"])
    if moments:
        (m,) = moments
        fresh = h["step"] == 1
        m.mul_(0.0 if fresh else h["momentum"]).add_(g, alpha=1.0 if fresh else 1.0 - h["dampening"])
        g = g.add(m, alpha=h["momentum"]) if h["nesterov"] else m
    p.add_(g, alpha=-h["lr"])


def _lion(p: Tensor, g: Tensor, moments: Sequence[Tensor], h: Hyper) -> None:
    (m,) = moments
    p.mul_(1.0 - h["lr"] * h["weight_decay"])
    direction = torch.sign(m.mul(h["beta1"]) + g.mul(1.0 - h["beta1"]))
    p.add_(direction, alpha=-h["lr"])
    m.mul_(h["beta2"]).add_(g, alpha=1.0 - h["beta2"])


def _rmsprop(p: Tensor, g: Tensor, moments: Sequence[Tensor], h: Hyper) -> None:
    (v,) = moments
    g = g.add(p, alpha=h["weight_decay"])
    v.mul_(h["alpha"]).addcmul_(g, g, value=1.0 - h["alpha"])
    p.addcdiv_(g, v.sqrt().add_(h["eps"]), value=-h["lr"])


def _adagrad(p: Tensor, g: Tensor, moments: Sequence[Tensor], h: Hyper) -> None:
    (v,) = moments
    g = g.add(p, alpha=h["weight_decay"])
    v.addcmul_(g, g, value=1.0)
    p.addcdiv_(g, v.sqrt().add_(h["eps"]), value=-h["lr"])


def _lamb(p: Tensor, g: Tensor, moments: Sequence[Tensor], h: Hyper) -> None:
    m, v = moments
    correction, denominator = _adam_moments(g, m, v, h)
    u = (m / correction / denominator).add_(p, alpha=h["weight_decay"])
    p.add_(u, alpha=-h["lr"] * trust("lamb", _norm(p), _norm(u), h))


def _lars(p: Tensor, g: Tensor, moments: Sequence[Tensor], h: Hyper) -> None:
    (m,) = moments
    rate = h["lr"] * trust("lars", _norm(p), _norm(g), h)
    m.mul_(h["momentum"]).add_(g.add(p, alpha=h["weight_decay"]), alpha=rate)
    p.sub_(m)


def trust(rule: str, of_parameter: float, of_update: float, h: Hyper) -> float:
    """What LAMB or LARS multiply the learning rate of a tensor by, from the norms of p and of u or g."""
    if of_parameter == 0 or of_update == 0:
        return 1.0
    if rule == "lamb":
        return of_parameter / of_update
    return h["trust_coefficient"] * of_parameter / (of_update + h["weight_decay"] * of_parameter + h["eps"])


def _norm(x: Tensor) -> float:
    return float(x.double().square().sum().sqrt())


def _ademamix(p: Tensor, g: Tensor, moments: Sequence[Tensor], h: Hyper) -> None:
    fast, slow, v = moments
    slow.mul_(h["beta3"]).add_(g, alpha=1.0 - h["beta3"])
    correction, denominator = _adam_moments(g, fast, v, h)
    p.mul_(1.0 - h["lr"] * h["weight_decay"])
    p.add_((fast / correction + h["alpha"] * slow) / denominator, alpha=-h["lr"])


_M, _V = Moment("exp_avg", True), Moment("exp_avg_sq", False)
_BUFFER = Moment("momentum_buffer", True)
_ADAM = ("lr", "beta1", "beta2", "eps", "weight_decay", "step")

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("adam", (_M, _V), (*_ADAM, "decoupled"), _adam),
        Rule("sgd", (_BUFFER,), ("lr", "momentum", "dampening", "nesterov", "weight_decay", "step"), _sgd),
        Rule("lion", (_M,), ("lr", "beta1", "beta2", "weight_decay"), _lion),
        Rule("rmsprop", (Moment("square_avg", False),), ("lr", "alpha", "eps", "weight_decay"), _rmsprop),
        Rule("adagrad", (Moment("sum", False),), ("lr", "eps", "weight_decay"), _adagrad),
        Rule("lamb", (_M, _V), _ADAM, _lamb),
        Rule("lars", (_BUFFER,), ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"), _lars),
        Rule(
            "ademamix",
            (Moment("exp_avg_fast", True), Moment("exp_avg_slow", True), _V),
            (*_ADAM, "beta3", "alpha"),
            _ademamix,
        ),
    )
}
