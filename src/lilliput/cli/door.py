"""What all commands share: `--json`, `--debug`, exit statuses, and the one line that an error becomes.

A command is a plain function that does its work and returns an `Answer`; `@command` gives it the two common options and
prints what it returns: without `--json` the answer for people on standard output; with it everything for people goes to
standard error and the last line of standard output is one JSON object, also on failure (`{"error": …, "kind": …}`).

Exit status: 0 done; 2 wrong use (bad option, unknown key or name); 1 anything else that failed, Ctrl-C included.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn, ParamSpec, TextIO

import typer
from rich.console import Console, RenderableType
from rich.text import Text
from typer.core import TyperGroup

from lilliput.errors import LilliputError, UsageError, nearest
from lilliput.progress import console, warn

P = ParamSpec("P")

FORMATS = ("nf4", "fp4", "int8", "int4", "int3", "int2", "int8g", "none")  # none: the checkpoint's own numbers

# Options that several commands share, each described once.
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face directory, a .gguf file, a hub id, or a short name.")
]
NumberFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="Number format of the base: nf4, fp4, int8, int4, …, or none (the checkpoint's own numbers).",
    ),
]
Adapter = Annotated[
    str | None, typer.Option(metavar="DIR", help="Adapter to put on the base: a run folder or a PEFT directory.")
]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Load the adapter even if it was trained over another base.")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", help="A recipe's name, or a YAML file of your own; by default qlora, or the task's."
    ),
]
Task = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What rows are: chat (chats to answer) or classify (texts with labels)."),
]
TextColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="classify: the column with the text; by default text or sentence.")
]
LabelColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="classify: the column with the label; by default label.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe value, e.g. lora.r=16; may be repeated."),
]
_Json = Annotated[bool, typer.Option("--json", help="Last line on standard output: one JSON object with the results.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback and the libraries' warnings.")]


@dataclass(frozen=True)
class Answer:
    """What a command has to say.

    results: becomes the JSON object; plain values only.
    people: what a person reads, any rich renderable or text; None prints nothing.
    fault: one line, where the command worked but its verdict is bad (a broken promise, an unusable machine); status 1.
    """

    results: dict[str, Any] = field(default_factory=dict)
    people: RenderableType | None = None
    fault: str = ""


class Stopped(LilliputError):
    """The person ended it (Ctrl-C, end of input); says how to go on, where that is possible. Exit status 1."""


class Door(TyperGroup):
    """The command group that turns wrong options into one line and status 2, as every other error is one line."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run the command line and exit, whatever the mode; `args` are those of the process by default."""
        words = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        try:
            status = super().main(args=words or ["--help"], prog_name=prog_name or "lilliput", **extra)
        except typer.Abort:  # end of input in a prompt
            status = _fail(Stopped("stopped"), as_json="--json" in words)
        except Exception as error:
            if not hasattr(error, "format_message"):  # how typer's own errors are told, by whichever click is behind it
                raise
            status = _fail(UsageError(_wrong_use(error)), as_json="--json" in words)
        sys.exit(status if isinstance(status, int) else 0)


def command(function: Callable[P, Answer | None]) -> Callable[..., None]:
    """Give `function` the options --json and --debug, print its answer, and exit with the status that its end means."""

    @functools.wraps(function)
    def run(*args: Any, json: bool = False, debug: bool = False, **options: Any) -> None:
        stdout = sys.stdout
        try:
            with _manners(debug), contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
                answer = function(*args, **options) or Answer()
            _print(answer, stdout, as_json=json)
            if answer.fault:
                _say_fault(answer.fault)
            status = 1 if answer.fault else 0
        except typer.Exit:
            raise
        except BrokenPipeError:
            status = _hush()
        except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001 - the last door: whatever it is becomes a line
            if debug:
                traceback.print_exc()
            status = _fail(error, as_json=json)
        raise typer.Exit(status)

    signature = inspect.signature(function, eval_str=True)
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint)
        for name, hint in (("json", _Json), ("debug", _Debug))
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *common])  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def _manners(debug: bool) -> Iterator[None]:
    """Keep the libraries' chatter off the screen, and tell our own warnings as all else is told; --debug shows all.

    This sets the process's environment and filters: this is the application, so it may.
    """
    if debug:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", message="Lilliput")
        warnings.showwarning = _show_warning
        try:
            yield
        finally:
            logging.disable(before)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """In place of Python's own, which adds a file and a line of code."""
    warn(str(message))


def _print(answer: Answer, stdout: TextIO, *, as_json: bool) -> None:
    """The answer for people on `stdout`, or on standard error when `stdout` is for JSON."""
    if answer.people is not None:
        stream = sys.stderr if as_json else stdout
        # A pipe has no width: wide enough there that no path in a table is broken.
        width = None if stream.isatty() else 160
        screen = Console(file=stream, width=width, highlight=False, soft_wrap=isinstance(answer.people, str))
        with screen.capture() as text:  # written by us, since rich ends the program itself when a pipe is closed
            screen.print(answer.people, markup=not isinstance(answer.people, str))
        stream.write(text.get())
        stream.flush()
    if as_json:
        stdout.write(json.dumps(plain(answer.results), ensure_ascii=False, allow_nan=False) + "\n")
        stdout.flush()


def plain(value: Any) -> Any:
    """The same value as JSON can say it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fail(error: BaseException, *, as_json: bool) -> int:
    """Say `error` in one line on standard error, and as JSON when asked; returns the exit status."""
    line = one_line(error)
    _say_fault(line)
    if as_json:
        print(json.dumps({"error": line, "kind": type(error).__name__}, ensure_ascii=False), flush=True)
    return error.exit_status if isinstance(error, LilliputError) else 1


def _say_fault(line: str) -> None:
    console.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def one_line(error: BaseException) -> str:
    """What a person reads about `error`: our own errors as they are, any other with its type and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, LilliputError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "stopped (Ctrl-C)"
    if isinstance(error, MemoryError):
        return f"not enough memory. {text}".strip()
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    kind = type(error).__name__
    return f"unexpected {kind}: {text or 'no message'}. Run again with --debug for the traceback"


def _wrong_use(error: Any) -> str:
    """The parser's message, with the command whose help tells more."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "lilliput"
    return f"{message}; see `{path} --help`"


def _hush() -> int:
    """The reader of a pipe went away (`lilliput … | head`): say nothing, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def choose(value: str, known: Sequence[str], what: str) -> str:
    """`value` if it is one of `known`; UsageError with the nearest otherwise. `what` names the option."""
    if value in known:
        return value
    raise UsageError(f"unknown value {value!r}{nearest(value, known)}", where=what, todo=f"Known: {', '.join(known)}.")
