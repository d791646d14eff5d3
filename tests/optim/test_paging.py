"""Pages keep to their budget, lose nothing, take their disk before the first step, and leave no file behind."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lilliput.errors import DiskError, UsageError
from lilliput.optim import paging
from lilliput.optim.paging import Pages, parse_bytes

KIB, MIB = 1 << 10, 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems may keep pages that were let go of")


def make_state(pages: Pages, count: int = 6, numel: int = 64 * KIB) -> list[list[Tensor]]:
    """As many parameters with a moment of bytes and its absmax each."""
    return [[pages.full((numel,), 127, torch.uint8), pages.empty((numel // 256,), torch.float32)] for _ in range(count)]


def step(pages: Pages, state: Sequence[Sequence[Tensor]]) -> None:
    """Something that reads and writes every byte, run by run."""
    for run in pages.runs(state):
        with pages.in_use([tensor for tensors in state[run] for tensor in tensors]) as tensors:
            for i, tensor in enumerate(tensors):
                tensor.mul_(3).add_(i + 1)


# ---- budgets in words ----


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("2GB", 2 * 10**9), ("512MiB", 512 * MIB), ("1.5 gb", 15 * 10**8), (" 3 kB ", 3000), ("7", 7), ("7B", 7),
        (4096, 4096), ("1TiB", 1 << 40), (".5KiB", 512),
    ],
)  # fmt: skip
def test_a_budget_is_bytes_with_a_unit(words: int | str, expected: int) -> None:
    assert parse_bytes(words) == Pages(words).budget == expected


@pytest.mark.parametrize("words", ["", "much", "2GBit", "-1GB", "0", 0, -5, "0.1B", True, "1e9", "GB", "1 2"])
def test_no_number_of_bytes_is_refused(words: int | str) -> None:
    with pytest.raises(UsageError, match=r"budget: a budget of .* is no number of bytes\. .*2GB"):
        Pages(words)


# ---- room ----


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.int64])
def test_tensors_are_zeros_aligned_and_apart(tmp_path: Path, dtype: torch.dtype) -> None:
    pages = Pages(folder=tmp_path)
    shapes = [(3, 5), (1,), (), (0, 4), (100, 100), (5 * MIB,)]
    tensors = [pages.empty(shape, dtype) for shape in shapes]
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()
        tensor.fill_(number + 1)
    assert all(bool((tensor == number + 1).all()) for number, tensor in enumerate(tensors))
    assert pages.total_bytes == sum(tensor.nbytes for tensor in tensors)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_blocks * 512 >= file.stat().st_size >= pages.total_bytes  # no holes
    assert file.stat().st_mode & 0o077 == 0


def test_small_tensors_share_the_file(tmp_path: Path) -> None:
    pages = Pages(folder=tmp_path)
    tensors = [pages.empty((10,), torch.float32) for _ in range(1000)]
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 4 * MIB
    assert len({tensor.data_ptr() for tensor in tensors}) == 1000


def test_without_a_tensor_there_is_no_file(tmp_path: Path) -> None:
    pages = Pages("1MB", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    pages.close()


# ---- the budget ----


def test_the_results_are_those_of_unpaged_state(tmp_path: Path) -> None:
    pages = Pages("96KiB", tmp_path)  # one and a half parameters of six
    state = make_state(pages)
    plain = [[tensor.clone() for tensor in tensors] for tensors in state]
    unpaged = Pages(folder=tmp_path)
    for _ in range(3):
        step(pages, state)
        for tensors in plain:
            step(unpaged, [tensors])
    assert len(pages.runs(state)) == 6
    assert all(
        torch.equal(a, b) for mine, other in zip(state, plain, strict=True) for a, b in zip(mine, other, strict=True)
    )


def test_resident_bytes_stay_below_the_budget_and_the_first_part_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages, dropped = Pages("1MiB", tmp_path), []
    state = make_state(pages, count=40, numel=64 * KIB)
    write = Pages._write_and_drop

    def noted(self: Pages, places: list[paging._Place]) -> None:
        dropped.append(sum(place.length for place in places))
        write(self, places)

    monkeypatch.setattr(Pages, "_write_and_drop", noted)
    for _ in range(3):
        dropped.clear()
        for run in pages.runs(state):
            with pages.in_use([tensor for tensors in state[run] for tensor in tensors]):
                assert pages.resident_bytes <= pages.budget
        assert pages.resident_bytes > 0.9 * pages.budget
    streamed = sum(dropped) / (pages.total_bytes - pages.budget)
    assert 0.9 < streamed < 1.2  # least recently used would drop all of it, and the budget's worth too


def test_runs_cover_the_list_and_keep_to_a_quarter_of_the_budget(tmp_path: Path) -> None:
    pages = Pages(4000, tmp_path)
    sizes = [400, 400, 400, 900, 10, 10, 3000, 0, 500]
    runs = pages.runs([[torch.empty(size, dtype=torch.uint8)] for size in sizes])
    assert runs == [slice(0, 2), slice(2, 3), slice(3, 6), slice(6, 7), slice(7, 9)]  # 3000: a run of its own
    assert pages.runs([[torch.empty(4000, dtype=torch.uint8)]]) == [slice(0, 1)]
    assert Pages().runs([[torch.empty(size)] for size in sizes]) == [slice(0, 9)]
    assert pages.runs([]) == Pages().runs([]) == []


def test_a_parameter_above_the_budget_is_kept_whole_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = Pages("32KiB", tmp_path)
    state = make_state(pages, count=2)
    for _ in range(2):
        step(pages, state)
        assert pages.resident_bytes == 0
    assert capsys.readouterr().err.count("the state of a parameter has 66,560 bytes, the budget 32,768") == 1
    assert [int(tensors[0][0]) for tensors in state] == [(127 * 9 + 3 + 1) % 256] * 2


def test_tensors_of_other_origin_are_left_alone(tmp_path: Path) -> None:
    pages, plain = Pages("1MB", tmp_path), torch.ones(5)
    with pages.in_use([plain, pages.empty((4,), torch.uint8)]) as tensors:
        assert tensors[0] is plain
        assert pages.resident_bytes == 4


RESIDENT = """
import sys, torch
from lilliput.optim.paging import Pages

