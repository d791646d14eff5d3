"""Keep for backward what products gave, compute the rest of a layer a second time: less memory, the same numbers.

Of what autograd keeps in a decoder layer more than half is cheap to make again: norms, rotated queries and keys,
silu(gate) and silu(gate) * up. The outputs of matrix products and of attention are dear. So a layer's input and those
outputs are kept, and backward starts by running the layer's remaining operations again, on the same numbers: the
gradients are equal bit for bit (unlike whole-layer checkpointing, which also runs every product twice).

Source: selective activation recomputation, Korthikanti et al., arXiv 2205.05198, section 5, turned to products. Through
public doors only: transformers' activation checkpointing of a model's layers, torch's selective checkpoint policy.
Not here: whole-layer checkpointing (`train.gradient_checkpointing`, run.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lilliput import kernels  # noqa: F401  defines torch.ops.lilliput

_PRODUCTS = {
    torch.ops.lilliput.lora_linear_4bit.default,
    torch.ops.lilliput.linear_4bit.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def keep_products_only(model: PreTrainedModel) -> None:
    """Let the layers of `model` recompute in backward all but their products.

    `model.activation_checkpointing_disable()` takes it back. Dropout draws the same numbers again. Raises ValueError
    for an architecture that transformers cannot checkpoint.
    """
    contexts = partial(create_selective_checkpoint_contexts, _keeps)
    options: dict[str, Any] = {"use_reentrant": False, "context_fn": contexts}
    # transformers renamed it in version 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def _keeps(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
