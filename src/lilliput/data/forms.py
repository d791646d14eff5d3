"""The forms of rows, one small adapter each, in one table; a row becomes a chat, a chat becomes a row.

A form is told by its keys; keys that no form names are not read. Sources: Stanford Alpaca (`instruction`, `input`,
`output`), Databricks Dolly (`context`, `response`), ShareGPT (`conversations`), OpenAssistant's export (arXiv
2304.07327), Self-Instruct's seeds (arXiv 2212.10560), P3 and FLAN (`inputs`, `targets`; arXiv 2110.08207, 2109.01652).
Not here: reading and writing whole files (`conversion.py`), how a chat is written for a model (`templates.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from lilliput.data.chats import Chat, Turn, check_chat, is_whole
from lilliput.data.oasst import read_messages_tree, read_tree
from lilliput.data.reading import Fields, Read, Reading, check_item, items, text, type_of
from lilliput.data.records import Record
from lilliput.data.sharegpt import read_conversation, write_conversation
from lilliput.errors import DataError, UsageError, nearest

Write = Callable[[Chat], Fields]  # raises DataError without a place where the form cannot say the chat


@dataclass(frozen=True)
class Form:
    """One form of rows: a line of the table.

    Attributes:
        name: what `--from` and `--to` call it.
        keys: a row of this form has all of them.
        also: keys that are read as well where a row has them; others are not.
        read: the chats of a row.
        write: the row that says a chat; None where we do not write the form.
        one: a row holds one chat, so that `lilliput tune` takes it as it is.
        choices: which of `Choices` mean something here.
    """

    name: str
    keys: tuple[str, ...]
    read: Read
    write: Write | None = None
    also: tuple[str, ...] = ()
    one: bool = True
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A row of one question and one answer: under which keys its parts stand ("" where the form has no such part).

    `input` is what the question is about, kept apart from it; `exact` are keys that hold the same as the first two, as
    texts, where those may hold something else (P3's token ids); they are taken where both are texts.
    """

    user: str
    assistant: str
    input: str = ""
    system: str = ""
    exact: tuple[str, str] | None = None

    def read(self, fields: Fields, reading: Reading) -> list[Chat]:
        """The chat of a row. Raises DataError for a field that is missing, empty or no text."""
        exact = self.exact if self.exact and all(isinstance(fields.get(key), str) for key in self.exact) else None
        user, assistant = exact or (self.user, self.assistant)
        question, answer = text(fields, user), text(fields, assistant)
        given = text(fields, self.input, optional=True) if self.input else ""
        if given:
            question = f"{question}\n\n{given}"
        turns: tuple[Turn, ...] = (Turn("user", question), Turn("assistant", answer))
        if self.system and (system := text(fields, self.system, optional=True)):
            turns = (Turn("system", system), *turns)
        return [Chat(turns, "", given)]

    def write(self, chat: Chat) -> Fields:
        """The row that says a chat. Raises DataError for one that is more than a question and an answer."""
        if [turn.role for turn in chat.turns] != ["user", "assistant"] or chat.tools:
            raise DataError(
                f"has {_described(chat)}, and a row of {self.user} and {self.assistant} holds one question, one answer"
            )
        question, answer = chat.turns[0].content, chat.turns[1].content
        if not self.input:
            return {self.user: question, self.assistant: answer}
        return {self.user: chat.without_input(question), self.input: chat.input, self.assistant: answer}


def _described(chat: Chat) -> str:
    if len(chat.turns) != 2:
        return f"{len(chat.turns)} turns"
    return "tools" if chat.tools else f"turns of {chat.turns[0].role} and {chat.turns[1].role}"


# ---- messages ----------------------------------------------------------------------------------------------------


