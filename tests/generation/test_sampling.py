"""Choosing a token: against transformers' own processors, and the promises of greedy and seeded choice."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation import logits_process as peer

from lilliput.errors import UsageError
from lilliput.generation.sampling import Sampler, Sampling, keep_min_p, keep_top_k, keep_top_p, penalize

SCORES = [torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3 for seed in range(5)]
SEEN = torch.tensor([[3, 7, 7, 49]])


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: keep_top_k(x, 5), peer.TopKLogitsWarper(5)),
        (lambda x: keep_top_k(x, 500), peer.TopKLogitsWarper(500)),
        (lambda x: keep_top_p(x, 0.8), peer.TopPLogitsWarper(0.8)),
        (lambda x: keep_top_p(x, 0.01), peer.TopPLogitsWarper(0.01)),
        (lambda x: keep_min_p(x, 0.1), peer.MinPLogitsWarper(0.1)),
        (lambda x: penalize(x, SEEN[0], 1.3), peer.RepetitionPenaltyLogitsProcessor(1.3)),
    ],
    ids=["top_k", "top_k_all", "top_p", "top_p_one", "min_p", "repetition_penalty"],
)
def test_each_rule_equals_transformers(scores, ours, theirs) -> None:
    torch.testing.assert_close(ours(scores), theirs(SEEN, scores[None].clone())[0])


def test_draws_follow_the_probabilities() -> None:
    scores = torch.tensor([0.0, math.log(2), math.log(5), -math.inf])
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    drawn = torch.tensor([sampler(scores, []) for _ in range(8000)])
    shares = torch.bincount(drawn, minlength=4) / 8000
    torch.testing.assert_close(shares, torch.tensor([1, 2, 5, 0]) / 8, atol=0.02, rtol=0)


def test_temperature_zero_is_the_best_token_and_a_tiny_one_nearly_so() -> None:
    for scores in SCORES:
        best = int(scores.argmax())
        assert Sampler(Sampling())(scores, []) == best
        assert Sampler(Sampling(temperature=1e-30))(scores, []) == best


def test_a_seed_repeats_the_draws_and_torchs_own_generator_is_left_alone() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=2.0, seed=seed))
        return [sampler(SCORES[0], []) for _ in range(20)]

    before = torch.random.get_rng_state()
    assert draws(1) == draws(1) != draws(2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_top_k_one_leaves_nothing_to_draw() -> None:
    sampler = Sampler(Sampling(temperature=5.0, top_k=1))
    assert {sampler(SCORES[1], []) for _ in range(20)} == {int(SCORES[1].argmax())}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused_by_name(wrong) -> None:
    [name] = wrong
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        Sampling(**wrong)
