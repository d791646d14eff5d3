"""Evol-Instruct: the six operations, elimination evolving, the pool, lineage, and the same data wherever it stops."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lilliput.errors import DataError, TeacherError, UsageError
from lilliput.synthesis import evol_instruct as evol
from lilliput.synthesis.evol_instruct import (
    Outcome,
    Plan,
    evol_instruct,
    merge,
    read_originals,
    says_nothing,
    verdict_of,
)
from lilliput.synthesis.evol_prompts import LEAKS, OPERATIONS, OTHER, SAME, comparing_prompt, evolving_prompt
from lilliput.synthesis.journal import read_journal
from lilliput.synthesis.teacher import Reply
from tests.synthesis.evol_brain import ROWS, Scripted, given, stage


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def run(file: Path, out: Path, teacher: Any = None, plan: Plan | None = None, **options: Any) -> Outcome:
    return evol_instruct(
        out, teacher or Scripted(), read_originals(file), plan or Plan(rounds=3, batch=2), progress=False, **options
    )


def rows_of(out: Path) -> list[dict]:
    """The data set, without its times."""
    rows = [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]
    for row in rows:
        row["provenance"].pop("time", None)
        row["provenance"].get("instruction", {}).pop("time", None)
    return rows


def decisions(out: Path) -> list[dict]:
    return list(read_journal(out).decisions.values())


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_prompt_ends_with_the_instruction_and_says_its_method(name: str) -> None:
    operation = OPERATIONS[name]
    text = "Sum {up} this table:\n| a | b |\n\n### a heading"
    prompt = evolving_prompt(text, operation, random.Random(0))
    assert given(prompt) == text
    assert prompt.count(text) == 1
    assert operation.method.split("{")[0] in prompt
    assert stage(prompt) == ("create" if operation.in_breadth else "rewrite")
    assert "{" not in prompt.replace(text, "").replace('{"', "")


def test_six_operations_of_which_one_is_in_breadth() -> None:
    assert [operation.in_breadth for operation in OPERATIONS.values()] == [False] * 5 + [True]


def test_each_kind_of_data_is_shown_by_an_example_of_its_own() -> None:
    prompts = {evolving_prompt("X", OPERATIONS["input"], random.Random(seed)) for seed in range(60)}
    assert len(prompts) == 5
    assert all(
        prompt.count("### Rewritten prompt:") == 3 for prompt in prompts
    )  # two examples, and the one that is asked


def test_the_comparison_shows_both() -> None:
    prompt = comparing_prompt("First {thing}", "Second")
    assert prompt.index("First {thing}") < prompt.index("Second\n")
    assert stage(prompt) == "compare"


def test_the_six_are_equally_likely() -> None:
    plan = Plan(rounds=1)
    drawn = Counter(evol._Attempt(evol.Pooled(n, 0, "x"), 1, plan).operation.name for n in range(3000))
    assert all(abs(count - 500) < 75 for count in drawn.values())  # 3.7 standard deviations
    assert set(drawn) == set(OPERATIONS)


# ---- elimination evolving --------------------------------------------------------------------------------------------


def brain_with(**said: Any) -> Callable[[str], str | Reply]:
    """A good teacher but for the stages that are named."""
    good = {"rewrite": "Name three birds that swim.", "create": "Name two rare moths.", "compare": OTHER}
    return lambda prompt: {**good, "respond": "Penguin, duck, loon.", **said}[stage(prompt)]


LONG = "I am sorry to say that nobody knows it for sure. " * 10
FAULTS = [
    ({"compare": SAME}, evol.NOTHING_NEW, "eliminate"),
    ({"compare": "Verdict: Equal."}, evol.NOTHING_NEW, "eliminate"),
    ({"rewrite": "name three  birds", "create": "Name three birds!"}, evol.NOTHING_NEW, "eliminate"),
    ({"compare": "Hard to say."}, evol.NO_VERDICT, "eliminate"),
    ({"compare": Reply("", "failed", error="boom")}, evol.NO_ANSWER, "eliminate"),
    ({"respond": "I'm Sorry, but as a model I cannot."}, evol.SORRY, "eliminate"),
    ({"respond": "It is. And so: that!"}, evol.ONLY_STOP_WORDS, "eliminate"),
    ({"respond": " … \n"}, evol.ONLY_STOP_WORDS, "eliminate"),
    ({"respond": Reply("and then", "length")}, evol.CUT, "respond"),
    ({"respond": Reply("", "refused", error="content filter")}, evol.NO_ANSWER, "respond"),
    ({"rewrite": "### Rewritten prompt: x y", "create": "#Created Prompt# x"}, evol.LEAKED, "eliminate"),
    ({"rewrite": "The GIVEN PROMPT asks for birds", "create": "As the given prompt"}, evol.LEAKED, "eliminate"),
    ({"rewrite": "\n", "create": ""}, evol.EMPTY, "evolve"),
    ({"rewrite": Reply("Name many", "length"), "create": Reply("Name", "length")}, evol.CUT, "evolve"),
    ({"rewrite": Reply("", error="too long"), "create": Reply("", error="too long")}, evol.NO_ANSWER, "evolve"),
]


@pytest.mark.parametrize(("said", "reason", "step"), FAULTS)
def test_each_fault_is_refused_with_its_reason(said: dict, reason: str, step: str, file: Path, tmp_path: Path) -> None:
    done = run(file, tmp_path / "out", Scripted(brain_with(**said)), Plan(rounds=1))
    assert done.evolved == 0 or reason == evol.NOTHING_NEW  # "the same words" are so for the first row only
    refused = [decision for decision in decisions(tmp_path / "out") if "reason" in decision]
    assert refused
    assert {(decision["step"], decision["reason"]) for decision in refused} == {(step, reason)}
    assert all({"text", "detail", "operation", "round", "root", "parent"} <= decision.keys() for decision in refused)
    assert done.refused[reason] == len(refused)


@pytest.mark.parametrize(
    "said", [{}, {"respond": LONG}, {"respond": "No."}, {"respond": "42"}, {"respond": "鳥が三羽"}]
)
def test_what_is_good_passes(said: dict, file: Path, tmp_path: Path) -> None:
    assert run(file, tmp_path / "out", Scripted(brain_with(**said)), Plan(rounds=1)).evolved == len(ROWS)


def test_words_that_the_parent_has_are_no_leak(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "Write a tale from the given prompt: a fox.", "output": "Once."}) + "\n")
    kept = brain_with(
        rewrite="Write a sad tale from the given prompt: a fox.", create="Turn the given prompt into a song."
    )
    assert run(path, tmp_path / "out", Scripted(kept), Plan(rounds=1)).evolved == 1


def test_nothing_is_asked_about_what_is_refused_already(file: Path, tmp_path: Path) -> None:
    leaking = Scripted(brain_with(rewrite="given prompt", create="given prompt"))
    run(file, tmp_path / "leaks", leaking, Plan(rounds=1))
    assert {stage(request.prompt) for request in leaking.asked} <= {"rewrite", "create"}
    equal = Scripted(brain_with(compare=SAME))
    run(file, tmp_path / "equal", equal, Plan(rounds=1))
    assert not [request for request in equal.asked if stage(request.prompt) == "respond"]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Equal", SAME), ("Not Equal", OTHER), ("not_equal.", OTHER), ("unequal", OTHER), ("hm", None),
        ('{"verdict": "equal"}', SAME), ('{"verdict": "different"}', OTHER), (" equal, not different", SAME),
        ("Different: they are not equally deep", OTHER), ("They are not different.", SAME),
        ("The instructions are not exactly equal.", OTHER), ("They aren't equal", OTHER),
        ("They seem equal, but the depth differs. Different", OTHER),
    ],
)  # fmt: skip
def test_verdicts_are_read(text: str, verdict: str | None) -> None:
    assert verdict_of(text) == verdict


def test_stop_words_leave_what_may_be_an_answer() -> None:
    assert says_nothing("I am. It is! --")
    assert says_nothing("")
    assert not any(map(says_nothing, ("yes", "No.", "7", "It is blue", "да")))


def test_quotation_marks_around_the_whole_go(file: Path, tmp_path: Path) -> None:
    quoted = Scripted(brain_with(rewrite='"Name three birds."', create='“Name a "rare" moth.”'))
    run(file, tmp_path / "out", quoted, Plan(rounds=1))
    texts = {row["instruction"] for row in rows_of(tmp_path / "out") if row["provenance"]["round"]}
    assert texts <= {"Name three birds.", 'Name a "rare" moth.'}
    assert texts


def test_leaks_are_the_names_that_the_prompts_use() -> None:
    shown = evolving_prompt("x", OPERATIONS["input"], random.Random(1)).lower()
    assert [leak in shown for leak in LEAKS] == [True, True, False]
    assert "created prompt" in evolving_prompt("x", OPERATIONS["breadth"], random.Random(1)).lower()


# ---- the pool and its lineage ----------------------------------------------------------------------------------------


def test_what_fails_stays_in_the_pool_and_is_evolved_again(tmp_path: Path, file: Path) -> None:
    tries: Counter[str] = Counter()

    def brain(prompt: str) -> str:
        if stage(prompt) in ("rewrite", "create"):
            tries[given(prompt)] += 1
            return "" if tries[given(prompt)] == 1 else f"{given(prompt)} And more."
        return OTHER if stage(prompt) == "compare" else "Fine words."

    done = run(file, tmp_path / "out", Scripted(brain), Plan(rounds=4))
    births = {row["provenance"]["id"]: row["provenance"] for row in rows_of(tmp_path / "out")}
    assert [births[f"1/{n}"]["parent"] for n in (2, 4)] == ["1/0", "1/2"]  # rounds 1 and 3 failed
    assert "1/1" not in births
    assert "1/3" not in births
    assert all(birth["root"] == f"{name.split('/')[0]}/0" for name, birth in births.items())
    assert done.evolved == 2 * len(ROWS)
    assert done.refused == {evol.EMPTY: 2 * len(ROWS)}


def test_a_child_is_evolved_further_and_remembers_its_birth(tmp_path: Path, file: Path) -> None:
    run(file, tmp_path / "out", Scripted(), Plan(rounds=4))
    rows = {row["provenance"]["id"]: row for row in rows_of(tmp_path / "out")}
    grandchildren = [row for row in rows.values() if not str(row["provenance"].get("parent", "/0")).endswith("/0")]
    assert grandchildren
    answers = read_journal(tmp_path / "out").answers
    for row in rows.values():
        birth = row["provenance"]
        if birth["round"]:
            parent = rows[birth["parent"]]
            asked = answers[birth["instruction"]["request"]]
            whole = parent["instruction"] + (f"\n\n{parent['input']}" if parent.get("input") else "")
            assert asked.reply.text.strip() == row["instruction"]
            assert birth["operation"] in OPERATIONS
            assert birth["method"] == "evol-instruct"
            assert {"prompt_sha256", "model", "decoding", "seed", "request"} <= birth.keys()
            assert whole in row["instruction"] or birth["operation"] == "breadth"


def test_originals_stay_as_they_were(tmp_path: Path, file: Path) -> None:
    run(file, tmp_path / "out", shuffle=False)
    kept = [row for row in rows_of(tmp_path / "out") if row["provenance"]["round"] == 0]
    assert [{**row, "provenance": 0} for row in kept] == [{**row, "provenance": 0} for row in ROWS]
    birth = kept[1]["provenance"]
    assert birth.pop("origin").startswith(file.name)
    assert birth == {"id": "2/0", "root": "2/0", "round": 0}


def test_merge_orders_shuffles_and_keeps_the_last(tmp_path: Path, file: Path) -> None:
    run(file, tmp_path / "out", plan=Plan(rounds=3), shuffle=False)
    originals = read_originals(file)
    rows = rows_of(tmp_path / "out")
    keys = [tuple(map(int, row["provenance"]["id"].split("/"))) for row in rows]
    assert keys == sorted(keys)
    evolved = [row for row in rows if row["provenance"]["round"]]
    assert merge(originals.rows, evolved, rounds=3, shuffle=False) == merge(
        originals.rows, evolved[::-1], rounds=3, shuffle=False
    )
    mixed = merge(originals.rows, evolved, rounds=3, seed=1)
    assert mixed == merge(originals.rows, evolved, rounds=3, seed=1)
    assert mixed != merge(originals.rows, evolved, rounds=3, seed=2)
    assert sorted(map(str, mixed)) == sorted(map(str, merge(originals.rows, evolved, rounds=3, shuffle=False)))
    last = merge(originals.rows, evolved, rounds=3, only_last=True, shuffle=False)
    assert [row["provenance"]["root"] for row in last] == [row["provenance"]["root"] for row in originals.rows]
    assert [row["provenance"]["round"] for row in last] == [
        max(r for n, r in keys if n == root + 1) for root in range(5)
    ]
    assert all(row["provenance"]["round"] <= 1 for row in merge(originals.rows, evolved, rounds=1))


# ---- the same data, however it is run --------------------------------------------------------------------------------


def test_the_same_for_any_batch_and_other_for_another_seed(tmp_path: Path, file: Path) -> None:
    run(file, tmp_path / "a", plan=Plan(rounds=3, batch=1))
    run(file, tmp_path / "b", plan=Plan(rounds=3, batch=100))
    run(file, tmp_path / "c", plan=Plan(rounds=3, seed=1))
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b") != rows_of(tmp_path / "c")


def test_stopped_after_any_answer_it_ends_the_same(tmp_path: Path, file: Path) -> None:
    whole = Scripted()
    run(file, tmp_path / "whole", whole)
    total = len(whole.asked)
    for breath in range(0, total, 4):
        out = tmp_path / f"after-{breath}"
        first = Scripted(breath=breath)
        with pytest.raises(TeacherError, match="same command again"):
            run(file, out, first)
        assert sum(row["provenance"]["round"] == 0 for row in rows_of(out)) == len(ROWS)
        second = Scripted()
        run(file, out, second)
        assert rows_of(out) == rows_of(tmp_path / "whole")
        assert len(first.asked) + len(second.asked) == total  # nothing is asked twice


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_twice_it_ends_the_same(tmp_path: Path, file: Path) -> None:
    run(file, tmp_path / "whole")
    for breath in (3, 11):
        if not (child := os.fork()):
            run(file, tmp_path / "killed", Scripted(breath=breath, end=lambda: os.kill(os.getpid(), signal.SIGKILL)))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not (tmp_path / "killed" / "data.jsonl").exists()
    accepted = [row["provenance"]["id"] for row in read_journal(tmp_path / "killed").rows]
    run(file, tmp_path / "killed")
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    ids = [row["provenance"]["id"] for row in rows_of(tmp_path / "killed")]
    assert len(ids) == len({*ids})
    assert {*accepted} <= {*ids}


def test_more_rounds_and_more_rows_go_on_in_the_same_directory(tmp_path: Path, file: Path) -> None:
    run(file, tmp_path / "whole", plan=Plan(rounds=3))
    few = read_originals(file, limit=2)
    evol_instruct(tmp_path / "grown", Scripted(), few, Plan(rounds=1), progress=False)
    assert {row["provenance"]["root"] for row in rows_of(tmp_path / "grown")} == {"1/0", "2/0"}
    run(file, tmp_path / "grown", plan=Plan(rounds=3))
    assert rows_of(tmp_path / "grown") == rows_of(tmp_path / "whole")
    run(file, tmp_path / "grown", plan=Plan(rounds=1))
    assert {row["provenance"]["round"] for row in rows_of(tmp_path / "grown")} == {0, 1}


def test_other_settings_are_another_run(tmp_path: Path, file: Path) -> None:
    run(file, tmp_path / "out")
    with pytest.raises(UsageError, match="operations"):
        run(file, tmp_path / "out", plan=Plan(rounds=3, operations=("deepen",)))
    file.write_text(json.dumps(ROWS[1:]))
    with pytest.raises(UsageError, match="data"):
        run(file, tmp_path / "out")


def test_only_the_chosen_operations_are_drawn(tmp_path: Path, file: Path) -> None:
    run(file, tmp_path / "out", plan=Plan(rounds=3, operations=("deepen", "breadth")))
    assert {decision["operation"] for decision in decisions(tmp_path / "out")} == {"deepen", "breadth"}


def test_rows_as_messages_can_be_trained_on(tmp_path: Path, file: Path) -> None:
    from lilliput.data import read_records, to_chat

    run(file, tmp_path / "out", to="messages")
    chats = [to_chat(record) for record in read_records(tmp_path / "out" / "data.jsonl")]
    assert "Add up the numbers.\n\n3, 4, 5" in {chat.turns[0].content for chat in chats}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"batch": 0}, "batch=0"),
        ({"operations": ()}, "no operation"),
        ({"operations": ("deepn",)}, "did you mean 'deepen'"),
    ],
)
def test_wrong_plans(options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Plan(**options)


# ---- what is evolved -------------------------------------------------------------------------------------------------


def test_input_is_joined_and_longer_chats_are_cut_to_a_pair(tmp_path: Path) -> None:
    turns = [
        ("system", "Be kind."),
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "Bye."),
        ("assistant", "So long."),
    ]
    rows: list[dict] = [
        {"messages": [{"role": role, "content": content} for role, content in turns]},
        {"messages": [{"role": role, "content": content} for role, content in turns[1:3]], "provenance": {"seed": 4}},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_originals(path)
    assert found.instructions == ["Hi.", "Hi."]
    assert (found.read, found.cut) == (2, 1)
    assert found.rows[1]["provenance"]["before"] == {"seed": 4}
    assert found.rows[0]["output"] == "Hello."


def test_a_folder_is_read_by_its_data(tmp_path: Path, file: Path) -> None:
    with pytest.raises(DataError, match="has no data.jsonl"):
        read_originals(tmp_path)
    run(file, tmp_path / "out", plan=Plan(rounds=1))
    again = read_originals(tmp_path / "out", limit=3)
    assert len(again.rows) == 3
    assert again.rows[0]["provenance"]["before"]["root"]


def test_bad_rows_and_limits(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"instruction": "Go.", "output": ""}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:2: 'output' is empty"):
        read_originals(path)
    found = read_originals(path, skip_bad_rows=True)
    assert len(found.rows) == 1
    assert [row.row for row in found.skipped] == [2]
    with pytest.raises(UsageError, match="limit=0"):
        read_originals(path, limit=0)
    with pytest.raises(DataError, match="no such file"):
        read_originals(tmp_path / "none.jsonl")
