"""Load a model: an empty one from its config, then tensor after tensor, quantized as they come.

Peak memory is that of the quantized model and one tensor. transformers' own `from_pretrained` places the tensors (it
knows the renamings and ties of every architecture); it is handed readers instead of tensors, and what it would only
warn about is an error here. Not here: what other libraries' quantized checkpoints hold (foreign.py); loading from the
hub's revisions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from lilliput.errors import CheckpointError, LilliputError, UsageError
from lilliput.formats import get_format
from lilliput.layers.identity import ATTRIBUTE, IdentitySource, Stamp
from lilliput.models.causal import context_limit
from lilliput.models.convert import config_directory, model_tensors, of_transformers
from lilliput.models.foreign import present, quantization_of, reader_for
from lilliput.models.gguf import hash_gguf, open_gguf
from lilliput.models.heads import fresh_keys, note_fresh, put_head
from lilliput.models.hf import METHOD, LilliputConfig, config_for
from lilliput.models.locate import Source, locate
from lilliput.models.rope import take_over_factors
from lilliput.models.stream import StoredTensor, directory_files, hash_directory, stored_tensors
from lilliput.progress import bar

# Constants that older versions of transformers wrote among the weights, beyond those that it passes over by itself.
_BUFFERS_OF_OLD = re.compile(r"\.attn\.masked_bias$")  # GPT-2
_SHOWN = 4  # names in an error about many


@dataclass(frozen=True)
class Checkpoint:
    """A model that is about to be loaded.

    Attributes:
        source: where it lies.
        directory: the config, generation config and tokenizer.
        config: of the model; its `quantization_config` is taken off.
        stored: how its layers are quantized in the files, or None.
        tensors: readers by the names of the files (for GGUF: of the model).
        hash_weights: the hash of the original checkpoint's tensors.
        dense: modules that stay dense beside those that always do; None where there are no others.
    """

    source: Source
    directory: Path
    config: PreTrainedConfig
    stored: LilliputConfig | None
    tensors: dict[str, StoredTensor]
    hash_weights: Callable[[], str]
    dense: list[str] | None = None

    @property
    def is_new_classifier(self) -> bool:
        """Whether it is loaded as a classifier, with what the files lack begun afresh."""
        return self.dense is not None


def load_model(
    model: str | Path,
    *,
    format: str = "none",
    double_quant: bool | None = None,
    threshold: float | None = None,
    embeddings: bool | None = None,
    symmetric: bool | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    labels: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Load `model` in evaluation mode, quantizing its linear layers while they are read.

    Args:
        model: a Hugging Face directory (safetensors, also sharded), a .gguf file, a hub id, or a catalogue name.
        format: "nf4", "fp4", "int8" or a grouped one ("int4", "int3-g64", see `formats.get_format`; to the nearest),
            or "none" for the checkpoint's own numbers. A directory that is quantized already loads as it was stored,
            with "none" or its own format.
        double_quant: quantize the absmax values too (4-bit formats; None: yes).
        threshold: input columns with a larger number leave the product in int8 (int8; None: 6.0).
        embeddings: the token table too, and the head where it is tied to that (int8; None: no).
        symmetric: the middle code is the zero of all groups (grouped formats; None: no).
        dtype: of everything that is not quantized (embeddings, norms, heads). float32 is the fast one on most CPUs.
        progress: show a bar on standard error.
        labels: names of classes: the base is loaded under a classifier's head for them (heads.py), random where the
            checkpoint has none for these labels. None loads the model as it is.
    Returns:
        The model, with `base_identity` on it. Nothing is frozen but the quantized layers.
    Raises:
        UsageError: an unknown format, or another one than the directory has; an option that the format has not, or
            that differs from the directory's; labels for a family without classifiers.
        CheckpointError: files missing, cut short or malformed; tensors missing, unexpected or of another shape.
    """
    if format != "none":
        get_format(format)
    checkpoint = open_checkpoint(locate(model))
    if labels is not None:
        tensors, dense = put_head(checkpoint.config, checkpoint.tensors, checkpoint.stored, labels)
        checkpoint = replace(checkpoint, tensors=tensors, dense=dense)
    stored = checkpoint.stored
    if stored is not None and format not in ("none", stored.format):
        raise UsageError(
            f"is quantized to {stored.format} already and cannot be loaded as {format}",
            where=checkpoint.source.name,
            todo=f"Use --format {stored.format} (or none), or quantize the original model again.",
        )
    options = {
        "double_quant": double_quant,
        "threshold": threshold,
        "embeddings": embeddings,
        "symmetric": symmetric,
    }
    wanted = None
    if stored is None and format != "none":
        wanted = config_for(format, skip_modules=checkpoint.dense, **options)
    else:
        _check_options(options, stored, checkpoint.source.name)
    loaded = _fill(checkpoint, wanted, dtype, progress)
    return _finish(loaded, checkpoint)


