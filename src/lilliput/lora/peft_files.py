"""Adapters as PEFT's directories, in and out: `adapter_config.json` and `adapter_model.safetensors`.

The layout is PEFT's: keys are `base_model.model.<module>.lora_A.weight` without the adapter's name, copies of
`modules_to_save` and trained biases lie beside them under their own names. Ours adds a passport in the file's metadata.
Loading is strict: a tensor that is missing, left over or of another shape is an error. What PEFT stores besides the
adapter (the base's embedding when it is targeted) must equal the base's own.
Not here: the old pickled `adapter_model.bin`, which could run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lilliput import files
from lilliput.errors import CheckpointError, UsageError, WrongBaseError
from lilliput.lora.adapters import (
    active_adapters,
    adapter_tensors,
    adapters,
    attach,
    base_only,
    check_new,
    delete_adapter,
    set_adapter,
)
from lilliput.lora.config import LoraConfig
from lilliput.lora.passport import Passport, check_base, make_passport
from lilliput.progress import say, warn

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_SHOWN = 4  # names of tensors in an error before "and N more"


def save_adapter(
    model: nn.Module, directory: str | Path, name: str = "default", passport: Passport | None = None
) -> None:
    """Write one adapter as a directory that `load_adapter` and `peft.PeftModel.from_pretrained` read.

    Both files are written beside and renamed at the end: after a full disk the old adapter is still there.

    Args:
        model: the model that carries the adapter.
        directory: made when it does not exist.
        name: which adapter; the name itself is not stored.
        passport: made from the model when None (without tokenizer and data).
    Raises:
        UsageError: no adapter of that name. DiskError: the files could not be written.
    """
    tensors = {f"{_PREFIX}{key}": tensor for key, tensor in adapter_tensors(model, name).items()}
    config = adapters(model)[name].to_peft()
    passport = passport or make_passport(model)
    with files.replace(Path(directory) / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files.write_safetensors(Path(directory) / WEIGHTS_FILE, tensors, passport.to_metadata())


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    *,
    allow_other_base: bool = False,
    trainable: bool = False,
) -> Passport | None:
    """Attach a saved adapter under `name` and make it the only active one; returns its passport.

    Args:
        model: the base, with or without other adapters.
        directory: an adapter, from here or from PEFT, or a run folder (its `adapter/` is taken).
        name: the name it gets here.
        allow_other_base: attach it although its passport names another base; a warning instead of the refusal.
        trainable: attach it for further training; else it is frozen.
    Raises:
        CheckpointError: a file is missing, cut short or malformed, it is no LoRA, or its tensors do not fit the model.
        WrongBaseError: it was trained over another base.
        UsageError: the name is taken or unusable, or adapters are merged. In every case the model is as before.
    """
    folder = _adapter_folder(directory)
    config = _read_config(folder).model_copy(update={"inference_mode": not trainable})
    tensors, passport = _read_tensors(folder)
    check_new(model, config, name)
    _check_passport(passport, model, folder, allow_other_base)
    before = active_adapters(model)
    try:
        attach(model, config, name, each_entry=False)
    except UsageError as error:
        raise CheckpointError(f"does not fit this model: {error}", where=str(folder / CONFIG_FILE)) from error
    try:
        _fill(model, name, tensors, folder / WEIGHTS_FILE)
    except BaseException:  # Ctrl-C too: numbers that were never filled in must not stay
        delete_adapter(model, name)
        set_adapter(model, before)
        raise
    return passport


def read_passport(directory: str | Path) -> Passport | None:
    """The passport of a saved adapter (or run folder) without loading it; None when it has none."""
    path = _adapter_folder(directory) / WEIGHTS_FILE
    with files.open_safetensors(path) as handle:
        return Passport.from_metadata(handle.metadata(), str(path))


def _adapter_folder(directory: str | Path) -> Path:
    """The folder with the adapter's files: the directory itself, or `adapter/` in a run folder."""
    directory = Path(directory)
    for folder in (directory, directory / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            if not (folder / WEIGHTS_FILE).is_file():
                _refuse_without_weights(folder)
            return folder
    fault = "holds no adapter" if directory.is_dir() else "no such directory"
    raise CheckpointError(
        f"{fault}: {CONFIG_FILE} is not there, nor in an adapter/ folder of a run",
        where=str(directory),
        todo="Give the folder that tune or PEFT has written.",
    )


def _refuse_without_weights(folder: Path) -> None:
    if (folder / _PICKLED).is_file():
        raise CheckpointError(
            f"{_PICKLED} is a pickle, which could run code and is not read",
            where=str(folder),
            todo=f"Save the adapter again with a current PEFT, which writes {WEIGHTS_FILE}.",
        )
    raise CheckpointError(f"{WEIGHTS_FILE} is missing", where=str(folder), todo="Copy the whole folder again.")


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG_FILE
    fields = files.read_json(path)
    if not isinstance(fields, dict):
        raise CheckpointError("not a JSON object", where=str(path))
    return LoraConfig.from_peft(fields, str(path))


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], Passport | None]:
    path = folder / WEIGHTS_FILE
    with files.open_safetensors(path) as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  the handle is no mapping
        return tensors, Passport.from_metadata(handle.metadata(), str(path))


