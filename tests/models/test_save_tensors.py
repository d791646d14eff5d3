"""A checkpoint written tensor by tensor is the one that the library reads, and a failure leaves what was there."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lilliput.errors import UsageError
from lilliput.models import load_model, load_tokenizer, save_tensors
from lilliput.models.stream import DTYPES, INDEX, WEIGHTS, write_tensors
from tests.models.conftest import make_model

IDS = torch.arange(3, 99).reshape(2, 48)


@dataclass(frozen=True)
class Ready:
    """A Lazy tensor that is there already."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def load(self) -> Tensor:
        return self.tensor


def ready(tensors: dict[str, Tensor]) -> dict[str, Ready]:
    return {name: Ready(tensor) for name, tensor in tensors.items()}


def test_the_library_reads_every_type_and_shape(tmp_path) -> None:
    tensors = {
        f"{name}.{shape}": torch.randint(0, 2, shape).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in ((), (0, 4), (3,), (5, 7))
    }
    tensors["turned"] = torch.randn(4, 6).T
    write_tensors(tmp_path / "all.safetensors", ready(tensors))
    read = load_file(tmp_path / "all.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].float(), tensor.float())


def test_what_fails_on_the_way_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / WEIGHTS
    write_tensors(path, ready({"a": torch.ones(3)}))

    class Broken(Ready):
        def load(self) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"a": Ready(torch.zeros(3)), "b": Broken(torch.zeros(2))})
    assert torch.equal(load_file(path)["a"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS]


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_a_model_of_such_tensors_loads_again(kind, tmp_path, tiny_tokenizer) -> None:
    model = make_model(kind)
    tensors = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    (tmp_path / INDEX).write_text("{}")  # of a sharded model that was here before
    save_tensors(model, ready(tensors), tmp_path, tiny_tokenizer, progress=False)
    again = load_model(tmp_path, progress=False)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert load_tokenizer(tmp_path)("a b").input_ids == tiny_tokenizer("a b").input_ids
    assert not (tmp_path / INDEX).exists()


def test_a_head_of_its_own_is_written_as_untied(tmp_path) -> None:
    model = make_model("llama-tied")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["lm_head.weight"] += 1
    save_tensors(model, ready(tensors), tmp_path, dtype=torch.float32, progress=False)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    again = load_model(tmp_path, progress=False)
    assert torch.equal(again.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(again.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def test_a_file_is_no_place_for_a_model(tmp_path) -> None:
    (tmp_path / "taken").write_text("a thesis")
    with pytest.raises(UsageError, match="is a file"):
        save_tensors(make_model("llama"), {}, tmp_path / "taken", progress=False)
    assert (tmp_path / "taken").read_text() == "a thesis"
