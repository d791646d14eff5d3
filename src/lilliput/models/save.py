"""Write a model, quantized or not, as a Hugging Face directory that `load_model` and `from_pretrained` read again.

Everything is written beside, then renamed, the weights first and `config.json` last: a full disk leaves the files that
were there. Not here: sharding (one file of any size is read by memory map), other libraries' quantized formats.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.errors import DiskError, FormatError, UsageError
from lilliput.files import replace, write_safetensors
from lilliput.layers import QuantizedEmbedding, QuantizedWeight, identity_of, quantized_layers
from lilliput.layers.replace import dense_type, linear_names
from lilliput.models.hf import config_for
from lilliput.models.stream import INDEX, WEIGHTS, Lazy, write_tensors
from lilliput.progress import bar


def save_model(model: PreTrainedModel, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write `model` and, when given, `tokenizer` into `directory`, which is made when it is not there.

    A quantized model keeps its codes; the hash of the checkpoint that it was quantized from is remembered in
    config.json.

    Raises:
        UsageError: the model carries adapters (those are saved by `lilliput.lora.save_adapter`), or `directory` is a
            file.
        FormatError: layers of more than one number format.
        DiskError: the disk is full or the place cannot be written; files that were there before are unchanged.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UsageError("is a file, expected a directory to save into", where=str(directory))
    tensors = _own_tensors(model)
    with _around_weights(model, _config_json(model), directory, tokenizer):
        write_safetensors(directory / WEIGHTS, tensors)


def save_tensors(
    model: PreTrainedModel,
    tensors: Mapping[str, Lazy],
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: Mapping[str, object] | None = None,
    beside: Mapping[str, object] | None = None,
    progress: bool = True,
) -> None:
    """Write a plain model of the configuration of `model` whose tensors are made one at a time, as they are written.

    Args:
        model: tells class and configuration; it may be quantized and carry adapters.
        tensors: all that the plain model needs, by its names; of tied ones the second name may be left out, and a model
            for which it is there is written as untied.
        directory: made when it is not there.
        dtype: what config.json says of the numbers.
        quantization: what it says of how they are quantized, where they are.
        beside: further JSON files by name.
        progress: show a bar.
    Raises:
        UsageError: `directory` is a file. DiskError: it could not be written. Whatever loading a tensor raises.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UsageError("is a file, expected a directory to save into", where=str(directory))
    config = {**_plain_config(model), "dtype": str(dtype).removeprefix("torch.")}
    if any(name in tensors for name in model.all_tied_weights_keys):
        config["tie_word_embeddings"] = False
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    with (
        bar(f"writing {directory.name}", len(tensors), shown=progress) as advance,
        _around_weights(model, config, directory, tokenizer, beside),
    ):
        write_tensors(directory / WEIGHTS, tensors, advance)


def save_repacked(
    model: PreTrainedModel,
    repack: Callable[[str, QuantizedWeight], Mapping[str, Lazy]],
    quantization: Mapping[str, object],
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    beside: Mapping[str, object] | None = None,
    progress: bool = True,
) -> None:
    """Write a quantized model in another library's layout.

    Args:
        repack: from a quantized layer and its name to the tensors, by full names, that stand for its weight.
        quantization: what config.json says of it.
        directory: made when it is not there.
        beside: further JSON files by name.
        progress: show a bar.
    Raises:
        UsageError: the model carries adapters, or `directory` is a file. DiskError: it could not be written. Whatever
            `repack` raises; nothing is written then.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UsageError("is a file, expected a directory to save into", where=str(directory))
    tensors: dict[str, Lazy] = {name: _Held(tensor) for name, tensor in _own_tensors(model).items()}
    for name, layer in quantized_layers(model):
        for part, _ in layer.named_parameters():
            if part != "bias":
                tensors.pop(f"{name}.{part}", None)
        tensors |= repack(name, layer)
    config = {**_plain_config(model), "quantization_config": dict(quantization)}
    with (
        bar(f"writing {directory.name}", len(tensors), shown=progress) as advance,
        _around_weights(model, config, directory, tokenizer, beside),
    ):
        write_tensors(directory / WEIGHTS, tensors, advance)


class _Held:
    """A tensor in memory, as `write_tensors` takes it."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.shape, self.load = tensor.dtype, tuple(tensor.shape), lambda: tensor


@contextmanager
def _around_weights(
    model: PreTrainedModel,
    config: dict[str, object],
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    others: Mapping[str, object] | None = None,
) -> Iterator[None]:
    """Write the small files beside; the block writes the weights; then the small ones are renamed, config.json last.

    others: further JSON files.
    """
    configs = {"config.json": config, **(others or {})}
    if model.can_generate():
        configs["generation_config.json"] = json.loads(model.generation_config.to_json_string())
    with ExitStack() as renames:  # happen when the block ends, the last one entered first
        for name, content in configs.items():
            beside = renames.enter_context(replace(directory / name))
            beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            renames.enter_context(_tokenizer_files(tokenizer, directory))
        yield
        (directory / INDEX).unlink(missing_ok=True)  # of a sharded model that was here before


def _own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict without the second name of tied tensors."""
    tied = model.all_tied_weights_keys
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if any(part.startswith("lora_") for part in name.split(".")):
            raise UsageError(
                f"the model carries adapters ('{name}')",
                where="save_model",
                todo="Save them with lilliput.lora.save_adapter, or merge them into a dequantized copy first.",
            )
        source = tied.get(name)
        if source is None or not _same(tensor, model.get_parameter(source)):
            tensors[name] = tensor
    return tensors


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _plain_config(model: PreTrainedModel) -> dict[str, object]:
    """config.json of the model as if nothing in it were quantized."""
    content = json.loads(model.config.to_json_string())
    content.pop("quantization_config", None)
    content.pop("_name_or_path", None)
    content["architectures"] = [type(model).__name__]
    content["dtype"] = str(dense_type(model)).removeprefix("torch.")
    content["transformers_version"] = transformers.__version__
    return content


def _config_json(model: PreTrainedModel) -> dict[str, object]:
    content = _plain_config(model)
    layers = [layer for _, layer in quantized_layers(model)]
    if layers:
        content["quantization_config"] = _quantization_json(model, layers)
    return content


def _quantization_json(model: PreTrainedModel, layers: list[QuantizedWeight]) -> dict[str, object]:
    tables = [layer for layer in layers if isinstance(layer, QuantizedEmbedding)]
    linears = [layer for layer in layers if layer not in tables]
    kinds = {(layer.format_name, tuple(layer.options.items())) for layer in linears or tables}
    if len(kinds) > 1:
        raise FormatError(f"the model's layers are quantized in {len(kinds)} ways: {sorted(kinds)}", where="save_model")
    ((format, options),) = kinds
    config = config_for(
        format,
        **dict(options),
        embeddings=bool(tables),
        skip_modules=linear_names(model),
        weights_sha256=identity_of(model).weights_sha256,
    )
    return config.to_dict()


@contextmanager
def _tokenizer_files(tokenizer: PreTrainedTokenizerBase, directory: Path) -> Iterator[None]:
    """Let transformers write the tokenizer's files beside; when the block has succeeded, bring each in place."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".tokenizer") as made:
            tokenizer.save_pretrained(made)
            yield
            for file in sorted(path for path in Path(made).rglob("*") if path.is_file()):
                with replace(directory / file.relative_to(made)) as temporary:
                    os.replace(file, temporary)
    except OSError as error:
        raise DiskError(f"the tokenizer could not be written ({error})", where=str(directory)) from error
