"""The loss of the head at labelled rows: against torch's own in float64 and float32, and never a big tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lilliput.errors import FormatError
from lilliput.kernels.linear_loss import _reference, linear_loss


def inputs(
    rows: int = 7, width: int = 5, vocabulary: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """(hidden, weight, bias, labels); the three first want gradients."""
    made = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(shape, generator=made, dtype=dtype, requires_grad=True)
        for shape in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    return hidden, weight, bias, torch.randint(vocabulary, (rows,), generator=made)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100, None])
def test_gradients_are_those_of_the_definition(chunk: int | None) -> None:
    hidden, weight, bias, labels = inputs()
    assert torch.autograd.gradcheck(lambda h, w, b: linear_loss(h, w, labels, b, chunk=chunk), (hidden, weight, bias))


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_torch(dtype: torch.dtype, apart: float, with_bias: bool) -> None:
    hidden, weight, bias, labels = inputs(50, 16, 300, dtype)
    wanted = [hidden, weight, *([bias] if with_bias else [])]
    ours = linear_loss(hidden, weight, labels, bias if with_bias else None, chunk=8)
    ours_grads = torch.autograd.grad(3 * ours, wanted)
    logits = functional.linear(hidden.double(), weight.double(), bias.double() if with_bias else None)
    theirs = functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(ours.double(), theirs, rtol=apart, atol=apart)
    for got, expected in zip(ours_grads, torch.autograd.grad(3 * theirs, wanted), strict=True):
        torch.testing.assert_close(got, expected, rtol=apart, atol=10 * apart)


def test_huge_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight, labels = torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1])
    loss = linear_loss(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 2e4  # the first row is wrong by 2e4, the second right
    torch.testing.assert_close(hidden.grad, torch.tensor([[2.0], [0.0]]))


def test_no_labels_no_loss() -> None:
    hidden, weight, _, _ = inputs()
    hidden = hidden.detach()[:0].requires_grad_()
    loss = linear_loss(hidden, weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 5)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_frozen_head_gets_no_gradient_and_nothing_is_kept_for_it() -> None:
    hidden, weight, _, labels = inputs()
    frozen = weight.detach()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        loss = linear_loss(hidden, frozen, labels)
    assert (7, 5) in kept
    assert set(kept) <= {(7, 5), (0,), ()}
    loss.backward()
    assert frozen.grad is None
    with torch.no_grad():
        assert not linear_loss(hidden, weight, labels).requires_grad


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_never_makes_a_tensor_of_tokens_times_vocabulary() -> None:
    hidden, weight, _, labels = inputs(64, 4, 1000, torch.float32)
    with torch.no_grad(), _Largest() as largest:
        _reference(hidden, weight, labels, None, 8, wants_hidden=True, wants_weight=False, wants_bias=False)
    assert 8 * 1000 <= largest.numel < 9 * 1000


def test_opcheck() -> None:
    hidden, weight, bias, labels = inputs(dtype=torch.float32)
    torch.library.opcheck(torch.ops.lilliput.linear_loss.default, (hidden, weight, labels, bias, 3, True, True, True))
    torch.library.opcheck(
        torch.ops.lilliput.linear_loss.default, (hidden, weight.detach(), labels, None, 3, True, False, False)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, w, b, y: (h[0], w, y, b), "hidden has shape"),
        (lambda h, w, b, y: (h, w[:, :3], y, b), "weight has shape"),
        (lambda h, w, b, y: (h, w, y[:2], b), "labels are torch.int64"),
        (lambda h, w, b, y: (h, w, y.float(), b), "labels are torch.float32"),
        (lambda h, w, b, y: (h, w, y, b[:2]), "bias does not have shape"),
        (lambda h, w, b, y: (h, w, y - 100, b), "labels span"),
        (lambda h, w, b, y: (h, w, y + 11, b), "labels span"),
    ],
)
def test_refuses_what_does_not_fit(change, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FormatError, match=said):
        linear_loss(*change(*inputs()))
