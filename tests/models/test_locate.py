"""What a MODEL argument stands for, and what is said when it stands for nothing."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch

from lilliput.errors import CheckpointError, LilliputError
from lilliput.models import load_model, load_tokenizer, locate
from tests.models.conftest import make_model
from tests.models.gguf_files import write_gguf


def hub_cache(root: Path, repository: str) -> Path:
    """The layout in which huggingface_hub keeps a repository; returns the snapshot's directory."""
    commit = "0" * 40
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_in_the_local_cache_needs_no_network(hub, tiny_tokenizer):
    snapshot = hub_cache(hub, "some/model")
    model = make_model("llama")
    model.save_pretrained(snapshot)
    tiny_tokenizer.save_pretrained(snapshot)
    source = locate("some/model")
    assert (source.kind, source.path, source.name) == ("directory", snapshot, "some/model")
    loaded = load_model("some/model", format="nf4", progress=False)
    assert loaded.base_identity.name == loaded.name_or_path == "some/model"
    assert load_tokenizer("some/model")("The").input_ids == tiny_tokenizer("The").input_ids


def test_a_download_that_was_interrupted_between_shards_goes_on(hub, monkeypatch):
    snapshot = hub_cache(hub, "some/model")
    make_model("llama").save_pretrained(snapshot, max_shard_size="50KB")
    last = sorted(snapshot.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    last.unlink()

    def download(name: str, local_files_only: bool = False, **_: object) -> str:
        if not local_files_only:
            last.write_bytes(content)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("some/model").path == snapshot
    assert last.read_bytes() == content


def test_a_hub_id_that_is_nowhere_says_what_was_tried(hub):
    with pytest.raises(LilliputError, match=r"no directory 'some/other', and the Hugging Face hub did not give it"):
        locate("some/other")


def test_a_directory_wins_over_a_hub_id(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("org/name")
    assert locate("org/name").path == Path("org/name")


def test_a_gguf_file_is_taken_whatever_its_case(tmp_path, tiny_tokenizer):
    path = write_gguf(tmp_path / "A.GGUF", make_model("llama"), tiny_tokenizer)
    assert locate(path).kind == "gguf"


def test_a_wrong_name_is_answered_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LilliputError, match=r"'smollm2-135m'.*did you mean 'smollm2-135m-instruct'\?.*\.gguf file"):
        locate("smollm2-135m")
    (tmp_path / "my-models").mkdir()
    with pytest.raises(LilliputError, match=r"did you mean 'my-models'\?"):
        locate("my-model")
    with pytest.raises(LilliputError, match=r"did you mean '.*my-models'\?"):
        locate(tmp_path / "my-modles")


def test_files_and_directories_that_are_no_model(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"can only be a GGUF file.*give the directory"):
        locate(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"has no config\.json\. A Hugging Face model directory has"):
        locate(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"Give the GGUF file itself: .*a\.gguf"):
        locate(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="This is an adapter"):
        locate(tmp_path)


def test_a_home_directory_is_expanded(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(load_model("~/model", progress=False).lm_head.weight, model.lm_head.weight)


def test_a_download_takes_the_weights_once(hub, monkeypatch):
    """A repository may hold its weights again under other names (consolidated.safetensors, original/…)."""
    snapshot = hub_cache(hub, "some/model")
    make_model("llama").save_pretrained(snapshot, max_shard_size="50KB")
    shards = sorted(file.name for file in snapshot.glob("*.safetensors"))
    hidden = {name: (snapshot / name).read_bytes() for name in shards}
    for name in shards:
        (snapshot / name).unlink()
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str] | None = None, local_files_only: bool = False) -> str:
        asked.extend(allow_patterns or ())
        for shard in set(shards) & set(allow_patterns or ()):
            (snapshot / shard).write_bytes(hidden[shard])
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("some/model").path == snapshot
    assert sorted({name for name in asked if name.endswith(".safetensors")}) == shards
