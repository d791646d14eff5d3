"""What stands between a decoder layer's products, each step as one operation that keeps little for backward.

A norm and a gated activation, written in torch's own operations, pass over memory ten times and leave half of what a
training step holds. Here each is one pass forward and one backward (kernels/rms_norm.py, kernels/swiglu.py), and their
results, which the adapters want again in backward, are not kept at all but made again from what is kept anyway:

    kept      x ............. gate, up .......      (the layer's input; what two products gave)
    again     norm(x)         silu(gate) * up       in backward, by the same operations, bit for bit

Each module is tried on random numbers first; one that computes something else (Gemma's 1 + weight) stays as it is.
Source: recomputing what is cheap, Korthikanti et al., arXiv 2205.05198, section 5.
Not here: products with adapters (kernels/lora_linear.py), attention (attention.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from lilliput import kernels
from lilliput.kernels import core

_AGREES = 1e-5  # largest difference from a module's own forward, relative to its largest number
_SILU = (nn.SiLU, SiLUActivation)


@contextmanager
def fused(model: PreTrainedModel) -> Iterator[list[str]]:
    """Inside the block the norms and gated activations of `model` run as one operation each.

    Forward agrees with the plain one to rounding. For float32 models on a CPU with the compiled core; others stay as
    they are.

    Args:
        model: adapters attached or not.

    Yields: the names of the modules that were changed.
    """
    with ExitStack() as undo:
        yield [] if model.device.type != "cpu" or not core.status().loaded else _fuse(model, undo)


def _fuse(model: PreTrainedModel, undo: ExitStack) -> list[str]:
    remakes, names, layers = Remakes(), [], list[nn.Module]()
    for name, module in model.named_modules():
        forward = _norm(module, remakes) or _gated(module, remakes)
        if forward is not None:
            _replace(module, forward, undo)
            names.append(name)
        elif _is_layer(module):
            layers.append(module)
    for layer in layers if names else ():
        _replace(layer, partial(_in_layer, layer, layer.forward, remakes), undo)
    return names


def _replace(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    module.forward = forward
    undo.callback(module.__dict__.pop, "forward")


def _is_layer(module: nn.Module) -> bool:
    """A decoder layer: what is cheap is made again within one, since no result of it is wanted in another."""
    return "forward" not in module.__dict__ and hasattr(module, "self_attn") and hasattr(module, "mlp")


def _in_layer(layer: nn.Module, plain: Callable[..., Any], remakes: Remakes, *args: Any, **kwargs: Any) -> Any:
    # a layer that is computed twice as a whole keeps nothing of its own
    if not torch.is_grad_enabled() or (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return plain(*args, **kwargs)
    with remakes.layer():
        return plain(*args, **kwargs)


# ---- what is made again instead of kept ----


@dataclass(frozen=True)
class _Again:
    make: Callable[[], Tensor]
    shape: torch.Size


class Remakes:
    """Tensors that autograd need not keep, since they can be made again."""

    def __init__(self) -> None:
        # By address; the tensor itself is held, so that no other one can get its address while it stands here.
        self._known: dict[int, tuple[Tensor, Callable[[], Tensor]]] | None = None

    def note(self, made: Tensor, again: Callable[[], Tensor]) -> Tensor:
        """`made`, which `again` makes once more, bit for bit. Outside of a layer nothing is noted."""
        if self._known is not None and made.numel():
            self._known[made.data_ptr()] = (made.detach(), again)
        return made

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Inside the block autograd keeps a recipe in the place of each tensor that was noted in it."""
        before, self._known = self._known, {}
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._known = before

    def _pack(self, kept: Tensor) -> Tensor | _Again:
        made, again = (self._known or {}).get(kept.data_ptr(), (None, None))
        if made is None or again is None or not _same_numbers(made, kept):
            return kept
        return _Again(again, kept.shape)


def _same_numbers(made: Tensor, kept: Tensor) -> bool:
    """Whether two tensors at one address hold the same numbers in the same order."""
    return kept.dtype == made.dtype and kept.numel() == made.numel() and kept.is_contiguous() and made.is_contiguous()


@torch.no_grad()
def _unpack(kept: Tensor | _Again) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.make().view(kept.shape)


# ---- norms ----


def _norm(module: nn.Module, remakes: Remakes) -> Callable[[Tensor], Tensor] | None:
    """The forward for a root-mean-square norm; None for anything else."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or not isinstance(eps, float):
        return None
    if weight.dim() != 1 or "forward" in module.__dict__:
        return None
    forward = partial(_rms_norm, module, eps, remakes)
    return forward if _same_results(module, forward, weight.shape[0], weight.dtype) else None


def _rms_norm(module: Any, eps: float, remakes: Remakes, x: Tensor) -> Tensor:
    weight = module.weight
    return remakes.note(kernels.rms_norm(x, weight, eps), partial(kernels.rms_norm, x.detach(), weight.detach(), eps))


# ---- gated activations ----


def _gated(module: nn.Module, remakes: Remakes) -> Callable[[Tensor], Tensor] | None:
    """The forward for down(silu(gate(x)) * up(x)); None for anything else."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Module) for part in parts) or "forward" in module.__dict__:
        return None
    width, dtype = getattr(parts[0], "in_features", None), getattr(parts[0], "weight", torch.empty(0)).dtype
    if not isinstance(getattr(module, "act_fn", None), _SILU) or width is None:
        return None
    forward = partial(_swiglu, module, remakes)
    return forward if _same_results(module, forward, width, dtype) else None


def _swiglu(module: Any, remakes: Remakes, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    h = remakes.note(kernels.swiglu(gate, up), partial(kernels.swiglu, gate.detach(), up.detach()))
    return module.down_proj(h)


# ---- the trial ----


@torch.no_grad()
def _same_results(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> bool:
    """Whether `forward` gives what the module gives, in float32, on random rows."""
    if dtype.is_floating_point and dtype != torch.float32:
        return False
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    training = module.training
    module.eval()
    try:
        plain, ours = module(x), forward(x)
    finally:
        module.train(training)
    return bool((plain - ours).abs().max() <= _AGREES * plain.abs().max())
