"""A fake OpenAI-compatible endpoint: a small HTTP server whose answers depend on the request alone; it can misbehave.

In a test, in this process:

    with FakeEndpoint(brain=lambda prompt: "…", faults=faults("500 x2", "slow")) as fake:
        Endpoint(EndpointSettings(fake.url, "fake"))

or as a program of its own, which prints its URL on its first line:

    python -m tests.synthesis.endpoint_server --brain tests.synthesis.brains:answer --faults "429 x3, good, die"

A brain is a function from the prompt (the user's turn, or the text to continue) to the answer. `faults` are played one
a request in the order of arrival, then all is well; what is in `always` is played for prompts that hold a text.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Brain = Callable[[str], str]


def echo(prompt: str) -> str:
    """The default brain: the number of words, and a hash of the prompt."""
    return f"{len(prompt.split())} words, {hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Seen:
    """A request as it came: when (monotonic seconds), its path, its headers in small letters, its JSON body."""

    at: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class FakeEndpoint:
    """The server. It listens between `start` and `stop`, or inside a `with` block.

    brain: answers. models: names that /models lists. key: the one that is asked for, "" for none.
    faults: names from `FAULTS` (with `=VALUE` where they take one), one a request, then "good".
    always: text in a prompt -> fault. unknown: names of fields that are answered with a 400 that names them.
    seconds: that an answer takes. most: how many requests were in work at the same time. port: 0 takes a free one.
    """

    brain: Brain = echo
    models: Sequence[str] = ("fake-1",)
    key: str = ""
    faults: Sequence[str] = ()
    always: Mapping[str, str] = field(default_factory=dict)
    unknown: Sequence[str] = ()
    seconds: float = 0.0
    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    most: int = 0

    def start(self) -> FakeEndpoint:
        """Listen; `url` is known then."""
        self.lock = threading.Lock()
        self._now, self._played = 0, iter(list(self.faults))
        self.server = _Server(("127.0.0.1", self.port), _Handler)
        self.server.fake = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Listen no more."""
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def __enter__(self) -> FakeEndpoint:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def next_fault(self, prompt: str) -> str:
        """What is played for this request."""
        for text, fault in self.always.items():
            if text in prompt:
                return fault
        with self.lock:
            return next(self._played, "good")

    def work(self, by: int) -> None:
        """Count requests that are in work."""
        with self.lock:
            self._now += by
            self.most = max(self.most, self._now)


def faults(script: str) -> list[str]:
    """A script as a list: `"429 x3, good, slow=0.5"` is 429 three times, a good answer, one after half a second."""
    played: list[str] = []
    for part in filter(None, (part.strip() for part in script.split(","))):
        name, _, times = part.partition(" x")
        played += [name.strip()] * int(times or 1)
    return played


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    fake: FakeEndpoint

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none of the test's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""

    def do_GET(self) -> None:
        fake = self.server.fake
        self._record({})
        if self._wrong_key():
            return
        if self.path == "/v1/models":
            self.send({"object": "list", "data": [{"id": name, "object": "model"} for name in fake.models]})
        else:
            self.fail(404, f"no route {self.path}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._record(body)
        if self._wrong_key() or self._wrong_place(body) or self._unknown_field(body):
            return
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        fault, _, value = self.server.fake.next_fault(prompt).partition("=")
        self.server.fake.work(1)
        try:
            answer = self._answer(body, prompt)
            time.sleep(self.server.fake.seconds)
        finally:
            self.server.fake.work(-1)
        FAULTS[fault](self, answer, value)

    def _record(self, body: dict[str, Any]) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.server.fake.lock:
            self.server.fake.seen.append(Seen(time.monotonic(), self.path, headers, body))

    def _wrong_key(self) -> bool:
        key = self.server.fake.key
        wrong = bool(key) and self.headers.get("Authorization") != f"Bearer {key}"
        if wrong:
            given = self.headers.get("Authorization", "none").removeprefix("Bearer ")
            self.fail(401, f"Incorrect API key provided: {given}.", code="invalid_api_key")
        return wrong

    def _wrong_place(self, body: dict[str, Any]) -> bool:
        if self.path not in ("/v1/chat/completions", "/v1/completions"):
            self.fail(404, f"no route {self.path}")
        elif body["model"] not in self.server.fake.models:
            self.fail(404, f"The model `{body['model']}` does not exist.", code="model_not_found")
        else:
            return False
        return True

    def _unknown_field(self, body: dict[str, Any]) -> bool:
        for name in self.server.fake.unknown:
            if name in body:
                self.fail(400, f"Unsupported parameter: '{name}'.", code="unsupported_parameter", param=name)
                return True
        return False

    def _answer(self, body: dict[str, Any], prompt: str) -> dict[str, Any]:
        """A good answer as OpenAI's API words it: cut at the first stop text, and at `max_tokens` words."""
        text = self.server.fake.brain(prompt)
        for stop in body.get("stop") or ():
            text = text.partition(stop)[0]
        words = re.findall(r"\S+\s*|\s+", text)
        longest = body.get("max_tokens", body.get("max_completion_tokens", 16))
        finish = "length" if len(words) > longest else "stop"
        text = "".join(words[:longest])
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": min(len(words), longest)}
        said = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
        return {
            "id": "x",
            "model": body["model"],
            "choices": [{"index": 0, **said, "finish_reason": finish}],
            "usage": usage,
        }

    # ---- sending --------------------------------------------------------------------------------------------------

    def send(self, value: Any, status: int = 200, **headers: str) -> None:
        """A JSON answer; `value` may be bytes that are none."""
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(raw)

    def fail(
        self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str
    ) -> None:
        """An error as OpenAI's API words it."""
        self.send({"error": {"message": message, "type": "x", "code": code, "param": param}}, status, **headers)

    def die(self, answer: dict[str, Any]) -> None:
        """Half an answer, then the line goes dead (a reset, not an end)."""
        raw = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2])
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def _slow(handler: _Handler, answer: dict[str, Any], value: str) -> None:
    time.sleep(float(value or 1))
    handler.send(answer)