def _read_messages(fields: Fields, reading: Reading) -> list[Chat]:
    """`messages` as they stand; `input` is the end of the first question where an Alpaca row kept it apart."""
    turns = []
    for number, item in enumerate(items(fields, "messages", "messages")):
        path = f"messages[{number}]"
        if isinstance(item, dict) and item.get("tool_calls"):
            raise DataError(f"{path} has 'tool_calls', which are not read: write the call as the assistant's words")
        check_item(item, path, ("role", "content"))
        turns.append(Turn(item["role"], item["content"]))
    given, first = fields.get("input"), next((turn.content for turn in turns if turn.role == "user"), "")
    kept = given if isinstance(given, str) and given.strip() and first.endswith(f"\n\n{given}") else ""
    return [Chat(tuple(turns), "", kept, _tools(fields))]


def _tools(fields: Fields) -> str:
    """The tools of a row as JSON, "" where there are none. Raises DataError for what is no list of objects."""
    given = fields.get("tools")
    if not given or (isinstance(given, str) and not given.strip()):
        return ""
    if not isinstance(given, str | list | dict):
        raise DataError(f"'tools' is {type_of(given)}, not a list of tools")
    try:
        tools = json.loads(given) if isinstance(given, str) else given
        written = json.dumps(tools, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise DataError(f"'tools' is no JSON ({error})") from error
    if not tools:
        return ""
    if not all(isinstance(tool, dict) for tool in (tools if isinstance(tools, list) else [tools])):
        raise DataError("'tools' is no list of objects")
    check_whole(written, "tools")  # also where JSON says it with an escape
    said = given if isinstance(given, str) else written
    check_whole(said, "tools")
    return said


def printable(words: str) -> str:
    """A name or a reason with half characters (lone surrogates) written as escapes: no terminal takes them."""
    return words.encode(errors="backslashreplace").decode()


def check_whole(words: str, key: str) -> None:
    """Raise DataError where the text under a key holds a lone surrogate, which no file can be written with."""
    if not is_whole(words):
        raise DataError(f"'{key}' holds half a character (a lone surrogate)")


def _write_messages(chat: Chat) -> Fields:
    row: Fields = {"messages": [{"role": turn.role, "content": turn.content} for turn in chat.turns]}
    if chat.input:
        row["input"] = chat.input
    if chat.tools:
        row["tools"] = chat.tools
    return row


def _read_sharegpt(fields: Fields, reading: Reading) -> list[Chat]:
    return [replace(chat, tools=_tools(fields)) for chat in read_conversation(fields, reading)]


# ---- Self-Instruct -----------------------------------------------------------------------------------------------


def _read_instances(fields: Fields, reading: Reading) -> list[Chat]:
    """An instruction with several instances of input and output: a chat each."""
    instruction = text(fields, "instruction")
    chats = []
    for number, item in enumerate(items(fields, "instances", "instances")):
        check_item(item, f"instances[{number}]", ("output",))
        try:
            chats += _ALPACA.read({**item, "instruction": instruction}, reading)
        except DataError as error:
            raise DataError(f"instances[{number}]: {error.what}") from error
    return chats


# ---- the table ---------------------------------------------------------------------------------------------------

_ALPACA = Pair("instruction", "output", input="input")
_DOLLY = Pair("instruction", "response", input="context")
_COMPLETION = Pair("prompt", "completion")
_RESPONSE = Pair("prompt", "response")
_P3 = Pair("inputs", "targets", exact=("inputs_pretokenized", "targets_pretokenized"))
_OASST = ("paths", "languages", "unreviewed")

FORMS = (
    Form("messages", ("messages",), _read_messages, _write_messages, also=("input", "tools")),
    Form("alpaca", ("instruction", "output"), _ALPACA.read, _ALPACA.write, also=("input",)),
    Form("dolly", ("instruction", "response"), _DOLLY.read, _DOLLY.write, also=("context",)),
    Form("sharegpt", ("conversations",), _read_sharegpt, write_conversation, also=("tools",), choices=("keep_html",)),
    Form("prompt-completion", ("prompt", "completion"), _COMPLETION.read, _COMPLETION.write),
    Form("prompt-response", ("prompt", "response"), _RESPONSE.read, _RESPONSE.write),
    Form("p3", ("inputs", "targets"), _P3.read, _P3.write, also=_P3.exact or ()),
    Form("self-instruct", ("instruction", "instances"), _read_instances, one=False),
    Form("oasst", ("message_tree_id", "prompt"), read_tree, one=False, choices=_OASST),
    Form("oasst-messages", ("message_id", "parent_id", "text"), read_messages_tree, one=False, choices=_OASST),
)
SOURCES = tuple(form.name for form in FORMS)
TARGETS = tuple(form.name for form in FORMS if form.write)
PARTS = ("user", "assistant", "input", "system")  # what a column of one's own may be


def form_named(name: str) -> Form:
    """The form of that name. Raises UsageError with the nearest name."""
    found = next((form for form in FORMS if form.name == name), None)
    if found is None:
        raise UsageError(f"unknown form '{name}'{nearest(name, SOURCES)}", todo=f"Known: {', '.join(SOURCES)}.")
    return found


def form_of_columns(columns: Mapping[str, str]) -> Form:
    """A form of one's own: which of PARTS is in which column, e.g. {"user": "question", "assistant": "answer"}.

    Raises UsageError: an unknown part, or no column for the user or the assistant.
    """
    for part, column in columns.items():
        if part not in PARTS:
            turned = f" (the part stands first: {column}={part})" if column in PARTS else nearest(part, PARTS)
            raise UsageError(f"'{part}={column}': unknown part '{part}'{turned}", todo=_columns_todo())
    for part in ("user", "assistant"):
        if part not in columns:
            raise UsageError(f"no column is said to be the {part}", todo=_columns_todo())
    pair = Pair(columns["user"], columns["assistant"], columns.get("input", ""), columns.get("system", ""))
    return Form("columns", (pair.user, pair.assistant), pair.read, also=(pair.input, pair.system))


def _columns_todo() -> str:
    return f"Say it as in user=question,assistant=answer; the parts are {', '.join(PARTS)}."


# ---- which form --------------------------------------------------------------------------------------------------


def forms_of(fields: Iterable[str]) -> list[Form]:
    """The forms whose keys are all there, without those that another of them asks more than."""
    there = set(fields)
    found = [form for form in FORMS if there.issuperset(form.keys)]
    return [form for form in found if not any(set(form.keys) < set(other.keys) for other in found)]


def to_chat(record: Record) -> Chat:
    """The chat that a record of any form with one chat a row holds, ready for training: it ends with the assistant's
    turn. Where the keys of several forms are there, the first of the table is taken.

    Raises DataError: a form that is not known or holds several chats, or a field that is missing, empty or of the
    wrong type.
    """
    found = forms_of(record.fields)
    if not found:
        raise unknown_form(record)
    if not found[0].one:
        todo = "Make chats of them first: lilliput data convert FILE -o chats.jsonl."
        what = f"is a row of the form {found[0].name}, which may hold several chats"
        raise DataError(what, where=record.origin, todo=todo)
    try:
        chats = found[0].read(record.fields, Reading())
        if not chats:
            raise DataError("no chat is left of it: no words of a user are answered")
        check_chat(chats[0], answered=True)
    except DataError as error:
        raise DataError(error.what, where=record.origin, todo=error.todo) from error
    return replace(chats[0], origin=record.origin)


def unknown_form(record: Record) -> DataError:
    """Name the keys seen, the forms understood, and what is missing from the form that comes nearest."""
    closest = max(FORMS, key=lambda form: sum(key in record.fields for key in form.keys) / len(form.keys))
    missing = [key for key in closest.keys if key not in record.fields]
    near = 2 * len(missing) <= len(closest.keys)  # half of its keys are there
    right = closest.keys if near else ()  # keys that need no suggestion
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
