"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them, in and out: packing, both zero conventions, the configs.

    qweight  int32 [in * bits / 32, out]       the codes of a row of W, down a column: code 0 in the lowest bits
    qzeros   int32 [groups, out * bits / 32]   the zeros of a group, in the same way, along a row
    scales   float16 or bfloat16 [groups, out]
    g_idx    int32 [in]                        the group of each column of W; where it is missing, column // group size

    W[o, i] = scales[g, o] (code[i, o] - zero[g, o])        g = g_idx[i]

In the first convention, "gptq", zeros are stored less one, in "gptq_v2" as they are. 3 bits do not divide a word: codes
then run over the ends of words, 32 of them in 3. Columns of a group lie anywhere (`desc_act`); here they are sorted by
group, and a GroupedTensor's `order` remembers where they came from.
Sources: the layout is that of the `pack` methods of both libraries' linear layers; arXiv 2210.17323 has no file format.
Not here: choosing codes (gptq.py), other libraries' kernels' own layouts (Marlin, BitBLAS, AWQ), which are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.errors import CheckpointError, FormatError, UsageError
from lilliput.formats import ROW, Format, GroupedTensor, get_format, grouped_format
from lilliput.formats.blockwise import FLOATS
from lilliput.formats.format import group_count
from lilliput.formats.grouped import zeros_of
from lilliput.formats.packing import pack_codes, row_bytes, unpack_codes
from lilliput.layers import QuantizedLinear, QuantizedWeight, identity_of, quantized_layers
from lilliput.layers.replace import replaceable
from lilliput.models.presented import Linears, Presented, expect, held, made, others, parts_of
from lilliput.models.save import save_repacked
from lilliput.models.stream import GPTQ_CONFIG, StoredTensor

FIRST, SECOND = "gptq", "gptq_v2"  # zeros less one; zeros as they are
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_BITS = (2, 3, 4, 8)
_WORD = 32  # bits
_LARGEST_GROUP = 2**20
# One in every field of a word. The first convention takes it off the whole word, so that a zero of 0 borrows from the
# field above it; added to the whole word it is undone. Fields of 3 bits lie across words and are taken one by one.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_RUN = 32  # in and out of a layer that is written: readers' kernels want whole words of any bits