def _check_options(given: dict[str, Any], stored: LilliputConfig | None, name: str) -> None:
    """Raise UsageError when an option asks for something else than what the model is loaded as."""
    for option, value in given.items():
        has = getattr(stored, option, False)
        if value is not None and value != has:
            how = f"is quantized to {stored.format} with {option}={has}" if stored else "is not to be quantized"
            raise UsageError(f"{how}, and {option}={value} was asked for", where=name, todo="Leave it out.")


def open_checkpoint(source: Source) -> Checkpoint:
    """Config and readers of a located model; no tensor is read. Raises CheckpointError for malformed files."""
    return _open_directory(source) if source.kind == "directory" else _open_gguf(source)


def _open_directory(source: Source) -> Checkpoint:
    config = _read_config(source.path)
    stored, tensors = _stored(config, source)
    stamps = [Stamp.of(file) for file in directory_files(source.path)]
    remembered = stored.weights_sha256 if stored else None
    return Checkpoint(
        source=source,
        directory=source.path,
        config=config,
        stored=stored,
        tensors=tensors,
        hash_weights=partial(_hash_stamped, stamps, remembered, partial(hash_directory, source.path)),
    )


def _open_gguf(source: Source) -> Checkpoint:
    file = open_gguf(source.path)
    directory = config_directory(file)
    config = _read_config(directory)
    take_over_factors(file, config)
    with torch.device("meta"):
        empty = model_class(config)._from_config(config)
    tied = empty.all_tied_weights_keys
    return Checkpoint(
        source=source,
        directory=directory,
        config=config,
        stored=None,
        tensors=model_tensors(file, config, empty.state_dict(), tied),
        hash_weights=partial(_hash_stamped, [Stamp.of(source.path)], None, partial(hash_gguf, source.path)),
    )


def _hash_stamped(stamps: list[Stamp], remembered: str | None, hash_files: Callable[[], str]) -> str:
    """What a quantized directory remembers of its original, or the hash of the files if they have not changed."""
    if remembered:
        return remembered
    for stamp in stamps:
        stamp.check()
    return hash_files()


def _read_config(directory: Path) -> PreTrainedConfig:
    with of_transformers(directory / "config.json", "is no configuration that transformers can use"):
        return AutoConfig.from_pretrained(directory, local_files_only=True)


def _stored(config: PreTrainedConfig, source: Source) -> tuple[LilliputConfig | None, dict[str, StoredTensor]]:
    """How a directory is quantized, and its tensors; what other libraries have quantized is shown as ours."""
    content = quantization_of(config, source.path)
    if content is None:
        return None, stored_tensors(source.path)
    if content.get("quant_method") == METHOD:
        return _own_quantization(content, source), stored_tensors(source.path, mapped=True)
    reader_for(content, source.name)  # what cannot be read is refused before a model is built
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        empty = model_class(config)._from_config(config)
    stored, tensors = present(content, source.path, empty, source.name)
    config.quantization_config = stored.to_dict()  # this is what transformers goes by
    return stored, tensors


