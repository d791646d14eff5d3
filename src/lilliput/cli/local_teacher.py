"""A model on this machine as a `Teacher`: its own chat template, one answer after another, each with its own seed.

Tokens come from `generation.generate_tokens`, chosen as in `lilliput chat`; presence and frequency penalties are
subtracted from the scores of tokens of the answer, as OpenAI's API reference defines them. An answer depends on
its request alone, never on its neighbours. Imports torch; `cli/teachers.py` opens it. Not here: batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.data import Chat, Turn, prompt_ids
from lilliput.errors import DataError
from lilliput.generation import Sampling, end_tokens
from lilliput.generation.chat import Detokenizer, generate_tokens
from lilliput.generation.sampling import Sampler
from lilliput.models.causal import context_length, require_causal
from lilliput.progress import warn
from lilliput.synthesis.teacher import Decoding, Reply, Request, cut, spoken

_LEAST = 16  # tokens that an answer must have room for


class LocalTeacher:
    """A loaded model as a `Teacher`.

    Args:
        model: a causal language model, adapters attached or not.
        tokenizer: its tokenizer. Without a chat template the Alpaca prompt is used, as in training.
        name: what a person calls it.
        completions: continue plain text, without turns: for a model that never saw any.

    Raises UsageError for a model that does not continue text.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, *, completions: bool = False
    ) -> None:
        require_causal(model, "writing data")
        self.model, self.tokenizer, self.name, self.completions = model, tokenizer, name, completions
        self.end = end_tokens(model, tokenizer)
        self._joined = False  # the template has no system turn: it is put before the user's

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Answer one after another; a prompt that is too long, or that the template refuses, gets an error."""
        for number, request in enumerate(requests):
            started = time.monotonic()
            try:
                reply = self._answer(request)
            except DataError as error:
                reply = Reply("", "failed", self.name, error=str(error))
            yield number, replace(reply, seconds=round(time.monotonic() - started, 3))

    def _answer(self, request: Request) -> Reply:
        ids = self._ids(request)
        longest = self._room(len(ids), request.decoding.max_tokens)
        sampler = _sampler(request, longest, len(ids))
        words, text, tokens, last = Detokenizer(self.tokenizer), "", 0, -1
        stream = generate_tokens(self.model, ids, sampler, stop=self.end, longest=longest)
        stopped = False
        try:
            for last in stream:
                tokens += 1
                text += "" if last in self.end else words.push(last)
                stopped = cut(spoken(text), request.decoding.stop)[1]
                if stopped:
                    break
        finally:
            stream.close()
        said, stopped = cut(spoken(text + words.flush()), request.decoding.stop)
        finish = "stop" if stopped or last in self.end else "length"
        return Reply(said, finish, self.name, len(ids), tokens)

    def _ids(self, request: Request) -> list[int]:
        """The prompt's tokens."""
        text = "\n\n".join(filter(None, (request.system, request.prompt)))
        if self.completions:
            return list(self.tokenizer(text, verbose=False)["input_ids"])
        if not request.system or self._joined:
            return self._turns(Turn("user", text))
        try:
            return self._turns(Turn("system", request.system), Turn("user", request.prompt))
        except DataError:
            ids = self._turns(Turn("user", text))
        warn(f"{self.name}: its chat template takes no system turn; what stands in one is put before the question")
        self._joined = True
        return ids

    def _turns(self, *turns: Turn) -> list[int]:
        return prompt_ids(Chat(turns, origin=""), self.tokenizer)

    def _room(self, prompt: int, wanted: int) -> int:
        """How many tokens the answer may have. Raises DataError when the prompt leaves hardly any."""
        context = context_length(self.model)
        if context is None:
            return wanted
        if prompt + min(wanted, _LEAST) > context:
            raise DataError(f"the prompt has {prompt} tokens, the model's context is {context}")
        return min(wanted, context - prompt)


def _sampler(request: Request, longest: int, prompt: int) -> Sampler:
    how = request.decoding
    sampling = Sampling(how.temperature, how.top_p, seed=request.seed, max_new_tokens=longest)
    if how.presence_penalty or how.frequency_penalty:
        return _Penalized(sampling, how, prompt)
    return Sampler(sampling)


class _Penalized(Sampler):
    """A token that the answer has already scores less: by `presence_penalty`, and by `frequency_penalty` each time."""

    def __init__(self, sampling: Sampling, decoding: Decoding, prompt: int) -> None:
        super().__init__(sampling)
        self.presence, self.frequency, self.prompt = decoding.presence_penalty, decoding.frequency_penalty, prompt

    def __call__(self, scores: Tensor, seen: Sequence[int] | Tensor) -> int:
        answer = torch.as_tensor(seen, dtype=torch.int64)[self.prompt :].cpu()
        counts = torch.bincount(answer, minlength=scores.numel())
        scores = scores.detach().float().cpu() - self.frequency * counts - self.presence * (counts > 0)
        return super().__call__(scores, seen)
