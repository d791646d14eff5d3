"""ShareGPT conversations: speakers become roles, and what people pasted is cleaned; each kind of mending is counted.

    human, gpt, gpt, human                       ->  user, assistant           answers joined, the last question dropped
    gpt, human, function_call, observation, gpt  ->  user, assistant, tool, assistant          the first words dropped

The steps are those that Vicuna's authors describe for this data (HTML to text, no empty turns, long ones split), one
function each. Turns of the same speaker that follow each other are joined with a blank line between: an answer that was
continued is one answer. Where somebody speaks who cannot (a tool without a call), the row is a bad one.
Not here: languages, duplicates, splitting (`conversion.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lilliput.data.chats import Chat, Turn
from lilliput.data.markup import html_to_text, is_html
from lilliput.data.reading import Fields, Reading, check_item, items
from lilliput.errors import DataError, nearest

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",  # the words with which it calls a tool
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_NAMES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def read_conversation(fields: Fields, reading: Reading) -> list[Chat]:
    """The chat of a row's `conversations`, cleaned; none where nothing is left.

    Raises DataError naming the item that is no turn or has an unknown speaker.
    """
    given = [] if fields.get("conversations") == [] else items(fields, "conversations", "turns")
    turns = [_turn(item, number) for number, item in enumerate(given)]
    for step in _STEPS:
        turns = step(turns, reading)
    if not turns:
        reading.dropped["conversations of which nothing is left"] += 1
        return []
    return [Chat(tuple(turns))]


def write_conversation(chat: Chat) -> Fields:
    """The row that says a chat in this form."""
    row: Fields = {"conversations": [{"from": _NAMES[turn.role], "value": turn.content} for turn in chat.turns]}
    if chat.tools:
        row["tools"] = chat.tools
    return row


def _turn(item: Any, number: int) -> Turn:
    """A turn of `from` and `value`, or of `role` and `content`, as some sets of this form have them."""
    path = f"conversations[{number}]"
    keys = (
        ("role", "content") if isinstance(item, dict) and "from" not in item and "role" in item else ("from", "value")
    )
    if isinstance(item, dict) and item.get(keys[1], "") is None:
        item = {**item, keys[1]: ""}  # null is a turn without words, as "" is
    check_item(item, path, keys)
    speaker, words = item[keys[0]], item[keys[1]]
    role = SPEAKERS.get(speaker) or SPEAKERS.get(speaker.strip().lower())
    if role is None:
        known = f"known are {', '.join(SPEAKERS)}"
        raise DataError(f"{path}.{keys[0]} is the unknown speaker '{speaker}' ({known}){nearest(speaker, SPEAKERS)}")
    return Turn(role, words)


# ---- the steps of cleaning ---------------------------------------------------------------------------------------


def _without_html(turns: list[Turn], reading: Reading) -> list[Turn]:
    """Turns that are wholly HTML, as text."""
    if reading.choices.keep_html:
        return turns
    cleaned = [Turn(turn.role, html_to_text(turn.content)) if is_html(turn.content) else turn for turn in turns]
    reading.changed["turns of HTML made text"] += sum(new is not old for new, old in zip(cleaned, turns, strict=True))
    return cleaned


def _without_empty(turns: list[Turn], reading: Reading) -> list[Turn]:
    full = [turn for turn in turns if turn.content.strip()]
    reading.dropped["turns without words"] += len(turns) - len(full)
    return full


def _joined(turns: list[Turn], reading: Reading) -> list[Turn]:
    """Neighbours of the same role as one turn; the answers of several tools stay apart."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role != "tool":
            joined[-1] = Turn(turn.role, f"{joined[-1].content}\n\n{turn.content}")
            reading.changed["turns joined to the same speaker's before"] += 1
        else:
            joined.append(turn)
    return joined


def _from_the_user_on(turns: list[Turn], reading: Reading) -> list[Turn]:
    """Without what the assistant and tools say before anybody asked; a system turn at the beginning stays."""
    start = next((place for place, turn in enumerate(turns) if turn.role == "user"), len(turns))
    head = turns[:1] if turns[:1] and turns[0].role == "system" and start < len(turns) else []
    reading.dropped["turns before the user's first"] += start - len(head)
    return head + turns[start:]


def _to_the_last_answer(turns: list[Turn], reading: Reading) -> list[Turn]:
    """Without what is not answered at the end."""
    end = max((place for place, turn in enumerate(turns, start=1) if turn.role == "assistant"), default=0)
    reading.dropped["turns without an answer at the end"] += len(turns) - end
    return turns[:end]


_STEPS: tuple[Callable[[list[Turn], Reading], list[Turn]], ...] = (
    _without_html,
    _without_empty,
    _joined,
    _from_the_user_on,
    _to_the_last_answer,
)
