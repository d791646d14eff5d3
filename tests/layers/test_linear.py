"""QuantizedLinear computes with the dequantized weight, and survives what is done to modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lilliput import formats
from lilliput.errors import FormatError, UsageError
from lilliput.layers import QuantizedLinear, unrounded

KINDS = [
    ("nf4", True),
    ("nf4", False),
    ("fp4", True),
    ("fp4", False),
    ("int8", None),
    ("int4", None),
    ("int3-row", None),
]
SHAPES = [(64, 128), (7, 9), (1, 1), (3, 200)]  # (in, out); odd products end in half a byte, ragged blocks


def make_linear(shape: tuple[int, int] = (64, 128), bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(*shape, bias=bias)


def tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return dict(layer.state_dict())


def assert_same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("format", "double_quant"), KINDS)
def test_forward_is_the_product_with_the_reference_dequantization(format, double_quant, shape):
    linear = make_linear(shape)
    layer = QuantizedLinear.from_linear(linear, format, double_quant)
    weight = formats.dequantize(formats.quantize(linear.weight.detach(), format, double_quant))
    x = torch.randn(2, 5, shape[0])
    with unrounded(layer):  # int8 rounds x as well: tests below
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, linear.bias))
    torch.testing.assert_close(layer.dequantize(), weight, rtol=0, atol=0)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == shape


def test_gradients_reach_input_and_bias_and_nothing_else():
    layer = QuantizedLinear.from_linear(make_linear())
    layer.bias.requires_grad_(True)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    weight = layer.dequantize()
    y = x.detach() @ weight.T + layer.bias.detach()
    torch.testing.assert_close(x.grad, 2 * y @ weight)
    torch.testing.assert_close(layer.bias.grad, 2 * y.sum(0))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_conv1d_is_transposed_on_the_way_in():
    torch.manual_seed(0)
    conv = Conv1D(96, 64)  # GPT-2's: weight [in, out]
    nn.init.normal_(conv.bias)
    layer = QuantizedLinear.from_linear(conv, "nf4", False)
    assert (layer.in_features, layer.out_features, layer.transposed) == (64, 96, True)
    assert copy.deepcopy(layer).transposed
    assert not QuantizedLinear.from_linear(nn.Linear(64, 96)).transposed
    x = torch.randn(4, 64)
    expected = formats.dequantize(formats.quantize(conv.weight.detach().t().contiguous(), "nf4", False))
    torch.testing.assert_close(layer(x), x @ expected.T + conv.bias)


@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict_has_plain_names_and_fills_an_empty_layer(double_quant):
    layer = QuantizedLinear.from_linear(make_linear(), "nf4", double_quant)
    nested = {"weight_absmax_scale", "weight_absmax_offset"} if double_quant else set()
    assert set(layer.state_dict()) == {"weight", "weight_absmax", "bias"} | nested
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.shape == (64 * 128 // 2, 1)
    empty = QuantizedLinear.empty(64, 128, True, "nf4", double_quant)
    assert all(p.device.type == "meta" and not p.requires_grad for p in empty.parameters())
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert_same(filled, layer)


def test_bytes_are_what_the_formats_promise():
    layer = QuantizedLinear.from_linear(make_linear((1024, 512), bias=False))
    numel, blocks = 1024 * 512, 1024 * 512 // 64
    counted = sum(p.nelement() * p.element_size() for p in layer.parameters())
    assert counted == numel // 2 + blocks + blocks // 256 * 4 + 4 == layer.quantized.nbytes
    assert counted * 8 / numel == pytest.approx(4.127, abs=2e-3)  # QLoRA, section 3: 4 + 0.127 bits


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_changing_the_type_leaves_codes_and_constants_alone(dtype, double_quant):
    layer = QuantizedLinear.from_linear(make_linear(), "nf4", double_quant)
    before = {name: tensor.clone() for name, tensor in tensors(layer).items()}
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    for name in before.keys() - {"bias"}:
        assert layer.state_dict()[name].dtype == before[name].dtype
        assert torch.equal(layer.state_dict()[name], before[name])
    assert layer(torch.randn(2, 64).to(dtype)).dtype == dtype


def test_half_and_float_on_a_whole_model_change_no_weight():
    model = nn.Sequential(QuantizedLinear.from_linear(make_linear()), nn.LayerNorm(128))
    before = model[0].dequantize()
    model.half().float()
    assert torch.equal(model[0].dequantize(), before)


def test_deepcopy_and_pickle_give_an_equal_and_independent_layer():
    layer = QuantizedLinear.from_linear(make_linear())
    x = torch.randn(3, 64)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert_same(other, layer)
        assert torch.equal(other(x), layer(x))
        other.weight.zero_()
    assert layer.weight.any()


def test_training_mode_and_missing_bias_are_kept():
    assert QuantizedLinear.from_linear(make_linear(bias=False).eval()).bias is None
    assert not QuantizedLinear.from_linear(make_linear().eval()).training
    assert QuantizedLinear.from_linear(make_linear().train()).training


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    linear = make_linear()
    linear.weight.data[3, 5] = bad
    with pytest.raises(FormatError):
        QuantizedLinear.from_linear(linear)


def test_wrong_names_and_shapes_are_refused():
    with pytest.raises(UsageError, match="did you mean 'nf4'"):
        QuantizedLinear.from_linear(make_linear(), "nf5")
    quantized = formats.quantize(torch.randn(8, 64))
    with pytest.raises(FormatError, match=r"bias has shape \(9,\), expected \(8,\)"):
        QuantizedLinear(quantized, torch.zeros(9))
    with pytest.raises(FormatError, match=r"\(out, in\)"):
        QuantizedLinear(formats.quantize(torch.randn(2, 4, 64)))
    with pytest.raises(FormatError, match=r"\(16, 64\), expected \(8, 64\)"):
        QuantizedLinear(quantized).hold(formats.quantize(torch.randn(16, 64)))


def test_an_empty_layer_makes_room_and_is_filled_in_place():
    source = QuantizedLinear.from_linear(make_linear())
    layer = QuantizedLinear.empty(64, 128, bias=True)
    layer.make_room("cpu")
    assert layer.bias.device.type == "meta"
    before = layer.weight
    layer.fill(source.quantized)
    assert layer.weight is before
    torch.testing.assert_close(layer.dequantize(), source.dequantize(), rtol=0, atol=0)
    with pytest.raises(FormatError, match="'nf4', {'double_quant': False}"):
        layer.fill(formats.quantize(make_linear().weight.detach(), "nf4", False))


def test_repr_says_the_format():
    assert "format=fp4, double_quant=False" in repr(QuantizedLinear.from_linear(make_linear(), "fp4", False))


def test_the_view_of_the_codes_follows_them() -> None:
    """`quantized` is made once; new codes, another device and a copy do not answer with the old ones."""
    layer = QuantizedLinear.from_linear(nn.Linear(64, 8, bias=False))
    first = layer.quantized
    assert layer.quantized is first
    other = QuantizedLinear.from_linear(nn.Linear(64, 8, bias=False))
    layer.hold(other.quantized)
    assert torch.equal(layer.dequantize(), other.dequantize())
    layer.load_state_dict(QuantizedLinear.from_linear(nn.Linear(64, 8, bias=False)).state_dict(), assign=True)
    assert not torch.equal(layer.dequantize(), other.dequantize())
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.zero_()
    assert not torch.equal(twin.dequantize(), layer.dequantize())
    assert "_view" not in pickle.loads(pickle.dumps(layer)).__dict__
    assert layer.to("meta").quantized.codes.is_meta


# ---- int8 ----


def make_int8(threshold: float | None = None) -> QuantizedLinear:
    return QuantizedLinear.from_linear(make_linear(), "int8", threshold=threshold)


def test_int8_computes_llm_int8s_product_with_its_threshold():
    linear, x = make_linear(), torch.randn(2, 5, 64) * 3
    for threshold in (0.0, 4.0):
        layer = QuantizedLinear.from_linear(linear, "int8", threshold=threshold)
        q = formats.quantize(linear.weight.detach(), "int8")
        largest = formats.rowwise.largest_input(64)
        expected = formats.rowwise.vectorwise_product(
            x.view(10, 64), q.codes.view(q.shape), q.absmax, threshold, largest
        )
        torch.testing.assert_close(layer(x), expected.view(2, 5, 128) + linear.bias)
    assert make_int8().threshold == 6.0
    assert QuantizedLinear.from_linear(linear).threshold == 0.0


def test_int8_is_saved_flat_with_an_absmax_a_row():
    layer = make_int8()
    assert set(layer.state_dict()) == {"weight", "weight_absmax", "bias"}
    assert (layer.weight.dtype, layer.weight.shape) == (torch.int8, (128 * 64, 1))
    assert (layer.weight_absmax.dtype, layer.weight_absmax.shape) == (torch.float32, (128,))
    assert layer.quantized.nbytes == 128 * 64 + 128 * 4
    filled = QuantizedLinear.empty(64, 128, True, "int8").to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert_same(filled, layer)


def test_int8_survives_what_is_done_to_modules():
    layer, x = make_int8(2.0), torch.randn(3, 64)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).half().float()):
        assert other.threshold == 2.0
        assert torch.equal(other.weight, layer.weight)
        assert torch.equal(other.weight_absmax, layer.weight_absmax)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert "format=int8, threshold=2.0" in repr(layer)
    conv = Conv1D(96, 64)
    turned = QuantizedLinear.from_linear(conv, "int8")
    assert turned.transposed
    assert torch.equal(turned.dequantize(), formats.dequantize(formats.quantize(conv.weight.detach().t(), "int8")))


def test_int8_with_options_that_do_not_fit_is_refused():
    with pytest.raises(UsageError, match="int8 has no double_quant"):
        QuantizedLinear.from_linear(make_linear(), "int8", double_quant=True)
    with pytest.raises(UsageError, match="nf4 has no threshold"):
        QuantizedLinear.from_linear(make_linear(), "nf4", threshold=6.0)
    with pytest.raises(UsageError, match="threshold=-1"):
        make_int8(-1.0)
    linear = make_linear()
    linear.weight.data[3, 5] = float("nan")
    with pytest.raises(FormatError, match=r"\[3, 5\]"):
        QuantizedLinear.from_linear(linear, "int8")


def test_unrounded_takes_the_inputs_as_they_are_and_gives_the_threshold_back():
    model = nn.Sequential(make_int8(3.0), nn.Linear(128, 64), QuantizedLinear.from_linear(make_linear()))
    x = torch.randn(5, 64)
    with pytest.raises(KeyError), unrounded(model) as names:
        assert names == ["0"]
        dense = nn.functional.linear(x, model[0].dequantize(), model[0].bias)
        torch.testing.assert_close(model[0](x), dense)
        raise KeyError
    assert model[0].threshold == 3.0
    assert (model[0](x) - dense).abs().max() > 1e-5  # a step of an input is 1 / 32767 of its row's greatest


# ---- groups ----


def make_grouped(symmetric: bool = False, ordered: bool = False, dtype: torch.dtype = torch.float16) -> QuantizedLinear:
    quantized = formats.quantize(make_linear().weight.detach(), "int4-g32", symmetric=symmetric)
    _, scale, zero, _ = quantized.packed
    order = torch.randperm(64).to(torch.int32) if ordered else None
    given = formats.GroupedTensor(quantized.format, quantized.shape, quantized.codes, scale.to(dtype), zero, order)
    return QuantizedLinear(given, torch.randn(128))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_are_saved_under_their_own_names_and_fill_an_empty_layer(symmetric, ordered):
    layer = make_grouped(symmetric, ordered, torch.bfloat16)
    absent = {"weight_zero"} if symmetric else set()
    absent |= set() if ordered else {"weight_order"}
    assert set(layer.state_dict()) == {"weight", "weight_scale", "weight_zero", "weight_order", "bias"} - absent
    assert (layer.weight.dtype, layer.weight.shape) == (torch.uint8, (128 * 64 // 2, 1))
    assert (layer.weight_scale.dtype, layer.weight_scale.shape) == (torch.bfloat16, (128, 2))
    options = {"symmetric": symmetric, "ordered": ordered, "scale_dtype": "bfloat16"}
    assert layer.options == options
    filled = QuantizedLinear.empty(64, 128, True, "int4-g32", **options).to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert_same(filled, layer)
    room = QuantizedLinear.empty(64, 128, True, "int4-g32", **options)
    room.make_room("cpu")
    room.fill(layer.quantized)
    assert torch.equal(room.dequantize(), layer.dequantize())


def test_groups_survive_what_is_done_to_modules():
    layer, x = make_grouped(ordered=True), torch.randn(3, 64)
    expected = layer(x)
    torch.testing.assert_close(expected, nn.functional.linear(x, layer.dequantize(), layer.bias))
    copies = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).half().float())
    for other in copies:
        for mine, theirs in zip(layer.quantized.packed, other.quantized.packed, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.dtype == theirs.dtype
    assert torch.equal(copies[0](x), expected)
    assert layer.double().weight_scale.dtype == torch.float16
    assert "format=int4-g32, symmetric=False, ordered=True, scale_dtype=float16" in repr(layer)


def test_a_grouped_conv1d_is_transposed():
    conv = Conv1D(96, 64)
    turned = QuantizedLinear.from_linear(conv, "int4", symmetric=True)
    assert turned.transposed
    dense = formats.dequantize(formats.quantize(conv.weight.detach().t(), "int4", symmetric=True))
    assert torch.equal(turned.dequantize(), dense)


def test_gradients_reach_the_input_of_groups_and_bias():
    layer = make_grouped(ordered=True)
    layer.bias.requires_grad_(True)
    x = torch.randn(12, 64, requires_grad=True)
    layer(x).square().sum().backward()
    weight = layer.dequantize()
    y = x.detach() @ weight.T + layer.bias.detach()
    torch.testing.assert_close(x.grad, 2 * y @ weight, rtol=1e-4, atol=1e-4)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_options_that_groups_lack_or_alone_have_are_refused():
    with pytest.raises(UsageError, match="int4 has no double_quant"):
        QuantizedLinear.from_linear(make_linear(), "int4", double_quant=True)
    with pytest.raises(UsageError, match="int4 has no threshold"):
        QuantizedLinear.from_linear(make_linear(), "int4", threshold=6.0)
    with pytest.raises(UsageError, match="nf4 has no symmetric"):
        QuantizedLinear.from_linear(make_linear(), "nf4", symmetric=True)
    with pytest.raises(UsageError, match="nf4 has no ordered"):
        QuantizedLinear.empty(64, 128, format="nf4", ordered=True)
    with pytest.raises(FormatError, match="'ordered': True"):
        QuantizedLinear(formats.quantize(torch.randn(128, 64), "int4-g32")).fill(make_grouped(ordered=True).quantized)
    with pytest.raises(FormatError, match=r"\(128, 64\), expected \(8, 64\)"):
        QuantizedLinear(formats.quantize(torch.randn(8, 64), "int4-g32")).hold(make_grouped().quantized)
