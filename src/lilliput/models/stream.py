"""Tensors of a checkpoint, one at a time, in and out: read or made when asked for, and kept by nobody.

A `StoredTensor` looks like a safetensors slice to transformers' loader (`get_shape`, `get_dtype`, `[...]`), which asks
for the numbers only when it is about to place them. Plain file reads, so that no page of a mapped file counts as ours;
a file whose numbers stay as they are is mapped instead. Source: the safetensors format specification.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lilliput.errors import CheckpointError
from lilliput.files import TensorsHash, open_safetensors, read_json, replace

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GPTQ_CONFIG = "quantize_config.json"  # beside config.json in directories of AutoGPTQ and GPTQModel

# the names that the safetensors specification gives to element types
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in one file.

    Attributes:
        name: its name in the file.
        dtype, shape: as `read` returns it.
        nbytes: the bytes it takes in the file.
        load: reads it, a new tensor each time (or a view of the mapped file).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    load: Callable[[], Tensor]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return _NAMES[self.dtype]

    def __getitem__(self, _: Any) -> Tensor:
        return self.load()


class Lazy(Protocol):
    """A tensor that is made when it is asked for and kept by nobody: `load()` gives `dtype` and `shape`."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def load(self) -> Callable[[], Tensor]: ...


def read_bytes(path: Path, start: int, nbytes: int) -> Tensor:
    """`nbytes` bytes of a file from `start` on, as a uint8 tensor [nbytes] of its own."""
    room = torch.empty(nbytes, dtype=torch.uint8)
    with open(path, "rb") as file:
        file.seek(start)
        got = file.readinto(room.numpy().data) if nbytes else 0
    if got != nbytes:
        raise CheckpointError(f"cut short: {got} bytes of {nbytes} at {start}", where=str(path))
    return room


def weight_files(directory: Path) -> list[str]:
    """The names of the safetensors files that a model directory should have: its index's shards, or the single file."""
    if (index := directory / INDEX).is_file():
        return list(dict.fromkeys(_weight_map(index).values()))
    return [WEIGHTS]


def directory_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: the single file, or the shards that its index names.

    AutoGPTQ called the single file after its options, gptq_model-4bit-128g.safetensors.

    Raises CheckpointError when there are none, or when a shard of the index is missing.
    """
    if (single := directory / WEIGHTS).is_file():
        return [single]
    if (index := directory / INDEX).is_file():
        return _indexed_files(index)
    if (directory / GPTQ_CONFIG).is_file() and len(named := sorted(directory.glob("*.safetensors"))) == 1:
        return named
    todo = f"Expected {WEIGHTS} or {INDEX}."
    if pickles := sorted(directory.glob("pytorch_model*.bin")):
        todo = (
            f"{pickles[0].name} is a pickle, which can run code when it is read; convert it to safetensors first "
            "(for example with `safetensors.torch.save_file` on a machine you trust it on)."
        )
    elif ggufs := sorted(directory.glob("*.gguf")):
        todo = f"Give the GGUF file itself: {ggufs[0]}."
    raise CheckpointError("no weights in this directory", where=str(directory), todo=todo)


def _indexed_files(index: Path) -> list[Path]:
    weight_map = _weight_map(index)
    files = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{len(missing)} of the {len(files)} shards it names are missing: {', '.join(missing[:3])}",
            where=str(index),
            todo="Copy or download the missing files.",
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no 'weight_map'", where=str(index), todo="Download the file again.")
    for name, file in weight_map.items():
        # a name that leaves the directory is no shard of this model
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"tensor '{name}' is said to lie in {file!r}", where=str(index))
    return weight_map


def stored_tensors(directory: Path, *, mapped: bool = False) -> dict[str, StoredTensor]:
    """All tensors of a model directory by name, none of them read.

    Args:
        mapped: hand out views of the mapped files (for numbers that are used as stored) instead of reading copies.
    Raises:
        CheckpointError: no weights, a missing or truncated shard, a tensor in two shards, or one that the index
            promises and no shard has.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in directory_files(directory):
        for tensor in _tensors_of(file, mapped):
            if tensor.name in tensors:
                raise CheckpointError(f"tensor '{tensor.name}' lies in another shard too", where=str(file))
            tensors[tensor.name] = tensor
    if not (directory / WEIGHTS).is_file() and (directory / INDEX).is_file():
        _check_complete(directory / INDEX, tensors)
    return tensors


def stored_file(file: Path) -> dict[str, StoredTensor]:
    """All tensors of one safetensors file by name, none of them read. Raises CheckpointError for a malformed file."""
    return {tensor.name: tensor for tensor in _tensors_of(file, mapped=False)}


def _check_complete(index: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError when the index promises a tensor that is in no shard."""
    if missing := sorted(_weight_map(index).keys() - tensors.keys()):
        raise CheckpointError(
            f"{len(missing)} tensors that it names are in no shard, '{missing[0]}' among them",
            where=str(index),
            todo="Copy or download the model again.",
        )


def _tensors_of(file: Path, mapped: bool) -> Iterable[StoredTensor]:
    with open_safetensors(file) as handle:  # the library checks size and offsets
        if mapped:
            return [_mapped_tensor(name, handle.get_tensor(name)) for name in handle.keys()]  # noqa: SIM118
    header, data = _header(file)
    return [_unread_tensor(file, name, entry, data) for name, entry in header.items()]


def _mapped_tensor(name: str, tensor: Tensor) -> StoredTensor:
    return StoredTensor(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes, lambda: tensor)


def _unread_tensor(file: Path, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"tensor '{name}' has the element type {entry['dtype']}, which is not known", where=str(file)
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, end = entry["data_offsets"]

    def load() -> Tensor:
        return read_bytes(file, data + start, end - start).view(dtype).reshape(shape)

    return StoredTensor(name, dtype, shape, prod(shape) * dtype.itemsize, load)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file that the library has accepted, and where its data begin."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def write_tensors(path: Path, tensors: Mapping[str, Lazy], written: Callable[[], None] = lambda: None) -> None:
    """Write a safetensors file of tensors that are loaded one after another, through `files.replace`.

    Args:
        written: called after each tensor.

    Raises DiskError when it cannot be written, and whatever loading raises; a file that was there is unchanged.
    """
    # as the library orders them, so that every tensor begins at a multiple of its element's size
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    said = json.dumps(header, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)
    with replace(path) as temporary, open(temporary, "wb") as file:
        file.write(len(said).to_bytes(8, "little") + said)
        for name in names:
            file.write(_bytes_of(tensors[name]))
            written()


def _bytes_of(tensor: Lazy) -> memoryview:
    """The numbers, little endian, row by row."""
    loaded = tensor.load().detach().cpu().contiguous()
    assert (loaded.dtype, tuple(loaded.shape)) == (tensor.dtype, tuple(tensor.shape))
    return loaded.reshape(-1).view(torch.uint8).numpy().data


def hash_directory(directory: Path) -> str:
    """`files.TensorsHash` over the tensors of a model directory, as stored."""
    digest = TensorsHash()
    for name, tensor in stored_tensors(directory).items():
        digest.add(name, tensor.load())
    return digest.hexdigest()
