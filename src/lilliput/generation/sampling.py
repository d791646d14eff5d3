"""How one next token is chosen from a model's scores: greedy, or seeded sampling.

Sources: nucleus sampling (top-p), arXiv 1904.09751; repetition penalty, CTRL, arXiv 1909.05858, section 4.1;
min-p, arXiv 2407.01082. The order is: penalty, temperature, top-k, top-p, min-p, then one draw.
Not here: beams, contrastive and speculative decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.errors import UsageError

_CUT = -math.inf


@dataclass(frozen=True)
class Sampling:
    """Options of one answer. The defaults are greedy: the same question gets the same answer.

    temperature: 0 takes the best token; above 0 scores are divided by it and a token is drawn.
    top_p: keep the smallest set of tokens whose probabilities reach this sum; 1 keeps all.
    top_k: keep this many best tokens; 0 keeps all.
    min_p: keep tokens at least this times as probable as the best; 0 keeps all.
    repetition_penalty: above 1 makes tokens that were already seen less likely; 1 changes nothing.
    seed: makes the draws repeatable; None draws anew each time.
    max_new_tokens: an answer that does not end by itself is ended here.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        for name, (holds, expected) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UsageError(f"{value} is not {expected}", where=name.replace("_", "-"))


_LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 0 <= x < math.inf, "a number from 0 (greedy) up"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top_k": (lambda x: x >= 0, "a whole number from 0 (keep all) up"),
    "min_p": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "a number above 0 (1 changes nothing)"),
    "seed": (lambda x: 0 <= x < 2**63, "a whole number from 0 to 2^63 - 1"),
    "max_new_tokens": (lambda x: x >= 1, "a whole number from 1 up"),
}


class Sampler:
    """Chooses token after token, with a random generator of its own: torch's global state stays untouched."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def __call__(self, scores: Tensor, seen: Sequence[int] | Tensor) -> int:
        """Choose the next token.

        Args:
            scores: float [vocabulary], the model's logits at the last position.
            seen: int64 [n], the tokens so far, prompt included (for the repetition penalty).
        """
        options = self.sampling
        scores = penalize(scores.detach().float().cpu(), seen, options.repetition_penalty)
        if options.temperature == 0:
            return int(scores.argmax())
        scores = (scores - scores.max()) / options.temperature  # best = 0: no overflow at a tiny temperature
        scores = keep_top_k(scores, options.top_k)
        scores = keep_top_p(scores, options.top_p)
        scores = keep_min_p(scores, options.min_p)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))


def penalize(scores: Tensor, seen: Sequence[int] | Tensor, penalty: float) -> Tensor:
    """Make seen tokens less likely: divide positive scores by `penalty`, multiply others. scores: [vocabulary]."""
    if penalty == 1:
        return scores
    index = torch.as_tensor(seen, dtype=torch.int64, device=scores.device).unique()
    old = scores[index]
    return scores.index_put((index,), torch.where(old > 0, old / penalty, old * penalty))


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Cut all but the `k` best scores (ties with the k-th stay) to -inf; 0 keeps all. scores: [vocabulary]."""
    if k == 0 or k >= scores.numel():
        return scores
    return scores.masked_fill(scores < scores.topk(k).values[-1], _CUT)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Cut all but the fewest best tokens whose probabilities sum to `p` or more. scores: [vocabulary]."""
    if p == 1:
        return scores
    sorted_scores, order = scores.sort(descending=True)
    probabilities = sorted_scores.softmax(-1)
    before = (
        probabilities.cumsum(-1) - probabilities
    )  # what the better tokens hold already; the best one has 0 and stays
    return scores.masked_fill(torch.zeros_like(scores, dtype=torch.bool).scatter(0, order, before >= p), _CUT)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """Cut tokens less than `p` times as probable as the best. scores: [vocabulary]."""
    if p == 0:
        return scores
    return scores.masked_fill(scores < scores.max() + math.log(p), _CUT)
