"""LoRA layers: a frozen base layer plus the low-rank updates of any number of adapters. arXiv 2106.09685, section 4.1.

For a frozen weight W [out, in] and input x the layer computes, over the active adapters,

    h = W x + sum of  s B A dropout(x),    A [r, in], B [out, r],    s = alpha / r,

with A random and B zero at the start, so that training begins at the base's own output. rsLoRA (arXiv 2312.03732)
takes s = alpha / sqrt(r), so that the update does not shrink with the rank. A and B are float32 whatever the base.
The base is any module with `in_features` and `out_features` (dense or quantized), a Conv1D, or an Embedding.
One adapter on a quantized base is one operation on a CPU (kernels/lora_linear.py), equal to rounding.
State keys are PEFT's: `base_layer.*`, `lora_A.<name>.weight`, `lora_embedding_A.<name>`, `modules_to_save.<name>.*`.
Not here: which modules are wrapped (targets.py), which adapters are active (adapters.py).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lilliput import kernels
from lilliput.errors import FormatError
from lilliput.layers import QuantizedEmbedding, QuantizedLinear, QuantizedWeight


class LoraLayer(nn.Module):
    """What LoraLinear and LoraEmbedding share: the base, the adapters' scalings, merging.

    `active` lists the adapters that take part in forward; adapters.py sets it. While `merged` is not empty, forward is
    the base's alone, since the base then holds the sum.
    """

    base_layer: Any  # a Linear, Conv1D, Embedding or quantized layer; what they share is no class

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling: dict[str, float] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        # What merging put aside: the weight's numbers (dense base) or the whole layer (quantized base). It is kept in a
        # tuple, so that torch does not count the layer among the children.
        self._aside: tuple[Tensor | nn.Module, ...] = ()
        self.train(base_layer.training)

    def attach(self, name: str, r: int, alpha: float, *, dropout: float, use_rslora: bool) -> None:
        """Add the adapter `name` with uninitialised tensors; `reset` or a file fills them."""
        self.scaling[name] = alpha / math.sqrt(r) if use_rslora else alpha / r
        self._make(name, r, dropout)

    def remove(self, name: str) -> None:
        """Drop the adapter `name`."""
        del self.scaling[name]
        self.active = tuple(other for other in self.active if other != name)
        self._drop(name)

    def _make(self, name: str, r: int, dropout: float) -> None:
        raise NotImplementedError

    def _drop(self, name: str) -> None:
        raise NotImplementedError

    def reset(self, name: str, init: bool | str) -> None:
        """Draw A and B of the adapter `name` as `init_lora_weights` says (see LoraConfig)."""
        raise NotImplementedError

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters under the names that PEFT's files use, such as `lora_A.weight`."""
        raise NotImplementedError

    def update_of(self, name: str) -> Tensor:
        """s B A of one adapter, float32, in the shape and orientation of the base's weight."""
        raise NotImplementedError

    @torch.no_grad()
    def sum_of(self, names: tuple[str, ...]) -> Tensor:
        """W and the updates of `names`: a new float32 tensor, [out, in] over a quantized base, else shaped as its W."""
        base = self.base_layer
        packed = isinstance(base, QuantizedWeight)
        total: Tensor = base.dequantize(torch.float32) if packed else base.weight.detach().to(torch.float32, copy=True)
        for name in names:
            total += self.update_of(name)
        return total

    @property
    def weight(self) -> Tensor:
        """The base's weight, for models that ask a layer for its dtype or device."""
        return self.base_layer.weight

    @torch.no_grad()
    def merge(self, names: tuple[str, ...], dtype: torch.dtype) -> None:
        """Put the sum of W and the updates of `names` in the base's place.

        A dense base gets new numbers in its own dtype. A quantized base is set aside and a dense nn.Linear in `dtype`
        (a Conv1D or an nn.Embedding where the model had one) takes its place: a sum rounded to the few values of the
        number format would no longer be the adapter.

        Raises FormatError, with nothing changed, when the sum is not finite.
        """
        base = self.base_layer
        packed = isinstance(base, QuantizedWeight)
        total = self.sum_of(names).to(dtype if packed else base.weight.dtype)
        if not torch.isfinite(total).all():
            raise FormatError(f"merging {', '.join(names)} gives NaN or infinite weights; the adapter is broken")
        if packed:
            self._aside, self.base_layer = (base,), _dense(base, total)
        else:
            self._aside, base.weight.data = (base.weight.data,), total
        self.merged = names

    def swap(self) -> None:
        """Exchange what is in the base's place and what `merge` put aside: the sum and the original, or back."""
        aside = self._aside[0].to(self.base_layer.weight.device)  # the model may have moved since
        if isinstance(aside, nn.Module):
            self._aside, self.base_layer = (self.base_layer,), aside
        else:
            self._aside, self.base_layer.weight.data = (self.base_layer.weight.data,), aside

    def unmerge(self) -> None:
        """Bring back what `merge` set aside, bit for bit."""
        self.swap()
        self._aside, self.merged = (), ()


