"""The optimizer of a run, from the recipe's section `optim`.

AdamW in 32 bits, unpaged, is torch's fused one, as it always was, so that recipes without the section give what they
gave. Everything else is ours (lilliput.optim), over the same two groups: weights that decay; biases and norms, which do
not.
Not here: the schedule of the learning rate, clipping by norm (the Trainer's).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from lilliput.optim import OPTIMIZERS, BlockwiseOptimizer
from lilliput.training.recipe import OptimSection, TrainSection

_TAKES_BETAS = ("adamw", "adam", "lamb")  # with AdamW's betas; those of Lion and AdEMAMix are others
_TAKES_MOMENTUM = ("sgd", "lars")


def make_optimizer(
    module: nn.Module, decayed: Collection[str], optim: OptimSection, train: TrainSection
) -> BlockwiseOptimizer | None:
    """The optimizer of the parameters of `module` that require gradients; None where torch's fused AdamW is meant.

    Args:
        module: what is trained.
        decayed: names of the parameters that decay.
        optim, train: the recipe's sections.
    """
    if optim.is_torchs:
        return None
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [pair for pair in trained if (pair[0] in decayed) is decays], "weight_decay": decay}
        for decays, decay in ((True, train.weight_decay), (False, 0.0))
    ]
    options: dict[str, Any] = {"lr": train.learning_rate, "bits": optim.bits, "paged": optim.paged}
    if optim.paged:
        options["budget"] = optim.budget
    if optim.name in _TAKES_BETAS:
        options["betas"] = (train.adam_beta1, train.adam_beta2)
    if optim.name in _TAKES_MOMENTUM:
        options["momentum"] = optim.momentum
    return OPTIMIZERS[optim.name]([group for group in groups if group["params"]], **options)
