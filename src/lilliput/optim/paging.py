"""Optimizer state in pages that leave the fast memory under a budget and come back when a step needs them.

On a CPU the state lies in a memory-mapped file, on a GPU in pinned host memory. A step walks over the parameters in the
same order each time, for which letting go of the least recently used is the worst choice: it drops what is needed next.
Here the most recently used goes first, so that the first part stays and the rest streams through.

Source: paged optimizers, QLoRA, arXiv 2305.14314, section 3 (there CUDA's unified memory decides what leaves).
Not here: which tensors are state, when a step needs them (`optimizers.py`).
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lilliput.errors import DiskError, UsageError
from lilliput.files import cache_dir
from lilliput.progress import warn

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed: no lock is needed to know that
    fcntl = None  # type: ignore[assignment]

_ALIGN = 64  # bytes: a cache line, and the widest vector
_SEGMENT = 4 << 20  # bytes that a file grows by at least; small tensors share them
_RUNS = 4  # a run is at most this part of the budget: the rest of the budget keeps what comes first
_PREFIX, _SUFFIX = "lilliput-state-", ".pages"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def parse_bytes(budget: int | str) -> int:
    """Bytes of "2GB" (2 * 10**9), "512MiB" (512 * 2**20), "1.5 GB" or a plain number.

    Raises UsageError for another unit, no number, or nothing left of it.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", str(budget))
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or isinstance(budget, bool) or int(float(found[1]) * unit) < 1:
        raise UsageError(
            f"a budget of {budget!r} is no number of bytes",
            where="budget",
            todo='Give bytes as a number, or with a unit: "2GB" (10**9 each), "512MiB" (2**20 each).',
        )
    return int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit


class _Place(NamedTuple):
    """Where a tensor lies: `start` and `length` in bytes of a map, whose first byte is `offset` in the file."""

    map: mmap.mmap
    offset: int
    start: int
    length: int