def _own_quantization(content: dict[str, Any], source: Source) -> LilliputConfig:
    try:
        return LilliputConfig.from_dict(content)
    except LilliputError as error:  # the file's fault, not the caller's
        raise CheckpointError(error.what, where=str(source.path / "config.json"), todo=error.todo) from error


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that the config names, else the one for language models: causal, or with encoder and decoder."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    try:
        with torch.device("meta"):
            found = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            return type(found.from_config(config))
    except ValueError as error:
        raise CheckpointError(f"transformers has no model for '{config.model_type}'", where="config.json") from error


def _fill(checkpoint: Checkpoint, wanted: LilliputConfig | None, dtype: torch.dtype, progress: bool) -> PreTrainedModel:
    """Have transformers build the empty model and place every tensor, and refuse whatever does not fit exactly."""
    name = checkpoint.source.name
    verb = f"Quantizing {Path(name).name} to {wanted.format}" if wanted else f"Loading {Path(name).name}"
    with bar(verb, len(checkpoint.tensors), shown=progress) as advance, _quiet_transformers():
        counted = {key: replace(t, load=partial(_counted, t.load, advance)) for key, t in checkpoint.tensors.items()}
        try:
            found: Any = model_class(checkpoint.config).from_pretrained(
                None,
                config=checkpoint.config,
                state_dict=counted,
                dtype=dtype,
                quantization_config=wanted,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except RuntimeError as error:  # how transformers reports what failed while a tensor was converted
            failures = wanted.failures if wanted else []
            raise (failures[0] if failures else CheckpointError(str(error), where=name)) from error
    loaded, info = found
    if checkpoint.is_new_classifier:
        fresh = fresh_keys(loaded, sorted(info["missing_keys"]))
        info["missing_keys"] = set(info["missing_keys"]) - {*fresh}
        note_fresh(loaded, fresh)
    _check(info, name)
    return loaded


def _counted(load: Callable[[], Tensor], advance: Callable[[], None]) -> Tensor:
    tensor = load()
    advance()
    return tensor


def _check(info: dict[str, Any], name: str) -> None:
    """Raise CheckpointError unless every tensor of the model was in the checkpoint, with its shape, and no other."""
    if mismatched := sorted(info["mismatched_keys"]):
        key, found, expected = mismatched[0]
        raise CheckpointError(
            f"{len(mismatched)} tensors have another shape than config.json says: '{key}' is {list(found)}, "
            f"expected {list(expected)}",
            where=name,
            todo="Weights and config.json belong to different models.",
        )
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not _BUFFERS_OF_OLD.search(key)}
    for kind, what in (
        ("missing_keys", "are missing from"),
        ("unexpected_keys", "have no place in the model but lie in"),
    ):
        if keys := sorted(info[kind]):
            more = ", …" if len(keys) > _SHOWN else ""
            raise CheckpointError(
                f"{len(keys)} tensors {what} the checkpoint: {', '.join(keys[:_SHOWN])}{more}",
                where=name,
                todo="Weights and config.json belong to different models, or files are missing.",
            )


def _finish(loaded: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """Generation config, name, identity."""
    name = checkpoint.source.name
    take_generation_config(loaded, checkpoint.directory)
    loaded.name_or_path = loaded.config.name_or_path = name
    setattr(loaded, ATTRIBUTE, IdentitySource(name, checkpoint.hash_weights))
    return loaded.eval()


def take_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """Give `model` the generation config that lies in `directory`, if one does."""
    path = directory / "generation_config.json"
    if path.is_file() and model.can_generate():
        with of_transformers(path, "is no generation config that transformers can use"):
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)


def context_of(model: str | Path) -> int | None:
    """How many tokens MODEL can look at; None when its architecture sets no limit. No tensor is read."""
    return context_limit(open_checkpoint(locate(model)).config)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No second progress bar, and no report of what we raise as an error; both settings as they were afterwards."""
    verbosity, shown = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
