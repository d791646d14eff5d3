"""A run: what was answered and decided is kept wherever it is stopped, and the end is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lilliput.errors import DataError, TeacherError, UsageError
from lilliput.synthesis.cost import Price
from lilliput.synthesis.journal import read_journal
from lilliput.synthesis.run import Run, dice, seed_of
from lilliput.synthesis.teacher import Reply, Request

SETTINGS = {"method": "test", "seed": 3}


class Script:
    """A teacher that answers a prompt with its length, last request first, and breaks after `breath` answers."""

    def __init__(self, breath: int = 1_000_000, fault: BaseException | None = None, name: str = "script") -> None:
        self.name, self.breath, self.fault, self.asked = name, breath, fault, list[str]()

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in reversed(list(enumerate(requests))):
            if self.breath == 0:
                raise self.fault or TeacherError("is away", where="http://there", todo="Start it.")
            self.breath -= 1
            self.asked.append(request.key)
            yield number, Reply(f"{len(request.prompt)} {request.seed % 97}", prompt_tokens=5, completion_tokens=2)


def method(run: Run, rounds: int = 4) -> list[dict[str, object]]:
    """A small method as the real ones are: rounds of questions that depend on earlier answers, accepted or refused."""
    words = "go"
    for turn in range(rounds):
        keys = [f"round {turn}/{number}" for number in range(5)]
        asked = [Request(key, words * dice(3, key).randint(1, 9), seed=seed_of(3, key)) for key in keys]
        for request, reply in zip(asked, run.ask(asked), strict=True):

            def judge(turn: int = turn, request: Request = request, reply: Reply = reply) -> dict[str, object]:
                if len(reply.text) % 2:
                    return {"step": "filter", "reason": "odd"}
                return {"row": {"text": reply.text, "provenance": run.provenance(request, reply, round=turn)}}

            words += str(run.decide(request.key, judge).get("reason", "."))
        run.progress(len(run.rows()), 20, f"round {turn}")
    return run.rows()


def without_times(rows: list[dict]) -> list[dict]:
    return [{**row, "provenance": {**row["provenance"], "time": ""}} for row in rows]


@pytest.fixture
def expected(tmp_path: Path) -> list[dict]:
    with Run(tmp_path / "whole", Script(), SETTINGS, progress=False) as run:
        return without_times(method(run))


def test_replies_stand_in_the_order_of_the_requests(tmp_path: Path) -> None:
    asked = [Request(f"{n}", "x" * n) for n in range(1, 6)]
    with Run(tmp_path, Script(), SETTINGS, progress=False) as run:
        assert [reply.text.split()[0] for reply in run.ask(asked)] == ["1", "2", "3", "4", "5"]
        assert run.ask([]) == []


@pytest.mark.parametrize("fault", [TeacherError("is away"), KeyboardInterrupt()], ids=["out of reach", "Ctrl-C"])
def test_stopped_anywhere_the_end_is_the_same(
    tmp_path: Path, expected: list[dict], fault: BaseException | None
) -> None:
    asked: list[str] = []
    for _ in range(40):
        teacher = Script(breath=3, fault=fault)
        try:
            with Run(tmp_path / "out", teacher, SETTINGS, progress=False) as run:
                rows = method(run)
        except (TeacherError, KeyboardInterrupt):
            rows = []
        asked += teacher.asked
        if rows:
            break
    assert without_times(rows) == expected
    assert len(asked) == len(set(asked)) == 20  # nothing was asked twice
    assert len(read_journal(tmp_path / "out").starts) == 7


def test_cut_after_any_line_the_end_is_the_same(tmp_path: Path, expected: list[dict]) -> None:
    lines = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for cut in range(0, len(lines), 3):
        out = tmp_path / f"cut {cut}"
        out.mkdir()
        (out / "journal.jsonl").write_bytes(b"".join(lines[:cut]) + lines[cut][:11])
        with Run(out, Script(), SETTINGS, progress=False) as run:
            assert without_times(method(run)) == expected


def test_a_run_that_is_complete_asks_nothing(tmp_path: Path, expected: list[dict]) -> None:
    teacher = Script(breath=0)
    with Run(tmp_path / "whole", teacher, SETTINGS, progress=False) as run:
        assert without_times(method(run)) == expected


def test_out_of_reach_says_how_to_go_on(tmp_path: Path) -> None:
    with Run(tmp_path, Script(breath=2), SETTINGS, progress=False) as run, pytest.raises(TeacherError) as caught:
        method(run)
    kept = f"What was answered is kept in {tmp_path}: run the same command again to go on."
    assert str(caught.value) == f"http://there: is away. Start it. {kept}"


def test_a_teacher_that_leaves_out_answers_is_told(tmp_path: Path) -> None:
    class Lazy(Script):
        def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            yield from list(super().complete(requests))[1:]

    with Run(tmp_path, Lazy(), SETTINGS, progress=False) as run:
        with pytest.raises(TeacherError, match=r"script: answered 4 of 5 requests"):
            method(run)
        assert len(run.state.answers) == 4


def test_another_request_under_a_known_key_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path, Script(), SETTINGS, progress=False) as run:
        run.ask([Request("a", "one")])
        with pytest.raises(DataError, match=r"journal.jsonl: the answer under 'a' belongs to another request"):
            run.ask([Request("a", "two")])


def test_another_teacher_or_seed_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path, Script(), SETTINGS, progress=False) as run:
        run.ask([Request("a", "one")])
    with pytest.raises(UsageError, match=r"teacher 'script' then, 'other' now; seed 3 then, 4 now"):
        Run(tmp_path, Script(name="other"), {**SETTINGS, "seed": 4}, progress=False)


def test_a_decision_is_made_once_and_is_plain(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, object]:
        made.append(1)
        return {"labels": ("a", "b"), "by": {1: 2.5}}

    for _ in range(2):
        with Run(tmp_path, Script(), SETTINGS, progress=False) as run:
            assert run.decide("k", make) == run.decide("k", make) == {"labels": ["a", "b"], "by": {"1": 2.5}}
    assert made == [1]


def test_a_failed_answer_is_final(tmp_path: Path) -> None:
    class Refuses(Script):
        def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            for number, _ in enumerate(requests):
                yield number, Reply("", "refused", error="content filter")

    request = Request("a", "Say something bad.")
    with Run(tmp_path, Refuses(), SETTINGS, progress=False) as run:
        assert run.ask([request])[0].error == "content filter"
    with Run(tmp_path, Script(), SETTINGS, progress=False) as run:
        assert run.ask([request])[0].error == "content filter"
        assert run.spent.failed == 1


def test_half_a_character_is_replaced_before_it_is_kept(tmp_path: Path) -> None:
    class Cuts(Script):
        def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            yield 0, Reply("a fox \ud83e", "length")

    for _ in range(2):
        with Run(tmp_path, Cuts(), SETTINGS, progress=False) as run:
            assert run.ask([Request("a", "x")])[0].text == "a fox \ufffd"


def test_provenance_names_what_made_a_row(tmp_path: Path) -> None:
    request = Request("a", "x", seed=5)
    with Run(tmp_path, Script(), SETTINGS, progress=False) as run:
        [reply] = run.ask([request])
        born = run.provenance(request, reply, parents=["seed 1"])
    assert born.pop("time").startswith("20")
    assert born.pop("decoding")["temperature"] == 0.7
    assert born == {
        "request": "a",
        "prompt_sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",  # of "x"
        "model": "script",
        "seed": 5,
        "parents": ["seed 1"],
    }


def test_seeds_and_dice_are_pinned() -> None:
    """A run that was begun with an earlier version must go on the same."""
    assert [seed_of(0, "a"), seed_of(1, "a"), seed_of(0, "b")] == [1771091398, 1603193915, 1053646646]
    assert [dice(0, "a").randint(0, 999), dice(0, "b").randint(0, 999)] == [955, 160]


def test_the_bar_counts_rows_requests_and_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run(tmp_path, Script(), SETTINGS, price=Price(1e5, 1e5)) as run:
        method(run)
        run.progress(20, 20, "the end")
    said = " ".join(capsys.readouterr().err.split())
    assert "rows: 20/20" in said
    assert "the end 20 requests, 140 tokens, cost 14.00" in said
    with Run(tmp_path, Script(), SETTINGS) as run:
        method(run)
    said = " ".join(capsys.readouterr().err.split())
    assert "goes on; 20 answers and 20 decisions are there already" in said
    assert "rows:" not in said


def test_a_teacher_that_answers_twice_leaves_a_readable_journal(tmp_path: Path) -> None:
    class Twice(Script):
        def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            for answer in super().complete(requests):
                yield answer
                yield answer

    with Run(tmp_path, Twice(), SETTINGS, progress=False) as run, pytest.raises(AssertionError, match="twice"):
        run.ask([Request("1", "x")])
    assert list(read_journal(tmp_path).answers) == ["1"]
    with Run(tmp_path, Script(), SETTINGS, progress=False) as run:
        assert run.ask([Request("1", "x")])[0].text.startswith("1 ")
