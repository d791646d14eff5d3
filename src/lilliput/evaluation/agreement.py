"""Does one model predict what another predicts: the numbers of a certificate, which can refuse an export.

Both read the same passages. Where a token is scored, both give a distribution of it, p (the reference) and q (the
candidate), and

    KL(p || q) = sum over the vocabulary of  p (log p - log q),  in nats,

is what it costs to take q for p: 0 when they are equal, 0.01 when a token that is sure in p has a probability of 0.99
in q. Sums are in float64, since near agreement the terms cancel to the last bits of float32.

The two need not be in memory together: `hold` keeps a model's last hidden states and its head (4 x width bytes a
position), and the rest of it can go. Logits exist for 64 positions at a time, unless a model changes them behind its
head (Gemma 2, Cohere): then for one passage, and such a model stays until it has been compared.
Not here: what is done with the numbers (cli/export.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.data import Example
from lilliput.errors import DataError, UsageError
from lilliput.evaluation.perplexity import exp_or_inf, head_is_plain, token_windows
from lilliput.models.causal import require_causal
from lilliput.progress import bar

_ROWS = 64  # positions whose logits exist at once: 64 x 49,152 float64 = 25 MB, of which five stand beside each other


@dataclass(frozen=True)
class Passage:
    """Tokens that a model reads together: ids int64 [tokens]; scored bool [tokens], never True at the first."""

    ids: Tensor
    scored: Tensor

    @property
    def inputs(self) -> Tensor:
        """int64 [1, tokens - 1]: the last token is only predicted."""
        return self.ids[None, :-1]

    @property
    def labels(self) -> Tensor:
        """int64 [scored]."""
        return self.ids[self.scored]

    def rows(self, hidden: Tensor) -> Tensor:
        """Of hidden [1, tokens - 1, width] the positions that predict a scored token: [scored, width]."""
        return hidden[0, self.scored[1:].to(hidden.device)]


@dataclass(frozen=True)
class Held:
    """What is left of a model that was run over passages: states, for each of them [scored, width]; and its head."""

    states: list[Tensor]
    head: nn.Module


@dataclass(frozen=True)
class Agreement:
    """How far a candidate is from a reference.

    Attributes:
        tokens: predictions that were compared, in `passages` passages.
        kl, kl_max: mean and largest KL(reference || candidate) of a token's distribution, nats.
        logit_difference: the largest |difference| of two logits.
        reference_perplexity, perplexity: of the reference and of the candidate on these tokens.
        same_greedy: the share of the tokens at which both think the same token most probable.
        seconds: of the comparison.
    """

    tokens: int
    passages: int
    kl: float
    kl_max: float
    logit_difference: float
    reference_perplexity: float
    perplexity: float
    same_greedy: float
    seconds: float

    @property
    def perplexity_ratio(self) -> float:
        """The candidate's perplexity over the reference's; 1 when nothing was lost."""
        return self.perplexity / self.reference_perplexity

    def within(self, max_kl: float) -> bool:
        """Whether the mean KL is at most `max_kl`; never with a NaN."""
        return self.kl <= max_kl and not math.isnan(self.kl_max)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}


def text_passages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 512,
    segments: int | None = 16,
) -> list[Passage]:
    """A text cut as `perplexity` cuts it: segments of `context` tokens, all but the first token of each scored.

    Raises UsageError and DataError as `perplexity` does.
    """
    ids, windows = token_windows(model, tokenizer, text, context, None, segments)
    scored = torch.arange(context) > 0
    return [Passage(ids[window.start : window.stop], scored) for window in windows]


def example_passages(
    examples: Sequence[Example], *, tokens: int | None = None, longest: int | None = None
) -> list[Passage]:
    """Training examples as passages, their labels scored.

    Args:
        tokens: take the first examples that have so many together; all by default.
        longest: cut longer ones to so many tokens.

    Raises DataError when no example has a label to predict.
    """
    found: list[Passage] = []
    total = 0
    for example in examples:
        if tokens is not None and total >= tokens:
            break
        scored = torch.tensor(example.label_mask[:longest])
        scored[:1] = False
        if scored.any():
            found.append(Passage(torch.tensor(example.input_ids[:longest], dtype=torch.int64), scored))
            total += len(scored)
    if not found:
        raise DataError("no row has a label to predict", todo="Give other rows, or a text.")
    return found


@torch.inference_mode()
def hold(model: PreTrainedModel, passages: Sequence[Passage], *, progress: bool = True) -> Held | PreTrainedModel:
    """Run `model` over the passages now, so that all of it but the head can go; `agreement` takes what it returns.

    A model whose logits are more than its head on the last hidden states is returned as it is.
    Raises UsageError for a model that does not continue text.
    """
    require_causal(model, "agreement")
    head = model.get_output_embeddings()
    if not head_is_plain(model, passages[0].ids[:8]) or head is None:
        return model
    states = []
    with bar("reading the held-out text", len(passages), shown=progress) as advance:
        for passage in passages:
            states.append(_states(model, passage))
            advance()
    return Held(states, head)


@torch.inference_mode()
def agreement(
    reference: PreTrainedModel | Held,
    candidate: PreTrainedModel | Held,
    passages: Sequence[Passage],
    *,
    progress: bool = True,
) -> Agreement:
    """Compare two models on passages; each is a model, or what `hold` has left of one on these passages.

    Raises UsageError for models that do not continue text, and for vocabularies of different sizes.
    """
    started, sums = time.perf_counter(), _Sums()
    pair = [_logits(side, passages) for side in (reference, candidate)]
    with bar("comparing", len(passages), shown=progress) as advance:
        for passage, (ours, theirs) in zip(passages, zip(*pair, strict=True), strict=True):
            for p, q, labels in zip(ours, theirs, passage.labels.split(_ROWS), strict=True):
                sums.add(p, q.to(p.device), labels.to(p.device))
            advance(note=f"KL so far {sums.kl / sums.tokens:.2e}")
    return sums.result(len(passages), time.perf_counter() - started)


@dataclass
class _Sums:
    """What `agreement` counts, token after token."""

    tokens: int = 0
    kl: float = 0.0
    kl_max: Tensor = field(default_factory=lambda: torch.tensor(0.0, dtype=torch.float64))
    difference: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])
    greedy: int = 0

    def add(self, p: Tensor, q: Tensor, labels: Tensor) -> None:
        """Logits of both [positions, vocabulary], and the tokens that came, int64 [positions]."""
        if p.shape != q.shape:
            raise UsageError(f"vocabularies of {p.shape[-1]:,} and {q.shape[-1]:,} tokens cannot be compared")
        self.tokens += len(labels)
        # torch's max, unlike Python's, lets no NaN pass unseen
        self.difference = torch.maximum(self.difference.to(p.device), (p.float() - q.float()).abs().max())
        self.greedy += int((p.argmax(-1) == q.argmax(-1)).sum())
        log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (p, q))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # below 0 by rounding only
        self.kl += float(kl.sum())
        self.kl_max = torch.maximum(self.kl_max.to(p.device), kl.max())
        for side, logs in enumerate((log_p, log_q)):
            self.losses[side] -= float(logs.gather(-1, labels[:, None]).sum())

    def result(self, passages: int, seconds: float) -> Agreement:
        perplexities = [exp_or_inf(loss / self.tokens) for loss in self.losses]
        return Agreement(
            tokens=self.tokens,
            passages=passages,
            kl=self.kl / self.tokens,
            kl_max=float(self.kl_max),
            logit_difference=float(self.difference),
            reference_perplexity=perplexities[0],
            perplexity=perplexities[1],
            same_greedy=self.greedy / self.tokens,
            seconds=seconds,
        )


def _logits(side: PreTrainedModel | Held, passages: Sequence[Passage]) -> Iterator[Iterator[Tensor]]:
    """For each passage its logits at scored tokens, [positions, vocabulary] for a few positions at a time."""
    if isinstance(side, Held):
        for states in side.states:
            yield _through(side.head, states)
        return
    require_causal(side, "agreement")
    head = side.get_output_embeddings()
    plain = head is not None and head_is_plain(side, passages[0].ids[:8])
    for passage in passages:
        if plain:
            assert head is not None
            yield _through(head, _states(side, passage))
        else:
            whole = side(input_ids=passage.inputs.to(side.device), use_cache=False).logits
            yield iter(passage.rows(whole).split(_ROWS))


def _through(head: nn.Module, states: Tensor) -> Iterator[Tensor]:
    for some in states.split(_ROWS):
        yield head(some)


def _states(model: PreTrainedModel, passage: Passage) -> Tensor:
    """The last hidden states before scored tokens, [scored, width]."""
    hidden: Any = model.base_model(input_ids=passage.inputs.to(model.device), use_cache=False).last_hidden_state
    return passage.rows(hidden)
