"""The familiar names: each optimizer with its equation, its options as torch.optim or bitsandbytes call them.

`…8bit` is the same class with `bits=8`, `Paged…` with `paged=True`; everything else is base.py's. The equations are
those of kernels/optimizer_rules.py, where t counts the steps from 1 and wd is the weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lilliput.errors import UsageError
from lilliput.kernels.optimizer_rules import Moment
from lilliput.optim.base import BlockwiseOptimizer, Params


class Adam(BlockwiseOptimizer):
    """Adam, arXiv 1412.6980, with weight decay as an L2 penalty; torch.optim.Adam's names and defaults.

        g += wd p;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        p -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        params: see BlockwiseOptimizer, and there for `options` (bits, paged, overrides, …) and errors.
        lr, betas, eps, weight_decay: as above.
    """

    rule = "adam"
    decoupled = False

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **options)

    def hyper(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        """As the base's, and whether the decay is decoupled."""
        return super().hyper({**group, "decoupled": self.decoupled}, step)


class AdamW(Adam):
    """AdamW, arXiv 1711.05101: as Adam, but the decay does not pass through the moments: p *= 1 - lr wd first.

    Names and defaults are torch.optim.AdamW's.
    """

    decoupled = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class SGD(BlockwiseOptimizer):
    """Stochastic gradient descent with momentum; torch.optim.SGD's names and defaults. No momentum, no state.

        g += wd p;  m = momentum m + (1 - dampening) g  (m = g at t = 1);  p -= lr m, or nesterov: lr (g + momentum m)

    Args:
        params: see BlockwiseOptimizer, and there for `options` and errors.
        lr, momentum, dampening, weight_decay: as above.
        nesterov: look ahead; asks for a momentum and no dampening.
    """

    rule = "sgd"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise UsageError("nesterov needs a momentum and no dampening", where=type(self).__name__)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, **options)

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        """None without momentum."""
        return super().moments(group) if group["momentum"] else ()


class Lion(BlockwiseOptimizer):
    """Lion, arXiv 2302.06675, algorithm 2: the sign of a momentum, so every number moves by lr; bitsandbytes' defaults.

        p *= 1 - lr wd;  p -= lr sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g

    Args:
        params: see BlockwiseOptimizer, and there for `options` and errors.
        lr, betas, weight_decay: as above. The paper takes a third to a tenth of AdamW's lr, and as much more decay.
    """

    rule = "lion"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **options)


class RMSprop(BlockwiseOptimizer):
    """RMSprop; torch.optim.RMSprop's names and defaults, without its momentum and centring.

        g += wd p;  v = alpha v + (1 - alpha) g^2;  p -= lr g / (sqrt(v) + eps)

    Args:
        params: see BlockwiseOptimizer, and there for `options` and errors.
        lr, alpha, eps, weight_decay: as above.
        momentum: only 0.
    """

    rule = "rmsprop"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        **options: Any,
    ) -> None:
        if momentum != 0:
            raise UsageError(f"momentum={momentum!r} is not supported", where=type(self).__name__)
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}, **options)


class Adagrad(BlockwiseOptimizer):
    """Adagrad; torch.optim.Adagrad's names and defaults.

        g += wd p;  v += g^2;  p -= lr / (1 + (t - 1) lr_decay) g / (sqrt(v) + eps)

    Args:
        params: see BlockwiseOptimizer, and there for `options` and errors.
        lr, lr_decay, weight_decay, eps: as above.
        initial_accumulator_value: v at the beginning.
    """

    rule = "adagrad"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, defaults, **options)

    def hyper(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        """As the base's, with the learning rate of this step."""
        return super().hyper({**group, "lr": group["lr"] / (1 + (step - 1) * group["lr_decay"])}, step)

    def initial(self, group: Mapping[str, Any]) -> float:
        """The accumulator's first value."""
        return float(group["initial_accumulator_value"])


class LAMB(BlockwiseOptimizer):
    """LAMB, arXiv 1904.00962, algorithm 2: Adam's update, scaled to the norm of each tensor.

        m, v as Adam's;  u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p;  p -= lr |p| / |u| u

    Names and defaults are bitsandbytes', whose LAMB is another one: it bounds |u| by |p|, and only in 32 bits.

    Args:
        params: see BlockwiseOptimizer, and there for `options` and errors.
        lr, betas, eps, weight_decay: as above.
    """

    rule = "lamb"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **options)


