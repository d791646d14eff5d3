"""Saving loses nothing that existed; reading says what is wrong with a file."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lilliput import files
from lilliput.errors import CheckpointError, DiskError


def test_replace_keeps_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    target = tmp_path / "kept.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), files.replace(target) as temporary:
        temporary.write_text("new, but not all of it")
        raise RuntimeError("half way")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_replace_makes_parents_and_plain_permissions(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    files.write_text(target, "text")
    plain = tmp_path / "plain.txt"
    plain.write_text("")
    assert target.stat().st_mode == plain.stat().st_mode


FULL_DISK = """
import resource, signal, sys, torch
from lilliput import files
from lilliput.errors import DiskError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the file system "is full" after 100 kB
try:
    files.write_safetensors(sys.argv[1], {"w": torch.zeros(1_000_000)})
except DiskError as error:
    print(error)
"""


def test_a_full_disk_is_said_and_the_old_file_survives(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    files.write_safetensors(target, {"w": torch.ones(3)})
    before = target.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(target)], capture_output=True, text=True, check=False)
    assert "could not be written" in done.stdout, done.stderr
    assert "unchanged" in done.stdout
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="could not be written"):
        files.write_text(tmp_path / "file" / "below.txt", "")


def test_safetensors_round_trip_keeps_values_types_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor([1, 255], dtype=torch.uint8)}
    files.write_safetensors(path, tensors, {"who": "me"})
    with files.open_safetensors(path) as handle:
        assert handle.metadata()["who"] == "me"
        assert {name: handle.get_tensor(name).tolist() for name in handle.keys()} == {  # noqa: SIM118  (not a dict)
            "a": [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]],
            "b": [1, 255],
        }


def _safetensors_bytes(tmp_path: Path) -> bytes:
    files.write_safetensors(tmp_path / "whole.safetensors", {"w": torch.zeros(100)})
    return (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("cut", "said"),
    [(0, "cut short: 0 bytes"), (5, "at least 8"), (40, "its header alone"), (200, r"cut short: 200 bytes of \d+")],
)
def test_a_safetensors_file_cut_short(tmp_path: Path, cut: int, said: str) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(_safetensors_bytes(tmp_path)[:cut])
    with pytest.raises(CheckpointError, match=said) as caught:
        files.open_safetensors(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    path.write_text("hello, this is a text of some length, not a checkpoint")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        files.open_safetensors(path)
    path.write_bytes((20).to_bytes(8, "little") + b"[1, 2, 3]" + b" " * 11 + b"\0" * 50)
    with pytest.raises(CheckpointError, match="header is broken"):
        files.open_safetensors(path)
    with pytest.raises(CheckpointError, match="no such file"):
        files.open_safetensors(tmp_path / "missing.safetensors")


def test_read_json_names_the_file_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(CheckpointError, match="broken JSON in line 2"):
        files.read_json(path)
    with pytest.raises(CheckpointError, match="no such file"):
        files.read_json(tmp_path / "none.json")
    files.write_json(path, {"ü": [1]})
    assert files.read_json(path) == json.loads(path.read_text()) == {"ü": [1]}


@given(st.permutations([("a", 3), ("b", 2), ("c", 5)]))
def test_tensors_hash_ignores_order_only(order: list[tuple[str, int]]) -> None:
    digest, same = files.TensorsHash(), files.TensorsHash()
    for name, size in order:
        digest.add(name, torch.arange(size))
    for name, size in sorted(order):
        same.add(name, torch.arange(size))
    assert digest.hexdigest() == same.hexdigest()


def test_tensors_hash_sees_names_values_types_and_shapes() -> None:
    def of(name: str, tensor: torch.Tensor) -> str:
        digest = files.TensorsHash()
        digest.add(name, tensor)
        return digest.hexdigest()

    base = torch.zeros(2, 3)
    variants = [("w", base), ("v", base), ("w", base.t()), ("w", base.half()), ("w", base + 1), ("w", base.int())]
    assert len({of(*variant) for variant in variants}) == len(variants)


def test_sha256_of_a_file_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_file(tmp_path / "abc") == files.sha256_text("abc") == expected


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_HOME", "/somewhere")
    assert files.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("LILLIPUT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert files.cache_dir() == Path("/cache/lilliput")


# ---- directories ----


def tree(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def make_directory(path: Path, **contents: str) -> Path:
    for name, text in contents.items():
        files.write_text(path / name, text)
    return path


def test_a_workplace_goes_with_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.workplace(tmp_path / "deep" / "out") as work:
        assert work.parent == tmp_path / "deep"
        (work / "half").mkdir()
        (work / "half" / "made").write_text("not all of it")
        raise KeyboardInterrupt
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_disk_that_fills_up_in_a_workplace_is_said(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="out: could not be written .*Free some space"):  # noqa: SIM117
        with files.workplace(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), files.workplace(tmp_path / "out"):
        (tmp_path / "nothing").read_text()  # another fault keeps its name
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be made"), files.workplace(tmp_path / "file" / "out"):
        pass


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    out = make_directory(tmp_path / "out", weights="old", index="old", notes="mine", **{"deep/notes": "mine"})
    files.put_directory(make_directory(tmp_path / "made", weights="new"), out, replaced=["weights", "index"])
    assert tree(out) == {"weights": "new", "notes": "mine", "deep/notes": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    files.put_directory(make_directory(tmp_path / "made", weights="new"), tmp_path / "other")
    assert tree(tmp_path / "other") == {"weights": "new"}


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_directory_that_cannot_be_replaced_stays(fails_at: int, tmp_path: Path, monkeypatch) -> None:
    out = make_directory(tmp_path / "out", weights="old", notes="mine")
    made = make_directory(tmp_path / "made", weights="new")
    calls, rename = [], os.replace

    def failing(one: Path, other: Path) -> None:
        calls.append(one)
        if len(calls) == fails_at:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(one, other)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(DiskError, match="could not be put in place .Device or resource busy"):
        files.put_directory(made, out, replaced=["weights"])
    assert tree(out) == {"weights": "old", "notes": "mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "out"]
