"""A classifier's head on a base: the backbone is the checkpoint's to the bit, what is new is known, no more may be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from lilliput.errors import CheckpointError, UsageError
from lilliput.layers import identity_of, quantized_layers
from lilliput.models import Classifier, load_model, load_tokenizer, save_model
from lilliput.models.heads import class_logits, classifier_of, classifier_pad, fresh_modules
from tests.classifiers import make_encoder, make_wordpiece, save_encoder
from tests.models.conftest import make_model
from tests.models.gguf_files import write_gguf

LABELS = ["bad", "good", "so-so"]
BATCH = {
    "input_ids": torch.tensor([[2, 5, 17, 3], [2, 21, 3, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
}
FRESH = {
    "bert": ["classifier"],
    "bert without pooler": ["bert.pooler.dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "gpt2": ["score"],
}


@pytest.mark.parametrize("kind", FRESH)
def test_the_backbone_is_the_checkpoints_and_the_rest_is_known_to_be_new(kind: str, tmp_path: Path) -> None:
    directory = save_encoder(tmp_path / "base", kind)
    model = load_model(directory, labels=LABELS, progress=False)
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert model.config.id2label == {0: "bad", 1: "good", 2: "so-so"}
    assert fresh_modules(model) == FRESH[kind]
    stored = AutoModel.from_pretrained(directory).state_dict()
    own = model.base_model.state_dict()
    known = [name for name in own if name in stored and not ("pooler" in name and kind == "bert without pooler")]
    assert len(known) > 20
    assert all(torch.equal(own[name], stored[name]) for name in known)
    assert identity_of(model).weights_sha256 == identity_of(load_model(directory, progress=False)).weights_sha256


@pytest.mark.parametrize("kind", FRESH)
def test_quantized_on_the_way_and_from_a_quantized_directory(kind: str, tmp_path: Path) -> None:
    """What is new stays dense, and both ways give the same backbone."""
    directory = save_encoder(tmp_path / "base", kind)
    model = load_model(directory, format="nf4", labels=LABELS, progress=False)
    names = {name for name, _ in quantized_layers(model)}
    assert names
    assert not any(name.startswith(new) for name in names for new in fresh_modules(model))
    save_model(load_model(directory, format="nf4", progress=False), tmp_path / "small")
    again = load_model(tmp_path / "small", labels=LABELS, progress=False)
    assert {name for name, _ in quantized_layers(again)} == names
    assert fresh_modules(again) == fresh_modules(model)
    ids = BATCH["input_ids"]
    assert torch.equal(model.base_model(ids)[0], again.base_model(ids)[0])


def saved_classifier(directory: Path, labels: dict[int, str]) -> PreTrainedModel:
    """A tiny classifier of these labels in a directory."""
    save_encoder(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, id2label=labels)
    model.save_pretrained(directory)
    return model.eval()


def test_a_classifier_of_the_same_labels_keeps_its_head_and_another_does_not(tmp_path: Path) -> None:
    model = saved_classifier(tmp_path / "whole", {0: "bad", 1: "good"})
    same = load_model(tmp_path / "whole", labels=["bad", "good"], progress=False)
    assert fresh_modules(same) == []
    assert torch.equal(class_logits(same, BATCH), model(**BATCH).logits)
    for other in (["good", "bad"], LABELS):
        assert fresh_modules(load_model(tmp_path / "whole", labels=other, progress=False)) == ["classifier"]


def test_a_tensor_of_the_backbone_must_not_be_missing(tmp_path: Path) -> None:
    directory = save_encoder(tmp_path / "base")
    tensors = load_file(directory / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*bert.encoder.layer.1.output.dense.weight"):
        load_model(directory, labels=LABELS, progress=False)


def test_a_family_without_classifiers_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(tmp_path / "eyes")
    with pytest.raises(UsageError, match="no classifier for models of type 'vit'"):
        load_model(tmp_path / "eyes", labels=LABELS, progress=False)


def test_classifier_json_goes_out_and_in(tmp_path: Path) -> None:
    made = Classifier(LABELS, 128, 0)
    made.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "classifier.json").read_text())["id2label"] == {
        "0": "bad", "1": "good", "2": "so-so",
    }  # fmt: skip
    assert Classifier.read(tmp_path) == Classifier.read(tmp_path / "adapter") == made  # a run folder too


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no classifier's adapter: classifier.json is not there"),
        ("{", "broken JSON"),
        ("[]", "cannot be read"),
        ('{"id2label": {"0": "a", "2": "b"}, "max_length": 8, "pad_token_id": 0}', "cannot be read"),
        ('{"id2label": {"0": "a"}, "max_length": "long", "pad_token_id": 0}', "cannot be read"),
    ],
)
def test_a_missing_or_broken_classifier_json_is_told(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "classifier.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        Classifier.read(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        Classifier.read(tmp_path / "nowhere")


def test_padding_is_the_tokenizers_or_the_end_of_text_or_none(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    tokenizer, model = make_wordpiece(), make_encoder()
    assert classifier_pad(tokenizer, model) == 0
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    assert classifier_pad(tokenizer, model) == 3
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no padding token"):
        classifier_pad(tokenizer, model)


def test_a_classifier_says_what_it_knows_of_its_labels_and_others_are_refused(tmp_path: Path) -> None:
    saved_classifier(tmp_path / "whole", {0: "bad", 1: "good"})
    tokenizer = load_tokenizer(tmp_path / "whole")
    found = classifier_of(load_model(tmp_path / "whole", progress=False), tokenizer)
    assert found == Classifier(["bad", "good"], 64, 0)
    save_encoder(tmp_path / "base")
    with pytest.raises(UsageError, match="is a BertModel, which has no classifier's head.*--adapter"):
        classifier_of(load_model(tmp_path / "base", progress=False), tokenizer)


def test_a_gguf_file_becomes_a_classifier(tmp_path: Path, cache: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    original = make_model("llama")
    file = write_gguf(tmp_path / "tiny.gguf", original, tiny_tokenizer)
    model = load_model(file, labels=LABELS, progress=False)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert fresh_modules(model) == ["score"]
    plain = load_model(file, progress=False)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.base_model(ids)[0], plain.base_model(ids)[0])
