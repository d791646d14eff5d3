"""The journal: what was written is read again, half a line is dropped, other faults and a second writer are named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lilliput.errors import DataError, DiskError, UsageError
from lilliput.synthesis.cost import Price
from lilliput.synthesis.journal import Journal, hash_of, json_bytes, read_journal
from lilliput.synthesis.teacher import Decoding, Reply, Request

ASKED = Request("round 1/0", "Write «ten» tasks.", Decoding(0.5, stop=("\n\n",)), seed=7)
ANSWER = Reply("1. Zähle bis zehn.\u2028", "length", "writer-1", 12, 7, 0.25, tries=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of one answer and two decisions."""
    journal = Journal(tmp_path / "out" / "journal.jsonl", {"seed": 1, "method": "test"}, Price(0.5, 1.5))
    journal.answer(ASKED, ANSWER)
    journal.decision("a", {"row": {"instruction": "Count."}})
    journal.decision("b", {"step": "filter", "reason": "too short"})
    journal.close()
    return journal.path


def open_again(path: Path) -> Journal:
    return Journal(path, {"method": "test", "seed": 1})


def test_what_was_written_is_read(path: Path) -> None:
    state = read_journal(path.parent)
    assert state.settings == {"seed": 1, "method": "test"}
    assert state.answers[ASKED.key].reply == ANSWER
    assert state.answers[ASKED.key].sha256 == hash_of(ASKED)
    assert list(state.decisions) == ["a", "b"]
    assert state.rows == [{"instruction": "Count."}]
    assert (state.spent.requests, state.spent.retries, state.spent.prompt_tokens) == (1, 1, 12)
    assert state.spent.line(state.price) == "1 requests, 19 tokens, cost 0.00, 1 retries"
    assert 0 <= state.seconds < 60
    assert state.end == path.stat().st_size


def test_every_prompt_is_in_it_once_with_its_answer(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("Write «ten» tasks.") == 1
    [line] = [json.loads(line) for line in text.split("\n") if '"answer"' in line]
    assert line["request"]["decoding"] == {
        "temperature": 0.5,
        "top_p": 1.0,
        "max_tokens": 1024,
        "stop": ["\n\n"],
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def test_starts_are_counted(path: Path) -> None:
    open_again(path).close()
    assert len(read_journal(path).starts) == 2


def test_wherever_it_is_cut_all_whole_lines_are_kept_and_it_goes_on(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    for cut in range(0, len(whole), 7):
        broken = tmp_path / "broken.jsonl"
        broken.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        state = read_journal(broken)
        assert len(state.starts) + len(state.answers) + len(state.decisions) == kept
        journal = open_again(broken)
        journal.decision("c", {})
        journal.close()
        again = read_journal(broken)
        assert again.tail == 0
        assert len(again.starts) + len(again.answers) + len(again.decisions) == kept + 2


@pytest.mark.parametrize("tail", [b'{"kind": "deci', b"\0" * 100, b'{"kind"\n', "ä".encode()[:1]])
def test_a_broken_last_line_is_dropped_and_said(path: Path, tail: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes()
    path.write_bytes(before + tail)
    open_again(path).close()
    assert path.read_bytes().startswith(before + b'{"kind":"begin"')
    assert f"cut short ({len(tail)} bytes)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "not a line of a journal"),
        ("[1]", "not a line of a journal"),
        ('{"kind": "guess"}', "unknown kind 'guess'"),
        ('{"kind": "answer", "key": "x", "time": "t"}', "'answer' that is not as it should be (KeyError: 'sha256')"),
        ('{"kind": "decision", "key": "a", "time": "t", "decision": {}}', "'a' is there already"),
    ],
)
def test_any_other_broken_line_is_named(path: Path, line: str, said: str) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]), encoding="utf-8")
    for read in (read_journal, open_again):
        with pytest.raises(DataError) as caught:
            read(path)
        assert caught.value.where == f"{path}:4"
        assert said in caught.value.what


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kind": "decision", "key": "a", "decision": {}}\n{"instruction": "x"}\n')
    with pytest.raises(DataError, match="starts with a line of kind 'begin'"):
        read_journal(path)
    with pytest.raises(DataError, match=r"nowhere/journal.jsonl: no such file|nowhere: no such file"):
        read_journal(tmp_path / "nowhere")


def test_other_settings_are_refused_by_name(path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        Journal(path, {"seed": 2, "rounds": 4, "method": "test"})
    assert "(seed 1 then, 2 now; rounds None then, 4 now)" in caught.value.what
    assert read_journal(path).settings == {"seed": 1, "method": "test"}


def test_settings_may_change_as_long_as_nothing_was_answered(tmp_path: Path) -> None:
    """A first start with a wrong name or URL must not take the directory for good."""
    Journal(tmp_path / "j.jsonl", {"teacher": "mistyped"}).close()
    Journal(tmp_path / "j.jsonl", {"teacher": "right"}).close()
    assert read_journal(tmp_path / "j.jsonl").settings == {"teacher": "right"}


def test_settings_are_compared_as_json_says_them(path: Path, tmp_path: Path) -> None:
    settings = {"operations": ("a", "b"), "rate": 0.1}
    Journal(tmp_path / "j.jsonl", settings).close()
    Journal(tmp_path / "j.jsonl", settings).close()


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_writers_are_refused(path: Path) -> None:
    journal = open_again(path)
    size = path.stat().st_size
    with pytest.raises(UsageError, match="another run is writing this journal"):
        open_again(path)
    assert len(read_journal(path).starts) == 2  # readers may
    assert path.stat().st_size == size
    journal.close()
    open_again(path).close()


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_the_lock_goes_with_a_killed_program(path: Path) -> None:
    program = (
        "import os, signal, sys; from lilliput.synthesis.journal import Journal;"
        "journal = Journal(sys.argv[1], {'seed': 1, 'method': 'test'}); journal.decision('c', {});"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -9
    journal = open_again(path)
    assert list(journal.state.decisions) == ["a", "b", "c"]
    journal.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_told(path: Path) -> None:
    journal = open_again(path)
    before = path.read_bytes()
    plain = journal._file
    with open("/dev/full", "ab", buffering=0) as full:
        journal._file = _Full(full, plain)  # type: ignore[assignment]
        with pytest.raises(DiskError, match=r"No space left.*run the same command again"):
            journal.decision("c", {})
    journal._file = plain
    journal.close()
    assert path.read_bytes() == before


class _Full:
    """Writes to a disk without room, truncates the real file."""

    def __init__(self, full: object, plain: object) -> None:
        self.write, self.truncate = full.write, plain.truncate  # type: ignore[attr-defined]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DiskError, match=r"cannot be written .*Choose another place"):
        Journal(tmp_path / "out" / "journal.jsonl", {})


def test_the_hash_depends_on_all_but_the_key() -> None:
    others = [
        Request("k", "Write ten tasks.", seed=8),
        Request("k", "Write ten tasks!", seed=7),
        Request("k", "Write ten tasks.", Decoding(0.1), seed=7),
        Request("k", "Write ten tasks.", system="Be brief.", seed=7),
        Request("k", "Write ten tasks.", seed=7, schema={"type": "object"}),
    ]
    same = [Request("k", "Write ten tasks.", seed=7), Request("other", "Write ten tasks.", seed=7)]
    assert len({hash_of(request) for request in (*others, *same)}) == len(others) + 1


def test_half_a_character_can_be_written() -> None:
    assert json.loads(json_bytes({"text": "a\ud83d"})) == {"text": "a\ud83d"}
    assert json_bytes("ä") == '"ä"'.encode()
