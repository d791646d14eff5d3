"""A talk with a model: turns in, pieces of text out as they come. The tokens go through transformers' `generate`.

The prompt is what the model saw in training: `data.prompt_ids` renders the turns with the model's own template.
`generate` runs in a thread and hands each token over through a queue, so that a person reads while the model thinks,
and can stop an answer without stopping the program. The choice of tokens is ours (sampling.py), put in as a logits
processor.

Not here: a decoder of our own, batches, several talks over one model.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from lilliput.data import Chat, Turn, end_of_turn_id, prompt_ids
from lilliput.errors import DataError
from lilliput.generation.sampling import Sampler, Sampling
from lilliput.models.causal import context_length, require_causal
from lilliput.progress import warn

_BROKEN = "\ufffd"  # what a tokenizer decodes half a character to


class ChatSession:
    """A conversation that remembers its turns.

    Args:
        model: a causal language model, adapters attached or not.
        tokenizer: its tokenizer, with the chat template that it was trained with.
        system: the system turn; None leaves it to the template (many have a default one).
        sampling: how tokens are chosen; greedy by default. Its seed makes the whole conversation repeatable.

    Raises UsageError for a model that does not continue text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        require_causal(model, "chatting")
        self.model, self.tokenizer = model, tokenizer
        self.sampling = sampling or Sampling()
        self.stop_tokens = end_tokens(model, tokenizer)
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forget all turns and begin again, under `system` (None: the template's own)."""
        self.system = system
        self.turns: tuple[Turn, ...] = ()
        self.tokens_out = 0
        self._sampler = Sampler(self.sampling)

    def reply(self, text: str) -> Generator[str, None, None]:
        """Answer a user's turn, piece by piece; both turns are remembered when the answer ends or is stopped.

        Closing the iterator (or Ctrl-C in it) stops the model. When the talk outgrows the model's context, the oldest
        turns are forgotten, with a warning. Raises DataError when `text` alone is too long.
        """
        ids, kept = self._fit((*self.turns, Turn("user", text)))
        pieces: list[str] = []
        remember = True
        try:
            for piece in self._stream(ids):
                pieces.append(piece)
                yield piece
        except Exception:
            remember = False  # an answer that failed was never given
            raise
        finally:
            answer = self._without_thoughts("".join(pieces))
            if remember and answer.strip():  # a turn without words is no turn: the question may be asked again
                self.turns = (*kept, Turn("assistant", answer))

    def _without_thoughts(self, answer: str) -> str:
        """What was said after `</think>`, where the chat template knows thoughts: it drops those of earlier turns."""
        if "</think>" not in str(self.tokenizer.chat_template):
            return answer
        return answer.rpartition("</think>")[2].partition("<think>")[0]  # a thought that was cut short says nothing

    def _fit(self, turns: tuple[Turn, ...]) -> tuple[list[int], tuple[Turn, ...]]:
        """The prompt's tokens and the turns they hold: without the oldest where all leave no room for an answer."""
        room = context_length(self.model)
        ids = self._prompt(turns)
        if room is None:
            return ids, turns
        kept = turns
        answer = min(self.sampling.max_new_tokens, room // 4)  # room that an answer should find
        while len(ids) + answer > room and len(kept) > 1:
            kept = kept[2:]  # a user's turn and its answer
            ids = self._prompt(kept)
        if len(ids) >= room:
            raise DataError(
                f"the message and the system prompt have {len(ids)} tokens, the model's context is {room}",
                todo="Send less at once.",
            )
        if forgotten := len(turns) - len(kept):
            warn(f"the talk outgrew the model's context of {room} tokens: the oldest {forgotten} turns are forgotten")
        return ids, kept

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        first = (Turn("system", self.system),) if self.system is not None else ()
        return prompt_ids(Chat((*first, *turns), origin="chat"), self.tokenizer)

    def _stream(self, ids: list[int]) -> Generator[str, None, None]:
        """Text as it comes, without special tokens and without half characters."""
        room = context_length(self.model)
        longest = self.sampling.max_new_tokens
        if room is not None:
            longest = min(longest, room - len(ids))
        words = Detokenizer(self.tokenizer)
        tokens = generate_tokens(self.model, ids, self._sampler, stop=self.stop_tokens, longest=longest)
        try:
            for token in tokens:
                self.tokens_out += 1
                if token not in self.stop_tokens and (piece := words.push(token)):
                    yield piece
        finally:
            tokens.close()
        if piece := words.flush():
            yield piece


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: the model's and tokenizer's end of text, the chat template's end of turn."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    return frozenset(token for token in ids if token is not None)


def generate_tokens(
    model: PreTrainedModel, ids: list[int], sampler: Sampler, *, stop: frozenset[int], longest: int
) -> Generator[int, None, None]:
    """Token ids after the prompt `ids`, as the model makes them, the stop token included, at most `longest`.

    An error in the model surfaces here; closing the iterator stops the model and waits for it.
    """
    out: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    halt = threading.Event()
    thread = threading.Thread(target=_generate, args=(model, ids, sampler, stop, longest, out, halt), daemon=True)
    thread.start()
    try:
        while (item := out.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        halt.set()
        thread.join()


def _generate(
    model: PreTrainedModel,
    ids: list[int],
    sampler: Sampler,
    stop: frozenset[int],
    longest: int,
    out: queue.SimpleQueue[int | BaseException | None],
    halt: threading.Event,
) -> None:
    """The thread's work: put each token, then the error if there was one, then None."""
    prompt = torch.tensor([ids], device=model.device)
    # What a checkpoint's generation_config.json would add is said here, so that the person's options alone decide.
    config = GenerationConfig(
        max_new_tokens=longest,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(stop) or None,
        pad_token_id=min(stop, default=0),
    )
    try:
        with torch.inference_mode():
            model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                logits_processor=[_Choose(sampler)],
                stopping_criteria=[_Halt(halt)],
                streamer=_ToQueue(out),
            )
    except BaseException as error:  # noqa: BLE001 - handed to the reader's thread, which raises it
        out.put(error)
    out.put(None)


class _Choose(LogitsProcessor):
    """Let our sampler choose: the chosen token keeps a finite score, so that greedy search takes it."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[0, self.sampler(scores[0], input_ids[0])] = 0.0
        return chosen


class _Halt(StoppingCriteria):
    """Stop as soon as the reader wants no more."""

    def __init__(self, halt: threading.Event) -> None:
        self.halt = halt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.halt.is_set(), dtype=torch.bool, device=input_ids.device)


class _ToQueue(BaseStreamer):
    """Hands tokens over; the first call brings the prompt, which nobody asked for."""

    def __init__(self, out: queue.SimpleQueue[int | BaseException | None]) -> None:
        self.out, self.prompt_seen = out, False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            for token in value.reshape(-1).tolist():
                self.out.put(token)
        self.prompt_seen = True

    def end(self) -> None:
        """`_generate` says when all is over, also after an error."""


class Detokenizer:
    """Tokens to text, a piece at a time: a piece is held back while it ends in half a character.

    The tokens before the new ones are decoded with them, since some tokenizers write a space only between two tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0  # ids[:shown] are on the screen
        self.before = 0  # ids[before:shown] give the new ones their context

    def push(self, token: int) -> str:
        """Take a token; return what can be shown now, perhaps nothing."""
        self.ids.append(token)
        piece = self._new()
        return "" if piece.endswith(_BROKEN) else self._show(piece)

    def flush(self) -> str:
        """The rest, half characters included."""
        return self._show(self._new())

    def _new(self) -> str:
        return self._decode(self.ids[self.before :])[len(self._decode(self.ids[self.before : self.shown])) :]

    def _show(self, piece: str) -> str:
        if piece:
            self.before, self.shown = self.shown, len(self.ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
