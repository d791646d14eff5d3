"""Perplexity against the plain definition, and its windows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lilliput.errors import DataError, UsageError
from lilliput.evaluation import perplexity, read_text
from lilliput.evaluation.perplexity import Segment, segments_of

TEXT = "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris, maybe! " * 60


def plain(model, ids: list[int], windows: list[tuple[int, int, int]]) -> tuple[float, int]:
    """The definition, in float64, all logits at once: exp of the mean over each window's tokens from `first` on."""
    losses = []
    for start, stop, first in windows:
        logits = model(torch.tensor([ids[start:stop]])).logits[0].double().log_softmax(-1)
        losses += [-float(logits[t - start - 1, ids[t]]) for t in range(first, stop)]
    return math.exp(sum(losses) / len(losses)), len(losses)


@torch.no_grad()
@pytest.mark.parametrize("context", [2, 17, 300])
def test_segments_scored_on_their_own_equal_the_definition(tiny_llama, tiny_tokenizer, context) -> None:
    model = tiny_llama()
    ids = tiny_tokenizer(TEXT)["input_ids"]
    result = perplexity(model, tiny_tokenizer, TEXT, context=context, segments=3, progress=False)
    wanted, tokens = plain(model, ids, [(i * context, (i + 1) * context, i * context + 1) for i in range(3)])
    assert (result.tokens, result.segments) == (tokens, 3) == (3 * (context - 1), 3)
    assert result.perplexity == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
def test_a_stride_scores_every_new_token_once(tiny_llama, tiny_tokenizer) -> None:
    model = tiny_llama()
    ids = tiny_tokenizer(TEXT)["input_ids"][:100]
    text = tiny_tokenizer.decode(ids)
    windows = [(0, 40, 1), (15, 55, 40), (30, 70, 55), (45, 85, 70), (60, 100, 85)]
    wanted, tokens = plain(model, ids, windows)
    result = perplexity(model, tiny_tokenizer, text, context=40, stride=15, progress=False)
    assert (result.tokens, result.segments) == (tokens, 5) == (99, 5)
    assert result.perplexity == pytest.approx(wanted, rel=1e-5)


@given(tokens=st.integers(0, 300), context=st.integers(2, 40), data=st.data())
def test_windows_are_full_and_no_token_is_scored_twice(tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    windows = list(segments_of(tokens, context, stride))
    scored = [t for w in windows for t in range(w.first, w.stop)]
    assert all(w.stop - w.start == context and w.start < w.first and w.stop <= tokens for w in windows)
    assert len(scored) == len(set(scored))
    assert (tokens - context < 0) == (not windows)
    if stride < context and windows:
        assert scored == list(range(1, windows[-1].stop))  # nothing is left out between the windows either


def test_the_drawn_windows() -> None:
    assert list(segments_of(8, 4, 4)) == [Segment(0, 4, 1), Segment(4, 8, 5)]
    assert list(segments_of(8, 4, 2)) == [Segment(0, 4, 1), Segment(2, 6, 4), Segment(4, 8, 6)]
    assert list(segments_of(8, 4, 2, limit=1)) == [Segment(0, 4, 1)]


@torch.no_grad()
def test_a_model_that_changes_its_logits_after_the_head_is_scored_with_them(tiny_tokenizer) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=1.0,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    ids = tiny_tokenizer(TEXT)["input_ids"]
    wanted, _ = plain(model, ids, [(0, 50, 1)])
    result = perplexity(model, tiny_tokenizer, TEXT, context=50, segments=1, progress=False)
    assert result.perplexity == pytest.approx(wanted, rel=1e-5)
    assert result.perplexity < 512 * math.e  # the cap of 0.5 keeps every token within e of the uniform guess


def test_no_tensor_of_all_tokens_by_the_vocabulary_is_made(tiny_llama, tiny_tokenizer) -> None:
    model = tiny_llama()
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(out.shape[-2]))
    perplexity(model, tiny_tokenizer, TEXT, context=500, segments=1, progress=False)
    assert max(seen) <= 128
    assert sum(seen[2:]) == 499  # the first two calls are the look at the head


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"context": 1}, "context"),
        ({"context": 513}, "512 positions"),
        ({"stride": 0}, "stride"),
        ({"context": 10, "stride": 11}, "stride"),
        ({"segments": 0}, "segments"),
    ],
)
def test_impossible_numbers_are_refused(tiny_llama, tiny_tokenizer, wrong, named) -> None:
    with pytest.raises(UsageError, match=named):
        perplexity(tiny_llama(), tiny_tokenizer, TEXT, progress=False, **{"context": 100, **wrong})


def test_a_text_shorter_than_a_segment_says_how_short(tiny_llama, tiny_tokenizer) -> None:
    with pytest.raises(DataError, match="fewer than one segment of 500"):
        perplexity(tiny_llama(), tiny_tokenizer, "The quick brown fox", context=500, progress=False)


def test_text_files_that_cannot_be_read_are_named(tmp_path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    for name, fault in (("none.txt", "no such file"), ("empty.txt", "empty"), ("latin.txt", "byte 2 is not UTF-8")):
        with pytest.raises(DataError, match=fault) as caught:
            read_text(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path)
