"""Teachers for the commands that let a language model write data: the options, and the model or endpoint behind them.

A command takes them all with one line:

    @takes_teacher
    def self_instruct(teacher: TeacherOptions, out: …) -> Answer:
        with resumable(out), Run(out, teacher.open(), settings, price=teacher.price) as run: …

Not here: how an endpoint is asked (`synthesis/endpoint.py`), what is asked (`synthesis/`).
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lilliput.cli.door import Answer, Stopped
from lilliput.errors import UsageError

if TYPE_CHECKING:
    from lilliput.cli.local_teacher import LocalTeacher
    from lilliput.data.engine import RayEngine
    from lilliput.synthesis.cost import Price
    from lilliput.synthesis.endpoint import Endpoint
    from lilliput.synthesis.ray_teacher import RayTeacher
    from lilliput.synthesis.teacher import Teacher

_ANY: dict[str, Any] = {"rich_help_panel": "The model that writes"}
_ENDPOINT: dict[str, Any] = {"rich_help_panel": "If it is behind a URL"}
_LOCAL: dict[str, Any] = {"rich_help_panel": "If it is on this machine"}


@dataclass(frozen=True)
class TeacherOptions:
    """What a person says about the language model that writes; each field is an option of the command.

    Raises UsageError for a price below 0.
    """

    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL|URL",
            help="Who writes: a Hugging Face directory, a .gguf file, a hub id, a short name; or the URL of an "
            "OpenAI-compatible endpoint (http://localhost:8000/v1).",
            **_ANY,
        ),
    ]
    completions: Annotated[
        bool,
        typer.Option(
            "--completions", help="Let it continue plain text, without chat turns: for a model without them.", **_ANY
        ),
    ] = False
    price_in: Annotated[
        float, typer.Option(metavar="X", help="Price of a million tokens of prompts, to count the cost.", **_ANY)
    ] = 0.0
    price_out: Annotated[
        float, typer.Option(metavar="X", help="Price of a million tokens of answers, to count the cost.", **_ANY)
    ] = 0.0
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="Where it answers: process, or ray (one on each worker).", **_ANY)
    ] = "process"
    workers: Annotated[int | None, typer.Option(metavar="N", help="ray: at most so many at a time.", **_ANY)] = None
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name there; not needed where there is only one.", **_ENDPOINT),
    ] = None
    key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable that holds the key.", **_ENDPOINT)
    ] = "OPENAI_API_KEY"
    key_over_http: Annotated[
        bool,
        typer.Option("--key-over-http", help="Send the key unencrypted to another machine.", **_ENDPOINT),
    ] = False
    concurrency: Annotated[int, typer.Option(metavar="N", help="Requests at the same time.", **_ENDPOINT)] = 8
    rpm: Annotated[float | None, typer.Option(metavar="N", help="At most N requests a minute.", **_ENDPOINT)] = None
    tpm: Annotated[float | None, typer.Option(metavar="N", help="At most N tokens a minute.", **_ENDPOINT)] = None
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time for one answer.", **_ENDPOINT)] = 600.0
    retries: Annotated[
        int, typer.Option(metavar="N", help="Try a request again so often, waiting longer each time.", **_ENDPOINT)
    ] = 8
    adapter: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Adapter to put on it: a run folder or a PEFT directory.", **_LOCAL),
    ] = None
    number_format: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help="Its number format: nf4, int8, int4, …, or none.", **_LOCAL),
    ] = None
    allow_other_base: Annotated[
        bool,
        typer.Option("--allow-other-base", help="Load the adapter even if it was trained over another base.", **_LOCAL),
    ] = False

    def __post_init__(self) -> None:
        for option, price in (("--price-in", self.price_in), ("--price-out", self.price_out)):
            if not 0 <= price < math.inf:
                raise UsageError(f"{price} is not a price from 0 up", where=option)

    @property
    def price(self) -> Price:
        """Of a million tokens."""
        from lilliput.synthesis.cost import Price

        return Price(self.price_in, self.price_out)

    def open(self) -> Teacher:
        """The teacher that these options describe.

        With `engine` "ray" it is built on the workers, when its name or an answer is wanted for the first time.

        Raises:
            UsageError: an option that cannot be, or that does not go with a model on this machine (a URL).
            TeacherError: the endpoint is out of reach, or has several models and none is named.
        """
        from lilliput.data.engine import RayEngine, engine_of

        engine = engine_of(self.engine, self.workers)
        if isinstance(engine, RayEngine):
            return open_on_ray(self, engine)
        return open_endpoint(self) if _is_url(self.model) else open_local(self)


def open_endpoint(options: TeacherOptions) -> Endpoint:
    """The endpoint at a URL; without `--name` it is asked which model it has."""
    from lilliput.synthesis.endpoint import Endpoint, EndpointSettings

    _refuse(
        options, ("adapter", "number_format", "allow_other_base"), "goes with a model on this machine, not with a URL"
    )
    settings = EndpointSettings(
        url=options.model,
        model=options.name or "",
        key_env=options.key_env,
        key_over_http=options.key_over_http,
        completions=options.completions,
        concurrency=options.concurrency,
        requests_per_minute=options.rpm,
        tokens_per_minute=options.tpm,
        timeout=options.timeout,
        retries=options.retries,
    )
    return Endpoint(settings if options.name else replace(settings, model=_only_model(Endpoint(settings))))


def open_local(options: TeacherOptions) -> LocalTeacher:
    """The model on this machine, with its adapter."""
    endpoint_only = ("name", "key_env", "key_over_http", "concurrency", "rpm", "tpm", "timeout", "retries")
    _refuse(options, endpoint_only, "goes with the URL of an endpoint (http://… or https://…), not with a model here")
    from lilliput.cli.base import open_base
    from lilliput.cli.local_teacher import LocalTeacher

    base = open_base(
        options.model,
        number_format=options.number_format,
        adapter=options.adapter,
        allow_other_base=options.allow_other_base,
    )
    adapter = f" with {options.adapter}" if options.adapter else ""
    number_format = f" as {base.format}" if base.format != "none" else ""
    plain = " (plain text)" if options.completions else ""
    name = f"{options.model}{adapter}{number_format}{plain}"
    return LocalTeacher(base.model, base.tokenizer, name, completions=options.completions)


def open_on_ray(options: TeacherOptions, engine: RayEngine) -> RayTeacher:
    """The teacher once on each worker; of an endpoint each asks its share of what may be asked at the same time."""
    from lilliput.synthesis.ray_teacher import RayTeacher

    alone = replace(options, engine="process", workers=None)
    if not _is_url(options.model):
        return RayTeacher(alone.open, engine)
    engine.start()
    share = replace(
        alone,
        concurrency=math.ceil(options.concurrency / engine.size),
        rpm=options.rpm and options.rpm / engine.size,
        tpm=options.tpm and options.tpm / engine.size,
    )
    return RayTeacher(share.open, engine, batch=max(share.concurrency, 1))


def _only_model(endpoint: Endpoint) -> str:
    models = endpoint.models()
    if len(models) == 1:
        return models[0]
    known = ", ".join(models) or "none"
    what = f"has {len(models)} models, and none is named" if models else "has no models"
    raise UsageError(what, where=endpoint.settings.base, todo=f"Choose one with --name: {known}." if models else None)


def _refuse(options: TeacherOptions, names: Sequence[str], why: str) -> None:
    """An option that would be without effect is an error."""
    defaults = {field.name: field.default for field in fields(TeacherOptions)}
    for name in names:
        if getattr(options, name) != defaults[name]:
            option = {"number_format": "format"}.get(name, name.replace("_", "-"))
            raise UsageError(why, where=f"--{option}")


def _is_url(model: str) -> bool:
    """Whether MODEL|URL is a URL. Raises UsageError for half of one."""
    if re.match(r"[\w.-]+:\d+(/|$)", model):
        raise UsageError(f"'{model}' is no URL", where="--model", todo=f"Do you mean http://{model}?")
    return "://" in model


def takes_teacher(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """Give a command all fields of `TeacherOptions` as options, and hand them over as its argument `teacher`."""
    options = inspect.signature(TeacherOptions, eval_str=True).parameters

    @functools.wraps(function)
    def run(*args: Any, **given: Any) -> Answer:
        teacher = TeacherOptions(**{name: given.pop(name) for name in options if name in given})
        return function(*args, teacher=teacher, **given)

    signature = inspect.signature(function, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "teacher"]
    taken = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in options.values()]
    run.__signature__ = signature.replace(parameters=[*own, *taken])  # type: ignore[attr-defined]
    del run.__annotations__["teacher"]
    return run


def check_place(out: Path) -> None:
    """Refuse a directory of a run that is a file, or that has rows which no run of ours wrote."""
    from lilliput.synthesis.journal import JOURNAL
    from lilliput.synthesis.pairs import RESULT

    if out.is_file():
        raise UsageError("is a file", where=str(out), todo="Give -o a directory.")
    if (out / RESULT).exists() and not (out / JOURNAL).exists():
        what = f"is there, but no {JOURNAL}: these rows were made by something else"
        raise UsageError(what, where=str(out / RESULT), todo="Give -o another directory.")


@contextmanager
def resumable(out: str | Path) -> Iterator[None]:
    """Inside the block Ctrl-C ends the command with the words that say how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        todo = "Everything so far is kept: give the same command again to go on."
        raise Stopped("stopped (Ctrl-C)", where=str(out), todo=todo) from error
