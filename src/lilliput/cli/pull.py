"""`lilliput pull`: fetch a model of the catalogue once, so that every later command finds it."""

from __future__ import annotations

from typing import Annotated

import typer

from lilliput.cli.base import size
from lilliput.cli.door import Answer


def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A short name of the catalogue, or a hub id.")],
) -> Answer:
    """Download a model into the cache and check it; a second time costs nothing.

    Example:  lilliput pull smollm2-135m-instruct
    """
    from lilliput.models import locate
    from lilliput.models import pull as fetch

    path = locate(model).path if "/" in model else fetch(model)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    count = sum(file.stat().st_size for file in files)
    return Answer({"model": model, "path": str(path), "bytes": count}, f"{model} is here: {path} ({size(count)})")
