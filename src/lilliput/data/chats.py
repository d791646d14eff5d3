"""What a chat is: turns with roles, checked in one place and trusted by the rest.

A chat may begin with a system turn; then user and assistant speak in turns, the user first. Between two turns of the
assistant a tool may answer: the assistant calls it in its own words, `tool` turns hold what came back, and the
assistant goes on. No turn is without words.
Not here: the forms of rows (`forms.py`), how a chat is written for a model (`templates.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lilliput.errors import DataError, nearest

ROLES = ("system", "user", "assistant", "tool")
# Who may speak after whom; "" stands before the first turn. The first of each is named where another one spoke.
_NEXT = {
    "": ("user", "system"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),  # a call of several tools is answered by each
}


# Not frozen: that makes a dataclass four times slower to make, and a conversion makes millions. Nobody changes one.
@dataclass(slots=True, unsafe_hash=True)
class Turn:
    """What one side said: `role` is one of ROLES."""

    role: str
    content: str


@dataclass(slots=True, unsafe_hash=True)
class Chat:
    """Turns in order, and the place of the row they come from.

    `input` is the end of the first user turn that an Alpaca row keeps apart ("" if none): the turn's content is
    `instruction + "\\n\\n" + input`. Chat templates write the content; the Alpaca prompt writes the two parts.
    `tools` says in JSON which tools the assistant may call ("" if none is said): a list of objects.
    """

    turns: tuple[Turn, ...]
    origin: str = ""
    input: str = ""
    tools: str = ""

    def without_input(self, question: str) -> str:
        """The first question without the `input` at its end: the instruction of an Alpaca row."""
        return question.removesuffix(f"\n\n{self.input}") if self.input else question

    @property
    def prompt(self) -> Chat:
        """The same chat without its last answer: what `prompt_ids` takes."""
        return replace(self, turns=self.turns[:-1]) if self.turns and self.turns[-1].role == "assistant" else self


def check_chat(chat: Chat, *, answered: bool) -> None:
    """Raise DataError unless the turns are a chat that ends with the assistant's (`answered`) or the others' words."""
    turns = chat.turns
    before = ""
    for number, turn in enumerate(turns, start=1):
        role, content = turn.role, turn.content
        # One expression for the chats that are well, since all of a data set's pass here; the words come afterwards.
        if not content or role not in _NEXT[before] or content.isspace() or not is_whole(content):
            _refuse(chat, number, before)
        before = role
    if not turns:
        raise DataError("has no turns", where=chat.origin or None)
    if answered and before != "assistant":
        todo = "Only the assistant's words are learned: end the chat with them."
        raise DataError(f"the last turn is the {before}'s, not the assistant's", where=chat.origin or None, todo=todo)
    if not answered and before not in ("user", "tool"):
        raise DataError(f"the last turn is the {before}'s, so there is nothing to answer", where=chat.origin or None)


def is_whole(text: str) -> bool:
    """Whether no lone surrogate is in a text: half a character, as a terminal without UTF-8 or an escape gives."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(chat: Chat, number: int, before: str) -> None:
    """Raise what is wrong with turn `number`, which follows a turn of `before`."""
    role, content = chat.turns[number - 1].role, chat.turns[number - 1].content
    where, todo = chat.origin or None, None
    if role not in ROLES:
        what = f"turn {number} has the unknown role '{role}' (known are {', '.join(ROLES)}){nearest(role, ROLES)}"
    elif not content.strip():
        what = f"turn {number} ({role}) has no words"
    elif not is_whole(content):
        what = f"turn {number} ({role}) holds half a character (a lone surrogate)"
    elif role == "system":
        what = f"turn {number} is a system turn; only the first may be"
    else:
        what = f"turn {number} is the {role}'s where the {_NEXT[before][0]}'s was expected"
        todo = "User and assistant speak in turns, the user first; a tool answers the assistant."
    raise DataError(what, where=where, todo=todo)
