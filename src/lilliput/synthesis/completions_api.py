"""The words of OpenAI's chat completions API: a request as its fields, an answer as a reply, an error as a sentence.

Source: OpenAI's API reference, `/chat/completions` and `/completions`. Not here: sending (`asking.py`), and where to
(`endpoint.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import replace
from typing import Any

import httpx2

from lilliput.synthesis.teacher import Reply, Request, cut, spoken

_STOPS = 4  # stop texts that the API takes; all are looked for here as well

# Fields that a request may do without, and what that means.
OPTIONAL = {
    "response_format": "the shape of answers is asked for in words alone",
    "seed": "its answers cannot be repeated",
    "max_tokens": "'max_completion_tokens' is sent in its place",
    "stop": "answers are cut here",
    "presence_penalty": "its answers repeat themselves more",
    "frequency_penalty": "its answers repeat themselves more",
}
# How an error names a field: in quotes, or, where the name is no word of English, bare.
_NAMED = {
    "response_format": r"response_format|json_schema|guided|grammar",
    "max_tokens": r"\bmax_tokens\b",
    "presence_penalty": r"presence_penalty",
    "frequency_penalty": r"frequency_penalty",
}
_FILTERED = re.compile(r"content.?(filter|policy|management)|moderation", re.IGNORECASE)
_TOO_LONG = re.compile(r"context.?(length|window|size)|too (long|large|many tokens)|exceed", re.IGNORECASE)


def fields_of(request: Request, model: str, *, completions: bool, left_out: Container[str]) -> dict[str, Any]:
    """The fields of a request, without those that say nothing and those in `left_out`.

    completions: for `/completions`, which continues a text; else for `/chat/completions`.
    """
    how = request.decoding
    turns = [{"role": "system", "content": request.system}] if request.system else []
    text = "\n\n".join(filter(None, (request.system, request.prompt)))
    fields = {
        "model": model,
        "prompt": text if completions else None,
        "messages": None if completions else [*turns, {"role": "user", "content": request.prompt}],
        "temperature": how.temperature,
        "top_p": None if how.top_p == 1 else how.top_p,
        "max_tokens": how.max_tokens,
        "max_completion_tokens": how.max_tokens if "max_tokens" in left_out else None,
        "stop": list(how.stop[:_STOPS]) or None,
        "presence_penalty": how.presence_penalty or None,
        "frequency_penalty": how.frequency_penalty or None,
        "seed": request.seed,
        "response_format": _shape(request),
    }
    return {name: value for name, value in fields.items() if value is not None and name not in left_out}


def not_taken(response: httpx2.Response, fields: Container[str]) -> str | None:
    """Which of the fields an error is about that a request may do without; None where it is about something else."""
    about = "" if _TOO_LONG.search(response.text) else response.text
    for name in OPTIONAL:
        if name in fields and re.search(_NAMED.get(name, rf"""['"`]{name}['"`]"""), about):
            return name
    return None


def held_back(response: httpx2.Response) -> bool:
    """Whether an error says that a content filter did not like the request."""
    return _FILTERED.search(response.text) is not None


def _shape(request: Request) -> dict[str, Any] | None:
    if request.schema is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(request.schema), "strict": True}}


def reply_of(response: httpx2.Response, request: Request) -> Reply | None:
    """The reply in a good answer; None when it is no such thing."""
    try:
        answer = json.loads(response.content)
        choice = answer["choices"][0]
        said = choice["message"] if "message" in choice else {"content": choice["text"]}
        usage = answer.get("usage") or {}
        counted = Reply(
            "",
            model=str(answer.get("model") or ""),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
        text, refusal, finish = said.get("content"), said.get("refusal"), choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    if isinstance(text, list):  # parts
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    if not isinstance(text, str | None):
        return None
    if refusal or finish == "content_filter":
        error = str(refusal or "held back by the endpoint's content filter")
        return replace(counted, finish="refused", error=error)
    words, stopped = cut(spoken(text or ""), request.decoding.stop)
    return replace(counted, text=words, finish="length" if finish == "length" and not stopped else "stop")


def message_of(response: httpx2.Response) -> str:
    """What an endpoint says about an error: OpenAI's `error.message`, FastAPI's `detail`, or the bare text."""
    try:
        body = response.json()
    except ValueError:
        return response.text
    error = body.get("error", body) if isinstance(body, dict) else body
    said = error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
    return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
