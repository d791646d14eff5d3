"""The built-in demo data: short messages to a shop, to be turned into a small fixed JSON record.

"Hi, this is Vera Cole. please send me six wool blankets by Friday" becomes
`{"kind": "order", "name": "Vera Cole", "item": "wool blankets", "count": 6, "day": "Friday"}`.

Names, things and days are copied as written, the number becomes digits, the kind must be understood, and what the
message does not say is null. Written by this project, made by a seeded generator. The words are in `demo_words.py`;
training and held-out rows share none of them. Not here: how an answer is judged (`lilliput.evaluation.exact_match`).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any, Literal

from lilliput.data.demo_words import HELDOUT, KINDS, TRAIN, Words

SYSTEM = "You write JSON."  # short, since without a system turn the template of SmolLM2 writes a long one
TASK = "Write as JSON: kind (order, booking, complaint or cancel), name, item, count, day; null if not said."

Split = Literal["train", "heldout"]
_WORDS: dict[Split, Words] = {"train": TRAIN, "heldout": HELDOUT}


@dataclass(frozen=True)
class DemoRow:
    """One message and the record that it says; `record` has the keys kind, name, item, count, day in this order."""

    message: str
    record: dict[str, str | int | None]

    @property
    def answer(self) -> str:
        """The record as the model has to write it."""
        return json.dumps(self.record, ensure_ascii=False, separators=(",", ":"))

    @property
    def prompt(self) -> str:
        """What is to be done, and the message: all that the model is told."""
        return f"{TASK}\n\n{self.message}"

    def as_messages(self) -> dict[str, Any]:
        """The row as a data set's record in `messages` form: system, user, assistant."""
        roles = (("system", SYSTEM), ("user", self.prompt), ("assistant", self.answer))
        return {"messages": [{"role": role, "content": content} for role, content in roles]}


def demo_rows(split: Split, count: int, seed: int = 0) -> list[DemoRow]:
    """`count` different rows of one of the two sets, the four kinds equally often.

    The same arguments give the same rows on every machine; a larger `count` only adds rows at the end.
    """
    rng = random.Random(f"{split} {seed}")
    rows: dict[str, DemoRow] = {}
    while len(rows) < count:
        row = _make_row(_WORDS[split], KINDS[len(rows) % len(KINDS)], rng)
        rows.setdefault(row.message, row)
    return list(rows.values())


def _make_row(words: Words, kind: str, rng: random.Random) -> DemoRow:
    """Draw what the message says, then say it."""
    item = rng.choice(_things(words, kind, rng))
    number = rng.choice(tuple(words.numbers)) if rng.random() < 0.6 else None
    day = rng.choice(rng.choice((words.weekdays, words.dates))) if rng.random() < 0.65 else None
    name = _draw_name(words, rng) if rng.random() < 0.75 else None
    count = words.numbers[number] if number else None
    record = {"kind": kind, "name": name, "item": item, "count": count, "day": day}
    slots = {"name": name, "day": day, **_item_slots(words, item, number, rng)}
    sentence = _typos(_sentence(words, kind, day is not None, rng), rng)
    opening, closing = _around(words, name is not None, rng)
    parts = [opening, sentence + rng.choice((".", ".", "!", "", "")), closing]
    return DemoRow(" ".join(part for part in parts if part).format(**slots), record)


def _things(words: Words, kind: str, rng: random.Random) -> tuple[str, ...]:
    """A list that fits the kind; half of what is ordered or booked could be either, so that the thing does not tell."""
    fitting = {"booking": (words.bookables,), "cancel": (words.bookables, words.goods)}.get(kind, (words.goods,))
    return words.either if rng.random() < 0.5 else rng.choice(fitting)


def _draw_name(words: Words, rng: random.Random) -> str:
    first = rng.choice(words.first_names)
    return f"{first} {rng.choice(words.surnames)}" if rng.random() < 0.5 else first


def _item_slots(words: Words, item: str, number: str | None, rng: random.Random) -> dict[str, str]:
    """What `{items}` and `{the_items}` stand for."""
    some, the = rng.choice(words.some), rng.choice(words.the)
    return {"items": f"{number or some} {item}".strip(), "the_items": f"{the} {number or ''} {item}".replace("  ", " ")}


def _sentence(words: Words, kind: str, with_day: bool, rng: random.Random) -> str:
    """A wording with its slots still open, with `{day}` in it or after it when there is a day to say."""
    if not with_day:
        return rng.choice([body for body in words.bodies[kind] if "{day}" not in body])
    body = rng.choice(words.bodies[kind])
    if "{day}" in body:
        return body
    ending = rng.choice(words.day_endings[kind])
    return body + ending if ending[0] in ".," else f"{body} {ending}"


def _around(words: Words, with_name: bool, rng: random.Random) -> tuple[str, str]:
    """What stands before and after the sentence; the name, if it is said, in one of the two."""
    greeting = rng.choice(words.greetings) if rng.random() < 0.4 else ""
    farewell = rng.choice(words.farewells) if rng.random() < 0.3 else ""
    if not with_name:
        return greeting, farewell
    if rng.random() < 0.5:
        return rng.choice(words.introductions), farewell
    return greeting, rng.choice(words.signatures)


def _typos(sentence: str, rng: random.Random) -> str:
    """Misspell a word in some of the sentences, and write some without capitals; slots stay whole."""
    parts = sentence.split(" ")
    plain = [place for place, part in enumerate(parts) if len(part) > 3 and part.isalpha()]
    if plain and rng.random() < 0.2:
        place = rng.choice(plain)
        parts[place] = _misspell(parts[place], rng)
    text = " ".join(parts)
    return text if rng.random() < 0.5 else text[0].upper() + text[1:]


def _misspell(word: str, rng: random.Random) -> str:
    """Swap two letters, lose one, or double one."""
    at = rng.randrange(1, len(word) - 1)
    before, letter, after = word[:at], word[at], word[at + 1 :]
    return rng.choice((before + after[0] + letter + after[1:], before + after, before + letter + letter + after))
