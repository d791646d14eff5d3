"""A GGUF file that is being written: tensors under their GGUF names, each made when it is its turn and written at once.

What a model's and an adapter's file share: which family a model is written as, what its tensors are called, how numbers
become the bytes of a ggml type. Beside, then renamed: there is never a second copy of the model, nor half a file.
Source: the GGUF specification (ggml/docs/gguf.md). Not here: which tensors there are (gguf_write.py, gguf_lora.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from torch import Tensor
from transformers import PreTrainedConfig

from lilliput.errors import CheckpointError, FormatError, UsageError, nearest
from lilliput.files import replace
from lilliput.models.families import FAMILIES, Family
from lilliput.progress import bar


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        path: the file.
        nbytes: its size.
        tensors: how many of each ggml type it has.
        notes: what a person should know: matrices kept in a larger type, what llama.cpp computes otherwise.
    """

    path: Path
    nbytes: int
    tensors: dict[str, int]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: shape in torch's order (rows first), `make` its numbers in float32, laid out as ggml's."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    kind: Kind = Kind.F32

    @property
    def nbytes(self) -> int:
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes


def family_of(config: PreTrainedConfig) -> Family:
    """The row of families.py that a model with this config is written as.

    Raises UsageError when there is none, or when llama.cpp computes something else than the config asks for.
    """
    family = next((family for family in FAMILIES.values() if config.model_type in family.models), None)
    if family is None:
        known = [name for family in FAMILIES.values() for name in family.models]
        raise UsageError(
            f"a model of the type '{config.model_type}' cannot be written as GGUF{nearest(config.model_type, known)}",
            todo=f"There are: {', '.join(known)}. llama.cpp's convert_hf_to_gguf.py knows more, from a directory.",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    asked = {**config.to_dict(), **rope}
    for name, values in family.computes:
        if asked.get(name, values[0]) not in values:
            raise UsageError(
                f"{name}={asked[name]!r} is not what llama.cpp computes for '{family.architecture}'",
                where=config.model_type,
                todo=f"It knows: {', '.join(map(repr, values))}.",
            )
    return family


def tensor_names(family: Family, config: PreTrainedConfig) -> Callable[[str], str]:
    """From the model's names of tensors to those of GGUF; what it returns raises CheckpointError for a strange name."""
    architecture = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def rename(name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        if (found := names.get_name(stem)) is None:
            raise CheckpointError(f"'{name}' has no name in GGUF of the architecture '{family.architecture}'")
        return f"{found}.{suffix}"

    return rename


def dense(parameter: Tensor) -> Tensor:
    """The numbers of a parameter that is not quantized, float32."""
    return parameter.detach().float().cpu()


def _block(entry: Entry) -> np.ndarray:
    """A tensor's bytes as they stand in the file. Block types keep their scales in float16, so that its bound holds."""
    tensor = entry.make()
    assert tuple(tensor.shape) == entry.shape, entry.name
    least, most = (float(number) for number in torch.aminmax(tensor))
    bound = torch.finfo(torch.float32 if entry.kind == Kind.F32 else torch.float16).max
    if not (-bound <= least and most <= bound):  # NaN is neither
        todo = "The weights are broken." if not math.isfinite(least + most) else "Write it as f32."
        what = f"holds numbers from {least:g} to {most:g}, which {entry.kind.name} cannot hold"
        raise FormatError(what, where=entry.name, todo=todo)
    return gguf.quantize(np.ascontiguousarray(tensor.numpy()), entry.kind)


def write_file(
    path: Path,
    architecture: str,
    entries: Sequence[Entry],
    describe: Callable[[GGUFWriter], None],
    notes: list[str],
    progress: bool,
) -> Written:
    """Write header, metadata (those that `describe` adds) and tensors.

    Raises FormatError for numbers that a type cannot hold, DiskError when the place cannot be written; a file that was
    there before is unchanged.
    """
    with replace(path) as temporary, closing(GGUFWriter(temporary, architecture)) as writer:
        describe(writer)
        for entry in entries:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with bar(f"Writing {path.name}", len(entries), shown=progress) as advance, torch.no_grad():
            for entry in entries:
                writer.write_tensor_data(_block(entry))
                advance()
    kinds = Counter(entry.kind.name for entry in entries)
    return Written(path, path.stat().st_size, dict(kinds), notes)