class LARS(BlockwiseOptimizer):
    """LARS, arXiv 1708.03888, algorithm 1: momentum whose gradient is scaled to the norm of each tensor.

        q = trust_coefficient |p| / (|g| + wd |p| + eps);  m = momentum m + lr q (g + wd p);  p -= m

    bitsandbytes' LARS is another one: SGD whose update is bounded by 0.02 |p|.

    Args:
        params: see BlockwiseOptimizer, and there for `options` and errors.
        lr, momentum, weight_decay, trust_coefficient: as above; the paper takes 0.9 and 0.001.
        eps: against a division by zero.
    """

    rule = "lars"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        super().__init__(params, defaults, **options)


class AdEMAMix(BlockwiseOptimizer):
    """AdEMAMix, arXiv 2409.03137, algorithm 1: AdamW with a second, slow momentum; bitsandbytes' names and defaults.

        m1, v as Adam's;  m2 = b3 m2 + (1 - b3) g;  p *= 1 - lr wd
        p -= lr (m1 / (1 - b1^t) + alpha m2) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        params: see BlockwiseOptimizer, and there for `options` and errors.
        lr, betas, alpha, eps, weight_decay: as above.
        t_alpha: steps over which alpha grows linearly from 0; None: it is constant.
        t_beta3: steps over which b3 grows from b1, its half-life linearly (the paper's f_b3); None: constant.
    """

    rule = "ademamix"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)
        if t_beta3 is not None and not 0 < betas[0] <= betas[2]:
            raise UsageError(f"t_beta3 needs 0 < b1 <= b3, and betas are {betas}", where=type(self).__name__)

    def hyper(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        """As the base's, with alpha and b3 of this step."""
        (b1, b2, b3), alpha = group["betas"], group["alpha"]
        if group["t_alpha"] is not None:
            alpha *= min(step / group["t_alpha"], 1.0)
        if group["t_beta3"] is not None:
            b3 = slow_beta(b1, b3, min(step / group["t_beta3"], 1.0))
        return super().hyper({**group, "betas": (b1, b2, b3), "alpha": alpha}, step)


def slow_beta(b1: float, b3: float, share: float) -> float:
    """b3 after a share of its warm-up: exp(ln b1 ln b3 / ((1 - share) ln b3 + share ln b1)); b1 at 0 and b3 at 1."""
    first, last = math.log(b1), math.log(b3)
    return min(math.exp(first * last / ((1 - share) * last + share * first)), b3)


class Adam8bit(Adam):
    """`Adam` with `bits=8`."""

    kept_bits = 8


class AdamW8bit(AdamW):
    """`AdamW` with `bits=8`."""

    kept_bits = 8


class SGD8bit(SGD):
    """`SGD` with `bits=8`."""

    kept_bits = 8


class Lion8bit(Lion):
    """`Lion` with `bits=8`."""

    kept_bits = 8


class RMSprop8bit(RMSprop):
    """`RMSprop` with `bits=8`."""

    kept_bits = 8


class Adagrad8bit(Adagrad):
    """`Adagrad` with `bits=8`."""

    kept_bits = 8


class LAMB8bit(LAMB):
    """`LAMB` with `bits=8`."""

    kept_bits = 8


class LARS8bit(LARS):
    """`LARS` with `bits=8`."""

    kept_bits = 8


class AdEMAMix8bit(AdEMAMix):
    """`AdEMAMix` with `bits=8`."""

    kept_bits = 8


class PagedAdam(Adam):
    """`Adam` with `paged=True`."""

    kept_in_pages = True


class PagedAdam8bit(Adam8bit):
    """`Adam` with `bits=8, paged=True`."""

    kept_in_pages = True


class PagedAdamW(AdamW):
    """`AdamW` with `paged=True`."""

    kept_in_pages = True


class PagedAdamW8bit(AdamW8bit):
    """`AdamW` with `bits=8, paged=True`."""

    kept_in_pages = True


class PagedLion(Lion):
    """`Lion` with `paged=True`."""

    kept_in_pages = True


class PagedLion8bit(Lion8bit):
    """`Lion` with `bits=8, paged=True`."""

    kept_in_pages = True


# By the names of a recipe.
OPTIMIZERS: dict[str, type[BlockwiseOptimizer]] = {
    kind.__name__.lower(): kind for kind in (AdamW, Adam, SGD, Lion, RMSprop, Adagrad, LAMB, LARS, AdEMAMix)
}
