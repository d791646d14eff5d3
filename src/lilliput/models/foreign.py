"""Checkpoints that other libraries have quantized, shown as ours: by the `quant_method` of their configuration.

So that loading, adapters, chat and evaluation know nothing of them, and none of those libraries is needed. A row of
READERS is a library. Not here: how its files lie (gptq_files.py, bnb_files.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from lilliput.errors import CheckpointError, LilliputError
from lilliput.files import read_json
from lilliput.layers.replace import linear_names, replaceable
from lilliput.models.bnb_files import present_bnb
from lilliput.models.gptq_files import present_gptq
from lilliput.models.hf import LilliputConfig, config_for
from lilliput.models.presented import Linears, Presented
from lilliput.models.stream import GPTQ_CONFIG, StoredTensor, stored_tensors


@dataclass(frozen=True)
class Reader:
    """How the checkpoints of a library are shown as ours.

    Attributes:
        present: from all tensors of a checkpoint, its quantization configuration, the model's linear layers and a name
            for errors.
        mapped: codes are used as they lie in the file.
    """

    present: Callable[[Mapping[str, StoredTensor], Mapping[str, Any], Linears, str], Presented]
    mapped: bool


READERS = {"bitsandbytes": Reader(present_bnb, mapped=True), "gptq": Reader(present_gptq, mapped=False)}
# Where older programs left the configuration that is in config.json today.
_BESIDE = {GPTQ_CONFIG: "gptq", "quant_config.json": "awq"}


def quantization_of(config: PreTrainedConfig, directory: Path) -> dict[str, Any] | None:
    """How a directory is quantized, in the words of whoever did it: of config.json, or of a file beside it.

    A file beside it counts only where the weights are packed: it may have been left by a model that was there before.

    Raises CheckpointError when it cannot be read.
    """
    content: dict[str, Any] | None = getattr(config, "quantization_config", None)
    return _beside(directory) if content is None else content


def _beside(directory: Path) -> dict[str, Any] | None:
    for name, method in _BESIDE.items():
        if (directory / name).is_file() and any(key.endswith(".qweight") for key in stored_tensors(directory)):
            content = read_json(directory / name)
            if not isinstance(content, dict):
                raise CheckpointError("is no object", where=str(directory / name))
            return {"quant_method": method, **content}
    return None


def reader_for(content: Mapping[str, Any], where: str) -> Reader:
    """The reader of a quantized checkpoint. Raises CheckpointError for libraries whose files are not read here."""
    method = content.get("quant_method") or content.get("method")
    if not isinstance(method, str) or method not in READERS:
        raise CheckpointError(
            f"is quantized by '{method}', which is not read here (these are: {', '.join(READERS)})",
            where=where,
            todo="Give the original model, or load it with transformers and the library that made it.",
        )
    return READERS[method]


def present(
    content: Mapping[str, Any], directory: Path, empty: PreTrainedModel, where: str
) -> tuple[LilliputConfig, dict[str, StoredTensor]]:
    """Configuration and tensors of a directory that another library has quantized, as if it were ours.

    Args:
        content: what `quantization_of` found.
        directory: of the model.
        empty: the model, not quantized, on the meta device.
        where: its name, for errors.
    Raises:
        CheckpointError: files missing or malformed, a layout that is not read here, or layers that are quantized in the
            files and cannot be in the model.
    """
    reader = reader_for(content, where)
    linears = Linears(empty)
    found = reader.present(stored_tensors(directory, mapped=reader.mapped), content, linears, where)
    quantized = {linears.find(name, where).name for name in found.modules}
    dense = [name for name in linear_names(empty) if name not in quantized]
    if unable := sorted(quantized - {*replaceable(empty, dense)}):
        raise CheckpointError(
            f"'{unable[0]}' is quantized, and shares its weight with another layer of {type(empty).__name__}",
            where=where,
            todo="In config.json, tie_word_embeddings should be false.",
        )
    try:
        remembered = _remembered(content)
        return config_for(found.format, skip_modules=dense, weights_sha256=remembered, **found.options), found.tensors
    except LilliputError as error:  # the file's fault, not the caller's
        raise CheckpointError(error.what, where=where, todo=error.todo) from error


def _remembered(content: Mapping[str, Any]) -> str | None:
    """The hash of the checkpoint that was quantized, where we have written this one."""
    meta = content.get("meta")
    for place in (content, meta if isinstance(meta, dict) else {}):
        if isinstance(said := place.get("weights_sha256"), str):
            return said
    return None