class Pages:
    """Room for the state of one optimizer.

    Args:
        budget: the most bytes of state that stay in memory between the moments of a step, e.g. "2GB"; None leaves it
            to the system, which writes pages out when memory is short.
        folder: where the file lies; None: `pages` in Lilliput's cache. In a folder that itself lies in memory (tmpfs)
            nothing is won.
        device: where the parameters are. "cpu": a mapped file. "cuda": pinned host memory, from which `in_use` makes
            copies; `budget` then bounds a run, and so the copies on the device.

    The file is removed by `close`, when this object is let go of and when Python ends. What a process that was killed
    has left in the folder is removed here, by the next one: a file belongs to nobody when its lock is free.

    On macOS and Windows pages that were let go of may stay in memory as long as there is enough: the budget is not
    enforced. On Windows a file in use cannot be removed, so that it may stay until the next start.

    Raises UsageError for a budget that is no number of bytes.
    """

    def __init__(
        self,
        budget: int | str | None = None,
        folder: str | Path | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.budget = None if budget is None else parse_bytes(budget)
        self.folder = cache_dir() / "pages" if folder is None else Path(folder)
        self.device = torch.device(device)
        self.total_bytes = 0
        self._file: _PageFile | None = None
        self._segment: _Place | None = None  # the newest piece of the file, and how much of it is taken
        self._taken = 0
        self._places: dict[int, _Place] = {}  # by the address of the first byte
        self._resident: dict[int, _Place] = {}  # in the order of use, the latest last
        self._warned = False
        _remove_left_over(self.folder)

    @property
    def resident_bytes(self) -> int:
        """Bytes of state that are kept in memory now, as far as they were brought in by `in_use`."""
        return sum(place.length for place in self._resident.values())

    # ---- room ----

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros in the pages, aligned to 64 bytes; its bytes on the disk are taken at once.

        What is written to it outside of `in_use` counts in no budget until it was in use once: to fill many tensors,
        take `full`. A tensor's room is given back by `close` alone: copy into it when all of its values change.

        Raises DiskError when the disk cannot hold it; what is in the pages already stays as it is.
        """
        count = prod(shape)
        length = count * dtype.itemsize
        if self.device.type != "cpu":
            tensor = torch.zeros(tuple(shape), dtype=dtype, pin_memory=torch.cuda.is_available())
        elif not length:
            tensor = torch.empty(tuple(shape), dtype=dtype)
        else:
            place = self._take(length)
            tensor = torch.frombuffer(place.map, dtype=dtype, count=count, offset=place.start).view(tuple(shape))
            self._places[tensor.data_ptr()] = place
        self.total_bytes += length
        return tensor

    def full(self, shape: Sequence[int], value: float, dtype: torch.dtype) -> Tensor:
        """`empty` with `value` everywhere, filled within the budget."""
        tensor = self.empty(shape, dtype)
        if value and tensor.numel():
            with self._kept([tensor]):
                tensor.fill_(value)
        return tensor

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in the pages, made within the budget."""
        copy = self.empty(tensor.shape, tensor.dtype)
        with self._kept([copy]):
            return copy.copy_(tensor)

    def _take(self, length: int) -> _Place:
        segment = self._segment
        if segment is None or self._taken + length > segment.length:
            self._file = self._file or _PageFile(self.folder)
            segment = self._segment = self._file.grow(_whole_pages(max(length, _SEGMENT)))
            self._taken = 0
        place = segment._replace(start=self._taken, length=length)
        self._taken += -(length // -_ALIGN) * _ALIGN
        return place

    # ---- use ----

    def runs(self, state: Sequence[Sequence[Tensor]]) -> list[slice]:
        """Cut a list of parameters' state tensors into neighbours that are to be in use together.

        Where all of it fits into the budget that is one run. Else a run is at most a quarter of the budget, so that the
        rest can keep what comes first; a parameter that is larger has a run of its own, with one warning where it is
        larger than the whole budget.
        """
        sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in state]
        if self.budget is None or sum(sizes) <= self.budget:
            return [slice(0, len(sizes))] if sizes else []
        if max(sizes) > self.budget and not self._warned:
            self._warned = True
            warn(f"the state of a parameter has {max(sizes):,} bytes, the budget {self.budget:,}: it is kept whole")
        cuts, filled = [0], 0
        for i, size in enumerate(sizes):
            if i > cuts[-1] and filled + size > self.budget // _RUNS:
                cuts.append(i)
                filled = 0
            filled += size
        return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]

    @contextmanager
    def in_use(self, tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """Bring these tensors in for the block; yields those to work on, in the same order.

        On a CPU they are the tensors themselves, and others leave first where the budget asks for it. On a GPU they are
        copies on the device, which are copied back at the end of the block. Tensors of other origin are left alone.
        """
        tensors = list(tensors)
        if self.device.type == "cpu":
            with self._kept(tensors):
                yield tensors
            return
        copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        yield copies
        for tensor, copy in zip(tensors, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy, non_blocking=True)
        torch.accelerator.synchronize(self.device)  # the host may read or save the state next

    @contextmanager
    def _kept(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        wanted = {key: self._places[key] for tensor in tensors if (key := tensor.data_ptr()) in self._places}
        arriving = {key: place for key, place in wanted.items() if key not in self._resident}
        self._make_room(sum(place.length for place in arriving.values()), wanted)
        if self.budget is not None:
            for start in _joined(arriving.values()):
                _advise(start, "MADV_WILLNEED")
        for key, place in wanted.items():  # the latest last
            self._resident.pop(key, None)
            self._resident[key] = place
        try:
            yield
        finally:
            self._make_room(0, ())  # a parameter above the whole budget leaves at once

    def _make_room(self, needed: int, wanted: Iterable[int]) -> None:
        """Let go of what was used last, but for the wanted, until `needed` bytes fit."""
        if self.budget is None:
            return
        over = self.resident_bytes + needed - self.budget
        leaving: list[_Place] = []
        for key in [key for key in reversed(self._resident) if key not in wanted]:
            if over <= 0:
                break
            leaving.append(self._resident.pop(key))
            over -= leaving[-1].length
        self._write_and_drop(leaving)

    def let_go(self) -> None:
        """Write everything out and drop it from memory, for instance after a checkpoint has read all of it."""
        self._resident.clear()
        self._write_and_drop(self._places.values())

    def _write_and_drop(self, places: Iterable[_Place]) -> None:
        for place in _joined(places):
            try:
                place.map.flush(place.start, place.length)  # only what is written can leave the page cache
            except OSError as error:  # a disk that fails, or a file system that copies on write and is full
                raise _disk_error(self.folder, place.length, error) from error
            _advise(place, "MADV_DONTNEED")
            if self._file and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file.handle, place.offset + place.start, place.length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Remove the file. Tensors stay usable; their room goes with the last of them."""
        if self._file:
            self._file.remove()
        self._file = self._segment = None
        self._places.clear()
        self._resident.clear()


def _joined(places: Iterable[_Place]) -> list[_Place]:
    """The whole pages that these places lie on, neighbours as one. A page on the rim is harmless: it comes back."""
    joined: list[_Place] = []
    for place in sorted(places, key=lambda place: (place.offset, place.start)):
        start = place.start // mmap.PAGESIZE * mmap.PAGESIZE
        end = _whole_pages(place.start + place.length)
        last = joined[-1] if joined else None
        if last and last.offset == place.offset and start <= last.start + last.length:
            start = last.start
            joined.pop()
        joined.append(_Place(place.map, place.offset, start, end - start))
    return joined


def _advise(place: _Place, advice: str) -> None:
    option = getattr(mmap, advice, None)
    if option is not None:
        place.map.madvise(option, place.start, place.length)


def _whole_pages(length: int) -> int:
    return -(length // -mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


# ---- the file ----------------------------------------------------------------------------------------------------


class _PageFile:
    """A file of ours that grows by maps and is locked while the process lives."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.handle, self.path = _locked_file(folder)
        except OSError as error:
            raise _disk_error(folder, _SEGMENT, error) from error
        self.size = 0
        self.remove = weakref.finalize(self, _remove, self.handle, self.path, os.getpid())

    def grow(self, size: int) -> _Place:
        """A shared map of `size` new bytes: zeros that have their place on the disk. Raises DiskError."""
        try:
            _allocate(self.handle, self.size, size)
        except OSError as error:
            os.ftruncate(self.handle, self.size)
            raise _disk_error(self.path.parent, self.size + size, error) from error
        offset, self.size = self.size, self.size + size
        return _Place(mmap.mmap(self.handle, size, offset=offset), offset, 0, size)


def _locked_file(folder: Path) -> tuple[int, Path]:
    """A new file with its lock. Between its birth and its lock another process may take it for one left over."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f"{_PREFIX}{os.getpid()}-", suffix=_SUFFIX, dir=folder)
        if _lock(handle) and os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether nobody else has the lock, which is ours from now on; it goes with the process, however it ends."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _allocate(handle: int, offset: int, size: int) -> None:
    """Take the bytes on the disk for real: a sparse file would fail in the middle of a step, with a signal."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, offset, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.lseek(handle, offset, os.SEEK_SET)
    zeros = memoryview(bytes(min(size, _SEGMENT)))
    while size:
        size -= os.write(handle, zeros[:size])


def _remove(handle: int, path: Path, process: int) -> None:
    """Remove the file, unless this is a fork of the process that it belongs to."""
    if os.getpid() == process:
        os.close(handle)
        _unlink(path)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except PermissionError:  # Windows, while it is mapped, or somebody else's: left to its owner's next start
        return


def _remove_left_over(folder: Path) -> None:
    """Remove the files of processes that have ended without doing it."""
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        try:
            handle = os.open(path, os.O_RDWR)
        except (FileNotFoundError, PermissionError):  # gone meanwhile; somebody else's
            continue
        left_over = _lock(handle)
        if left_over and fcntl is not None:
            _unlink(path)  # with its lock still held: nobody can take it for theirs
        os.close(handle)
        if left_over and fcntl is None:
            _unlink(path)


def _disk_error(folder: Path, needed: int, error: OSError) -> DiskError:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    return DiskError(
        f"cannot hold {needed:,} bytes of optimizer state ({error.strerror}; {free:,} bytes are free)",
        where=str(folder),
        todo="Free some space, or choose another place with page_folder.",
    )
