"""The equations of the LoRA layers against float64 formulas; starts, dropout, dtypes, merging of one layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lilliput import kernels
from lilliput.errors import FormatError
from lilliput.layers import QuantizedLinear
from lilliput.lora.layer import LoraEmbedding, LoraLayer, LoraLinear, TrainedCopy

IN, OUT = 6, 10


def linear() -> nn.Module:
    return nn.Linear(IN, OUT)


def conv1d() -> nn.Module:
    layer = Conv1D(OUT, IN)
    nn.init.normal_(layer.bias)
    return layer


def embedding() -> nn.Module:
    return nn.Embedding(IN, OUT)


def attached(base: nn.Module, r: int = 3, alpha: float = 5, name: str = "a", **options: Any) -> LoraLayer:
    """A layer with one active adapter whose A and B are random."""
    layer = LoraEmbedding(base) if isinstance(base, nn.Embedding) else LoraLinear(base)
    attach(layer, name, r, alpha, **options)
    return layer


def attach(layer: LoraLayer, name: str, r: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False) -> None:
    layer.attach(name, r, alpha, dropout=dropout, use_rslora=use_rslora)
    for tensor in layer.tensors(name).values():
        nn.init.normal_(tensor)
    layer.active = (*layer.active, name)


def formula(layer: LoraLayer, x: Tensor, scale: dict[str, float]) -> Tensor:
    """h = W x + b + sum s B A x in float64; for an embedding x is one-hot."""
    base = layer.base_layer
    dense = base.weight.double() if isinstance(base, (Conv1D, nn.Embedding)) else base.weight.double().T
    total = x @ dense
    if (bias := getattr(base, "bias", None)) is not None:
        total = total + bias.double()
    for name, s in scale.items():
        a, b = (tensor.double() for tensor in layer.tensors(name).values())
        total = total + s * (x @ a.T @ b.T)
    return total


@pytest.mark.parametrize("make", [linear, conv1d, embedding])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_is_the_papers_formula(make: Any, use_rslora: bool) -> None:
    torch.manual_seed(0)
    layer = attached(make(), r=3, alpha=5, use_rslora=use_rslora)
    attach(layer, "b", 2, 7, use_rslora=use_rslora)
    scale = {"a": 5 / math.sqrt(3), "b": 7 / math.sqrt(2)} if use_rslora else {"a": 5 / 3, "b": 7 / 2}
    ids = torch.tensor([[0, 3], [5, 5]])
    is_embedding = isinstance(layer, LoraEmbedding)
    x = nn.functional.one_hot(ids, IN).double() if is_embedding else torch.randn(2, 2, IN, dtype=torch.float64)
    out = layer(ids if is_embedding else x.float())
    torch.testing.assert_close(out.double(), formula(layer, x, scale), rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_forward_of_any_shape(in_features: int, out_features: int, r: int, rows: int) -> None:
    torch.manual_seed(0)
    layer = attached(nn.Linear(in_features, out_features), r=r, alpha=2)
    x = torch.randn(rows, in_features, dtype=torch.float64)
    torch.testing.assert_close(layer(x.float()).double(), formula(layer, x, {"a": 2 / r}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [linear, conv1d, embedding])
def test_a_fresh_adapter_changes_nothing(make: Any) -> None:
    layer = attached(make())
    for init in (True, "gaussian"):
        layer.reset("a", init)
        x = torch.arange(IN) if isinstance(layer, LoraEmbedding) else torch.randn(2, IN)
        assert torch.equal(layer(x), layer.base_layer(x))
        assert any(tensor.abs().max() > 0 for tensor in layer.tensors("a").values())
    layer.reset("a", False)
    assert not torch.equal(layer(x), layer.base_layer(x))


def test_dropout_acts_on_the_adapter_in_training_only() -> None:
    torch.manual_seed(0)
    layer = attached(nn.Linear(IN, OUT), dropout=0.5)
    x = torch.randn(50, IN)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.active = ()
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_layer_attached_in_eval_mode_does_not_drop() -> None:
    layer = attached(nn.Linear(IN, OUT).eval(), dropout=0.5)
    x = torch.randn(5, IN)
    assert torch.equal(layer(x), layer(x))


def test_a_bfloat16_base_keeps_its_dtype_and_the_update_is_float32() -> None:
    torch.manual_seed(0)
    layer = attached(nn.Linear(IN, OUT).bfloat16())
    x = torch.randn(4, IN).bfloat16()
    assert {tensor.dtype for tensor in layer.tensors("a").values()} == {torch.float32}
    out = layer(x)
    assert out.dtype == torch.bfloat16
    a, b = layer.tensors("a").values()
    exact = layer.base_layer(x).float() + x.float() @ a.T @ b.T * (5 / 3)
    assert torch.equal(out, exact.bfloat16())


@pytest.mark.parametrize("make", [linear, conv1d, embedding])
def test_merging_keeps_the_output_and_unmerging_every_bit(make: Any) -> None:
    torch.manual_seed(0)
    layer = attached(make())
    x = torch.arange(IN) if isinstance(layer, LoraEmbedding) else torch.randn(3, IN)
    before, original = layer(x), layer.base_layer.weight.clone()
    layer.merge(("a",), torch.float32)
    torch.testing.assert_close(layer(x), before)
    assert not torch.equal(layer.weight, original)
    layer.unmerge()
    assert torch.equal(layer.weight, original)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_merged(bad: float) -> None:
    layer = attached(nn.Linear(IN, OUT))
    original = layer.base_layer.weight.clone()
    with torch.no_grad():
        next(iter(layer.tensors("a").values()))[0, 0] = bad
    with pytest.raises(FormatError, match="NaN or infinite"):
        layer.merge(("a",), torch.float32)
    assert torch.equal(layer.weight, original)
    assert layer.merged == ()


def test_a_float16_overflow_is_not_merged() -> None:
    layer = attached(nn.Linear(IN, OUT).half())
    with torch.no_grad():
        for tensor in layer.tensors("a").values():
            tensor.fill_(300.0)
    with pytest.raises(FormatError, match="NaN or infinite"):
        layer.merge(("a",), torch.float16)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: what is looked up is multiplied."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        self.register_buffer("embed_scale", torch.tensor(8.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def test_an_embedding_that_scales_scales_the_update_too() -> None:
    layer = attached(ScaledEmbedding())
    ids = torch.arange(IN)
    before = layer(ids)
    layer.merge(("a",), torch.float32)
    torch.testing.assert_close(layer(ids), before)


def test_a_trained_copy_is_the_module_in_use() -> None:
    wrapper = TrainedCopy(nn.Linear(IN, OUT))
    wrapper.attach("a")
    with torch.no_grad():
        wrapper.modules_to_save["a"].weight.zero_()
    assert wrapper.weight is wrapper.original_module.weight
    wrapper.active = "a"
    assert wrapper.weight is wrapper.modules_to_save["a"].weight
    assert wrapper.out_features == OUT
    assert torch.equal(wrapper(torch.ones(1, IN)), wrapper.modules_to_save["a"].bias[None])
    with pytest.raises(AttributeError):
        _ = wrapper.no_such_thing


def quantized(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(64, 48, bias=bias))


class Calls:
    """Stands before kernels.lora_linear and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.operation = 0, kernels.lora_linear
        monkeypatch.setattr(kernels, "lora_linear", self)

    def __call__(self, *args: Any) -> Tensor:
        self.count += 1
        return self.operation(*args)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_one_operation_over_a_quantized_base_equals_the_parts(
    monkeypatch: pytest.MonkeyPatch, rows: int, bias: bool
) -> None:
    layer, calls = attached(quantized(bias)), Calls(monkeypatch)
    x = torch.randn(2, rows, 64, requires_grad=True)
    wanted = [x, *layer.tensors("a").values()]
    y = layer(x)
    assert calls.count == 1
    layer.lora_A["a"].register_forward_hook(lambda *_: None)  # somebody listens: part by part
    parts = layer(x)
    assert calls.count == 1
    torch.testing.assert_close(y, parts, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    for one, two in zip(torch.autograd.grad(y, wanted, grad), torch.autograd.grad(parts, wanted, grad), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


def test_dropout_on_a_quantized_base_acts_in_training_and_is_one_operation_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, calls = attached(quantized(), dropout=0.5), Calls(monkeypatch)
    x = torch.randn(20, 64)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    assert calls.count == 0
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert calls.count == 2


def test_what_is_not_one_operation_goes_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    x = torch.randn(3, 64)
    layer = attached(quantized())
    plain = layer(x)
    assert calls.count == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(layer(x), plain, atol=0.5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    attach(layer, "b", 2, 7)
    two = layer(x)
    layer.active = ()
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.active = ("a", "b")
    layer.merge(("a", "b"), torch.float32)
    assert torch.allclose(layer(x), two, atol=1e-4)
    attached(nn.Linear(64, 48))(x)
    assert calls.count == 1


@pytest.mark.parametrize("part", ["base_layer", "lora_B"])
def test_a_hook_on_a_part_is_called(part: str) -> None:
    layer, heard = attached(quantized()), []
    module = layer.base_layer if part == "base_layer" else layer.lora_B["a"]
    module.register_forward_hook(lambda *_: heard.append(part))
    layer(torch.randn(3, 64))
    assert heard == [part]
