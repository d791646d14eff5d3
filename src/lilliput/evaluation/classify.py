"""A classifier's answers: the label of a text with its probability, and how many rows of a file it gets right.

Texts of similar length go through the model together and come back in their own order; longer ones than in training are
cut as they were there. Not here: what is read off the counts (data/confusion.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.data import ClassExample, ClassSet, Confusion, collate_labelled
from lilliput.data.labelled import encode_texts, length_batches
from lilliput.errors import DataError
from lilliput.models import Classifier
from lilliput.models.heads import class_logits
from lilliput.progress import bar

_BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """The most probable label of a text, and the probability of every label (softmax of the logits)."""

    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class ClassifyScore:
    """How a classifier did on rows: the counts, the mean cross entropy, and the seconds it took."""

    confusion: Confusion
    loss: float
    seconds: float


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    classifier: Classifier,
    *,
    batch_size: int = _BATCH,
    progress: bool = False,
) -> list[Prediction]:
    """The labels of texts, in their order.

    Args:
        model: with a classifier's head and, where it was tuned, its adapter.
        tokenizer: the model's.
        texts: what is to be labelled.
        classifier: labels, length and padding; `Classifier.read` has it of an adapter's directory.
        batch_size: texts at a time.
        progress: show a bar.

    Raises DataError for an empty text.
    """
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise DataError("is empty", where=f"text {number}", todo="Give it at least one word.")
    ids, _ = encode_texts(list(texts), tokenizer, classifier.max_length)
    logits = _logits(model, [ClassExample(row, 0) for row in ids], classifier.pad_token_id, batch_size, progress)
    found = []
    for row in torch.softmax(logits, dim=-1).tolist():
        probabilities = dict(zip(classifier.labels, row, strict=True))
        best = max(probabilities, key=lambda name: probabilities[name])
        found.append(Prediction(best, probabilities[best], probabilities))
    return found


def score_classes(
    model: PreTrainedModel, rows: ClassSet, pad_token_id: int, *, batch_size: int = _BATCH, progress: bool = True
) -> ClassifyScore:
    """Predict rows whose labels are known, and count.

    Args:
        model: as in `predict`.
        rows: from `encode_labelled`, with the labels that the model was tuned for.
        pad_token_id: what rows are filled with.
        batch_size: rows at a time.
        progress: show a bar.
    """
    began = time.perf_counter()
    logits = _logits(model, rows.examples, pad_token_id, batch_size, progress)
    true = torch.tensor([example.label for example in rows.examples])
    loss = torch.nn.functional.cross_entropy(logits, true).item()
    confusion = Confusion.of(rows.labels, true.tolist(), logits.argmax(-1).tolist())
    return ClassifyScore(confusion, loss, time.perf_counter() - began)


def _logits(
    model: PreTrainedModel, examples: Sequence[ClassExample], pad_token_id: int, batch_size: int, progress: bool
) -> Tensor:
    """float32 [examples, classes], in the order of the examples."""
    batches = length_batches(examples, batch_size)
    parts = []
    with bar("classifying", len(batches), shown=progress) as advance:
        for batch in batches:
            parts.append(class_logits(model, collate_labelled([examples[row] for row in batch], pad_token_id)))
            advance()
    order = torch.tensor([row for batch in batches for row in batch])
    return torch.cat(parts)[order.argsort()]
