"""What a language model is asked and what it answers, whichever it is: requests in, replies as they come.

A teacher is anything with a `name` and a `complete`: a model on this machine (the command line hands one in), an
OpenAI-compatible endpoint (`endpoint.py`), a script in a test. Not here: what to ask (`self_instruct.py`,
`evol_instruct.py`), what is written down (`journal.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Decoding:
    """How an answer's tokens are chosen, in the words of OpenAI's API.

    temperature: 0 takes the best token. top_p: nucleus. max_tokens: an answer is cut there. stop: texts that end an
    answer and are not part of it. presence_penalty, frequency_penalty: as OpenAI defines them; -2 to 2.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True)
class Request:
    """One question to a teacher.

    key: names it within a run, the same each time the run is repeated (`"round 3/generate/12"`).
    prompt: the user's turn, or for a model that only continues text, the text.
    system: the system turn; "" for none.
    seed: of the draws, from `seed_of(run's seed, key)`; teachers that cannot take one leave it out.
    schema: JSON schema of the wanted answer, for teachers that offer structured output; others leave it out.
    """

    key: str
    prompt: str
    decoding: Decoding = field(default_factory=Decoding)
    system: str = ""
    seed: int = 0
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Reply:
    """One answer, or why there is none.

    finish: "stop" (ended by itself or at a stop text), "length" (cut), "refused" (the endpoint would not), "failed".
    error: what went wrong with this one request for good ("" if nothing did); `text` is "" then.
    model: as the teacher names it. prompt_tokens, completion_tokens: as counted by the teacher. seconds: it took.
    tries: how often it was asked.
    """

    text: str
    finish: str = "stop"
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    error: str = ""
    tries: int = 1


class Teacher(Protocol):
    """A language model that can be asked."""

    @property
    def name(self) -> str:
        """What a person calls it; written into each row's provenance."""
        ...

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Answer all requests, in any order, each as (its number in `requests`, the reply) as soon as it is there.

        What is wrong with one request alone is a `Reply` with an `error`. Raises TeacherError when the teacher itself
        is out of reach: all replies that were yielded before stand.
        """
        ...


def spoken(text: str) -> str:
    """What a model says behind its thoughts, where it wrote them into its answer: `<think>…</think>`."""
    if not text.lstrip().startswith("<think>"):
        return text
    return text.partition("</think>")[2].lstrip()  # a thought that was cut short says nothing


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first of the stop texts, and whether there was one."""
    found = [at for end in stop if end and (at := text.find(end)) >= 0]
    return (text[: min(found)], True) if found else (text, False)
