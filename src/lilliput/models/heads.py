"""A classifier's head on a base: which class of transformers, which tensors are taken over, which begin afresh.

    checkpoint                        model asked for with labels=["neg", "pos"]
    BertModel: encoder…, pooler       BertForSequenceClassification: bert.encoder…, bert.pooler; classifier is new
    LlamaForCausalLM: model…, lm_head LlamaForSequenceClassification: model…; score is new, lm_head is left

What begins afresh holds random numbers and must be trained whole (`fresh_modules`); it is never quantized. A checkpoint
that is a classifier of the same labels already keeps its head. What a person needs to use a saved adapter (labels,
length, padding) lies beside it in `classifier.json`.
Not here: training the head (training/classify.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.errors import CheckpointError, UsageError
from lilliput.files import read_json, write_json
from lilliput.layers.replace import default_skip

if TYPE_CHECKING:
    from lilliput.models.hf import LilliputConfig
    from lilliput.models.stream import StoredTensor

CLASSIFIER_FILE = "classifier.json"
_FRESH = "lilliput_fresh"  # the attribute of a model that names its random parameters
_POOLER = "pooler"  # part of the backbone that many checkpoints lack


@dataclass(frozen=True)
class Classifier:
    """What it takes to use a tuned classifier, beside the base and the adapter.

    Attributes:
        labels: names of the classes, by their number.
        max_length: longer texts are cut to so many tokens, as in training.
        pad_token_id: what rows were filled with; the config of some families needs it.
    """

    labels: list[str]
    max_length: int
    pad_token_id: int

    def save(self, directory: str | Path) -> None:
        """Write `classifier.json` into an adapter's directory; `id2label` as in a config.json."""
        content = asdict(self)
        labels = content.pop("labels")
        named = {str(index): name for index, name in enumerate(labels)}
        write_json(Path(directory) / CLASSIFIER_FILE, {"id2label": named, **content})

    @classmethod
    def read(cls, directory: str | Path) -> Classifier:
        """Read it from an adapter's directory or a run folder. Raises CheckpointError when it is missing or broken."""
        folder = Path(directory)
        places = (folder / CLASSIFIER_FILE, folder / "adapter" / CLASSIFIER_FILE)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            fault = "is no classifier's adapter" if folder.is_dir() else "no such directory"
            todo = "Give the folder of a run of `lilliput tune … --task classify`."
            raise CheckpointError(f"{fault}: {CLASSIFIER_FILE} is not there", where=str(folder), todo=todo)
        content = read_json(path)
        try:
            names = content["id2label"]
            labels = [str(names[str(index)]) for index in range(len(names))]
            return cls(labels, int(content["max_length"]), int(content["pad_token_id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"cannot be read ({error!r})", where=str(path), todo="Copy the folder again."
            ) from error


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' `…ForSequenceClassification` of a model's family. Raises UsageError when there is none."""
    known: Any = AutoModelForSequenceClassification._model_mapping
    if type(config) not in known:
        raise UsageError(
            f"transformers has no classifier for models of type '{config.model_type}'",
            where="--task classify",
            todo="Choose a model of another family, such as BERT, RoBERTa, GPT-2 or Llama.",
        )
    return known[type(config)]


def labels_of(config: PreTrainedConfig) -> list[str]:
    """The names of the classes that a config knows, by their number."""
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def put_head(
    config: PreTrainedConfig, tensors: dict[str, StoredTensor], stored: LilliputConfig | None, labels: Sequence[str]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Turn `config` (in place) into a classifier's of these labels.

    Args:
        config: of the checkpoint.
        tensors: of the checkpoint.
        stored: how the checkpoint is quantized; what it leaves dense is corrected, in the config too.
        labels: names of the classes.
    Returns: the tensors that the classifier takes over; the names of its modules that must stay dense.
    """
    kind = classifier_class(config)
    keeps_head = config.architectures == [kind.__name__] and labels_of(config) == list(labels)
    config.architectures = [kind.__name__]
    config.id2label, config.label2id = dict(enumerate(labels)), {name: index for index, name in enumerate(labels)}
    config.problem_type = "single_label_classification"
    with torch.device("meta"):
        empty = kind._from_config(config)
    prefix = f"{empty.base_model_prefix}."
    prefixed = any(name.startswith(prefix) for name in tensors)
    poolers = {name for name, _ in empty.named_modules() if name.rpartition(".")[2] == _POOLER}
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if keeps_head or ((not prefixed or name.startswith(prefix)) and (poolers or f".{_POOLER}." not in f".{name}"))
    }
    dense = default_skip(empty)
    if poolers and not any(f".{_POOLER}." in f".{name}" for name in kept):
        dense += sorted(poolers)
    if stored is not None:
        stored.skip_modules = _still_there(empty, prefix, stored.skip_modules or []) + dense
        config.quantization_config = stored.to_dict()  # this is what transformers goes by
    return kept, dense


def _still_there(empty: PreTrainedModel, prefix: str, names: Sequence[str]) -> list[str]:
    """Those of `names` that are modules of the classifier, under the names they have there."""
    modules = {name for name, _ in empty.named_modules()}
    return [found for name in names for found in (name, prefix + name) if found in modules]


def fresh_keys(model: PreTrainedModel, missing: Sequence[str]) -> list[str]:
    """Of the parameters that no tensor filled, those that may begin afresh: the head's, and a pooler's."""
    prefix = f"{model.base_model_prefix}."
    return [key for key in missing if not key.startswith(prefix) or f".{_POOLER}." in f".{key}"]


def note_fresh(model: PreTrainedModel, keys: Sequence[str]) -> None:
    """Remember which parameters of `model` are random."""
    setattr(model, _FRESH, sorted({key.rpartition(".")[0] for key in keys}))


def fresh_modules(model: PreTrainedModel) -> list[str]:
    """Full names of the modules with random numbers, which are to be trained whole; none for a model that was loaded as
    it is."""
    return list(getattr(model, _FRESH, ()))


def classifier_pad(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The token that rows of a batch are filled with: the tokenizer's padding, else the one that ends a text.

    No other token will do here: GPT-2's and Llama's kind of classifier looks for the last token that is no padding.
    Raises UsageError when there is neither.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and token < vocabulary:
            return token
    raise UsageError(
        "the tokenizer has no padding token and no token that ends a text, so rows cannot be put into one batch",
        where="tokenizer",
        todo="Set pad_token in its tokenizer_config.json.",
    )


def classifier_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Classifier:
    """What a model that is a classifier by itself says of its labels. Raises UsageError when it is none."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise UsageError(
            f"is a {type(model).__name__}, which has no classifier's head",
            where=str(model.name_or_path),
            todo="Give an adapter of `lilliput tune … --task classify` with --adapter.",
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    return Classifier(
        labels_of(model.config), min(longest, tokenizer.model_max_length), classifier_pad(tokenizer, model)
    )


@torch.no_grad()
def class_logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits float32 [rows, classes] on the CPU, of a batch with input_ids and attention_mask int64 [rows, tokens]."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return model(**inputs).logits.float().cpu()