def _drip(handler: _Handler, answer: dict[str, Any], value: str) -> None:
    """Never ends, and never pauses for long."""
    raw = json.dumps(answer).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(raw)))
    handler.end_headers()
    for byte in raw:
        handler.wfile.write(bytes([byte]))
        time.sleep(float(value or 0.05))


def _filtered(handler: _Handler, answer: dict[str, Any], value: str) -> None:
    """The answer was begun and then held back."""
    answer["choices"][0] |= {"finish_reason": "content_filter", "message": {"role": "assistant", "content": None}}
    handler.send(answer)


def _said_no(handler: _Handler, answer: dict[str, Any], value: str) -> None:
    answer["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
    handler.send(answer)


# name -> what is done with the handler, the good answer and the value after "="
FAULTS: dict[str, Callable[[_Handler, dict[str, Any], str], None]] = {
    "good": lambda handler, answer, value: handler.send(answer),
    "slow": _slow,
    "drip": _drip,
    "429": lambda handler, answer, value: handler.fail(
        429, "Too many requests.", **({"Retry_After": value} if value else {})
    ),
    "quota": lambda handler, answer, value: handler.fail(429, "You exceeded your quota.", code="insufficient_quota"),
    "500": lambda handler, answer, value: handler.fail(500, "The server had an error."),
    "503": lambda handler, answer, value: handler.fail(503, "Overloaded.", **({"Retry_After": value} if value else {})),
    "400": lambda handler, answer, value: handler.fail(400, "I do not like this request."),
    "filter": lambda handler, answer, value: handler.fail(400, "Blocked by our policy.", code="content_filter"),
    "long": lambda handler, answer, value: handler.fail(
        400, "This model's maximum context length is 10 tokens.", code="context_length_exceeded"
    ),
    "filtered": _filtered,
    "refusal": _said_no,
    "moved": lambda handler, answer, value: handler.send({}, 307, Location="http://127.0.0.1:9/v1/chat/completions"),
    "html": lambda handler, answer, value: handler.send(b"<html>Please log in</html>"),
    "half": lambda handler, answer, value: handler.send(json.dumps(answer).encode()[:-9]),
    "no choices": lambda handler, answer, value: handler.send({**answer, "choices": []}),
    "no usage": lambda handler, answer, value: handler.send({"choices": answer["choices"]}),
    "list": lambda handler, answer, value: handler.send([1, 2]),
    "die": lambda handler, answer, value: handler.die(answer),
}


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--brain", default=f"{__name__}:echo", help="module:function")
    parser.add_argument("--faults", default="", help="a script, e.g. '429 x3, good, die'")
    parser.add_argument("--seconds", type=float, default=0.0, help="that an answer takes")
    parser.add_argument("--key", default="")
    given = parser.parse_args()
    module, _, name = given.brain.partition(":")
    brain = getattr(importlib.import_module(module), name)
    fake = FakeEndpoint(brain, key=given.key, faults=faults(given.faults), seconds=given.seconds, port=given.port)
    print(fake.start().url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
