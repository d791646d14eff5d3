"""The output head and the cross entropy in one operation, a few labelled tokens at a time.

For labelled positions with hidden states h (n rows), head W (v x d), bias b and labels y:

    z = h W^T + b          loss = sum_i logsumexp(z_i) - z_i[y_i]          dloss/dz = softmax(z) - onehot(y)

A model's own loss builds z for every token of the batch, labelled or not, and keeps it for backward: tokens x
vocabulary numbers, three times over. Here z exists for one chunk of labelled rows only. While it is there the gradient
to h is computed from it, so that backward is one multiplication by a scalar. The head is usually frozen, and its
gradient is computed only when it is wanted.

Kernel: csrc/ops/cross_entropy.simd.cpp (the softmax; the products are torch's).
Source: the idea of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009, section 4,
without its sparsity trick. Not here: choosing the labelled rows (training/trainer.py does), soft-capped logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.kernels import dispatch
from lilliput.kernels.core import arrays

CHUNK_BYTES = (
    64 << 20
)  # of logits at a time: within 5 % of all rows at once on two cores; at 16 MiB GEMM loses 5 %, at 3 MiB half


def linear_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """The sum over rows of the cross entropy of softmax(hidden weight^T + bias) at the labels; natural logarithm.

    Args:
        hidden: floating [n, d], the hidden states that predict the labels; n = 0 gives a loss of 0.
        weight: floating [v, d], the head.
        labels: int64 [n], each in 0..v-1: the caller has left out what is not a label.
        bias: floating [v] or None.
        chunk: rows at a time; by default as many as keep the logits of a chunk within `CHUNK_BYTES`.

    Returns: a scalar of hidden's dtype; differentiable in hidden, weight and bias, once.
    Raises FormatError for shapes or labels that do not fit.
    """
    _require(hidden.dim() == 2, f"hidden has shape {tuple(hidden.shape)}, expected [tokens, width]")
    rows, width = hidden.shape
    _require(
        weight.dim() == 2 and weight.shape[1] == width,
        f"weight has shape {tuple(weight.shape)}, expected [vocabulary, {width}]",
    )
    vocabulary = weight.shape[0]
    _require(
        labels.shape == (rows,) and labels.dtype == torch.int64,
        f"labels are {labels.dtype} {tuple(labels.shape)}, expected int64 [{rows}]",
    )
    _require(bias is None or bias.shape == (vocabulary,), f"bias does not have shape [{vocabulary}]")
    if rows and not torch.compiler.is_compiling():
        low, high = (int(end) for end in labels.aminmax())
        _require(low >= 0 and high < vocabulary, f"labels span {low}..{high}, expected within 0..{vocabulary - 1}")
    if chunk is None:
        chunk = CHUNK_BYTES // (4 * vocabulary)
    wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    return torch.ops.lilliput.linear_loss(hidden, weight, labels, bias, max(1, chunk), *wants)[0]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise FormatError(what, where="linear_loss")


# ---- the softmax of a chunk: by torch, and by the compiled core ----


def _softmax(z: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """The sum of the cross entropies of logits z [rows, v] as float64; z becomes the gradient where it is wanted."""
    y = labels.unsqueeze(1)
    norm = z.logsumexp(1, keepdim=True)
    total = (norm - z.gather(1, y)).sum(dtype=torch.float64)
    if gradient:
        z.sub_(norm).exp_().scatter_add_(1, y, z.new_full((), -1.0).expand_as(y))
    return total


def _softmax_core(core: ModuleType, z: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    losses = z.new_empty(z.shape[0])
    z_, labels_, losses_ = arrays(z, labels, losses)
    core.cross_entropy(z_, labels_, gradient, losses_, torch.get_num_threads())
    return losses.sum(dtype=torch.float64)


# ---- the operation ----


def _loss(
    softmax: Callable[[Tensor, Tensor, bool], Tensor],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients to hidden, weight and bias (empty where they are not wanted)."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    exact = torch.promote_types(hidden.dtype, torch.float32)  # never sum in half precision
    grad_hidden, grad_weight, grad_bias = _gradients(hidden, weight, wants_hidden, wants_weight, wants_bias)
    loss = hidden.new_zeros((), dtype=torch.float64)
    buffer = hidden.new_empty(min(chunk, rows), vocabulary)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        h = hidden[part]
        z = torch.mm(h, weight.t(), out=buffer[: h.shape[0]]).to(exact)
        if bias is not None:
            z += bias
        loss += softmax(z, labels[part], wants_hidden or wants_weight or wants_bias)
        if wants_bias:
            grad_bias += z.sum(0)
        dz = z.to(weight.dtype)
        if wants_hidden:
            torch.mm(dz, weight, out=grad_hidden[part])
        if wants_weight:
            grad_weight.addmm_(dz.t(), h)
    return loss.to(hidden.dtype), grad_hidden, grad_weight, grad_bias


_reference = partial(_loss, _softmax)


def _by_core(core: ModuleType, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _loss(partial(_softmax_core, core), *args)


def _core_knows(hidden: Tensor, weight: Tensor, *others: Any) -> bool:
    return torch.promote_types(hidden.dtype, torch.float32) == torch.float32 and weight.shape[0] > 0


def _gradients(
    hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the three gradients; nothing for those that are not wanted."""
    return (
        hidden.new_zeros(hidden.shape if wants_hidden else 0),
        weight.new_zeros(weight.shape if wants_weight else 0),
        weight.new_zeros(weight.shape[0] if wants_bias else 0),
    )


def _fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return hidden.new_empty(()), *_gradients(hidden, weight, wants_hidden, wants_weight, wants_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wants = inputs[5:8]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients were computed in forward: scale them. `grad_loss` is a scalar."""
    hidden, weight, bias = (
        grad_loss * saved if wanted else None for saved, wanted in zip(ctx.saved_tensors, ctx.wants, strict=True)
    )
    return hidden, weight, None, bias, None, None, None, None


LINEAR_LOSS = dispatch.define(
    "linear_loss(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, SymInt chunk, bool wants_hidden,"
    " bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)
dispatch.register_core(LINEAR_LOSS, _reference, _by_core, _core_knows)
torch.library.register_autograd(LINEAR_LOSS, _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)