def resident():  # file pages alone: what else a process holds comes and goes by itself
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssFile"))

MIB = 1 << 20

def passes(pages, count):  # two over a state of `count` MiB; what is resident at most, when looked at, let go of
    before = resident()
    state = [[pages.full((MIB,), 127, torch.uint8)] for _ in range(count)]
    most = resident()
    for _ in range(2):
        for run in pages.runs(state):
            with pages.in_use([tensor for tensors in state[run] for tensor in tensors]) as tensors:
                for tensor in tensors:
                    tensor.add_(1)
                most = max(most, resident())
    assert all(int(tensor[0]) == 129 for tensors in state for tensor in tensors)
    read = resident()
    pages.let_go()
    return [(bytes - before) / MIB for bytes in (most, read, resident())]

passes(Pages("1MiB", sys.argv[1]), 2)  # code that is read in with its first use is resident from then on
print(*passes(Pages("8MiB", sys.argv[1]), 80))
"""


def test_copies_are_made_within_the_budget(tmp_path: Path) -> None:
    pages, plain = Pages("100kB", tmp_path), [torch.randn(3, 4096), torch.tensor(7), torch.randn(4096).bfloat16()]
    copies = [pages.copied(tensor) for tensor in plain * 3]
    assert pages.resident_bytes <= 100_000 < pages.total_bytes
    for copy, tensor in zip(copies, plain * 3, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.dtype == tensor.dtype
        assert copy.data_ptr() != tensor.data_ptr()


@linux
def test_resident_memory_of_state_ten_times_the_budget(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RESIDENT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    most, read, after = map(float, done.stdout.split())
    assert most < 8 + 1
    assert read > 8 + 1  # looked at outside of `in_use`, as a checkpoint does
    assert after < 1


# ---- the disk ----


def test_a_full_disk_is_an_error_before_anything_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(folder=tmp_path)
    kept = pages.full((10,), 3, torch.uint8)

    def full(handle: int, offset: int, size: int) -> None:
        os.truncate(handle, offset + size // 2)  # as some file systems do before they notice
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DiskError) as caught:
        pages.empty((8 * MIB,), torch.float32)
    said = str(caught.value)
    needed = 36 * MIB  # 4 MiB that there are, 32 that are asked for
    assert said.startswith(f"{tmp_path}: cannot hold {needed:,} bytes of optimizer state (No space left on device; ")
    assert "bytes are free). Free some space, or choose another place with page_folder." in said
    (file,) = tmp_path.iterdir()
    assert (file.stat().st_size, pages.total_bytes, int(kept.sum())) == (4 * MIB, 10, 30)


LIMITED = """
import resource, sys, torch
from lilliput.errors import DiskError
from lilliput.optim.paging import Pages
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    Pages(folder=sys.argv[1]).empty((10,), torch.uint8)
except DiskError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
def test_a_limit_on_file_sizes_is_the_same_error(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=False)
    assert "cannot hold 4,194,304 bytes of optimizer state (File too large" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"file/pages: cannot hold .* \(Not a directory"):
        Pages(folder=tmp_path / "file" / "pages").empty((1,), torch.uint8)


