"""From a MODEL argument to files: a Hugging Face directory, a GGUF file, a short name of the catalogue, or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lilliput.errors import CheckpointError, LilliputError, nearest
from lilliput.models.catalogue import CATALOGUE, pull
from lilliput.progress import say

# what a load needs of a repository beside its weights: no pickles, no code
_SMALL = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.spm")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
        name: the MODEL argument, as it was given.
        path: the directory, or the GGUF file.
    """

    name: str
    path: Path
    kind: Literal["directory", "gguf"]


def locate(model: str | Path) -> Source:
    """Find the files of `model`, fetching them when it is a catalogue name or a hub id that is not here yet.

    Raises LilliputError that says what was tried and which names are near, CheckpointError for a file or directory that
    is there but is no model.
    """
    name, path = str(model), Path(model).expanduser()
    if path.is_file():
        return _file(name, path)
    if path.is_dir():
        return _directory(name, path)
    if name in CATALOGUE:
        return Source(name, pull(name), "directory" if CATALOGUE[name].is_directory else "gguf")
    if _HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return _directory(name, _from_hub(name))
    raise LilliputError(
        f"there is no directory or file '{name}', and the catalogue does not have it{nearest(name, _near_names(path))}",
        where="MODEL",
        todo=f"Give a Hugging Face directory, a .gguf file, a hub id (org/name), or one of: {', '.join(CATALOGUE)}.",
    )


def _file(name: str, path: Path) -> Source:
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            "a single file can only be a GGUF file (.gguf)",
            where=name,
            todo="For safetensors give the directory, which holds config.json too.",
        )
    return Source(name, path, "gguf")


def _directory(name: str, path: Path) -> Source:
    if (path / "config.json").is_file():
        return Source(name, path, "directory")
    todo = "A Hugging Face model directory has config.json, *.safetensors and the tokenizer's files."
    if (path / "adapter_config.json").is_file() or (path / "adapter" / "adapter_config.json").is_file():
        todo = "This is an adapter: give the base as MODEL, and this directory with --adapter."
    elif ggufs := sorted(path.glob("*.gguf")):
        todo = f"Give the GGUF file itself: {ggufs[0]}."
    raise CheckpointError("has no config.json", where=str(path), todo=todo)


def _near_names(path: Path) -> list[str]:
    """Names that the user may have meant: the catalogue's, and what lies where they looked."""
    parent = path.parent
    beside = (
        [str(parent / p.name) if str(parent) != "." else p.name for p in parent.iterdir()] if parent.is_dir() else []
    )
    return [*CATALOGUE, *beside]


def _complete(snapshot: Path) -> bool:
    """False for what an interrupted download has left: no config, or not all shards that the index names."""
    from lilliput.models.stream import directory_files  # here, since names alone must not cost the import of torch

    try:
        directory_files(snapshot)
    except CheckpointError:
        return False
    return (snapshot / "config.json").is_file()


def _from_hub(name: str) -> Path:
    """The snapshot of a hub repository: the one in the local cache when it is complete, else a download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    from lilliput.models.stream import weight_files

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if _complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass  # not here yet
    say(f"Fetching {name} from the Hugging Face hub")
    try:
        small = Path(snapshot_download(name, allow_patterns=list(_SMALL)))
        # Many repositories hold the same weights again, under other names or in folders: the index decides.
        return Path(snapshot_download(name, allow_patterns=[*_SMALL, *weight_files(small)]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LilliputError(
            f"there is no directory '{name}', and the Hugging Face hub did not give it ({first_line})"
            f"{nearest(name, CATALOGUE)}",
            where="MODEL",
            todo=f"Check the name and the network. Without the hub: {', '.join(CATALOGUE)}.",
        ) from error