# ---- words ----


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n, lines] of codes below 2**bits to int32 [n * bits / 32, lines], down each column, lowest bits first."""
    count, lines = codes.shape
    runs = pad(codes, (0, 0, 0, -count % _WORD)).view(-1, _WORD, lines)  # 32 codes fill `bits` words
    words = torch.zeros(runs.shape[0], bits, lines, dtype=torch.int32)
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        code = runs[:, place].int()
        words[:, word] |= code << shift
        if shift + bits > _WORD:
            words[:, word + 1] |= code >> (_WORD - shift)
    return words.view(-1, lines)[: count * bits // _WORD]


def unpack_words(words: Tensor, count: int, bits: int) -> Tensor:
    """The inverse: int32 [n * bits / 32, lines] to uint8 [count, lines]."""
    lines = words.shape[1]
    runs = pad(words, (0, 0, 0, -words.shape[0] % bits)).view(-1, bits, lines)
    codes = torch.empty(runs.shape[0], _WORD, lines, dtype=torch.uint8)
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        code = runs[:, word] >> shift
        if shift + bits > _WORD:
            code = (code & ((1 << (_WORD - shift)) - 1)) | (runs[:, word + 1] << (_WORD - shift))
        codes[:, place] = code & ((1 << bits) - 1)
    return codes.view(-1, lines)[:count]


# ---- a layer ----


@dataclass(frozen=True)
class Layout:
    """How the codes of a file lie.

    Attributes:
        bits: of a code: 2, 3, 4 or 8.
        group: columns of a group; ROW: all.
        convention: of zeros: "gptq" or "gptq_v2".
    """

    bits: int
    group: int
    convention: str

    @property
    def format(self) -> Format:
        """The number format of the codes."""
        return grouped_format(self.bits, self.group)

    def expected(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Shapes and types of the parts of a weight (out, in)."""
        rows, columns = shape
        groups = group_count(columns, self.group)
        return {
            "qweight": ((columns * self.bits // _WORD, rows), (torch.int32,)),
            "qzeros": ((groups, rows * self.bits // _WORD), (torch.int32,)),
            "scales": ((groups, rows), FLOATS),
            "g_idx": ((columns,), (torch.int32, torch.int64)),
        }

    def group_of_columns(self, columns: int) -> Tensor:
        """int64 [columns], in the order in which groups lie: 0, 0, .. 1, 1, .."""
        return torch.arange(columns) // (columns if self.group == ROW else self.group)

    def pack_zeros(self, zeros: Tensor) -> Tensor:
        """uint8 [groups, out] to qzeros."""
        less = zeros - 1 if self.convention == FIRST else zeros
        return pack_words(less.T.contiguous(), self.bits).T.contiguous()

    def unpack_zeros(self, words: Tensor, rows: int) -> Tensor:
        """qzeros to uint8 [groups, out]."""
        if self.convention == FIRST and self.bits in _ONES:
            words = words + _ONES[self.bits]
        zeros = unpack_words(words.T, rows, self.bits).T
        return (zeros + 1) & (2**self.bits - 1) if self.convention == FIRST and self.bits not in _ONES else zeros


@dataclass(frozen=True)
class StoredLayer:
    """One quantized layer of a file.

    Attributes:
        name: of the layer, for errors.
        layout: how its codes lie.
        shape: (out, in).
        parts: readers of PARTS; g_idx may be missing.
    """

    name: str
    layout: Layout
    shape: tuple[int, int]
    parts: Mapping[str, StoredTensor]

    def check(self, where: str) -> None:
        """Raise CheckpointError unless all parts are there and fit; nothing is read."""
        if any(side * self.layout.bits % _WORD for side in self.shape):
            raise CheckpointError(
                f"'{self.name}' is {list(self.shape)}, whose codes of {self.layout.bits} bits do not fill whole words",
                where=where,
            )
        for part, (shape, types) in self.layout.expected(self.shape).items():
            if part != "g_idx" or part in self.parts:
                expect(f"{self.name}.{part}", self.parts.get(part), shape, types, where)

    def order(self, where: str) -> Tensor | None:
        """int32 [in]: the columns sorted by group; None where they lie so.

        Raises CheckpointError when the groups are not those that the group size makes.
        """
        if "g_idx" not in self.parts:
            return None
        groups = self.parts["g_idx"].load().long()
        order = torch.argsort(groups, stable=True)
        if not torch.equal(groups[order], self.layout.group_of_columns(self.shape[1])):
            raise CheckpointError(
                f"'{self.name}.g_idx' does not put {self.layout.group or self.shape[1]} columns into each group",
                where=where,
                todo="The group size in its configuration is another, or the file is broken.",
            )
        return None if torch.equal(order, torch.arange(order.numel())) else order.int()

    def codes(self, order: Tensor | None) -> Tensor:
        """Our packed codes, flat, of the columns in `order`."""
        codes = unpack_words(self.parts["qweight"].load(), self.shape[1], self.layout.bits)
        if order is not None:
            codes = codes[order.long()]
        return pack_codes(codes.T.contiguous(), self.layout.bits)

    def scale(self) -> Tensor:
        """[out, groups], as stored."""
        return self.parts["scales"].load().T.contiguous()

    def zero(self) -> Tensor:
        """uint8 [out, groups]."""
        return self.layout.unpack_zeros(self.parts["qzeros"].load(), self.shape[0]).T.contiguous()

    def is_symmetric(self) -> bool:
        """Whether all zeros are the middle code."""
        return bool((self.zero() == 2 ** (self.layout.bits - 1)).all())


def unpack_gptq(tensors: Mapping[str, Tensor], bits: int, group: int, convention: str) -> GroupedTensor:
    """A GroupedTensor of the tensors of one layer. Zeros that are all the middle code, and an order that is none, are
    None in it.

    Args:
        tensors: qweight, qzeros, scales, and g_idx where there is one; see above.
        bits: of a code.
        group: columns of a group; -1 or ROW: all.
        convention: "gptq" or "gptq_v2".
    Raises:
        CheckpointError: a tensor is missing, or they do not fit each other.
    """
    layout = _layout(bits, group, convention, "GPTQ")
    where = "GPTQ layer"
    words, groups = tensors.get("qweight"), tensors.get("g_idx")
    if words is None or words.dim() != 2:
        raise CheckpointError("has no two-dimensional 'qweight'", where=where)
    columns = words.shape[0] * _WORD // bits if groups is None else groups.numel()
    parts = {part: held(part, tensors[part]) for part in PARTS if part in tensors}
    layer = StoredLayer("layer", layout, (words.shape[1], columns), parts)
    layer.check(where)
    order = layer.order(where)
    zero = None if layer.is_symmetric() else layer.zero()
    return GroupedTensor(layout.format, layer.shape, layer.codes(order), layer.scale(), zero, order)


def pack_gptq(q: GroupedTensor, convention: str) -> dict[str, Tensor]:
    """The four tensors of a layer.

    Args:
        q: of shape (out, in), both multiples of 32; scales that float16 or bfloat16 holds.
        convention: "gptq" or "gptq_v2".
    Raises:
        UsageError: an unknown convention.
        FormatError: a shape or scales that the layout cannot hold, or zeros of 0, which the first convention cannot.
    """
    return {part: tensor.load() for part, tensor in gptq_tensors(q, convention).items()}


def gptq_tensors(q: GroupedTensor, convention: str, where: str = "GPTQ") -> dict[str, StoredTensor]:
    """The same, each packed when it is asked for; what cannot be packed is refused at once."""
    layout = Layout(q.format.bits, q.format.block, convention)
    if convention not in (FIRST, SECOND):
        raise UsageError(f"unknown convention '{convention}' of zeros", todo=f"There are: {FIRST}, {SECOND}.")
    _check_packable(q, layout, where)
    shape: tuple[int, int] = (q.shape[0], q.shape[1])
    dtypes = {"scales": _scales(q).dtype}
    loads = {
        "qweight": lambda: pack_words(_in_place(q).T.contiguous(), layout.bits),
        "qzeros": lambda: layout.pack_zeros(zeros_of(q.zero, q.scale, q.format).to(torch.uint8).T),
        "scales": lambda: _scales(q).T.contiguous(),
        "g_idx": lambda: _group_index(q, layout),
    }
    expected = layout.expected(shape)
    return {part: made(part, dtypes.get(part, torch.int32), expected[part][0], loads[part]) for part in PARTS}


def _check_packable(q: GroupedTensor, layout: Layout, where: str) -> None:
    if len(q.shape) != 2 or any(side % _RUN for side in q.shape):
        raise FormatError(
            f"the weight is {list(q.shape)}; GPTQ files hold layers whose inputs and outputs are multiples of {_RUN}",
            where=where,
            todo="Leave this layer dense.",
        )
    if layout.convention == FIRST and q.zero is not None and not bool(q.zero.all()):
        raise FormatError(
            f"has zeros of 0, which the convention '{FIRST}' cannot store", where=where, todo=f"Use '{SECOND}'."
        )
    if _scales(q).dtype == torch.float32:
        raise FormatError(
            "has scales that float16 cannot hold",
            where=where,
            todo="Quantize with scales that are rounded to float16 or bfloat16.",
        )


def _scales(q: GroupedTensor) -> Tensor:
    """The scales in 16 bits; in float32 where 16 bits cannot hold them."""
    half = q.scale.half()
    return half if q.scale.dtype == torch.float32 and torch.equal(half.float(), q.scale) else q.scale


def _in_place(q: GroupedTensor) -> Tensor:
    """uint8 [out, in]: the codes with every column where it is in W."""
    codes = unpack_codes(q.codes, (q.shape[0], q.shape[1]), q.format.bits)
    return codes if q.order is None else torch.empty_like(codes).index_copy_(1, q.order.long(), codes)


def _group_index(q: GroupedTensor, layout: Layout) -> Tensor:
    groups = layout.group_of_columns(q.shape[1]).int()
    return groups if q.order is None else torch.empty_like(groups).index_copy_(0, q.order.long(), groups)


# ---- configs ----


def gptq_config(
    format: str | Format,
    *,
    symmetric: bool,
    ordered: bool,
    convention: str | None = None,
    dense: list[str] | None = None,
    weights_sha256: str | None = None,
    lm_head: bool = False,
    true_sequential: bool = True,
    static_groups: bool = False,
    damp_percent: float = 0.01,
    meta: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What `quantize_config.json` holds, and `quantization_config` in `config.json`: the same.

    Args:
        format: of the layers: a grouped one.
        symmetric: all zeros are the middle code.
        ordered: groups hold columns that are no neighbours, so that readers must look at g_idx.
        convention: of zeros; None: `convention_for(symmetric)`.
        dense: linear layers inside the backbone that are not quantized.
        weights_sha256: hash of the checkpoint that was quantized.
        lm_head: whether the head is quantized.
        true_sequential, static_groups, damp_percent: how codes were found, for the record.
        meta: more for the record.
    """
    row = get_format(format)
    remembered = {} if weights_sha256 is None else {"weights_sha256": weights_sha256}
    skipped: dict[str, dict[str, object]] = {f"-:^{re.escape(name)}$": {} for name in dense or ()}
    return {
        "quant_method": "gptq",
        "checkpoint_format": convention or convention_for(symmetric),
        "bits": row.bits,
        "group_size": -1 if row.block == ROW else row.block,
        "sym": symmetric,
        "desc_act": ordered,
        "static_groups": static_groups,
        "true_sequential": true_sequential,
        "damp_percent": damp_percent,
        "lm_head": lm_head,
        "pack_dtype": "int32",
        **({"dynamic": skipped} if skipped else {}),
        "meta": {"quantizer": [f"lilliput:{_version()}"], **remembered, **(meta or {})},
    }


def convention_for(symmetric: bool) -> str:
    """The convention that most programs read: the first, but for zeros of their own the second.

    GPTQModel refuses such zeros in the first convention from anybody else, since AutoGPTQ once wrote them wrongly.
    """
    return FIRST if symmetric else SECOND


def _version() -> str:
    from lilliput import __version__

    return __version__


def read_layout(content: Mapping[str, Any], where: str) -> Layout:
    """What a GPTQ configuration says of the layout; the rest is only for the record.

    Raises CheckpointError when something is missing, unknown, or a layout that is not read here.
    """
    form = content.get("checkpoint_format") or content.get("format") or FIRST
    if content.get("is_marlin_format"):
        form = "marlin"
    if (words := content.get("pack_dtype", "int32")) not in ("int32", "torch.int32"):
        raise CheckpointError(f"its codes are packed into {words}, and only int32 is read here", where=where)
    missing = [key for key in ("bits", "group_size") if key not in content]
    if missing:
        raise CheckpointError(f"its GPTQ configuration has no '{missing[0]}'", where=where)
    return _layout(content["bits"], content["group_size"], form, where)


def _layout(bits: Any, group: Any, convention: Any, where: str) -> Layout:
    todo = "Load it with the library that made it, or quantize the original model again."
    if convention not in (FIRST, SECOND):
        raise CheckpointError(
            f"is GPTQ in the layout '{convention}'; read here are {FIRST} and {SECOND}", where=where, todo=todo
        )
    if isinstance(bits, bool) or bits not in _BITS:
        raise CheckpointError(f"is GPTQ of {bits!r} bits; read here are 2, 3, 4 and 8", where=where, todo=todo)
    if not isinstance(group, int) or isinstance(group, bool) or group > _LARGEST_GROUP:
        raise CheckpointError(
            f"the group size is {group!r}, expected a whole number up to {_LARGEST_GROUP}", where=where
        )
    try:
        layout = Layout(bits, ROW if group == -1 else group, convention)
        layout.format  # noqa: B018  raises for a group that no format has
    except UsageError as error:
        raise CheckpointError(f"is GPTQ in {error.what}, which are not read here", where=where, todo=todo) from error
    return layout


# ---- a checkpoint ----


def present_gptq(
    tensors: Mapping[str, StoredTensor], content: Mapping[str, Any], linears: Linears, where: str
) -> Presented:
    """A GPTQ checkpoint as one of ours.

    All layers are of one format: where one has zeros of its own, or columns in an order of their own, all have them;
    scales of several types become float32. So zeros and g_idx are read here; codes and scales when they are placed.

    Raises CheckpointError for whatever does not fit.
    """
    layout = read_layout(content, where)
    names = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    if not names:
        raise CheckpointError("is said to be quantized by GPTQ, and has no 'qweight'", where=where)
    layers = [
        StoredLayer(name, layout, linears.find(name, where).shape, parts_of(tensors, name, PARTS)) for name in names
    ]
    for layer in layers:
        layer.check(where)
    orders = [layer.order(where) for layer in layers]
    dtypes = {layer.parts["scales"].dtype for layer in layers}
    options = {
        "symmetric": all(layer.is_symmetric() for layer in layers),
        "ordered": any(order is not None for order in orders),
        "scale_dtype": str(dtypes.pop() if len(dtypes) == 1 else torch.float32).removeprefix("torch."),
    }
    shown = others(tensors, [layer.parts for layer in layers])
    for layer, order in zip(layers, orders, strict=True):
        shown |= _shown(layer, order, options)
        _drop_empty_bias(shown, layer.name, linears, where)
    return Presented(layout.format.name, options, shown, names)


def _shown(layer: StoredLayer, order: Tensor | None, options: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The parameters of our layer."""
    name, (rows, columns) = f"{layer.name}.weight", layer.shape
    constants = rows, group_count(columns, layer.layout.group)
    scales = getattr(torch, options["scale_dtype"])
    found: dict[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]] = {
        "": (torch.uint8, (rows * row_bytes(columns, layer.layout.bits), 1), lambda: layer.codes(order).view(-1, 1)),
        "_scale": (scales, constants, lambda: layer.scale().to(scales)),
    }
    if not options["symmetric"]:
        found["_zero"] = (torch.uint8, constants, layer.zero)
    if options["ordered"]:
        own = torch.arange(columns, dtype=torch.int32) if order is None else order
        found["_order"] = (torch.int32, (columns,), lambda: own)
    return {name + part: made(name + part, *rest) for part, rest in found.items()}


def _drop_empty_bias(shown: dict[str, StoredTensor], name: str, linears: Linears, where: str) -> None:
    """Older AutoGPTQ wrote a bias of zeros for layers that have none."""
    bias = shown.get(f"{name}.bias")
    if bias is None or linears.find(name, where).has_bias:
        return
    if bias.load().any():
        raise CheckpointError(f"has a bias for '{name}', which has none in {type(linears.model).__name__}", where=where)
    del shown[bias.name]


# ---- writing ----


def save_gptq(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    convention: str | None = None,
    progress: bool = True,
) -> None:
    """Write a model whose linear layers are in groups as a GPTQ checkpoint.

    Args:
        convention: of zeros; None: `convention_for` the model's.
        progress: show a bar.
    Raises:
        UsageError: no layer is in groups, or another is quantized too; an unknown convention; adapters on the model;
            `directory` is a file.
        FormatError: layers of several formats, or one that the layout cannot hold (says which).
        DiskError: it could not be written.
    """
    layers = dict(_grouped_layers(model))
    tensors = [layer.quantized for layer in layers.values()]
    if len(formats := {q.format.name for q in tensors}) > 1:
        raise FormatError(f"layers of several formats: {', '.join(sorted(formats))}", where="save_gptq")
    symmetric = all(q.options["symmetric"] for q in tensors)
    head = model.get_output_embeddings()
    quantization = gptq_config(
        tensors[0].format,
        symmetric=symmetric,
        ordered=any(q.options["ordered"] for q in tensors),
        convention=convention,
        dense=replaceable(model),
        weights_sha256=identity_of(model).weights_sha256,
        lm_head=any(layer is head for layer in layers.values()),
    )

    def repack(name: str, layer: QuantizedWeight) -> dict[str, StoredTensor]:
        assert isinstance(layer.quantized, GroupedTensor)
        found = gptq_tensors(layer.quantized, quantization["checkpoint_format"], where=name)
        return {f"{name}.{part}": tensor for part, tensor in found.items()}

    save_repacked(
        model, repack, quantization, directory, tokenizer, beside={GPTQ_CONFIG: quantization}, progress=progress
    )


def _grouped_layers(model: PreTrainedModel) -> list[tuple[str, QuantizedLinear]]:
    found = []
    for name, layer in quantized_layers(model):
        if not isinstance(layer, QuantizedLinear) or not isinstance(layer.quantized, GroupedTensor):
            raise UsageError(
                f"'{name}' is in {layer.format_name}, which GPTQ files cannot hold",
                where="save_gptq",
                todo="Quantize to int4, int3, int2 or int8g.",
            )
        found.append((name, layer))
    if not found:
        raise UsageError("no layer of the model is quantized", where="save_gptq", todo="Quantize it first.")
    return found


__all__ = [
    "gptq_config",
    "gptq_tensors",
    "pack_gptq",
    "present_gptq",
    "save_gptq",
    "unpack_gptq",
]
