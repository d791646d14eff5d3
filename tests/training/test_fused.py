"""Norms and gated activations in one operation: the same losses and gradients, and less is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from lilliput.data import Pack, pack
from lilliput.kernels import core, use
from lilliput.layers import replace_linears
from lilliput.training import fused as module
from lilliput.training.fused import Remakes, fused
from lilliput.training.trainer import LabelLoss, batch_of
from tests.training.test_prefix import GROUPED, adapted, llama, mistral, neox, qwen2
from tests.training.test_trainer import examples

pytestmark = pytest.mark.skipif(not core.status().loaded, reason=f"no compiled core: {core.status().reason}")


def qwen3() -> PreTrainedModel:
    """Norms over the heads' width too."""
    return Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8))


def gemma2() -> PreTrainedModel:
    """Norms that multiply by 1 + weight, and an activation that is not SiLU."""
    return Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8))


def everywhere(model: PreTrainedModel) -> PreTrainedModel:
    """With an adapter on all layers of a quantized base, as a run has it."""
    replace_linears(model, "nf4")
    return adapted(model, layers_to_transform=None)


def packs() -> list[Pack]:
    return pack(examples(), 20)


def losses(loss: LabelLoss) -> list[Tensor]:
    value = loss(**batch_of(packs(), 0))["loss"]
    return [value, *torch.autograd.grad(value, [p for p in loss.parameters() if p.requires_grad])]


@pytest.mark.parametrize(
    ("make", "changed"), [(llama, 13), (mistral, 13), (qwen2, 13), (qwen3, 21), (gemma2, 0), (neox, 0)]
)
@pytest.mark.parametrize("training", [True, False])
def test_losses_and_gradients_are_the_same(make: Callable[[], PreTrainedModel], changed: int, training: bool) -> None:
    torch.manual_seed(0)
    loss = LabelLoss(everywhere(make())).train(training)
    plain = losses(loss)
    with fused(loss.model) as names:
        assert len(names) == changed
        ours, again = losses(loss), losses(loss)
    for expected, got, repeated in zip(plain, ours, again, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(got, repeated)
    assert all(torch.equal(one, other) for one, other in zip(losses(loss), plain, strict=True))  # all is undone


def test_what_is_made_again_is_what_it_was() -> None:
    """Keeping everything, with the same operations, gives the same gradients to the last bit."""
    torch.manual_seed(0)
    loss = LabelLoss(everywhere(llama())).train()
    with fused(loss.model):
        made_again = losses(loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remakes, "_pack", lambda self, kept: kept)
        with fused(loss.model):
            kept = losses(loss)
    assert all(torch.equal(one, other) for one, other in zip(made_again, kept, strict=True))


def test_nothing_is_kept_that_a_norm_or_an_activation_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = LabelLoss(everywhere(llama())).train()
    counts = {"again": 0, "noted": 0}
    pack_, note = Remakes._pack, Remakes.note

    def packed(self: Remakes, kept: Tensor) -> object:
        result = pack_(self, kept)
        counts["again"] += not isinstance(result, Tensor)
        return result

    def noted(self: Remakes, made: Tensor, again: Callable[[], Tensor]) -> Tensor:
        counts["noted"] += self._known is not None
        return note(self, made, again)

    monkeypatch.setattr(Remakes, "_pack", packed)
    monkeypatch.setattr(Remakes, "note", noted)
    with fused(loss.model):
        loss(**batch_of(packs(), 0))
    layers = 4
    # q, k, v and gate, up want a norm's result, down the activation's; the last norm stands outside of the layers
    assert counts == {"again": layers * (3 + 2 + 1), "noted": layers * 3}


def test_less_memory_is_held_for_backward() -> None:
    loss = LabelLoss(everywhere(llama())).train()

    kept: list[int] = []

    def measure() -> int:
        """Bytes of distinct storages that autograd packs outside of the layers' own recipes."""
        seen: dict[int, Tensor] = {}

        def remember(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        original = Remakes._pack
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Remakes, "_pack", lambda self, t: remember(r) if isinstance(r := original(self, t), Tensor) else r
            )
            with saved_tensors_hooks(remember, lambda tensor: tensor):
                loss(**batch_of(packs(), 0))
        return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())

    kept.append(measure())
    with fused(loss.model):
        kept.append(measure())
    assert kept[1] < 0.75 * kept[0]


def test_gradient_checkpointing_goes_on_working() -> None:
    loss = LabelLoss(everywhere(llama())).train()
    plain = losses(loss)
    loss.model.activation_checkpointing_enable({"use_reentrant": False})
    with fused(loss.model):
        for expected, got in zip(plain, losses(loss), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_tensor_with_the_address_of_one_that_is_gone_is_kept_itself() -> None:
    remakes = Remakes()
    weight = torch.randn(8, requires_grad=True)
    with remakes.layer():
        for _ in range(20):  # the allocator hands an address out again as soon as it is free
            remakes.note(torch.randn(8), lambda: torch.full((8,), torch.nan))
        total = sum((weight * torch.randn(8)).sum() for _ in range(20))
    total.backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_the_same_numbers_in_another_order_are_kept() -> None:
    remakes, weight = Remakes(), torch.randn(4, 3, requires_grad=True)
    made = torch.randn(3, 4)
    with remakes.layer():
        remakes.note(made, made.clone)
        (weight * made.T).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, made.T)


def test_trained_norms_get_their_gradients() -> None:
    loss = LabelLoss(llama()).train()  # all weights are trained
    plain = losses(loss)
    with fused(loss.model):
        for expected, got in zip(plain, losses(loss), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_forward_of_somebody_elses_is_left_alone() -> None:
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.forward = own = type(mlp).forward.__get__(mlp)
    with fused(model) as names:
        assert "model.layers.0.mlp" not in names
        assert mlp.forward is own
    assert mlp.forward is own


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_than_float32_are_left_alone(dtype: torch.dtype) -> None:
    with fused(llama().to(dtype)) as names:
        assert names == []


def test_without_the_core_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.core, "status", lambda: core.CoreStatus(False, None, "taken away", 1))
    with fused(llama()) as names:
        assert names == []


def test_inside_another_backend_results_agree() -> None:
    loss = LabelLoss(everywhere(llama())).train()
    with fused(loss.model):
        ours = losses(loss)
        with use("reference"):
            for expected, got in zip(losses(loss), ours, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_module_that_only_looks_like_one_is_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x

    model = llama()
    model.model.norm = OddRMSNorm()
    with fused(model) as names:
        assert "model.norm" not in names
