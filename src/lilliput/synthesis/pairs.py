"""Rows as instruction, input and output, whatever form they came in: what is evolved, and what a report looks at.

Not here: forms and files (`lilliput.data`). Of a chat of several questions the first question and answer is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lilliput.data import Chat, SkippedRow, read_records, to_chat
from lilliput.data.records import settle
from lilliput.errors import DataError

RESULT = "data.jsonl"  # what a run's folder has its rows in


@dataclass(frozen=True)
class Pair:
    """One instruction with its answer. input: what an Alpaca row keeps apart, or "". provenance: as its row has it."""

    instruction: str
    output: str
    input: str = ""
    origin: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """Instruction and input, joined by a blank line."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True)
class Pairs:
    """The rows of a file: pairs in its order, its fingerprint, how many chats were cut to a pair, what was skipped."""

    pairs: list[Pair]
    sha256: str
    cut: int
    skipped: list[SkippedRow]


def read_pairs(path: str | Path, *, skip_bad_rows: bool = False) -> Pairs:
    """Read a file in any form that `lilliput.data` reads, or the data.jsonl of a run's folder.

    Raises DataError: no such file or folder, no rows, or a bad row (unless skipped).
    """
    path = Path(path)
    if path.is_dir():
        if not (path / RESULT).is_file():
            todo = "Name a file of rows, or the folder that a run wrote to (its -o)."
            raise DataError(f"has no {RESULT}", where=str(path), todo=todo)
        path = path / RESULT
    records = read_records(path, skip_bad_rows=skip_bad_rows)
    pairs: list[Pair] = []
    bad: list[SkippedRow] = []
    cut = 0
    for record in records:
        try:
            chat = to_chat(record)
        except DataError as error:
            if error.todo and not skip_bad_rows:  # what to do about it is more than a place can say
                raise
            bad.append(SkippedRow(record.origin, error.what, record.row))
        else:
            cut += len(chat.turns) > 2 or bool(chat.tools)
            pairs.append(pair_of(chat, record.fields.get("provenance")))
    settle(path, bad, len(records), skip=skip_bad_rows)
    return Pairs(pairs, records.sha256, cut, [*records.skipped, *bad])


def pair_of(chat: Chat, provenance: Any = None) -> Pair:
    """The first question and answer of a chat; its system turn, its tools and what comes later are left out."""
    at = 1 if chat.turns[0].role == "system" else 0
    question, answer = chat.turns[at].content, chat.turns[at + 1].content
    birth = provenance if isinstance(provenance, dict) else {}
    return Pair(chat.without_input(question), answer, chat.input, chat.origin, birth)
