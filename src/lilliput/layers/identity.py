"""What a base remembers of its birth: its name, the hash of its checkpoint's numbers, the hash of its quantized
numbers.

An adapter's passport holds these, and a wrong base is refused by them. Hashing reads the whole checkpoint, so that it
happens when somebody asks and not while loading. The hash does not depend on how a checkpoint is cut into files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from lilliput.errors import CheckpointError
from lilliput.files import TensorsHash, open_safetensors, read_json, sha256_file
from lilliput.layers.replace import quantized_layers

ATTRIBUTE = "base_identity"  # where a loader leaves an IdentitySource on the model


@dataclass(frozen=True)
class BaseIdentity:
    """Which numbers a model computes with.

    Attributes:
        name: the MODEL that was asked for.
        weights_sha256: `files.TensorsHash` over the tensors of the original checkpoint, as stored there.
        quantized_sha256: the same over codes and constants of the quantized layers; None when there are none.
        format: the number format of the quantized layers, "none" when there are none.
    """

    name: str
    weights_sha256: str
    quantized_sha256: str | None
    format: str


@dataclass
class IdentitySource:
    """What a loader attaches to a model so that its identity can be told later.

    Attributes:
        name: the MODEL that was asked for.
        hash_weights: reads the checkpoint and returns its hash; called at most once, and picklable.
    """

    name: str
    hash_weights: Callable[[], str]
    _sha256: str | None = field(default=None, repr=False)

    @property
    def weights_sha256(self) -> str:
        if self._sha256 is None:
            self._sha256 = self.hash_weights()
        return self._sha256


def identity_of(model: nn.Module) -> BaseIdentity:
    """Tell which base `model` is, whatever adapters are on it.

    Taken from what `load_model` or `from_pretrained` with our configs attached; else from the safetensors files in the
    directory `model.name_or_path`; else from the numbers in the model itself. Reads the checkpoint on the first call.
    Raises CheckpointError when the files have changed since the model was loaded.
    """
    source = getattr(model, ATTRIBUTE, None)
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    if isinstance(source, IdentitySource):
        name, weights = source.name, source.weights_sha256
    elif files := _weight_files(Path(name)):
        weights = hash_files(files)
    else:
        weights = _hash_parameters(model)
    formats = {layer.format_name for _, layer in quantized_layers(model)}
    return BaseIdentity(name, weights, _hash_quantized(model) if formats else None, "+".join(sorted(formats)) or "none")


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files that a load takes of `directory`; others that lie there are no part of this model."""
    if (single := directory / "model.safetensors").is_file():
        return [single]
    if (index := directory / "model.safetensors.index.json").is_file():
        return sorted(directory / name for name in set(read_json(index)["weight_map"].values()))
    return sorted(directory.glob("*.safetensors"))


def hash_files(files: list[Path]) -> str:
    """The hash of all tensors in these safetensors files, as stored; files of another kind (pickles, which are never
    opened here) are hashed byte by byte.
    """
    digest = TensorsHash()
    for file in files:
        if file.suffix != ".safetensors":
            digest.add_bytes(file.name, "file", (), sha256_file(file).encode())
            continue
        with open_safetensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118  a safe_open handle is no mapping
                digest.add(name, handle.get_tensor(name))
    return digest.hexdigest()


@dataclass(frozen=True)
class Stamp:
    """A file's size and time of change, to notice that it is not the file that was loaded."""

    path: Path
    size: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, path: Path) -> Stamp:
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Raise CheckpointError when the file is gone or another."""
        if not self.path.is_file() or Stamp.of(self.path) != self:
            raise CheckpointError(
                "has changed since the model was loaded from it, so that its hash would not be this model's",
                where=str(self.path),
                todo="Load the model again.",
            )


def _hash_quantized(model: nn.Module) -> str:
    digest = TensorsHash()
    for name, layer in quantized_layers(model):
        quantized = layer.quantized
        for part, value in zip(("codes", *quantized.CONSTANTS), quantized.packed, strict=True):
            if value is not None:
                digest.add(f"{_base_name(name)}.{part}", value)
    return digest.hexdigest()


def _hash_parameters(model: nn.Module) -> str:
    """Hash a model that came from no file; adapters on it do not count."""
    digest = TensorsHash()
    for name, tensor in model.state_dict().items():
        if not _is_adapter(name):
            digest.add(_base_name(name), tensor)
    return digest.hexdigest()


def _base_name(name: str) -> str:
    """A base's own name for a module or tensor: wrappers keep what they wrap as `base_layer` or `original_module`."""
    name = name.removeprefix("base_model.model.")  # PEFT's outer shell
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))
