"""`lilliput chat`: talk to a model in the terminal, or ask it one thing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from lilliput.cli.base import open_base
from lilliput.cli.door import Adapter, AllowOtherBase, Answer, Model, NumberFormat
from lilliput.errors import LilliputError, UsageError
from lilliput.progress import console, say

if TYPE_CHECKING:
    from lilliput.generation import ChatSession

_HELP = "/reset forgets the talk, /system TEXT begins anew under a system prompt, /exit leaves. Ctrl-C stops an answer."


def chat(
    model: Model,
    adapter: Adapter = None,
    number_format: NumberFormat = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Answer this and exit; only the answer goes to standard output.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the best token. Higher: more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the best tokens that hold this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many best tokens; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens at least this times as probable as the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens seen before get less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawn answers repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="An answer that does not end by itself is ended here.")] = 512,
    allow_other_base: AllowOtherBase = False,
) -> Answer | None:
    """Talk to a model in the terminal, with or without an adapter.

    Greedy by default, so that what you see is the model and not the dice; --temperature 0.7 --top-p 0.9 is livelier.

    Example:  lilliput chat smollm2-135m-instruct --adapter runs/mine

    Example:  lilliput chat smollm2-135m-instruct --prompt "Name three rivers." --temperature 0.7 --seed 1
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("is empty", where="--prompt", todo="Ask something, or leave it out to chat.")
    from lilliput.generation import ChatSession, Sampling

    sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed, max_new_tokens)
    base = open_base(model, number_format=number_format, adapter=adapter, allow_other_base=allow_other_base)
    session = ChatSession(base.model, base.tokenizer, system, sampling)
    if prompt is not None:
        return _once(session, prompt)
    _talk(session, model if adapter is None else f"{model} with {adapter}")
    return Answer({"turns": [{"role": turn.role, "content": turn.content} for turn in session.turns]})


def _once(session: ChatSession, prompt: str) -> Answer:
    """Answer `prompt` on standard output as it comes."""
    started = time.perf_counter()
    answer = _show(session.reply(prompt), sys.stdout)
    seconds = time.perf_counter() - started
    tokens = session.tokens_out
    return Answer({"answer": answer, "tokens": tokens, "seconds": round(seconds, 3)})


def _show(pieces: Iterable[str], stream: TextIO) -> str:
    """Write pieces as they come, then a line's end; returns the whole text."""
    said: list[str] = []
    for piece in pieces:
        stream.write(piece)
        stream.flush()
        said.append(piece)
    stream.write("\n")
    stream.flush()
    return "".join(said)


def _talk(session: ChatSession, name: str) -> None:
    """Read lines and answer them until /exit or the end of the input."""
    say(f"Chatting with {name}.\n{_HELP}")
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if not _obey(line, session):
                return
        elif line:
            _answer(session, line)


def _read_line() -> str | None:
    """A line from the person, without the space around it; None at the end of the input or on Ctrl-C."""
    asking = sys.stdin.isatty()
    if asking:
        _line_editing()
    try:
        return input("you: " if asking else "").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _line_editing() -> None:
    """Arrow keys and history, where Python has readline (not on Windows)."""
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # importing it is what changes input()


def _obey(line: str, session: ChatSession) -> bool:
    """Carry out a /command; False ends the talk."""
    word, _, rest = line.partition(" ")
    if word in ("/exit", "/quit", "/bye"):
        return False
    if word == "/reset":
        session.reset(session.system)
        say("The talk is forgotten.")
    elif word == "/system":
        session.reset(rest.strip() or None)
        say(
            "A new talk begins"
            + (" under that system prompt." if rest.strip() else ", without a system prompt of yours.")
        )
    elif word == "/help":
        say(_HELP)
    else:
        say(f"{word} is no command. {_HELP}")
    return True


def _answer(session: ChatSession, line: str) -> None:
    """Answer one line; Ctrl-C stops the answer, an error of ours is told, and the talk goes on."""
    pieces = session.reply(line)
    try:
        _show(pieces, sys.stdout)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        say("(stopped)")
    except LilliputError as error:
        console.print(f"error: {error}", style="red", markup=False)
    finally:
        pieces.close()
