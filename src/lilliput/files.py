"""Files written beside and then renamed; files read as if a stranger wrote them; hashes.

Everything that saves goes through `replace`, so that a crash or a full disk loses nothing that existed.
Source of the safetensors layout: the safetensors format specification (8 bytes of header length, JSON header, data).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lilliput.errors import CheckpointError, DataError, DiskError

_CHUNK = 1 << 22  # bytes read at a time when hashing a file


@contextmanager
def replace(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`: on success flushed to disk and renamed onto it, on failure removed.

    Parent directories are made. Raises DiskError when the disk is full or the place cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _settle(temporary, path)
        temporary = None
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"could not be written ({_reason(error)})",
            where=str(path),
            todo="Free some space or choose another place; a file that was there before is unchanged.",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _settle(temporary: Path, path: Path) -> None:
    """Flush `temporary`, give it the permissions a plain new file would have, and rename it onto `path`."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


@contextmanager
def workplace(path: str | Path) -> Iterator[Path]:
    """Yield a new directory beside `path`, on its disk, where something is made; it goes with what is left in it.

    Raises DiskError when it cannot be made, or the disk fills up inside the block.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise DiskError(f"cannot be made ({_reason(error)})", where=str(path), todo="Choose another place.") from error
    try:
        yield work
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskError(f"could not be written ({_reason(error)})", where=str(path), todo="Free some space.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put_directory(made: Path, path: Path, replaced: Iterable[str] = ()) -> None:
    """Rename the directory `made` to `path`, on the same disk.

    Args:
        replaced: names of files in a directory that is there already which go; its other files are taken over.

    Raises DiskError, with the old directory in its place.
    """
    path = path.resolve()
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    old = aside / path.name
    try:
        if path.is_dir():
            _take_over(path, made, {*replaced})
            os.replace(path, old)
        os.replace(made, path)
    except BaseException as error:
        if old.is_dir() and not path.exists():
            os.replace(old, path)
        if isinstance(error, OSError):
            raise DiskError(f"could not be put in place ({_reason(error)})", where=str(path)) from error
        raise
    finally:
        if not old.is_dir() or path.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _take_over(old: Path, made: Path, replaced: set[str]) -> None:
    """Copy into `made` what lies in `old` and is neither replaced nor made anew."""
    for file in sorted(path for path in old.rglob("*") if not path.is_dir()):
        name = file.relative_to(old)
        if name.as_posix() not in replaced and not (made / name).exists():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, made / name, follow_symlinks=False)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 through `replace`."""
    with replace(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | Path, todo: str, limit: int = -1) -> str:
    """The first `limit` characters of a UTF-8 text file; all by default.

    Args:
        todo: what to do where there is no such file.

    Raises:
        DataError: it is missing, not UTF-8, or cannot be read.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(limit)
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path), todo=todo) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start} is not UTF-8", where=str(path), todo="Convert it, e.g. with `iconv -t utf-8`."
        ) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(path)) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with a newline at the end, through `replace`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file of a model, adapter or run. Raises CheckpointError when it is missing or broken."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("no such file", where=str(path)) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"broken JSON in line {error.lineno}: {error.msg}", where=str(path), todo="Restore or download it again."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot be read ({error})", where=str(path)) from error


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors, any shapes and types, with string metadata, through `replace`."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replace(path) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})


def open_safetensors(path: str | Path) -> Any:
    """Open a safetensors file for reading by memory map: a `safe_open` handle, to be used in a `with` block.

    Raises CheckpointError when the file is missing, cut short, or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("no such file", where=str(path))
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{_safetensors_fault(path)} ({error})", where=str(path), todo="Copy or download the file again."
        ) from error


def _safetensors_fault(path: Path) -> str:
    """Say in words what is wrong with a safetensors file that the library refused."""
    size = path.stat().st_size
    if size < 8:
        return f"cut short: {size} bytes, a safetensors file has at least 8"
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > min(size, 100_000_000):
            return f"not a safetensors file, or cut short: {size} bytes, but its header alone would have {header_size}"
        try:
            header = json.loads(file.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "not a safetensors file: its header is broken"
    expected = 8 + header_size + max(ends, default=0)
    return f"cut short: {size} bytes of {expected}" if size < expected else "malformed"


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Hexadecimal SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class TensorsHash:
    """SHA-256 over named tensors that does not depend on the order in which they come.

    It is the hash of the sorted lines `name dtype shape sha256(bytes)`; the bytes are little endian, row by row.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, any shape and type; it is not kept."""
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self.add_bytes(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw.data)

    def add_bytes(self, name: str, dtype: str, shape: tuple[int, ...], raw: memoryview | bytes) -> None:
        """The same for bytes that lie in a file, with what they are said to be."""
        self._lines.append(f"{name} {dtype} {list(shape)} {hashlib.sha256(raw).hexdigest()}")

    def hexdigest(self) -> str:
        """The hash of all tensors taken so far."""
        return sha256_text("\n".join(sorted(self._lines)))


def cache_dir() -> Path:
    """Where models are kept: $LILLIPUT_HOME, else $XDG_CACHE_HOME/lilliput, else ~/.cache/lilliput (not made here)."""
    if home := os.environ.get("LILLIPUT_HOME"):
        return Path(home)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lilliput"
