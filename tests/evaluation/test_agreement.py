"""Two models compared: the numbers are the formulas', the passages those of `perplexity` and of training, and no
logits of a whole text exist."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from lilliput.data import Example
from lilliput.errors import DataError, UsageError
from lilliput.evaluation import Passage, agreement, example_passages, hold, perplexity, text_passages
from lilliput.evaluation.agreement import Held
from tests.conftest import make_tiny_llama

TEXT = "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris, maybe! " * 20


def passages(*lengths: int, seed: int = 0) -> list[Passage]:
    """Random tokens, of which every second is scored."""
    made = torch.Generator().manual_seed(seed)
    return [Passage(torch.randint(3, 512, (n,), generator=made), torch.arange(n) % 2 == 1) for n in lengths]


def gemma(seed: int) -> Gemma2ForCausalLM:
    """A model that caps its logits behind the head."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 0.5}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, initializer_range=0.5)).eval()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def by_the_formula(reference: PreTrainedModel, candidate: PreTrainedModel, read: list[Passage]) -> dict[str, Any]:
    """Whole logits in float64, numpy."""
    kls, differences, same, losses = [], [], [], [[], []]
    for passage in read:
        with torch.no_grad():
            p, q = (model(input_ids=passage.ids[None]).logits[0].double().numpy() for model in (reference, candidate))
        for t in np.flatnonzero(passage.scored.numpy()):
            log_p, log_q = log_softmax(p[t - 1]), log_softmax(q[t - 1])
            kls.append((np.exp(log_p) * (log_p - log_q)).sum())
            differences.append(np.abs(p[t - 1] - q[t - 1]).max())
            same.append(p[t - 1].argmax() == q[t - 1].argmax())
            for side, logs in enumerate((log_p, log_q)):
                losses[side].append(-logs[passage.ids[t]])
    return {
        "tokens": len(kls),
        "passages": len(read),
        "kl": np.mean(kls),
        "kl_max": np.max(kls),
        "logit_difference": np.max(differences),
        "same_greedy": np.mean(same),
        "reference_perplexity": np.exp(np.mean(losses[0])),
        "perplexity": np.exp(np.mean(losses[1])),
        "perplexity_ratio": np.exp(np.mean(losses[1]) - np.mean(losses[0])),
    }


@pytest.mark.parametrize("make", [make_tiny_llama, gemma], ids=["plain head", "capped logits"])
@pytest.mark.parametrize("held", [False, True])
def test_the_numbers_are_those_of_the_formulas(make, held: bool) -> None:
    reference, candidate, read = make(0), make(1), passages(9, 200, 2)
    with torch.no_grad():  # near enough to agree now and then
        for one, other in zip(candidate.parameters(), reference.parameters(), strict=True):
            one.lerp_(other, 0.7)
    wanted = by_the_formula(reference, candidate, read)
    assert 0 < wanted["same_greedy"] < 1
    sides = [hold(model, read, progress=False) if held else model for model in (reference, candidate)]
    assert all(isinstance(side, Held) == (held and make is make_tiny_llama) for side in sides)
    found = agreement(sides[0], sides[1], read, progress=False).to_json()
    assert found.pop("seconds") > 0
    assert found == pytest.approx(wanted, rel=2e-4, abs=1e-7)


def test_a_model_agrees_with_itself(tiny_llama) -> None:
    found = agreement(tiny_llama(), tiny_llama(), passages(50), progress=False)
    assert (found.kl, found.kl_max, found.logit_difference, found.same_greedy) == (0, 0, 0, 1)
    assert found.perplexity_ratio == 1
    assert found.within(0)


def test_kl_is_not_symmetric_and_never_negative(tiny_llama) -> None:
    one, other, read = tiny_llama(initializer_range=0.3), tiny_llama(1, initializer_range=0.3), passages(60)
    there, back = agreement(one, other, read, progress=False), agreement(other, one, read, progress=False)
    assert there.kl != back.kl
    assert (there.logit_difference, there.same_greedy) == (back.logit_difference, back.same_greedy)
    near = tiny_llama()
    near.lm_head.weight.data *= 1 + 1e-6
    assert 0 <= agreement(tiny_llama(), near, read, progress=False).kl < 1e-9


def test_what_is_held_lets_the_body_go(tiny_llama) -> None:
    model, read = tiny_llama(), passages(30)
    body = weakref.ref(model.model)
    held = hold(model, read, progress=False)
    del model
    gc.collect()
    assert body() is None
    assert [tuple(states.shape) for states in held.states] == [(15, 64)]
    assert agreement(held, tiny_llama(), read, progress=False).kl == 0


def test_logits_exist_for_64_positions_at_a_time(tiny_llama) -> None:
    sizes: list[int] = []
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda _, __, logits: sizes.append(logits.numel() // 512))
    agreement(model, tiny_llama(), passages(400, 90), progress=False)
    assert max(sizes) == 64
    assert sum(sizes) >= 245


def test_a_text_is_cut_as_perplexity_cuts_it(tiny_llama, tiny_tokenizer) -> None:
    model, other = tiny_llama(), tiny_llama(1)
    read = text_passages(model, tiny_tokenizer, TEXT, context=64, segments=3)
    found = agreement(model, other, read, progress=False)
    scores = [perplexity(m, tiny_tokenizer, TEXT, context=64, segments=3, progress=False) for m in (model, other)]
    assert found.tokens == scores[0].tokens == 3 * 63
    assert found.reference_perplexity == pytest.approx(scores[0].perplexity, rel=1e-5)
    assert found.perplexity == pytest.approx(scores[1].perplexity, rel=1e-5)
    with pytest.raises(DataError, match="fewer than one segment of 64"):
        text_passages(model, tiny_tokenizer, "Short.", context=64)


def test_examples_are_scored_at_their_labels() -> None:
    rows = [
        Example([5, 6, 7, 8], [True, False, True, True]),
        Example([5, 6], [False, False]),
        Example([9, 9, 9], [False, True, False]),
        Example([4, 4], [False, True]),
    ]
    read = example_passages(rows)
    assert [passage.scored.tolist() for passage in read] == [
        [False, False, True, True], [False, True, False], [False, True]
    ]  # fmt: skip
    assert read[0].labels.tolist() == [7, 8]
    assert rows[0].label_mask[0]  # the example itself is as it was
    assert len(example_passages(rows, tokens=5)) == 2  # the row that reaches the number is the last
    assert [len(passage.ids) for passage in example_passages(rows, longest=2)] == [2, 2]  # the first lost its labels
    with pytest.raises(DataError, match="no row has a label"):
        example_passages(rows[1:2])


def test_a_broken_candidate_passes_nowhere(tiny_llama) -> None:
    broken = tiny_llama()
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    for sides in ((tiny_llama(), broken), (broken, tiny_llama())):
        found = agreement(*sides, passages(20), progress=False)
        assert math.isnan(found.kl)
        assert math.isnan(found.kl_max)
        assert math.isnan(found.logit_difference)
        assert not found.within(math.inf)


def test_what_cannot_be_compared_is_refused(tiny_llama) -> None:
    with pytest.raises(UsageError, match="512 and 600 tokens cannot be compared"):
        agreement(tiny_llama(), tiny_llama(vocab_size=600), passages(10), progress=False)
    bert = BertForMaskedLM(BertConfig(vocab_size=512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=16)).eval()  # fmt: skip
    with pytest.raises(UsageError, match="agreement takes models that continue a text"):
        agreement(tiny_llama(), bert, passages(10), progress=False)
    with pytest.raises(UsageError, match="agreement takes models that continue a text"):
        hold(bert, passages(10), progress=False)