@pytest.mark.parametrize("lacking", [True, False])
def test_zeros_are_written_where_the_system_cannot_allocate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: bool
) -> None:
    def refuses(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if lacking:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuses, raising=False)
    pages = Pages(folder=tmp_path)
    tensor = pages.full((5 * MIB,), 1, torch.uint8)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_blocks * 512 >= 5 * MIB
    assert int(tensor.sum()) == 5 * MIB


def test_systems_without_advice_and_locks_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MADV_DONTNEED", "MADV_WILLNEED"):
        monkeypatch.delattr(mmap, name, raising=False)
    for name in ("posix_fadvise", "posix_fallocate"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(paging, "fcntl", None)
    pages = Pages("96KiB", tmp_path)
    state = make_state(pages, count=3)
    step(pages, state)
    assert [int(tensors[0][-1]) for tensors in state] == [(127 * 3 + 1) % 256] * 3
    pages.close()
    assert not list(tmp_path.iterdir())


# ---- files left behind ----


def test_close_removes_the_file_and_leaves_the_tensors(tmp_path: Path) -> None:
    pages = Pages("1MB", tmp_path)
    tensor = pages.full((1000,), 5, torch.uint8)
    pages.close()
    assert not list(tmp_path.iterdir())
    assert int(tensor.sum()) == 5000
    pages.close()


def test_the_file_goes_with_its_pages(tmp_path: Path) -> None:
    tensor = Pages(folder=tmp_path).empty((1,), torch.uint8)
    assert not list(tmp_path.iterdir())
    assert int(tensor) == 0


HOLDS = """
import os, sys, time, torch
from lilliput.optim.paging import Pages
pages = Pages(folder=sys.argv[1])
tensor = pages.full((1000,), 5, torch.uint8)
if sys.argv[2] == "forks" and not os.fork():
    sys.exit()  # with everything that runs at an exit
if sys.argv[2] == "forks":
    os.wait()
    assert len(os.listdir(sys.argv[1])) == 1
print("ready", flush=True)
if sys.argv[2] == "waits":
    time.sleep(60)
"""


def holding(folder: Path, how: str) -> subprocess.Popen[str]:
    """A process with a file there, when it is ready."""
    child = subprocess.Popen([sys.executable, "-c", HOLDS, folder, how], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("how", ["ends", pytest.param("forks", marks=linux)])
def test_the_file_is_removed_at_exit_and_not_by_a_fork(tmp_path: Path, how: str) -> None:
    assert holding(tmp_path, how).wait(30) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_a_killed_process_leaves_a_file_to_the_next_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "notes.pages").touch()  # not ours
    killed, living = holding(tmp_path, "waits"), holding(tmp_path, "waits")
    try:
        mine = Pages(folder=tmp_path)
        mine.empty((1,), torch.uint8)
        assert len(list(tmp_path.iterdir())) == 4
        killed.send_signal(signal.SIGKILL)
        killed.wait(30)
        Pages(folder=tmp_path)
        left = {path.name.split("-")[2] for path in tmp_path.glob("lilliput-state-*")}
        assert left == {str(living.pid), str(os.getpid())}
        assert (tmp_path / "notes.pages").exists()
    finally:
        for child in (killed, living):
            child.kill()
            child.wait(30)


STARTS = """
import sys, torch
from lilliput.optim.paging import Pages
for number in range(200):
    pages = Pages(folder=sys.argv[1])
    tensor = pages.full((10,), number, torch.uint8)
    assert pages._file.path.exists()
    pages.close()
"""


@linux
def test_two_processes_that_start_at_once_do_not_take_each_others_files(tmp_path: Path) -> None:
    children = [subprocess.Popen([sys.executable, "-c", STARTS, tmp_path], stderr=subprocess.PIPE) for _ in range(2)]
    for child in children:
        _, said = child.communicate(timeout=60)
        assert child.returncode == 0, said
    assert not list(tmp_path.iterdir())


# ---- on a GPU ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_state_of_a_gpu_is_pinned_and_copied_there_and_back() -> None:
    pages = Pages("1MB", device="cuda")
    state = pages.full((1000,), 7, torch.uint8)
    assert state.is_pinned()
    with pages.in_use([state]) as (there,):
        assert there.device.type == "cuda"
        there.add_(1)
    assert int(state.sum()) == 8000
