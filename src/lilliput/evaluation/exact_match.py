"""How many answers are exactly right: greedy answers in batches, compared with the last turn of each chat.

Right means the same JSON value, however it is spaced and in whatever order its keys stand; where either of the two is
not JSON, the same text without the white space around it. Nothing is cut out of an answer: words around the JSON make
it wrong.

Not here: partial credit, several right answers, sampling (`lilliput.generation`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lilliput.data import Chat, prompt_ids
from lilliput.errors import DataError, UsageError
from lilliput.generation.chat import end_tokens
from lilliput.models.causal import require_causal
from lilliput.progress import bar


@dataclass(frozen=True)
class ExactResult:
    """rows: chats asked; exact: how many of them were answered exactly; answers: what was said, in the chats' order."""

    rows: int
    exact: int
    answers: list[str]


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Chat],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = True,
) -> ExactResult:
    """Ask the model each chat without its last turn, and count the answers that are the last turn.

    Prompts of like length share a batch, padded on the left, positions counted from the first real token.
    Decoding is greedy and stops at the end of the turn or after `max_new_tokens`, the same for every model.

    Raises UsageError for a model that does not continue text, DataError when there is no chat, or a chat does not end
    with the assistant's turn.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1")
    require_causal(model, "exact match")
    expected = [_expected(chat) for chat in chats]
    if not expected:
        raise DataError("no rows to answer")
    prompts = [prompt_ids(chat.prompt, tokenizer) for chat in chats]
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers = [""] * len(prompts)
    with bar("answering", len(prompts), shown=progress) as advance:
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            said = _answer(model, tokenizer, [prompts[row] for row in rows], max_new_tokens)
            for row, answer in zip(rows, said, strict=True):
                answers[row] = answer
            advance(len(rows))
    exact = sum(same_answer(answer, right) for answer, right in zip(answers, expected, strict=True))
    return ExactResult(len(answers), exact, answers)


def same_answer(answer: str, expected: str) -> bool:
    """Whether two answers are the same JSON value, or, where either is not JSON, the same text."""
    try:
        return _canonical(answer) == _canonical(expected)
    except (ValueError, RecursionError):  # not JSON, or nested beyond what any record is
        return answer.strip() == expected.strip()


def _canonical(text: str) -> str:
    """JSON in one spelling, so that 1, 1.0 and true stay different."""
    return json.dumps(json.loads(text), sort_keys=True)


def _expected(chat: Chat) -> str:
    if not chat.turns or chat.turns[-1].role != "assistant":
        what = "does not end with the assistant's turn, so there is nothing to compare an answer with"
        raise DataError(what, where=chat.origin or None)
    return chat.turns[-1].content


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    """Greedy answers to one batch of prompts, without special tokens."""
    stop = sorted(end_tokens(model, tokenizer))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0]
    input_ids, attention_mask = _pad_left(prompts, pad)
    plan = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=pad)
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]  # transformers types it as nn.Module's attributes
            input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device), generation_config=plan
        )
    return tokenizer.batch_decode(out[:, input_ids.shape[1] :], skip_special_tokens=True)


def _pad_left(prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both int64 [rows, longest]; `generate` counts positions along the attention mask."""
    longest = max(len(ids) for ids in prompts)
    padded = [[pad] * (longest - len(ids)) + ids for ids in prompts]
    seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(padded), torch.tensor(seen)
