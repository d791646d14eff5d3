"""GGUF files: the header checked byte by byte, tensors read one at a time and dequantized by the `gguf` library.

Source: the GGUF specification (ggml/docs/gguf.md), versions 2 and 3, little endian. Every malformation is a named
    error:
lengths and counts are compared with what is left of the file before anything is read. Names and layouts of an
architecture are in families.py. Not here: writing GGUF; architectures whose tensors are cut or merged (mixtures of
experts).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from lilliput.errors import CheckpointError
from lilliput.files import TensorsHash
from lilliput.models.stream import read_bytes

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
_DOWNLOAD = "Copy or download the file again."
_STRING, _ARRAY = 8, 9  # of the specification's gguf_metadata_value_type
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PLAIN = {  # types that are numbers already; the rest come in blocks
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: shape in torch's order (rows first), offset from the start of the file, length in bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file: its metadata and the table of its tensors; no numbers.

    `header_sha256` is over all bytes before the tensors: configuration and tokenizer depend on nothing else.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    header_sha256: str = field(repr=False)

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def read(self, name: str) -> Tensor:
        """A tensor's numbers, dequantized to float32 (those of F16 and BF16 in their own type), in torch's order."""
        tensor = self.tensors[name]
        raw = read_bytes(self.path, tensor.start, tensor.nbytes)
        if tensor.kind in _PLAIN:
            return raw.view(_PLAIN[tensor.kind]).reshape(tensor.shape)
        rows = raw.numpy().reshape(*tensor.shape[:-1], -1)
        return torch.from_numpy(gguf.dequantize(rows, tensor.kind)).reshape(tensor.shape)

    def dtype(self, name: str) -> torch.dtype:
        """The type in which `read` returns a tensor."""
        return _PLAIN.get(self.tensors[name].kind, torch.float32)


def open_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file.

    Raises CheckpointError when it is no GGUF file, is cut short or malformed, has no architecture, or holds a tensor
    type that the `gguf` library cannot dequantize.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=str(path))
    with open(path, "rb") as file:
        reader = _Reader(path, file, path.stat().st_size)
        tensor_count, metadata_count = _read_start(reader)
        metadata = _read_metadata(reader, metadata_count)
        table = [_read_tensor_entry(reader) for _ in range(tensor_count)]
        digest = reader.digest.hexdigest()
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise reader.broken(f"'general.alignment' is {alignment!r}, expected a power of two")
    if (parts := metadata.get("split.count", 0)) not in (0, 1):
        raise CheckpointError(
            f"is one of {parts} parts, which are not read here",
            where=str(path),
            todo="Join them first with llama.cpp's `llama-gguf-split --merge`.",
        )
    data = -(-reader.position // alignment) * alignment
    tensors = {entry[0]: _place(reader, entry, data) for entry in table}
    if len(tensors) != len(table):
        raise reader.broken("two tensors have the same name")
    return GgufFile(path, metadata, tensors, digest)


def hash_gguf(path: Path) -> str:
    """`files.TensorsHash` over the tensors of a GGUF file, as stored: their blocks, under their GGUF names."""
    file = open_gguf(path)
    digest = TensorsHash()
    for tensor in file.tensors.values():
        raw = read_bytes(path, tensor.start, tensor.nbytes).numpy()
        digest.add_bytes(tensor.name, tensor.kind.name, tensor.shape, raw.data)
    return digest.hexdigest()


class _Reader:
    """Reads a header front to back, and knows what is left of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.position = 0
        self.digest = hashlib.sha256()

    def take(self, nbytes: int, what: str) -> bytes:
        if nbytes > self.size - self.position:
            raise CheckpointError(
                f"cut short or broken: {what} needs {nbytes} bytes at {self.position}, the file has {self.size}",
                where=str(self.path),
                todo=_DOWNLOAD,
            )
        raw = self.file.read(nbytes)
        if len(raw) != nbytes:
            raise self.broken(f"cut short while it was read, at byte {self.position}")
        self.position += nbytes
        self.digest.update(raw)
        return raw

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken(f"{what} is not UTF-8 ({error.reason})") from error

    def broken(self, what: str) -> CheckpointError:
        return CheckpointError(what, where=str(self.path), todo=_DOWNLOAD)


