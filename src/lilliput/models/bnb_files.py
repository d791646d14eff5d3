"""bitsandbytes checkpoints as transformers writes them, in and out: nf4 and fp4, and LLM.int8().

    4 bits   X.weight                  uint8 [numel / 2, 1]   codes, the earlier number in the high nibble: ours
             X.weight.absmax           float32 [blocks], or, nested, uint8 [blocks]
             X.weight.quant_map        float32 [16]           the codebook
             X.weight.nested_absmax    float32                one a `nested_blocksize` of absmax: our absmax_scale
             X.weight.nested_quant_map float32 [256]          the codebook of the absmax: the dynamic tree
             X.weight.quant_state.bitsandbytes__nf4 (or fp4)  JSON in bytes: sizes, types, `nested_offset`
    int8     X.weight int8 [out, in], X.SCB float32 [out]: the absmax of a row, X.weight_format uint8 []: 0

The numbers are ours already (formats/blockwise.py), so that nothing is computed here. A block of 64 k numbers, as ROCm
has them (128), is k blocks of 64 with the same absmax. Codes in another type than uint8 (`bnb_4bit_quant_storage`) are
the same bytes. bitsandbytes is not imported. Sources: bitsandbytes' `QuantState.as_dict` and `Linear8bitLt`.
Not here: other block sizes, and int8 laid out for older GPUs (`weight_format` 1 to 3), which are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.quantizers_utils import should_convert_module

from lilliput.errors import CheckpointError, FormatError, UsageError
from lilliput.formats import DYNAMIC8, QuantizedTensor, get_format
from lilliput.layers import QuantizedLinear, QuantizedWeight, identity_of, quantized_layers
from lilliput.layers.replace import dense_type, linear_names
from lilliput.models.presented import Linear, Linears, Presented, expect, held, made, others, parts_of
from lilliput.models.save import save_repacked
from lilliput.models.stream import StoredTensor

_STATE = "quant_state.bitsandbytes__"
_MARK = re.compile(rf"(.+)\.weight\.{re.escape(_STATE)}(nf4|fp4)")
_PARTS_4BIT = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
_PARTS_INT8 = ("weight", "SCB", "weight_format")
_STORAGES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAME = 1e-6  # codebooks that differ by less are the same: they are computed anew on each machine
_FLOAT32 = (torch.float32,)


# ---- in: 4 bits ----


@dataclass(frozen=True)
class QuantState:
    """What the JSON of a layer says.

    Attributes:
        quant_type: "nf4" or "fp4".
        shape: of the weight.
        blocksize: numbers that share an absmax.
        nested_blocksize: absmax that share an absmax of their own; 0: they are not quantized.
        nested_offset: what was taken off the absmax.
    """

    quant_type: str
    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int = 0
    nested_offset: float = 0.0

    @classmethod
    def read(cls, raw: Tensor, where: str) -> QuantState:
        """Of uint8 [bytes]. Raises CheckpointError when it is not what bitsandbytes writes."""
        try:
            said = json.loads(bytes(raw.reshape(-1).tolist()))
            nested = (int(said.get("nested_blocksize", 0)), float(said.get("nested_offset", 0.0)))
            shape = tuple(int(side) for side in said["shape"])
            return cls(str(said["quant_type"]), shape, int(said["blocksize"]), *nested)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"the quantization state cannot be read ({error!r})", where=where) from error

    def write(self, dtype: torch.dtype) -> Tensor:
        """uint8 [bytes]; `dtype` is what the weight is dequantized to."""
        said: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.nested_blocksize:
            said |= {
                "nested_blocksize": self.nested_blocksize,
                "nested_dtype": "float32",
                "nested_offset": self.nested_offset,
            }
        return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


@dataclass(frozen=True)
class Stored4bit:
    """One layer of a file in 4 bits.

    Attributes:
        name: of the layer.
        state: what its JSON says.
        parts: readers of _PARTS_4BIT; the nested ones may be missing.
        linear: the model's layer.
    """

    name: str
    state: QuantState
    parts: Mapping[str, StoredTensor]
    linear: Linear

    @property
    def nested(self) -> bool:
        """Whether the absmax are quantized."""
        return self.state.nested_blocksize > 0

    @property
    def blocks(self) -> int:
        """Our blocks of 64."""
        return get_format(self.state.quant_type).blocks(self.linear.shape)

    @property
    def repeats(self) -> tuple[int, int]:
        """Our blocks in one of theirs; our blocks of absmax in one of theirs."""
        own = get_format(self.state.quant_type).block
        return self.state.blocksize // own, self.state.nested_blocksize * self.state.blocksize // own // DYNAMIC8.block

    def check(self, where: str) -> None:
        """Raise CheckpointError unless everything fits; the codebooks are read for it."""
        self._check_state(where)
        row = get_format(self.state.quant_type)
        blocks = -(prod(self.linear.shape) // -self.state.blocksize)
        self._check_codes(row.code_bytes(self.linear.shape), where)
        self._expect("weight.absmax", (blocks,), (torch.uint8,) if self.nested else _FLOAT32, where)
        self._check_codebook("weight.quant_map", row.codebook(), where)
        if self.nested:
            self._expect("weight.nested_absmax", (-(blocks // -self.state.nested_blocksize),), _FLOAT32, where)
            self._check_codebook("weight.nested_quant_map", DYNAMIC8.codebook(), where)

    def _check_state(self, where: str) -> None:
        state = self.state
        if tuple(state.shape) != self.linear.shape:
            raise CheckpointError(
                f"'{self.name}' has a quantized weight {list(state.shape)}, the model {list(self.linear.shape)}",
                where=where,
                todo="Weights and config.json belong to different models.",
            )
        if not isfinite(state.nested_offset):
            raise CheckpointError(f"'{self.name}' has absmax around {state.nested_offset}", where=where)
        own, absmax = get_format(state.quant_type).block, DYNAMIC8.block
        if state.blocksize <= 0 or state.blocksize % own:
            raise CheckpointError(
                f"'{self.name}' has blocks of {state.blocksize} numbers; read here are multiples of {own}", where=where
            )
        if state.nested_blocksize < 0 or state.nested_blocksize % absmax:
            raise CheckpointError(
                f"'{self.name}' has blocks of {state.nested_blocksize} absmax; read here are multiples of {absmax}",
                where=where,
            )

    def _check_codes(self, count: int, where: str) -> None:
        """Codes are the right number of bytes, in whatever type they are kept."""
        codes = self.parts.get("weight")
        size = codes.dtype.itemsize if codes is not None else 1
        self._expect("weight", (-(count // -size), 1), _STORAGES, where)
        if count % size:
            raise CheckpointError(f"'{self.name}.weight' has codes that do not fill its type", where=where)

    def _check_codebook(self, part: str, own: Tensor, where: str) -> None:
        self._expect(part, tuple(own.shape), _FLOAT32, where)
        if not torch.allclose(self.parts[part].load(), own, rtol=0, atol=_SAME):
            raise CheckpointError(f"'{self.name}.{part}' is not the codebook of {self.state.quant_type}", where=where)

    def _expect(self, part: str, shape: tuple[int, ...], types: tuple[torch.dtype, ...], where: str) -> None:
        expect(f"{self.name}.{part}", self.parts.get(part), shape, types, where)

    def shown(self) -> dict[str, StoredTensor]:
        """The parameters of our layer."""
        name, blocks, (several, nested) = f"{self.name}.weight", self.blocks, self.repeats
        codes, absmax = self.parts["weight"], self.parts["weight.absmax"]
        count = get_format(self.state.quant_type).code_bytes(self.linear.shape)
        found = [
            made(name, torch.uint8, (count, 1), lambda: codes.load().view(-1).view(torch.uint8).view(-1, 1)),
            _repeated(f"{name}_absmax", absmax, several, blocks),
        ]
        if self.nested:
            scales = self.parts["weight.nested_absmax"]
            offset = torch.tensor(self.state.nested_offset, dtype=torch.float32)
            found += [
                _repeated(f"{name}_absmax_scale", scales, nested, -(blocks // -DYNAMIC8.block)),
                held(f"{name}_absmax_offset", offset),
            ]
        return {tensor.name: tensor for tensor in found}


def _repeated(name: str, tensor: StoredTensor, times: int, count: int) -> StoredTensor:
    """Every number so many times, `count` in all."""

    def load() -> Tensor:
        return tensor.load() if times == 1 else tensor.load().repeat_interleave(times)[:count]

    return made(name, tensor.dtype, (count,), load)


def _present_4bit(
    tensors: Mapping[str, StoredTensor], content: Mapping[str, Any], linears: Linears, where: str
) -> Presented:
    marks = [(found[1], name) for name in tensors if (found := _MARK.fullmatch(name))]
    layers = []
    for name, mark in sorted(marks):
        parts = {**parts_of(tensors, name, _PARTS_4BIT), mark: tensors[mark]}
        layer = Stored4bit(
            name, QuantState.read(tensors[mark].load(), f"{where}: {mark}"), parts, linears.find(name, where)
        )
        if not mark.endswith(layer.state.quant_type):
            raise CheckpointError(f"'{mark}' speaks of {layer.state.quant_type}", where=where)
        layer.check(where)
        layers.append(layer)
    kinds = sorted({(layer.state.quant_type, layer.nested) for layer in layers})
    if len(kinds) > 1:
        ways = ", ".join(f"{kind} {'with' if nested else 'without'} double quantization" for kind, nested in kinds)
        raise CheckpointError(f"its layers are quantized in {len(kinds)} ways: {ways}", where=where)
    shown = others(tensors, [layer.parts for layer in layers])
    for layer in layers:
        shown |= layer.shown()
    ((kind, nested),) = kinds
    return Presented(kind, {"double_quant": nested}, shown, [layer.name for layer in layers])


# ---- in: int8 ----


def _present_int8(
    tensors: Mapping[str, StoredTensor], content: Mapping[str, Any], linears: Linears, where: str
) -> Presented:
    threshold = content.get("llm_int8_threshold", 6.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0:
        raise CheckpointError(f"llm_int8_threshold is {threshold!r}, expected a number from 0 on", where=where)
    names = sorted(name.removesuffix(".SCB") for name in tensors if name.endswith(".SCB"))
    taken = {name: parts_of(tensors, name, _PARTS_INT8) for name in names}
    shown = others(tensors, taken.values())
    for name, parts in taken.items():
        shown |= _shown_int8(name, parts, linears.find(name, where).shape, where)
    return Presented("int8", {"threshold": float(threshold)}, shown, names)


def _shown_int8(
    name: str, parts: Mapping[str, StoredTensor], shape: tuple[int, int], where: str
) -> dict[str, StoredTensor]:
    expect(f"{name}.weight", parts.get("weight"), shape, (torch.int8,), where)
    expect(f"{name}.SCB", parts["SCB"], (shape[0],), _FLOAT32, where)
    if "weight_format" in parts and parts["weight_format"].load().any():
        raise CheckpointError(
            f"'{name}' is laid out for the cores of some GPU, not row by row",
            where=where,
            todo="Load and save it again with a newer bitsandbytes.",
        )
    codes = parts["weight"]
    found = (
        made(f"{name}.weight", torch.int8, (prod(shape), 1), lambda: codes.load().reshape(-1, 1)),
        made(f"{name}.weight_absmax", torch.float32, (shape[0],), parts["SCB"].load),
    )
    return {tensor.name: tensor for tensor in found}


def present_bnb(
    tensors: Mapping[str, StoredTensor], content: Mapping[str, Any], linears: Linears, where: str
) -> Presented:
    """A bitsandbytes checkpoint as one of ours. What it holds is told by its tensors, not by its configuration.

    Raises CheckpointError for whatever does not fit.
    """
    readers = [
        reader
        for is_there, reader in (
            (any(_MARK.fullmatch(name) for name in tensors), _present_4bit),
            (any(name.endswith(".SCB") for name in tensors), _present_int8),
        )
        if is_there
    ]
    if len(readers) != 1:
        fault = "has layers in 4 bits and in int8" if readers else "has no layer in 4 bits or int8"
        raise CheckpointError(f"is said to be quantized by bitsandbytes, and {fault}", where=where)
    return readers[0](tensors, content, linears, where)


# ---- out ----


def save_bnb(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    progress: bool = True,
) -> None:
    """Write a model in nf4, fp4 or int8 as transformers and bitsandbytes read it.

    Codes and constants are the same numbers; the model's own hash is remembered in `config.json`.

    Args:
        progress: show a bar.
    Raises:
        UsageError: no layer is quantized, or one in a format that bitsandbytes has not (or a table of embeddings);
            adapters on the model; `directory` is a file.
        FormatError: layers of several formats, or names of layers that transformers could not tell apart.
        DiskError: it could not be written.
    """
    layers = _linears(model)
    first = layers[0][1]
    if len(kinds := {(layer.format_name, tuple(layer.options.items())) for _, layer in layers}) > 1:
        raise FormatError(f"the model's layers are quantized in {len(kinds)} ways: {sorted(kinds)}", where="save_bnb")
    dense = linear_names(model)
    _check_names(dense, [name for name, _ in layers])
    writer = _WRITERS[first.format_name]
    dtype = dense_type(model)
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": False,
        "llm_int8_skip_modules": dense,
        **writer.config(first, dtype),
        "weights_sha256": identity_of(model).weights_sha256,
    }

    def repack(name: str, layer: QuantizedWeight) -> dict[str, StoredTensor]:
        assert isinstance(layer.quantized, QuantizedTensor)
        return {f"{name}.{part}": held(part, value) for part, value in writer.tensors(layer.quantized, dtype).items()}

    save_repacked(model, repack, quantization, directory, tokenizer, progress=progress)


def _linears(model: PreTrainedModel) -> list[tuple[str, QuantizedLinear]]:
    found = []
    for name, layer in quantized_layers(model):
        if not isinstance(layer, QuantizedLinear) or layer.format_name not in _WRITERS:
            what = layer.format_name if isinstance(layer, QuantizedLinear) else "a table of embeddings"
            raise UsageError(
                f"'{name}' is {what}, which bitsandbytes has not in its checkpoints",
                where="save_bnb",
                todo="Load the model in nf4, fp4 or int8, without embeddings.",
            )
        found.append((name, layer))
    if not found:
        raise UsageError("no layer of the model is quantized", where="save_bnb", todo="Load it in nf4, fp4 or int8.")
    return found


def _check_names(dense: list[str], quantized: list[str]) -> None:
    """transformers skips modules whose names match, or end like, an entry of a list: ours must say what we mean."""
    for name in quantized:
        if not should_convert_module(name, dense):
            raise FormatError(
                f"'{name}' is quantized, and transformers would take it for one of the layers that are not",
                where="save_bnb",
            )


@dataclass(frozen=True)
class _Writer:
    """How a format is written: the tensors of a weight, and what the configuration says."""

    tensors: Callable[[QuantizedTensor, torch.dtype], dict[str, Tensor]]
    config: Callable[[QuantizedLinear, torch.dtype], dict[str, Any]]


def _tensors_4bit(q: QuantizedTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {
        "weight": q.codes.view(-1, 1),
        "weight.absmax": q.absmax,
        "weight.quant_map": q.format.codebook(),
    }
    state = QuantState(q.format.name, q.shape, q.format.block)
    if q.absmax_scale is not None and q.absmax_offset is not None:
        found |= {"weight.nested_absmax": q.absmax_scale, "weight.nested_quant_map": DYNAMIC8.codebook()}
        state = QuantState(q.format.name, q.shape, q.format.block, DYNAMIC8.block, q.absmax_offset.item())
    return {**found, f"weight.{_STATE}{q.format.name}": state.write(dtype)}


def _tensors_int8(q: QuantizedTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": q.codes.view(q.shape), "SCB": q.absmax, "weight_format": torch.zeros((), dtype=torch.uint8)}


def _config_4bit(layer: QuantizedLinear, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": layer.format_name,
        "bnb_4bit_use_double_quant": layer.options["double_quant"],
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


def _config_int8(layer: QuantizedLinear, dtype: torch.dtype) -> dict[str, Any]:
    return {"load_in_8bit": True, "llm_int8_threshold": layer.threshold, "llm_int8_has_fp16_weight": False}


_WRITERS = {
    "nf4": _Writer(_tensors_4bit, _config_4bit),
    "fp4": _Writer(_tensors_4bit, _config_4bit),
    "int8": _Writer(_tensors_int8, _config_int8),
}

__all__ = ["present_bnb", "save_bnb"]