def _check_passport(passport: Passport | None, model: nn.Module, folder: Path, allow_other_base: bool) -> None:
    if passport is None:
        say(f"{folder}: the adapter has no passport, so that its base cannot be checked")
        return
    try:
        note = check_base(passport, model, str(folder))
    except WrongBaseError as error:
        if not allow_other_base:
            raise
        warn(f"{folder}: {error.what}; loaded all the same, as asked")
    else:
        if note:
            say(f"{folder}: {note}")


@torch.no_grad()
def _fill(model: nn.Module, name: str, stored: Mapping[str, Tensor], path: Path) -> None:
    """Copy the file's tensors into the adapter. Raises CheckpointError unless they fit one to one and are finite."""
    wanted = adapter_tensors(model, name)
    found = _without_extras(model, name, stored, path)
    _refuse(path, "tensors are missing", sorted(wanted.keys() - found.keys()))
    _refuse(path, "tensors belong to no module of this adapter", sorted(found.keys() - wanted.keys()))
    shapes = {key: (list(found[key].shape), list(wanted[key].shape)) for key in wanted}
    misfits = [f"{key} is {has}, the model needs {needs}" for key, (has, needs) in shapes.items() if has != needs]
    _refuse(path, "tensors have the wrong shape", misfits)
    _refuse(path, "tensors hold NaN or Inf", [key for key in wanted if not _finite(found[key])])
    for key, tensor in wanted.items():
        tensor.copy_(found[key])


def _without_extras(model: nn.Module, name: str, stored: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The file's tensors by our names, less what PEFT stores beside the adapter.

    With an adapted embedding PEFT stores the base's own embedding too, and with bias="all" the biases of originals and
    copies of `modules_to_save` a second time. Such tensors may be left out only if they are what the model has.
    """
    wanted = adapter_tensors(model, name)
    found = {key.removeprefix(_PREFIX): tensor for key, tensor in stored.items()}
    with base_only(model):
        base = {key: value for key, value in model.state_dict(keep_vars=True).items() if torch.is_tensor(value)}
    for key in [key for key in found if key not in wanted]:
        twin = found.get(_plain(key, "modules_to_save")) if "modules_to_save" in key.split(".") else None
        twin = base.get(_plain(_plain(key, "original_module"), "base_layer")) if twin is None else twin
        if twin is None:
            continue
        if twin.shape != found[key].shape or not torch.equal(twin.detach().to(found[key].dtype).cpu(), found[key]):
            raise CheckpointError(
                f"it brings its own '{key}' {list(found[key].shape)}, which is not this base's {list(twin.shape)}",
                where=str(path),
                todo="Load it over the base it was trained on (with the same vocabulary).",
            )
        del found[key]
    return found


def _plain(key: str, wrapper: str) -> str:
    """`key` without the part that a wrapper adds to it."""
    return ".".join(part for part in key.split(".") if part != wrapper)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _refuse(path: Path, fault: str, names: list[str]) -> None:
    """Raise when there are names to complain about, showing the first few."""
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise CheckpointError(
            f"{len(names)} {fault}: {', '.join(names[:_SHOWN])}{more}",
            where=str(path),
            todo="It is the adapter of another model, or its files do not belong together.",
        )
