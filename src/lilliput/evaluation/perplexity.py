"""Perplexity of a text under a model: exp of the mean negative log-likelihood of the tokens that were predicted.

The whole text is one string of tokens, without BOS, cut into segments of `context` tokens. Each segment is scored on
its own, so it gives context - 1 predictions; what is left at the end and fills no segment is not scored. This is the
convention of GPTQ (arXiv 2210.17323, section 4). With `stride` < `context` the windows overlap and only a window's new
tokens count, each with at least context - stride tokens before it.

Not here: word-level perplexity, tasks with right and wrong answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput import files
from lilliput.errors import DataError, UsageError
from lilliput.models.causal import context_length, require_causal
from lilliput.progress import bar

_ROWS = 128  # positions whose logits exist at once: 128 x 49,152 float32 = 25 MB, against 201 MB for a segment of 1024


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity: exp(negative log-likelihood / tokens); tokens: predictions that counted; seconds: of the scoring."""

    perplexity: float
    tokens: int
    segments: int
    seconds: float


@dataclass(frozen=True)
class Segment:
    """A window [start, stop) of the text's tokens, in which the tokens [first, stop) are scored."""

    start: int
    stop: int
    first: int


def read_text(path: str | Path) -> str:
    """A whole UTF-8 text file. Raises DataError when it is missing, empty, or not UTF-8."""
    text = files.read_text(path, "Give --text a plain text file.")
    if not text.strip():
        raise DataError("the file is empty", where=str(path), todo="Perplexity needs some text.")
    return text


def segments_of(tokens: int, context: int, stride: int, limit: int | None = None) -> Iterator[Segment]:
    """The windows over `tokens` tokens, in order; only full ones, at most `limit`.

    Drawn for 8 tokens, context 4; a dot is only context, a number is scored (a first token has nothing before it)::

        stride 4:  . 1 2 3            stride 2:  . 1 2 3
                           . 5 6 7                   . . 4 5
                                                         . . 6 7
    """
    starts = range(0, tokens - context + 1, stride)
    for start in starts if limit is None else starts[:limit]:
        stop = start + context
        yield Segment(start, stop, first=start + 1 if start == 0 else max(start + 1, stop - stride))


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 1024,
    stride: int | None = None,
    segments: int | None = None,
    progress: bool = True,
) -> PerplexityResult:
    """Score `text`; see the module's docstring for the definition.

    Args:
        context: tokens in a segment.
        stride: tokens from one segment's start to the next; `context` by default, so that segments do not overlap.
        segments: score only so many, from the beginning; all by default.

    Raises UsageError for impossible numbers and models that predict no next token, DataError for a text shorter than
    one segment.
    """
    require_causal(model, "perplexity")
    ids, windows = token_windows(model, tokenizer, text, context, stride, segments)
    total, tokens, started = 0.0, 0, time.perf_counter()
    plain_head = head_is_plain(model, ids[:8])
    with bar("perplexity", len(windows), shown=progress) as advance:
        for window in windows:
            total += _negative_log_likelihood(model, ids, window, plain_head)
            tokens += window.stop - window.first
            advance(note=f"so far {exp_or_inf(total / tokens):.3f}")
    return PerplexityResult(exp_or_inf(total / tokens), tokens, len(windows), time.perf_counter() - started)


def token_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    context: int,
    stride: int | None = None,
    segments: int | None = None,
) -> tuple[Tensor, list[Segment]]:
    """The text's tokens without BOS, int64 [tokens], and the windows over them; arguments and errors: `perplexity`."""
    stride = context if stride is None else stride
    _check(model, context, stride, segments)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    windows = list(segments_of(len(ids), context, stride, segments))
    if not windows:
        raise DataError(
            f"the text has {len(ids)} tokens, fewer than one segment of {context}",
            todo=f"Give more text, or --context {max(len(ids), 2)} or less.",
        )
    return ids, windows


def _check(model: PreTrainedModel, context: int, stride: int, segments: int | None) -> None:
    """Refuse numbers that make no sense for this model."""
    if context < 2:
        raise UsageError(f"{context} is too few: a segment needs 2 tokens to predict one", where="context")
    if not 1 <= stride <= context:
        raise UsageError(f"{stride} is not between 1 and the context of {context}", where="stride")
    if segments is not None and segments < 1:
        raise UsageError(f"{segments} is not a number of segments from 1 up", where="segments")
    longest = context_length(model)
    if longest is not None and context > longest:
        raise UsageError(f"{context} is more than the {longest} positions this model has", where="context")


def head_is_plain(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether the logits are the head on the last hidden state and nothing more (Gemma 2 caps, Cohere scales them)."""
    ids = ids[None].to(model.device)
    body, head = model.base_model, model.get_output_embeddings()
    if head is None or body is model:
        return False
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    return torch.allclose(head(hidden), model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def _negative_log_likelihood(model: PreTrainedModel, ids: Tensor, window: Segment, plain_head: bool) -> float:
    """The sum over a window's scored tokens; ids: int64 [all tokens of the text].

    A plain head is applied to a few rows at a time, as the module it is: quantized or adapted heads count as such.
    Any other is left to the model itself, at the price of a whole segment's logits.
    """
    inputs = ids[None, window.start : window.stop - 1].to(model.device)
    labels = ids[window.first : window.stop].to(model.device)
    if plain_head:
        rows: Tensor = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[0, -len(labels) :]
        head: nn.Module | None = model.get_output_embeddings()
    else:
        rows, head = model(input_ids=inputs, use_cache=False).logits[0, -len(labels) :], None
    total = 0.0
    for some, wanted in zip(rows.split(_ROWS), labels.split(_ROWS), strict=True):
        logits = some if head is None else head(some)
        total += float(nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"))
    return total


def exp_or_inf(x: float) -> float:
    """exp that says infinity instead of failing, and NaN where x is NaN."""
    return math.inf if x >= 700 else math.exp(x)