class LoraLinear(LoraLayer):
    """LoRA over nn.Linear, Conv1D or a quantized layer. x [..., in] -> [..., out] in the dtype of the base's output."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__(base_layer)
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.weight.shape
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    def _make(self, name: str, r: int, dropout: float) -> None:
        device = self.base_layer.weight.device
        self.lora_A[name] = _unset_linear(self.in_features, r, device)
        self.lora_B[name] = _unset_linear(r, self.out_features, device)
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_dropout[name].train(self.training)

    def _drop(self, name: str) -> None:
        for parts in (self.lora_A, self.lora_B, self.lora_dropout):
            del parts[name]

    def _weights(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, in] and B [out, r] of one adapter."""
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        return a.weight, b.weight

    def reset(self, name: str, init: bool | str) -> None:
        a, b = self._weights(name)
        if init == "gaussian":
            nn.init.normal_(a, std=1 / a.shape[0])
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # torch's own start of a Linear, as PEFT uses it
        nn.init.zeros_(b) if init else nn.init.kaiming_uniform_(b, a=math.sqrt(5))

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        a, b = self._weights(name)
        return {"lora_A.weight": a, "lora_B.weight": b}

    def update_of(self, name: str) -> Tensor:
        a, b = self._weights(name)
        update = b.float() @ a.float() * self.scaling[name]
        return update.T if isinstance(self.base_layer, Conv1D) else update

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """h = W x + sum of s B A dropout(x) over the active adapters."""
        if not args and not kwargs and self._is_one_operation(x):
            return self._in_one(x)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged or not self.active:
            return result
        dtype = result.dtype
        for name in self.active:
            a, b = self.lora_A[name], self.lora_B[name]
            result = result + b(a(self.lora_dropout[name](x.to(self._weights(name)[0].dtype)))) * self.scaling[name]
        return result.to(dtype)

    def _is_one_operation(self, x: Tensor) -> bool:
        """Whether h is what kernels.lora_linear computes: one adapter without dropout on a quantized base.

        Elsewhere than on a CPU in float32, under autocast, and where somebody listens with hooks or took a layer's
        place, the parts are called one by one.
        """
        if self.merged or len(self.active) != 1 or type(self.base_layer) is not QuantizedLinear:
            return False
        name = self.active[0]
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        return (
            x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and x.dtype == torch.float32
            and (isinstance(dropout, nn.Identity) or not dropout.training)
            and type(a) is type(b) is nn.Linear
            and not any(_is_listened_to(module) for module in (self.base_layer, a, b, dropout))
        )

    def _in_one(self, x: Tensor) -> Tensor:
        name, base = self.active[0], self.base_layer
        a, b = self._weights(name)
        return kernels.lora_linear(x, base.quantized, a, b, self.scaling[name], base.bias, base.threshold)


