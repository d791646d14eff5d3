"""OpenAssistant: trees of messages become chats, along the best replies, along all, or along the N best of each.

Source: OpenAssistant Conversations, arXiv 2304.07327, section 3 and its export: a tree a line (`prompt` with nested
`replies`), or a message a line (`message_id`, `parent_id`), which is built into trees again; a reply may stand in its
file before what it replies to. The replies to a user were ranked by people, 0 is the best.

    prompter ─┬─ assistant (rank 0) ─┬─ prompter ── assistant        best: the first of these chats
              │                      └─ prompter ── assistant        top-1: the first two
              └─ assistant (rank 1)                                  all: all three

A message is left out, with all below it, when it is deleted, refused by its reviewers (`review_result` false: spam and
the like), not reviewed (`review_result` null or missing), in another language than wanted, or without words. What a
model wrote (`synthetic`) has no reviews but the result `true` in the export, and stays. Nothing here calls itself, so a
tree of single messages may be as deep as it likes; nested trees end where JSON parsers do, at some hundred levels.
Not here: labels and emojis.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lilliput.data.chats import Chat, Turn
from lilliput.data.reading import Choices, Fields, Reading, missing, type_of
from lilliput.data.records import Record, SkippedRow, kind_of, parse_line, quick_fields, readable, stream_records
from lilliput.errors import DataError, UsageError, nearest

_ROLES = {"prompter": "user", "assistant": "assistant"}
_ABORTED = ("aborted_low_grade", "halted_by_moderator")  # states of a tree that was given up
_TREE, _PARENTS = "tree", "parents"  # what `MessageFile` hands to `read_messages_tree`


@dataclass(slots=True)
class _Message:
    """One message of a tree: numbers are places in the list of all."""

    role: str
    words: str
    rank: float | None
    parent: int
    position: int  # which of its parent's replies
    kept: bool = True
    replies: list[int] = field(default_factory=list)


def check_paths(paths: str) -> int | None:
    """How many replies are followed where there are several: of "best" and "top-2" 1 and 2, of "all" None.

    Raises UsageError for any other word.
    """
    if paths in ("best", "all"):
        return 1 if paths == "best" else None
    found = re.fullmatch(r"top-([1-9][0-9]*)", paths)
    if not found:
        raise UsageError(
            f"unknown value '{paths}'{nearest(paths, ('best', 'all', 'top-2'))}",
            where="--paths",
            todo="Known: best, all, and top-1, top-2, ….",
        )
    return int(found[1])


def read_tree(fields: Fields, reading: Reading) -> list[Chat]:
    """The chats of a row that holds a tree under `prompt`.

    Raises DataError naming the field that is missing or of the wrong type, e.g. `replies[2].text`.
    """
    if fields.get("tree_state") in _ABORTED:
        reading.dropped["trees that were given up"] += 1
        return []
    if "prompt" not in fields:
        raise missing(fields, "prompt")
    messages: list[_Message] = []
    _add(messages, fields["prompt"], -1, reading, "prompt")
    return _chats(messages, reading)


def read_messages_tree(fields: Fields, reading: Reading) -> list[Chat]:
    """The chats of a tree that `MessageFile` built of single messages."""
    messages: list[_Message] = []
    places: list[int] = []
    for message, parent in zip(fields[_TREE], fields[_PARENTS], strict=True):
        places.append(len(messages))
        _add(messages, message, places[parent] if parent >= 0 else -1, reading)
    return _chats(messages, reading)


# ---- from JSON to messages ---------------------------------------------------------------------------------------


def _add(messages: list[_Message], top: Any, parent: int, reading: Reading, name: str = "") -> None:
    """Append a message and all that is nested in its `replies`, each before its replies; `name` is what
    the row calls the first."""
    waiting = [(top, parent, 0)]
    first = len(messages)
    while waiting:
        value, above, position = waiting.pop()
        try:
            message = _message(value, above, position)
            if above >= 0 and messages[above].role == message.role:
                raise DataError(f".role is {value['role']}, as that of the message above it")
        except DataError as error:
            raise DataError(f"{_path(messages, above, position, first, name)}{error.what}".lstrip(". ")) from error
        refused = _refusal(value, reading.choices)
        if above >= 0 and not messages[above].kept:
            refused = "replies below dropped messages"
        if refused:
            reading.dropped[refused] += 1
            message.kept = False
        if above >= 0:
            messages[above].replies.append(len(messages))
        messages.append(message)
        replies = value.get("replies") or []
        waiting += [(reply, len(messages) - 1, place) for place, reply in reversed(list(enumerate(replies)))]


def _message(value: Any, parent: int, position: int) -> _Message:
    """Raises DataError that begins with the field: " is null, not an object" or ".text is null, not text"."""
    if not isinstance(value, dict):
        raise DataError(f" is {type_of(value)}, not an object")
    role, words, rank, replies = (value.get(key) for key in ("role", "text", "rank", "replies"))
    if not isinstance(role, str) or role not in _ROLES:
        hint = nearest(role, _ROLES) if isinstance(role, str) else ""
        raise DataError(f".role is {role!r}, not prompter or assistant{hint}" if role else ".role is missing")
    for key in ("deleted", "review_result"):
        if not isinstance(value.get(key), bool | None):  # the text "False" of a CSV file would count as true
            raise DataError(f".{key} is {type_of(value[key])}, not true or false")
    if not isinstance(words, str) and not value.get("deleted"):
        raise DataError(f".text is {type_of(words) if 'text' in value else 'missing'}, not text")
    if rank is not None and not isinstance(rank, int | float):
        raise DataError(f".rank is {type_of(rank)}, not a number")
    if replies is not None and not isinstance(replies, list):
        raise DataError(f".replies is {type_of(replies)}, not a list of messages")
    return _Message(_ROLES[role], words or "", rank, parent, position)


def _path(messages: list[_Message], parent: int, position: int, first: int, name: str) -> str:
    """Where a message stands within its row: `prompt`, or `replies[2].replies[0]`."""
    steps: list[str] = []
    while parent >= first:
        steps.append(f"replies[{position}]")
        parent, position = messages[parent].parent, messages[parent].position
    if len(steps) > 6:
        steps[3:-3] = [f"… {len(steps) - 6} more …"]
    return ".".join(reversed(steps)) or name


def _refusal(value: Fields, choices: Choices) -> str:
    """Why a message is left out, as its count is called; "" if it is not."""
    if value.get("deleted"):
        return "deleted messages"
    if value.get("tree_state") in _ABORTED:
        return "messages of trees that were given up"
    result = value.get("review_result")
    if result is False:
        return "messages that reviewers refused"
    if result is None and not choices.unreviewed:
        return "messages that nobody reviewed"
    if choices.languages:
        language, wanted = str(value.get("lang") or "").lower(), {name.lower() for name in choices.languages}
        if language not in wanted and language.split("-")[0] not in wanted:
            return "messages in other languages"
    return "" if value["text"].strip() else "messages without words"


# ---- from messages to chats --------------------------------------------------------------------------------------


def _chats(messages: list[_Message], reading: Reading) -> list[Chat]:
    if messages[0].role != "user":
        raise DataError("the first message is the assistant's, not a prompter's")
    most = check_paths(reading.choices.paths)
    ends = list(_ends(messages, most, only_one=reading.choices.paths == "best"))
    if not ends:
        reading.dropped["trees without an answer"] += 1
    return [Chat(_turns_to(messages, end)) for end in ends]


def _ends(messages: list[_Message], most: int | None, only_one: bool) -> Iterator[int]:
    """The answers with which chats end: those that nobody went on from. `most` replies of the assistant are followed.

    With `only_one` of several questions that follow an answer the first one that was answered is followed.
    """
    waiting = [0] if messages[0].kept else []
    while waiting:
        place = waiting.pop()
        if messages[place].role == "user":
            waiting += reversed(_answers(messages, place)[:most])
            continue
        asked = [reply for reply in _kept(messages, place) if _answers(messages, reply)]
        if not asked:
            yield place
        waiting += reversed(asked[:1] if only_one else asked)


def _kept(messages: list[_Message], place: int) -> list[int]:
    return [reply for reply in messages[place].replies if messages[reply].kept]


def _answers(messages: list[_Message], place: int) -> list[int]:
    """The kept replies to a user, the best first; those without a rank come last, in the order of the file."""

    def order(reply: int) -> float:
        rank = messages[reply].rank
        return float("inf") if rank is None else rank

    return sorted(_kept(messages, place), key=order)


def _turns_to(messages: list[_Message], end: int) -> tuple[Turn, ...]:
    turns = []
    while end >= 0:
        turns.append(Turn(messages[end].role, messages[end].words))
        end = messages[end].parent
    return tuple(reversed(turns))


# ---- single messages ---------------------------------------------------------------------------------------------


@dataclass
class MessageFile:
    """A file of single messages as trees; the file is read twice, and an index of it is all that is kept in memory.

    Attributes:
        path: JSONL; of the other kinds of file the messages themselves are kept.
        rows: messages seen, once `trees` has begun.
        orphans: where those stand whose tree does not begin in this file.
    """

    path: Path
    rows: int = 0
    orphans: list[str] = field(default_factory=list)

    def trees(self) -> Iterator[Record | SkippedRow]:
        """First the rows that cannot be used, then a record for each tree, in the order of their first messages."""
        lines = kind_of(self.path) == "jsonl"
        with readable(self.path), open(self.path, "rb") as file:
            index = _Index()
            for handle, row in _handles(file, self.path.name) if lines else _held(self.path):
                self.rows += 1
                fault = row if isinstance(row, SkippedRow) else index.add(row, handle)
                if fault:
                    yield fault
            self.orphans = index.orphans(self.path.name)
            for root in index.roots:
                yield _tree(index, root, file, self.path.name)


@dataclass
class _Index:
    """What replies to what. A handle finds a message again: where its line begins and its number, or the row itself."""

    handles: dict[str, Any] = field(default_factory=dict)
    replies: dict[str, list[str]] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)

    def add(self, row: Record, handle: Any) -> SkippedRow | None:
        """Take a message, or say what is wrong with it."""
        name, parent = row.fields.get("message_id"), row.fields.get("parent_id")
        try:
            if not isinstance(name, str) or not name:
                raise DataError(f"'message_id' is {type_of(name)}, not text")
            if parent is not None and not isinstance(parent, str):
                raise DataError(f"'parent_id' is {type_of(parent)}, neither text nor null")
            if name in self.handles:
                raise DataError(f"the message_id '{name}' stands in the file before")
            _add([], row.fields, -1, Reading())
        except DataError as error:
            return SkippedRow(row.origin, error.what, row.row)
        self.handles[name] = handle
        if parent:
            self.replies.setdefault(parent, []).append(name)
        else:
            self.roots.append(name)
        return None

    def orphans(self, file: str) -> list[str]:
        """Where the messages stand that no tree leads to, in the order of the file."""
        reached = set(self.roots)
        waiting = list(self.roots)
        while waiting:
            below = self.replies.get(waiting.pop(), [])
            reached.update(below)
            waiting += below
        lost = [handle for name, handle in self.handles.items() if name not in reached]
        return [handle.origin if isinstance(handle, Record) else f"{file}:{handle[1]}" for handle in lost]


def _handles(file: BinaryIO, name: str) -> Iterator[tuple[Any, Record | SkippedRow]]:
    """Each row of a JSONL file with its handle."""
    at, row = 0, 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            row += 1
            origin, fields = f"{name}:{number}", quick_fields(line)
            yield (at, number), Record(fields, origin, row) if fields else parse_line(line, origin, row)
        at += len(line)


def _held(path: Path) -> Iterator[tuple[Any, Record | SkippedRow]]:
    for row in stream_records(path):
        yield row, row


def _tree(index: _Index, root: str, file: BinaryIO, name: str) -> Record:
    """A tree's messages, each before its replies, with the place of what they reply to, for `read_messages_tree`."""
    messages: list[Fields] = []
    parents: list[int] = []
    waiting = [(root, -1)]
    while waiting:
        at, parent = waiting.pop()
        handle = index.handles[at]
        messages.append(handle.fields if isinstance(handle, Record) else _at(file, handle[0]))
        parents.append(parent)
        waiting += [(reply, len(messages) - 1) for reply in reversed(index.replies.get(at, []))]
    first = index.handles[root]
    origin = first.origin if isinstance(first, Record) else f"{name}:{first[1]}"
    return Record({_TREE: messages, _PARENTS: parents}, origin)


def _at(file: BinaryIO, place: int) -> Fields:
    """The message whose line begins there; it was read before, so it is well."""
    file.seek(place)
    line = file.readline()
    fields = quick_fields(line)
    if fields is None:
        row = parse_line(line, "", 0)
        assert isinstance(row, Record), "the index has rows that are well"
        fields = row.fields
    return fields
