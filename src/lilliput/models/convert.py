"""A GGUF file's metadata as a Hugging Face config, and its tensors under the model's names.

transformers needs seconds to make a config (or, in tokenizer.py, a tokenizer) of GGUF metadata, so that the result is
kept under `cache_dir()`, by the hash of the file's header: the same header gives the same config, wherever the file
lies. Names of tensors come from the `gguf` library's own maps. Not here: reading the tensors, gguf.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from lilliput.errors import CheckpointError, DiskError, LilliputError, nearest
from lilliput.files import cache_dir, read_json, write_json
from lilliput.models.families import FAMILIES, Family
from lilliput.models.gguf import GgufFile, lazily
from lilliput.models.rope import FACTORS
from lilliput.models.stream import StoredTensor
from lilliput.progress import say

NO_GGUF = "Use the model's safetensors instead."
_RECIPE = 5  # raised when this file or tokenizer.py makes something else of the same header


def config_directory(file: GgufFile) -> Path:
    """The directory with config.json and generation_config.json of `file`; made on the first call.

    Raises CheckpointError for an architecture that is not supported, or metadata that transformers cannot use.
    """
    family_of(file)
    return kept(file, "configuration", lambda directory: _convert_config(file, directory))


def kept(file: GgufFile, what: str, make: Callable[[Path], None]) -> Path:
    """The directory with `what` was made of the header of `file`: from the cache, or made now, with a line for people.

    Args:
        make: writes into the directory it is given; when it fails nothing is kept.
    """
    name = f"{file.header_sha256[:32]}-{what}-{_RECIPE}-transformers-{transformers.__version__}"
    directory = cache_dir() / "converted" / name
    if directory.is_dir():
        return directory
    say(f"Converting the {what} of {file.path.name} (once)")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
            made = Path(temporary) / what
            made.mkdir()
            make(made)
            _move_in_place(made, directory)
    except OSError as error:
        raise DiskError(f"could not be written ({error})", where=str(directory), todo="Free some space.") from error
    return directory


def _move_in_place(made: Path, directory: Path) -> None:
    """Rename `made` to `directory`, unless another process was faster."""
    try:
        os.replace(made, directory)
    except OSError:
        if not directory.is_dir():
            raise


@contextmanager
def of_transformers(where: Path, fault: str, todo: str | None = None) -> Iterator[None]:
    """Turn whatever transformers raises over a stranger's file into a CheckpointError: `fault (what it said)`.

    Its kinds of exceptions cannot be listed (the tokenizers library raises plain `Exception`).
    """
    try:
        yield
    except LilliputError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        raise CheckpointError(f"{fault} ({type(error).__name__}: {said[0]})", where=str(where), todo=todo) from error


def drop_keys(path: Path, *keys: str) -> None:
    """Rewrite a JSON file without what only says how a conversion was called."""
    write_json(path, {key: value for key, value in read_json(path).items() if key not in keys})


def family_of(file: GgufFile) -> Family:
    """The row of families.py for `file`. Raises CheckpointError when there is none."""
    if file.architecture not in FAMILIES:
        raise CheckpointError(
            f"GGUF of the architecture '{file.architecture}' is not supported{nearest(file.architecture, FAMILIES)}",
            where=str(file.path),
            todo=f"Supported: {', '.join(FAMILIES)}. {NO_GGUF}",
        )
    return FAMILIES[file.architecture]


def model_tensors(
    file: GgufFile, config: PreTrainedConfig, expected: Iterable[str], tied: Iterable[str]
) -> dict[str, StoredTensor]:
    """The tensors of `file` under the model's own names, laid out as the model wants them, none of them read.

    Args:
        expected: names in the model's state dict.
        tied: those among them that may be absent, being another's.
    Raises:
        CheckpointError: a tensor that the model needs and the file lacks, or one that the model has no place for.
    """
    family, tied = family_of(file), set(tied)
    architecture = next(number for number, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors: dict[str, StoredTensor] = {}
    used = {FACTORS}  # the config has taken these over
    for name in expected:
        stem, _, suffix = name.rpartition(".")
        found = f"{names.get_name(stem)}.{suffix}"
        if found not in file.tensors:
            if name in tied:
                continue
            raise CheckpointError(f"has no tensor '{found}' for the model's '{name}'", where=str(file.path))
        used.add(found)
        tensors[name] = _stored(file, found, name, family, config)
    if unused := sorted(file.tensors.keys() - used):
        raise CheckpointError(
            f"{len(unused)} tensors have no place in a {config.model_type} model, '{unused[0]}' among them",
            where=str(file.path),
        )
    return tensors


def _stored(file: GgufFile, found: str, name: str, family: Family, config: PreTrainedConfig) -> StoredTensor:
    tensor = file.tensors[found]
    transform = family.transform(found, config)
    # a transposed layout has the shape that the model expects, not the file's
    shape = tensor.shape
    if transform is not None:
        try:
            shape = tuple(transform(torch.empty(shape, device="meta")).shape)
        except RuntimeError as error:
            raise CheckpointError(
                f"tensor '{found}' {list(shape)} does not fit the heads that the metadata tell of", where=str(file.path)
            ) from error
    return StoredTensor(name, file.dtype(found), shape, tensor.nbytes, lazily(file, found, transform))


def _convert_config(file: GgufFile, directory: Path) -> None:
    """Let transformers read the metadata, complete them, and write the configs."""
    with of_transformers(file.path, "transformers cannot make a configuration of its metadata", NO_GGUF):
        config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
        _complete(config, file)
        with torch.device("meta"):
            config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.dtype = torch.float32
    special = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(directory)
    config.save_pretrained(directory)
    drop_keys(directory / "config.json", "_name_or_path", "_model_name_or_path")


def _complete(config: PreTrainedConfig, file: GgufFile) -> None:
    """Take over what transformers leaves at its default."""
    for key, name in family_of(file).settings:
        if value := file.metadata.get(f"{file.architecture}.{key}"):  # 0 says that there is none
            setattr(config, name, value)
    if (embedding := file.tensors.get("token_embd.weight")) is not None:
        config.vocab_size = embedding.shape[0]  # not all files say it in their metadata
