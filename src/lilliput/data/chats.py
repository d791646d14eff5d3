"""A record becomes a chat: turns with roles. The forms of records are a table.

Understood: Alpaca rows (Stanford Alpaca: `instruction`, `input`, `output`), prompt/completion, prompt/response, and
messages (`role`, `content`). A form is told by its keys; keys that no form names are not read. A chat is checked
here once and trusted by the rest: an optional system turn, then user and assistant in turns, no empty words.
Not here: how a chat is written for a model (`templates.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lilliput.data.records import Record
from lilliput.errors import DataError, nearest

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one side said: `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """Turns in order, and the place of the row they come from.

    `input` is the end of the first user turn that an Alpaca row keeps apart ("" if none): the turn's content is
    `instruction + "\\n\\n" + input`. Chat templates write the content; the Alpaca prompt writes the two parts.
    """

    turns: tuple[Turn, ...]
    origin: str = ""
    input: str = ""

    @property
    def prompt(self) -> Chat:
        """The same chat without its last answer: what `prompt_ids` takes."""
        return replace(self, turns=self.turns[:-1]) if self.turns and self.turns[-1].role == "assistant" else self


@dataclass(frozen=True)
class Form:
    """One form of records: a row of the table."""

    name: str
    keys: tuple[str, ...]  # a record of this form has all of them
    convert: Callable[[Record], Chat]


def to_chat(record: Record) -> Chat:
    """The chat that a record holds, ready for training: it ends with the assistant's turn.

    Raises DataError: a form that is not known, or a field that is missing, empty or of the wrong type.
    """
    for form in FORMS:
        if all(key in record.fields for key in form.keys):
            chat = form.convert(record)
            check_chat(chat, answered=True)
            return chat
    raise _unknown_form(record)


def check_chat(chat: Chat, *, answered: bool) -> None:
    """Raise DataError unless the turns are a chat that ends with the assistant's (`answered`) or the user's words."""
    if not chat.turns:
        raise DataError("has no turns", where=chat.origin or None)
    for number, turn in enumerate(chat.turns, start=1):
        _check_turn(turn, number, chat)
    last = chat.turns[-1].role
    if answered and last != "assistant":
        todo = "Only the assistant's words are learned: end the chat with them."
        raise DataError(f"the last turn is the {last}'s, not the assistant's", where=chat.origin or None, todo=todo)
    if not answered and last != "user":
        raise DataError(f"the last turn is the {last}'s, so there is nothing to answer", where=chat.origin or None)


def _check_turn(turn: Turn, number: int, chat: Chat) -> None:
    where = chat.origin or None
    if turn.role not in ROLES:
        known = f"known are {', '.join(ROLES)}"
        raise DataError(
            f"turn {number} has the unknown role '{turn.role}' ({known}){nearest(turn.role, ROLES)}", where=where
        )
    if not turn.content.strip():
        raise DataError(f"turn {number} ({turn.role}) has no words", where=where)
    if any("\ud800" <= letter <= "\udfff" for letter in turn.content):  # from a terminal that does not speak UTF-8
        raise DataError(f"turn {number} ({turn.role}) holds half a character (a lone surrogate)", where=where)
    if turn.role == "system":
        if number > 1:
            raise DataError(f"turn {number} is a system turn; only the first may be", where=where)
        return
    before = chat.turns[number - 2].role if number > 1 else "system"
    expected = "assistant" if before == "user" else "user"
    if turn.role != expected:
        what = f"turn {number} is the {turn.role}'s where the {expected}'s was expected"
        raise DataError(what, where=where, todo="User and assistant speak in turns, the user first.")


# ---- the table ---------------------------------------------------------------------------------------------------


def _messages(record: Record) -> Chat:
    messages = record.fields["messages"]
    if not isinstance(messages, list) or not messages:
        what = "is empty" if messages == [] else f"is {_type_of(messages)}, not a list of messages"
        raise DataError(f"'messages' {what}", where=record.origin)
    return Chat(tuple(_message(item, number, record) for number, item in enumerate(messages, start=1)), record.origin)


def _message(item: Any, number: int, record: Record) -> Turn:
    if not isinstance(item, dict):
        raise DataError(f"message {number} is {_type_of(item)}, not an object", where=record.origin)
    missing = [key for key in ("role", "content") if key not in item]
    if missing:
        has = ", ".join(f"'{key}'" for key in item) or "nothing"
        raise DataError(f"message {number} has no '{missing[0]}' (it has {has})", where=record.origin)
    for key in ("role", "content"):
        if not isinstance(item[key], str):
            raise DataError(f"'{key}' of message {number} is {_type_of(item[key])}, not text", where=record.origin)
    return Turn(item["role"], item["content"])


def _alpaca(record: Record) -> Chat:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    given = _text(record, "input", optional=True)
    content = f"{instruction}\n\n{given}" if given else instruction
    return Chat((Turn("user", content), Turn("assistant", output)), record.origin, input=given)


def _pair(question: str, answer: str) -> Callable[[Record], Chat]:
    """A converter for rows of one question and one answer under the given keys."""

    def convert(record: Record) -> Chat:
        turns = (Turn("user", _text(record, question)), Turn("assistant", _text(record, answer)))
        return Chat(turns, record.origin)

    return convert


FORMS = (
    Form("messages", ("messages",), _messages),
    Form("alpaca", ("instruction", "output"), _alpaca),
    Form("prompt/completion", ("prompt", "completion"), _pair("prompt", "completion")),
    Form("prompt/response", ("prompt", "response"), _pair("prompt", "response")),
)


def _text(record: Record, key: str, *, optional: bool = False) -> str:
    """A field that must be text with words in it; an optional one may be missing, null or blank (then "")."""
    value = record.fields.get(key)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"'{key}' is {_type_of(value)}, not text", where=record.origin)
    if value.strip():
        return value
    if optional:
        return ""
    raise DataError(f"'{key}' is empty", where=record.origin)


def _type_of(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _unknown_form(record: Record) -> DataError:
    """Name the keys seen, the forms understood, and what is missing from the form that comes nearest."""
    closest = max(FORMS, key=lambda form: sum(key in record.fields for key in form.keys) / len(form.keys))
    missing = [key for key in closest.keys if key not in record.fields]
    right = closest.keys if len(missing) < len(closest.keys) else ()  # keys that need no suggestion
    if right:
        what = f"has no '{missing[0]}', which a row of the form {closest.name} needs"
    else:
        what = "is of no known form"
        missing = [key for form in FORMS for key in form.keys]
    seen = ", ".join(f"'{key}'" + ("" if key in right else _meant(key, missing)) for key in record.fields) or "none"
    forms = "; ".join(f"{form.name} ({', '.join(form.keys)})" for form in FORMS)
    return DataError(f"{what}; its keys are {seen}; forms understood: {forms}", where=record.origin)


def _meant(key: str, missing: list[str]) -> str:
    """`" (did you mean 'output'?)"` behind a key that comes near a missing one."""
    hint = nearest(key, missing)
    return f" ({hint.removeprefix('; ')})" if hint else ""
