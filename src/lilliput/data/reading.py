"""What the forms' adapters share: the choices a person made, the counts they keep, and fields that must be text.

Not here: the forms (`forms.py`, `sharegpt.py`, `oasst.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lilliput.data.chats import Chat
from lilliput.errors import DataError

Fields = dict[str, Any]


@dataclass(frozen=True)
class Choices:
    """What a person may choose about the reading of rows; plain values, so that it can be sent to another process.

    Attributes:
        paths: which chats of an OpenAssistant tree: "best", "all", or "top-2" (any number).
        languages: keep messages in these languages only (`("en", "de")`); () keeps all.
        unreviewed: also keep messages that nobody has reviewed.
        keep_html: leave HTML in ShareGPT turns as it is.
    """

    paths: str = "best"
    languages: tuple[str, ...] = ()
    unreviewed: bool = False
    keep_html: bool = False


@dataclass
class Reading:
    """A reading under way: the choices, and what was dropped and what was changed, counted by reason."""

    choices: Choices = field(default_factory=Choices)
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)


Read = Callable[[Fields, Reading], "list[Chat]"]  # raises DataError without a place: the caller knows the row


def text(fields: Fields, key: str, *, optional: bool = False) -> str:
    """A field that must be text with words in it; an optional one may be missing, null or blank (then "")."""
    value = fields.get(key)
    if isinstance(value, str):
        if value and not value.isspace():
            return value
        if optional:
            return ""
        raise DataError(f"'{key}' is empty")
    if value is None and (optional or key not in fields):
        if optional:
            return ""
        raise missing(fields, key)
    raise DataError(f"'{key}' is {type_of(value)}, not text")


def items(fields: Fields, key: str, of: str) -> list[Any]:
    """A field that must be a list with something in it; `of` says what, for the error."""
    if key not in fields:
        raise missing(fields, key)
    value = fields[key]
    if isinstance(value, list) and value:
        return value
    what = "is empty" if value == [] else f"is {type_of(value)}, not a list of {of}"
    raise DataError(f"'{key}' {what}")


def check_item(item: Any, path: str, keys: tuple[str, ...]) -> None:
    """Raise DataError saying what is wrong with an item that must be an object with text under the keys."""
    if not isinstance(item, dict):
        raise DataError(f"{path} is {type_of(item)}, not an object")
    for key in keys:
        if key not in item:
            raise missing(item, key, f"{path} ")
        if not isinstance(item[key], str):
            raise DataError(f"{path}.{key} is {type_of(item[key])}, not text")


def missing(fields: Fields, key: str, path: str = "") -> DataError:
    """Says that a key is not there, and which are."""
    has = ", ".join(f"'{name}'" for name in fields) or "nothing"
    return DataError(f"{path}has no '{key}' (it has {has})")


def type_of(value: Any) -> str:
    """What a value is, in words that follow "is"."""
    return "null" if value is None else f"of type {type(value).__name__}"


def in_words(counts: Counter[str]) -> str:
    """`"3 turns without words, 1 deleted messages"`: what was counted, the most first; "" for nothing."""
    return ", ".join(f"{count:,} {reason}" for reason, count in (+counts).most_common())