class LoraEmbedding(LoraLayer):
    """LoRA over nn.Embedding: the row of token t gains s (B A)[:, t]. A [r, tokens] starts at zero, B [dim, r] normal.

    Dropout does not apply: there is no input to drop. ids int [...] -> [..., dim].
    """

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__(base_layer)
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        self.padding_idx = base_layer.padding_idx
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()

    def _make(self, name: str, r: int, dropout: float) -> None:
        device = self.base_layer.weight.device
        self.lora_embedding_A[name] = nn.Parameter(torch.empty(r, self.num_embeddings, device=device))
        self.lora_embedding_B[name] = nn.Parameter(torch.empty(self.embedding_dim, r, device=device))

    def _drop(self, name: str) -> None:
        del self.lora_embedding_A[name], self.lora_embedding_B[name]

    def reset(self, name: str, init: bool | str) -> None:
        nn.init.normal_(self.lora_embedding_B[name])
        nn.init.zeros_(self.lora_embedding_A[name]) if init else nn.init.normal_(self.lora_embedding_A[name])

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        return {"lora_embedding_A": self.lora_embedding_A[name], "lora_embedding_B": self.lora_embedding_B[name]}

    def update_of(self, name: str) -> Tensor:
        return (self.lora_embedding_B[name].float() @ self.lora_embedding_A[name].float()).T * self.scaling[name]

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's rows plus the active adapters' rows."""
        result = self.base_layer(ids, *args, **kwargs)
        if self.merged or not self.active:
            return result
        dtype = result.dtype
        # Gemma's embeddings multiply what they look up; the update is part of the weight and is multiplied too.
        factor = getattr(self.base_layer, "embed_scale", None)
        for name in self.active:
            rows = functional.embedding(ids, self.lora_embedding_A[name].T, padding_idx=self.padding_idx)
            update = rows @ self.lora_embedding_B[name].T * self.scaling[name]
            result = result + (update if factor is None else update * factor)
        return result.to(dtype)


class TrainedCopy(nn.Module):
    """A module of `modules_to_save`: the frozen original, and one trained copy of it per adapter.

    Forward and every attribute are those of the module in use: the active adapter's copy, else the original.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.train(original_module.training)

    def attach(self, name: str) -> None:
        """Give the adapter `name` its own copy, equal to the original."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module)

    def remove(self, name: str) -> None:
        """Drop the copy of the adapter `name`."""
        del self.modules_to_save[name]
        self.active = None if self.active == name else self.active

    def in_use(self) -> nn.Module:
        """The module that forward runs."""
        return self.original_module if self.active is None else self.modules_to_save[self.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module in use."""
        return self.in_use()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.in_use(), name)


def _is_listened_to(module: nn.Module) -> bool:
    """Whether calling the module runs more than its class's forward: hooks, or a forward of its own (accelerate's)."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in module.__dict__


def _unset_linear(in_features: int, out_features: int, device: torch.device) -> nn.Linear:
    """A float32 Linear without bias and with unset numbers, so that loading draws nothing from the random generator."""
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False, device=device, dtype=torch.float32)


def _dense(base: QuantizedWeight, weight: Tensor) -> nn.Module:
    """The plain layer that `base` stands for, with this weight [out, in] and the base's own bias parameter."""
    if isinstance(base, QuantizedEmbedding):
        table = nn.Embedding.from_pretrained(weight, freeze=True, padding_idx=base.padding_idx)
        return table.train(base.training)
    assert isinstance(base, QuantizedLinear)
    with torch.device("meta"):
        dense: Any = (
            Conv1D(base.out_features, base.in_features)
            if base.transposed
            else nn.Linear(base.in_features, base.out_features)
        )
    dense.weight = nn.Parameter(weight.T.contiguous() if base.transposed else weight, requires_grad=False)
    dense.bias = base.bias
    return dense.train(base.training)