def _read_start(reader: _Reader) -> tuple[int, int]:
    """Check magic and version; return the counts of tensors and of metadata entries."""
    magic = reader.take(4, "the magic number")
    if magic != _MAGIC:
        raise reader.broken(f"not a GGUF file: it begins with {magic!r}, expected {_MAGIC!r}")
    version = reader.number("I", "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        why = "big endian" if swapped else f"version {version}"
        raise CheckpointError(f"GGUF of {why}, expected little endian of version 2 or 3", where=str(reader.path))
    tensor_count = reader.number("Q", "the count of tensors")
    metadata_count = reader.number("Q", "the count of metadata")
    # an entry takes 13 bytes at least, so that a count from garbage is refused before anything is allocated
    if (tensor_count + metadata_count) * 13 > reader.size:
        raise reader.broken(
            f"broken: it claims {tensor_count} tensors and {metadata_count} metadata in {reader.size} bytes"
        )
    return tensor_count, metadata_count


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = reader.string("a metadata key")
        metadata[key] = _read_value(reader, reader.number("I", f"the type of '{key}'"), f"'{key}'")
    if not isinstance(metadata.get("general.architecture"), str):
        raise reader.broken("its metadata do not say 'general.architecture'")
    return metadata


def _read_value(reader: _Reader, kind: int, what: str) -> Any:
    if kind in _SCALARS:
        return reader.number(_SCALARS[kind], what)
    if kind == _STRING:
        return reader.string(what)
    if kind != _ARRAY:
        raise reader.broken(f"{what} has the unknown type {kind}")
    element, count = reader.number("I", what), reader.number("Q", what)
    if element in _SCALARS:
        code = _SCALARS[element]
        raw = reader.take(count * struct.calcsize(f"<{code}"), what)
        return list(struct.unpack(f"<{count}{code}", raw))
    if element != _STRING or count * 8 > reader.size - reader.position:
        raise reader.broken(f"{what} is an array of {count} elements of type {element}, which does not fit")
    return [reader.string(what) for _ in range(count)]


def _read_tensor_entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape in torch's order, type, offset from the start of the data)."""
    name = reader.string("a tensor's name")
    dimensions = reader.number("I", f"the dimensions of '{name}'")
    if dimensions > _MAX_DIMENSIONS:
        raise reader.broken(f"tensor '{name}' has {dimensions} dimensions, at most {_MAX_DIMENSIONS} exist")
    sizes = [reader.number("Q", f"the shape of '{name}'") for _ in range(dimensions)]
    return name, tuple(reversed(sizes)), reader.number("I", f"'{name}'"), reader.number("Q", f"'{name}'")


def _place(reader: _Reader, entry: tuple[str, tuple[int, ...], int, int], data: int) -> GgufTensor:
    """Check a tensor's type, shape and extent."""
    name, shape, kind_number, offset = entry
    kind = _known_kind(reader, name, kind_number)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise reader.broken(f"tensor '{name}' has rows of {shape[-1]} values, not a multiple of {kind.name}'s {block}")
    nbytes = prod(shape) // block * block_bytes
    start = data + offset
    if start + nbytes > reader.size:
        raise CheckpointError(
            f"cut short: tensor '{name}' ends at byte {start + nbytes}, the file has {reader.size}",
            where=str(reader.path),
            todo=_DOWNLOAD,
        )
    return GgufTensor(name, kind, shape, start, nbytes)


def _known_kind(reader: _Reader, name: str, number: int) -> GGMLQuantizationType:
    try:
        kind = GGMLQuantizationType(number)
        if kind not in _PLAIN:  # ask the library with one block, before gigabytes are read for nothing
            gguf.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"tensor '{name}' is of ggml type {number}, which the gguf library cannot dequantize ({error})",
            where=str(reader.path),
            todo="Update the 'gguf' package, or take a file in another quantization.",
        ) from error
    return kind


Transform = Callable[[Tensor], Tensor]


def lazily(file: GgufFile, name: str, transform: Transform | None) -> Callable[[], Tensor]:
    """What reads a tensor of `file` when called, and turns its layout into the model's."""
    return partial(_read_transformed, file, name, transform)


def _read_transformed(file: GgufFile, name: str, transform: Transform | None) -> Tensor:
    tensor = file.read(name)
    return tensor if transform is None else transform(tensor)
