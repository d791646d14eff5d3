"""GPTQ files: the packing is the one that the formula says, and directories open with the numbers that they hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lilliput import formats, lora
from lilliput.errors import CheckpointError, FormatError, LilliputError, UsageError
from lilliput.formats import GroupedTensor, get_format
from lilliput.formats.format import group_count
from lilliput.formats.grouped import grouped
from lilliput.layers import QuantizedLinear, identity_of, quantized_layers, replace_linears
from lilliput.layers.replace import replaceable, shape_of
from lilliput.models import load_model, save_model
from lilliput.models.gptq_files import (
    GPTQ_CONFIG,
    gptq_config,
    pack_gptq,
    pack_words,
    save_gptq,
    unpack_gptq,
    unpack_words,
)
from lilliput.models.stream import INDEX, WEIGHTS
from tests.models.conftest import make_model

IDS = torch.arange(3, 99).reshape(2, 48)
BITS = (2, 3, 4, 8)
GROUPS = ("-g32", "-g64", "", "-row")
NAMES = {2: "int2", 3: "int3", 4: "int4", 8: "int8g"}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def field(words: list[int], index: int, bits: int) -> int:
    """Code `index` of a line of int32 words: the definition, in whole numbers of any length."""
    stream = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(words))
    return stream >> index * bits & (1 << bits) - 1


def by_the_formula(tensors: dict[str, Tensor], bits: int, convention: str) -> Tensor:
    """float32 [out, in]: scales[g] (code - zero[g]), every code and zero taken out one by one."""
    columns, rows = tensors["g_idx"].numel(), tensors["qweight"].shape[1]
    less = 1 if convention == "gptq" else 0
    zeros = [
        [field(group, row, bits) + less & (1 << bits) - 1 for row in range(rows)]
        for group in tensors["qzeros"].tolist()
    ]
    weight = torch.empty(rows, columns)
    for row in range(rows):
        words = tensors["qweight"][:, row].tolist()
        for column in range(columns):
            group = int(tensors["g_idx"][column])
            step = float(tensors["scales"][group, row])
            weight[row, column] = step * (field(words, column, bits) - zeros[group][row])
    return weight


def random_grouped(
    shape: tuple[int, int],
    name: str,
    symmetric: bool = False,
    ordered: bool = False,
    dtype: torch.dtype = torch.float16,
    least_zero: int = 1,
) -> GroupedTensor:
    """Random codes and constants; columns in a random order where `ordered`."""
    row = get_format(name)
    constants = shape[0], group_count(shape[1], row.block)
    zero = None if symmetric else torch.randint(least_zero, 2**row.bits, constants)
    codes = torch.randint(0, 2**row.bits, shape, dtype=torch.uint8)
    scale = (torch.rand(constants) + 0.5).mul(0.2 / 2**row.bits).to(dtype)
    return grouped(codes, scale, zero, row, torch.randperm(shape[1]) if ordered else None)


# ---- words ----


def test_words_of_four_bits_read_like_a_number() -> None:
    assert pack_words(torch.arange(8, dtype=torch.uint8)[:, None], 4).tolist() == [[0x76543210]]
    assert pack_words(torch.tensor([[0], [0], [0], [255]], dtype=torch.uint8), 8).tolist() == [[-(1 << 24)]]


def test_eleven_codes_of_three_bits_meet_the_end_of_a_word() -> None:
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[10] = 0b101
    assert pack_words(codes, 3).tolist() == [[0b01 << 30], [0b1], [0]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [32, 96, 160])
def test_words_are_a_stream_of_bits(bits: int, count: int) -> None:
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (count, 3), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert list(words.shape) == [count * bits // 32, 3]
    assert [field(words[:, 1].tolist(), i, bits) for i in range(count)] == codes[:, 1].tolist()
    assert torch.equal(unpack_words(words, count, bits), codes)


# ---- a layer ----


@pytest.mark.parametrize("convention", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_a_layer_there_and_back(bits: int, group: str, symmetric: bool, ordered: bool, convention: str) -> None:
    torch.manual_seed(0)
    q = random_grouped((32, 160), NAMES[bits] + group, symmetric, ordered)
    tensors = pack_gptq(q, convention)
    assert {part: t.dtype for part, t in tensors.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }
    groups = group_count(160, q.format.block)
    assert list(tensors["qzeros"].shape) == [groups, bits]
    assert torch.equal(by_the_formula(tensors, bits, convention), formats.dequantize(q))
    again = unpack_gptq(tensors, bits, q.format.block or -1, convention)
    assert (again.format, again.shape) == (q.format, q.shape)
    assert (again.zero is None) == symmetric
    assert (again.order is not None) == (ordered and groups > 1)
    assert torch.equal(formats.dequantize(again), formats.dequantize(q))


def test_columns_are_sorted_by_group_and_otherwise_stay_in_their_order() -> None:
    q = random_grouped((32, 64), "int4-g32")
    tensors = pack_gptq(q, "gptq")
    tensors["g_idx"] = torch.tensor([1, 0] * 32, dtype=torch.int32)
    order = unpack_gptq(tensors, 4, 32, "gptq").order
    assert order is not None
    assert order.tolist() == [*range(1, 64, 2), *range(0, 64, 2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_keep_their_type(dtype: torch.dtype) -> None:
    q = random_grouped((32, 64), "int4-g32", dtype=dtype)
    tensors = pack_gptq(q, "gptq")
    assert tensors["scales"].dtype == dtype
    assert torch.equal(unpack_gptq(tensors, 4, 32, "gptq").scale, q.scale)


def test_scales_in_float32_are_written_in_float16_where_that_is_exact() -> None:
    q = random_grouped((32, 64), "int4-g32")
    wide = GroupedTensor(q.format, q.shape, q.codes, q.scale.float(), q.zero)
    assert torch.equal(pack_gptq(wide, "gptq")["scales"], pack_gptq(q, "gptq")["scales"])


def test_a_missing_group_index_means_neighbours() -> None:
    q = random_grouped((32, 96), "int4-g64")
    tensors = pack_gptq(q, "gptq")
    del tensors["g_idx"]
    assert torch.equal(formats.dequantize(unpack_gptq(tensors, 4, 64, "gptq")), formats.dequantize(q))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_of_0_that_borrowed_from_their_neighbours_are_read(bits: int) -> None:
    """GPTQModel takes one off whole words: the field above a 0 is one less than it says."""
    torch.manual_seed(0)
    q = random_grouped((32, 64), f"{NAMES[bits]}-g32", least_zero=0)
    assert q.zero is not None
    q.zero[3, 0] = 0
    tensors = pack_gptq(q, "gptq_v2")
    tensors["qzeros"] = tensors["qzeros"] - {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    again = unpack_gptq(tensors, bits, 32, "gptq")
    assert again.zero is not None
    assert torch.equal(again.zero, q.zero)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_of_0_are_written_in_the_second_convention_alone(bits: int) -> None:
    q = random_grouped((32, 64), f"{NAMES[bits]}-g32")
    assert q.zero is not None
    q.zero[3, 0] = 0
    assert torch.equal(
        formats.dequantize(unpack_gptq(pack_gptq(q, "gptq_v2"), bits, 32, "gptq_v2")), formats.dequantize(q)
    )
    with pytest.raises(FormatError, match=r"zeros of 0.*'gptq' cannot store. Use 'gptq_v2'"):
        pack_gptq(q, "gptq")


def test_what_the_layout_cannot_hold_is_refused() -> None:
    for shape in ((33, 64), (32, 48)):
        with pytest.raises(FormatError, match="multiples of 32"):
            pack_gptq(random_grouped(shape, "int4-g32"), "gptq")
    q = random_grouped((32, 64), "int4-g32")
    odd = GroupedTensor(q.format, q.shape, q.codes, q.scale.float() + 1e-7, q.zero)
    with pytest.raises(FormatError, match="scales that float16 cannot hold"):
        pack_gptq(odd, "gptq")
    with pytest.raises(UsageError, match="unknown convention 'v2'"):
        pack_gptq(q, "v2")


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (lambda t: t.pop("qweight"), (4, 32), "no two-dimensional 'qweight'"),
        (lambda t: t.pop("scales"), (4, 32), r"has no 'layer\.scales'"),
        (lambda t: t.update(qzeros=t["qzeros"].long()), (4, 32), r"qzeros' is int64 \[2, 4\], expected int32 \[2, 4\]"),
        (lambda t: t.update(scales=t["scales"][:1]), (4, 32), r"scales' is float16 \[1, 32\], expected .* \[2, 32\]"),
        (lambda t: None, (4, 64), r"qzeros' is int32 \[2, 4\], expected int32 \[1, 4\]"),
        (lambda t: None, (8, 32), r"qweight' is int32 \[8, 32\], expected int32 \[16, 32\]"),
        (lambda t: None, (5, 32), "is GPTQ of 5 bits"),
        (lambda t: None, (4, 16), "groups of 16 numbers"),
        (lambda t: t["g_idx"].fill_(0), (4, 32), "does not put 32 columns into each group"),
        (lambda t: t["g_idx"].add_(7), (4, 32), "does not put 32 columns into each group"),
        (lambda t: t.update(g_idx=t["g_idx"][:60]), (4, 32), "do not fill whole words|qweight' is"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Callable[..., Any], arguments: tuple[int, int], said: str) -> None:
    tensors = pack_gptq(random_grouped((32, 64), "int4-g32"), "gptq")
    change(tensors)
    with pytest.raises(CheckpointError, match=said):
        unpack_gptq(tensors, *arguments, "gptq")


# ---- a directory ----

Change = Callable[[dict[str, Tensor]], Any]


def write_gptq(
    model: Any,
    directory: Path,
    name: str = "int4-g32",
    *,
    symmetric: bool = False,
    ordered: bool = False,
    convention: str = "gptq_v2",
    dense: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
    change: Change = lambda tensors: None,
) -> Any:
    """Write `model` with random codes as a GPTQ directory; returns the model with those numbers, dense."""
    model.save_pretrained(directory)
    tensors = load_file(directory / WEIGHTS)
    with torch.no_grad():
        for path in replaceable(model):
            if path.endswith(dense) and dense:
                continue
            linear = model.get_submodule(path)
            q = random_grouped(shape_of(linear), name, symmetric, ordered)
            weight = formats.dequantize(q)
            linear.weight.copy_(weight if isinstance(linear, nn.Linear) else weight.T)
            del tensors[f"{path}.weight"]
            tensors |= {f"{path}.{part}": t for part, t in pack_gptq(q, convention).items()}
    change(tensors)
    own = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(own, directory / WEIGHTS, metadata={"format": "pt"})
    said = gptq_config(name, symmetric=symmetric, ordered=ordered, convention=convention) if config is None else config
    set_config(directory, said)
    return model


def set_config(directory: Path, content: dict[str, Any] | None) -> None:
    """Put a quantization configuration into config.json, or take it out."""
    path = directory / "config.json"
    whole = json.loads(path.read_text())
    whole.pop("quantization_config", None)
    path.write_text(json.dumps(whole if content is None else {**whole, "quantization_config": content}))


def assert_same_logits(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    ("name", "symmetric", "ordered", "convention"),
    [
        ("int4-g32", True, False, "gptq"),
        ("int4-g32", False, True, "gptq_v2"),
        ("int3-g64", False, False, "gptq"),
        ("int2-g32", False, False, "gptq_v2"),
        ("int8g-row", True, False, "gptq"),
    ],
)
def test_a_directory_opens_with_its_numbers(kind, name, symmetric, ordered, convention, tmp_path) -> None:
    settings = {"symmetric": symmetric, "ordered": ordered, "convention": convention}
    expected = write_gptq(make_model(kind), tmp_path, name, **settings)
    model = load_model(tmp_path, progress=False)
    assert_same_logits(model, expected)
    layers = dict(quantized_layers(model))
    assert list(layers) == replaceable(expected)
    for path, layer in layers.items():
        assert layer.format_name == name
        assert layer.options == {"symmetric": symmetric, "ordered": ordered, "scale_dtype": "float16"}
        weight = expected.get_submodule(path).weight
        dense = layer.dequantize()
        assert torch.equal(dense if isinstance(expected.get_submodule(path), nn.Linear) else dense.T, weight)
    assert load_model(tmp_path, format=name, progress=False).config.quantization_config.format == name


def test_a_directory_without_a_group_index_opens(tmp_path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("g_idx")]:
            del tensors[key]

    assert_same_logits(load_model(write_path(tmp_path, change=drop), progress=False), WRITTEN[tmp_path])


WRITTEN: dict[Path, Any] = {}  # what `write_path` wrote


def write_path(directory: Path, kind: str = "llama", **settings: Any) -> Path:
    """`write_gptq`, for tests that are about the directory."""
    WRITTEN[directory] = write_gptq(make_model(kind), directory, **settings)
    return directory


def test_one_layer_with_an_order_or_zeros_of_its_own_gives_all_layers_them(tmp_path) -> None:
    q = random_grouped((64, 64), "int4-g32", symmetric=False, ordered=True)
    path = "model.layers.1.self_attn.o_proj"

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors |= {f"{path}.{part}": t for part, t in pack_gptq(q, "gptq").items()}

    expected = write_gptq(make_model("llama"), tmp_path, symmetric=True, convention="gptq", change=swap)
    with torch.no_grad():
        expected.get_submodule(path).weight.copy_(formats.dequantize(q))
    model = load_model(tmp_path, progress=False)
    assert model.config.quantization_config.options == {
        "symmetric": False,
        "ordered": True,
        "scale_dtype": "float16",
    }
    assert_same_logits(model, expected)


def test_scales_of_two_types_become_float32(tmp_path) -> None:
    path = "model.layers.0.mlp.down_proj"

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[f"{path}.scales"] = tensors[f"{path}.scales"].bfloat16()

    write_path(tmp_path, change=widen)
    model = load_model(tmp_path, progress=False)
    assert {layer.weight_scale.dtype for _, layer in quantized_layers(model)} == {torch.float32}
    stored = load_file(tmp_path / WEIGHTS)[f"{path}.scales"]
    assert torch.equal(model.get_submodule(path).weight_scale, stored.T.float())


def test_shards_open(tmp_path) -> None:
    write_path(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    weight_map = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):  # the parts of a layer lie in different files
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / WEIGHTS).unlink()
    assert_same_logits(load_model(tmp_path, progress=False), WRITTEN[tmp_path])


def test_a_directory_of_the_first_autogptq_opens(tmp_path) -> None:
    """The configuration lies beside, the file has a name of its own, and layers without a bias have one of zeros."""

    def add_biases(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(".qweight")]:
            tensors[key.replace("qweight", "bias")] = torch.zeros(tensors[key].shape[1], dtype=torch.float16)

    write_path(tmp_path, symmetric=True, convention="gptq", change=add_biases)
    set_config(tmp_path, None)
    (tmp_path / GPTQ_CONFIG).write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False, "sym": True}))
    (tmp_path / WEIGHTS).rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    model = load_model(tmp_path, progress=False)
    assert_same_logits(model, WRITTEN[tmp_path])
    assert model.model.layers[0].mlp.up_proj.bias is None
    assert len(identity_of(model).weights_sha256) == 64


def test_a_configuration_that_was_left_beside_a_dense_model_does_not_count(tmp_path, tiny_llama) -> None:
    save_model(tiny_llama(), tmp_path)
    (tmp_path / GPTQ_CONFIG).write_text(json.dumps({"bits": 4, "group_size": 32}))
    assert not dict(quantized_layers(load_model(tmp_path, progress=False)))


def test_a_bias_that_the_model_has_not_is_refused(tmp_path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.ones(128)

    with pytest.raises(CheckpointError, match=r"has a bias for 'model\.layers\.0\.mlp\.up_proj'"):
        load_model(write_path(tmp_path, change=add), progress=False)


def test_layers_that_are_dense_in_the_file_stay_dense(tmp_path) -> None:
    write_path(tmp_path, dense=("down_proj", "layers.0.self_attn.q_proj"))
    model = load_model(tmp_path, progress=False)
    assert_same_logits(model, WRITTEN[tmp_path])
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear
    assert isinstance(model.model.layers[1].self_attn.q_proj, QuantizedLinear)


def quantize_head(tensors: dict[str, Tensor]) -> None:
    tensors.pop("lm_head.weight", None)
    q = random_grouped((512, 64), "int4-g32")
    tensors |= {f"lm_head.{part}": t for part, t in pack_gptq(q, "gptq_v2").items()}


def test_a_quantized_head_opens(tmp_path) -> None:
    model = load_model(write_path(tmp_path, change=quantize_head), progress=False)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert logits(model).isfinite().all()


def test_a_quantized_head_of_a_tied_model_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="'lm_head' is quantized, and shares its weight"):
        load_model(write_path(tmp_path, "llama-tied", change=quantize_head), progress=False)


def test_names_without_the_backbones_open(tmp_path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)

    write_path(tmp_path, "gpt2", change=strip)
    assert_same_logits(load_model(tmp_path, progress=False), WRITTEN[tmp_path])


def test_adapters_train_over_it_and_it_is_saved_as_ours(tmp_path) -> None:
    write_path(tmp_path / "gptq", ordered=True)
    model = load_model(tmp_path / "gptq", progress=False)
    before = logits(model)
    save_model(model, tmp_path / "own")
    again = load_model(tmp_path / "own", progress=False)
    assert torch.equal(logits(again), before)
    assert identity_of(again).weights_sha256 == identity_of(model).weights_sha256
    lora.add_adapter(model, lora.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model(IDS, labels=IDS).loss.backward()
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_a_classifier_is_put_on_it(tmp_path) -> None:
    write_path(tmp_path)
    model = load_model(tmp_path, labels=["no", "yes"], progress=False)
    hidden = model.model(IDS).last_hidden_state
    torch.testing.assert_close(hidden, WRITTEN[tmp_path].model(IDS).last_hidden_state, rtol=1e-4, atol=1e-4)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_method": "awq"}, r"is quantized by 'awq', which is not read here \(these are: bitsandbytes, gptq\)"),
        ({"quant_method": ["gptq"]}, "is quantized by"),
        ({"quant_method": None}, "is quantized by 'None'"),
        ({"checkpoint_format": "marlin"}, "in the layout 'marlin'; read here are gptq and gptq_v2"),
        ({"is_marlin_format": True}, "in the layout 'marlin'"),
        ({"pack_dtype": "int64"}, "packed into int64"),
        ({"bits": 5}, "of 5 bits"),
        ({"bits": "4"}, "of '4' bits"),
        ({"bits": True}, "of True bits"),
        ({"group_size": 16}, "groups of 16 numbers"),
        ({"group_size": -2}, "groups of -2 numbers"),
        ({"group_size": "128"}, "the group size is '128'"),
        ({"group_size": 2**70}, "expected a whole number up to"),
        ({"group_size": 64}, "qzeros' is int32"),
        ({"bits": 8}, "qweight' is int32"),
    ],
)
def test_other_layouts_are_refused(change: dict[str, Any], said: str, tmp_path) -> None:
    config = gptq_config("int4-g32", symmetric=False, ordered=False)
    write_path(tmp_path, config={**config, **change})
    with pytest.raises(CheckpointError, match=said):
        load_model(tmp_path, progress=False)


@pytest.mark.parametrize("missing", ["bits", "group_size"])
def test_a_configuration_with_holes_is_refused(missing: str, tmp_path) -> None:
    config = gptq_config("int4-g32", symmetric=False, ordered=False)
    del config[missing]
    with pytest.raises(CheckpointError, match=f"has no '{missing}'"):
        load_model(write_path(tmp_path, config=config), progress=False)


def test_awq_of_old_is_refused_by_its_name(tmp_path) -> None:
    write_path(tmp_path)
    set_config(tmp_path, None)
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 128, "version": "GEMM"}))
    with pytest.raises(CheckpointError, match="is quantized by 'awq'"):
        load_model(tmp_path, progress=False)


@pytest.mark.parametrize("content", ["[]", "{", '"gptq"'])
def test_a_broken_configuration_beside_is_refused(content: str, tmp_path) -> None:
    write_path(tmp_path)
    set_config(tmp_path, None)
    (tmp_path / GPTQ_CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match=GPTQ_CONFIG):
        load_model(tmp_path, progress=False)


def test_a_configuration_that_is_no_object_is_refused(tmp_path) -> None:
    write_path(tmp_path, config=["gptq"])  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path, progress=False)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{UP}.qzeros"), f"has no '{UP}.qzeros'"),
        (lambda t: t.pop(f"{UP}.scales"), f"has no '{UP}.scales'"),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].double()}), r"scales' is float64 \[2, 128\]"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:, :64]}), r"qweight' is int32 \[8, 64\]"),
        (lambda t: t[f"{UP}.g_idx"].zero_(), "does not put 32 columns into each group"),
        (lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"].float()}), "g_idx' is float32"),
        (
            lambda t: t.update({"model.extra.qweight": t[f"{UP}.qweight"]}),
            "'model.extra' is quantized, and is no linear",
        ),
        (lambda t: t.pop(f"{UP}.qweight"), "have no place in the model|are missing"),
        (lambda t: t.pop("model.norm.weight"), r"missing from the checkpoint: model\.norm\.weight"),
        (
            lambda t: [t.pop(key) for key in list(t) if key.endswith(".qweight")],
            "said to be quantized by GPTQ, and has no 'qweight'",
        ),
    ],
)
def test_broken_files_are_refused(change: Change, said: str, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_model(write_path(tmp_path, change=change), progress=False)


def test_another_format_and_other_options_are_refused(tmp_path) -> None:
    write_path(tmp_path)
    with pytest.raises(UsageError, match="is quantized to int4-g32 already"):
        load_model(tmp_path, format="nf4")
    with pytest.raises(UsageError, match="symmetric=True was asked for"):
        load_model(tmp_path, symmetric=True)


# ---- writing ----


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "gpt2"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_saved_opens_again(kind: str, symmetric: bool, tmp_path) -> None:
    make_model(kind).save_pretrained(tmp_path / "dense")
    model = load_model(tmp_path / "dense", format="int4-g32", symmetric=symmetric, progress=False)
    save_gptq(model, tmp_path / "gptq", progress=False)
    again = load_model(tmp_path / "gptq", progress=False)
    expected, got = model.state_dict(), again.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert identity_of(again).weights_sha256 == identity_of(model).weights_sha256
    assert identity_of(again).quantized_sha256 == identity_of(model).quantized_sha256
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "gptq" / GPTQ_CONFIG).read_text())
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, symmetric, False)
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")


def test_the_first_convention_can_be_asked_for(tmp_path, tiny_llama) -> None:
    model = tiny_llama()
    replace_linears(model, "int3-g64")
    save_gptq(model, tmp_path, convention="gptq", progress=False)
    assert json.loads((tmp_path / GPTQ_CONFIG).read_text())["checkpoint_format"] == "gptq"
    assert torch.equal(logits(load_model(tmp_path, progress=False)), logits(model))


def test_dense_layers_inside_are_named(tmp_path, tiny_llama) -> None:
    model = tiny_llama()
    replace_linears(model, "int4-g32", skip=["lm_head", "down_proj"])
    save_gptq(model, tmp_path, progress=False)
    dynamic = json.loads((tmp_path / GPTQ_CONFIG).read_text())["dynamic"]
    assert dynamic == {rf"-:^model\.layers\.{index}\.mlp\.down_proj$": {} for index in range(2)}
    assert torch.equal(logits(load_model(tmp_path, progress=False)), logits(model))


def test_the_tokenizer_is_saved_beside(tmp_path, tiny_llama, tiny_tokenizer) -> None:
    model = tiny_llama()
    replace_linears(model, "int4-g32")
    save_gptq(model, tmp_path, tiny_tokenizer, progress=False)
    assert (tmp_path / "tokenizer.json").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_models_that_gptq_cannot_hold_are_refused_and_nothing_is_written(tmp_path, tiny_llama) -> None:
    dense, other, mixed, narrow = tiny_llama(), tiny_llama(), tiny_llama(), tiny_llama(intermediate_size=72)
    replace_linears(other, "nf4")
    replace_linears(mixed, "int4-g32", skip=["o_proj", "lm_head"])
    replace_linears(mixed, "int3-g32", skip=["lm_head"])
    replace_linears(narrow, "int4-g32")
    faults: list[tuple[Any, type[LilliputError], str]] = [
        (dense, UsageError, "no layer of the model is quantized"),
        (other, UsageError, "is in nf4, which GPTQ files cannot hold"),
        (mixed, FormatError, "layers of several formats: int3-g32, int4-g32"),
        (narrow, FormatError, r"model\.layers\.0\.mlp\.gate_proj: the weight is \[72, 64\].*multiples of 32"),
    ]
    for model, kind, said in faults:
        with pytest.raises(kind, match=said):
            save_gptq(model, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("here")
    model = tiny_llama()
    replace_linears(model, "int4-g32")
    with pytest.raises(UsageError, match="is a file, expected a directory"):
        save_gptq(model, tmp_path / "file", progress=False)
    with pytest.raises(UsageError, match="unknown convention 'third'"):
        save_gptq(model, tmp_path / "out", convention="third", progress=False)


def test_the_configuration_says_what_is_asked_for() -> None:
    config = gptq_config("int3-row", symmetric=True, ordered=True, damp_percent=0.05, meta={"samples": 128})
    assert {key: config[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "damp_percent")} == {
        "quant_method": "gptq",
        "bits": 3,
        "group_size": -1,
        "sym": True,
        "desc_act": True,
        "damp_percent": 0.05,
    }
    assert config["meta"]["samples"] == 128
    assert "dynamic" not in config
    assert math.prod([config["lm_head"], config["static_groups"]]) == 0
    with pytest.raises(UsageError, match="unknown number format"):
        gptq_config("int5", symmetric=True, ordered=False)
