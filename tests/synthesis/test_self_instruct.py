"""Self-Instruct and its Alpaca variant: the paper's steps, an end that is said, the same rows from the same seed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lilliput.data import read_records, to_chat
from lilliput.errors import TeacherError, UsageError
from lilliput.synthesis import alpaca, growing, self_instruct
from lilliput.synthesis.growing import Outcome, Plan, write_rows
from lilliput.synthesis.run import Run
from lilliput.synthesis.seeds import SeedTasks, read_seeds
from tests.synthesis.brains import Scripted, answer

METHODS: dict[str, Callable[..., Outcome]] = {
    self_instruct.METHOD: self_instruct.self_instruct,
    alpaca.METHOD: alpaca.alpaca,
}
EACH = pytest.mark.parametrize("method", METHODS)


def generate(
    out: Path,
    plan: Plan,
    method: str = self_instruct.METHOD,
    teacher: Scripted | None = None,
    seeds: SeedTasks | None = None,
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Run a method in `out`; the outcome and all rows."""
    given = seeds or read_seeds()
    with Run(out, teacher or Scripted(), plan.settings(method, given), progress=False) as run:
        outcome = METHODS[method](run, given, plan)
        return outcome, run.rows()


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the time of their birth."""
    return [{**row, "provenance": {**row["provenance"], "time": ""}} for row in rows]


def journal(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "journal.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == kind]


# ---- the steps ---------------------------------------------------------------------------------------------------


def test_step_1_shows_six_of_people_and_two_of_its_own(tmp_path: Path) -> None:
    teacher, people = Scripted(), {task.instruction for task in read_seeds()}
    generate(tmp_path, Plan(target=150), teacher=teacher)
    shown = {
        request.key: re.findall(r"Task \d+: (.+)", request.prompt)
        for request in teacher.asked
        if "/instructions/" in request.key
    }
    assert all(len(tasks) == 8 == len(set(tasks)) for tasks in shown.values())
    own = {key: sum(task not in people for task in tasks) for key, tasks in shown.items()}
    assert {count for key, count in own.items() if key.startswith("round 1/")} == {0}
    assert {count for key, count in own.items() if not key.startswith("round 1/")} == {2}
    request = next(request for request in teacher.asked if "/instructions/" in request.key)
    assert request.prompt.endswith("\nTask 9:")
    assert request.decoding.stop == ("Task 16",)
    assert (request.decoding.temperature, request.decoding.top_p, request.decoding.presence_penalty) == (0.7, 0.5, 2.0)


def test_only_tasks_with_rows_are_shown_again(tmp_path: Path) -> None:
    teacher = Scripted()
    _, rows = generate(tmp_path, Plan(target=150), teacher=teacher)
    people, with_rows = {task.instruction for task in read_seeds()}, {row["instruction"] for row in rows}
    for request in teacher.asked:
        if "/instructions/" in request.key:
            assert set(re.findall(r"Task \d+: (.+)", request.prompt)) <= people | with_rows


def test_step_2_shows_twelve_classifications_and_nineteen_others(tmp_path: Path) -> None:
    teacher = Scripted()
    generate(tmp_path, Plan(target=10), teacher=teacher)
    asked = [request.prompt for request in teacher.asked if "/classification/" in request.key]
    kinds = {task.instruction: task.classification for task in read_seeds()}
    shown = re.findall(r"Task: (.+)\nClassification: (Yes|No)", asked[0])
    assert [kinds[text] for text, _ in shown] == [said == "Yes" for _, said in shown]
    assert sum(said == "Yes" for _, said in shown) == 12
    assert sum(said == "No" for _, said in shown) == 19
    beginnings = {prompt.rsplit("Task:", 1)[0] for prompt in asked}
    assert len(beginnings) == 1  # the same ones each time, so that a server may keep them


def test_step_3_asks_for_labels_first_where_it_is_a_classification(tmp_path: Path) -> None:
    teacher = Scripted()
    _, rows = generate(tmp_path, Plan(target=150), teacher=teacher)
    for request in teacher.asked:
        if "/instances/" in request.key:
            instruction = request.prompt.rsplit("Task: ", 1)[1]
            assert ("Class label:" in request.prompt) == ("Sort" in instruction)
            assert request.decoding.stop == ("\nTask:",)
    labels = {row["output"] for row in rows if row["provenance"]["classification"]}
    assert labels == {"tool", "food"}


def test_step_4_refuses_what_is_near_to_anything_before(tmp_path: Path) -> None:
    first, second = (f"Name three rivers that flow into the {sea} Sea." for sea in ("Baltic", "North"))
    again = f"Task 9: {first}\nTask 10: {second}"
    outcome, rows = generate(tmp_path, Plan(target=10, patience=1, batch=1), teacher=Scripted(lambda prompt: again))
    refused = [line["decision"] for line in journal(tmp_path, "decision") if "reason" in line["decision"]]
    assert refused[0]["step"] == "instructions"
    assert refused[0]["reason"] == "too near to another"
    assert refused[0]["text"] == second
    assert first in refused[0]["detail"]
    assert rows == []
    assert outcome.instructions == 1


def test_every_answer_and_every_candidate_has_its_line(tmp_path: Path) -> None:
    outcome, rows = generate(tmp_path, Plan(target=60))
    decisions = [line["decision"] for line in journal(tmp_path, "decision")]
    assert len(journal(tmp_path, "answer")) == outcome.requests
    assert sum("row" in decision for decision in decisions) == 60 == len(rows)
    assert sum("reason" in decision for decision in decisions) == sum(outcome.refused.values())
    steps = {(decision["step"], "reason" in decision) for decision in decisions}
    assert steps == {
        ("instructions", False),
        ("instructions", True),
        ("classification", False),
        ("instances", False),
        ("instances", True),
    }


@EACH
def test_a_row_knows_where_it_comes_from(method: str, tmp_path: Path) -> None:
    _, rows = generate(tmp_path, Plan(target=40, seed=3), method)
    requests = {line["key"]: line["request"] for line in journal(tmp_path, "answer")}
    for row in rows:
        birth = row["provenance"]
        assert birth["method"] == method
        assert birth["model"] == "scripted"
        assert row["instruction"] in requests[birth["request"]]["prompt"] or method == "alpaca"
        assert len(birth["parents"]) == (8 if method == "self-instruct" else 3)
        assert 0 <= birth["rouge"] <= 0.7
        assert {"prompt_sha256", "decoding", "seed", "time", "task"} <= birth.keys()


@EACH
def test_the_plan_changes_the_decoding(method: str, tmp_path: Path) -> None:
    teacher = Scripted()
    generate(tmp_path, Plan(target=5, max_tokens=77, temperature=0.3), method, teacher)
    asked = {request.key.split("/")[1]: request.decoding for request in teacher.asked}
    assert asked["tasks" if method == "alpaca" else "instructions"].temperature == 0.3
    assert asked["tasks" if method == "alpaca" else "instances"].max_tokens == 77


def test_alpaca_asks_for_whole_tasks(tmp_path: Path) -> None:
    teacher = Scripted()
    outcome, rows = generate(tmp_path, Plan(target=60), "alpaca", teacher)
    assert outcome.requests == len(teacher.asked) <= 60 / 3
    assert all(re.findall(r"### (\d+)\n", request.prompt) == ["1", "2", "3", "4"] for request in teacher.asked)
    assert {request.decoding.stop for request in teacher.asked} == {("### 21",)}
    assert len({row["instruction"] for row in rows}) == len(rows)  # a single instance of each


@EACH
def test_an_answer_that_was_cut_loses_its_last_task(method: str, tmp_path: Path) -> None:
    plan = Plan(target=1000, max_requests=8, batch=8)
    whole, _ = generate(tmp_path / "whole", plan, method, Scripted())
    cut, _ = generate(tmp_path / "cut", plan, method, Scripted(finish="length"))
    texts = [
        {
            line["decision"].get("text") or line["decision"].get("instruction")
            for line in journal(tmp_path / name, "decision")
        }
        for name in ("whole", "cut")
    ]
    assert texts[1] < texts[0]
    assert cut.instructions < whole.instructions


# ---- the end -----------------------------------------------------------------------------------------------------


@EACH
def test_it_ends_with_the_last_row_that_is_wanted(method: str, tmp_path: Path) -> None:
    outcome, rows = generate(tmp_path, Plan(target=33), method)
    assert outcome.ended == "target"
    assert outcome.rows == len(rows) == 33


@EACH
def test_no_more_requests_than_allowed(method: str, tmp_path: Path) -> None:
    teacher = Scripted()
    outcome, rows = generate(tmp_path, Plan(target=10_000, max_requests=30), method, teacher)
    assert outcome.ended == "max-requests"
    assert 30 - 8 < outcome.requests == len(teacher.asked) <= 30
    more, all_rows = generate(tmp_path, Plan(target=10_000, max_requests=60), method, teacher)
    assert more.requests == len(teacher.asked) <= 60  # earlier ones count, and are not made again
    assert all_rows[: len(rows)] == rows


@EACH
@pytest.mark.parametrize(
    "text", ["", "I am sorry.", "blub " * 300, "Task 9: What is the relation between the given pairs?"]
)
def test_it_gives_up_where_nothing_new_comes(method: str, text: str, tmp_path: Path) -> None:
    teacher = Scripted(lambda prompt: text)
    outcome, rows = generate(tmp_path, Plan(patience=2, batch=2), method, teacher)
    assert rows == []
    assert (outcome.ended, outcome.rounds) == ("patience", 2)
    assert outcome.refused
    assert outcome.most_refused().startswith(f"{max(outcome.refused.values())} x ")


def test_a_goal_that_is_raised_is_gone_on_to(tmp_path: Path) -> None:
    """Target, requests and patience say when to end, not what comes."""
    generate(tmp_path / "two", Plan(target=20))
    _, raised = generate(tmp_path / "two", Plan(target=70))
    _, at_once = generate(tmp_path / "one", Plan(target=70))
    assert timeless(raised) == timeless(at_once)


def test_a_goal_that_is_lowered_loses_nothing(tmp_path: Path) -> None:
    _, rows = generate(tmp_path, Plan(target=50))
    outcome, still = generate(tmp_path, Plan(target=20))
    assert still == rows
    assert outcome.rows == 20


# ---- the same again ----------------------------------------------------------------------------------------------


@EACH
def test_same_seed_same_rows(method: str, tmp_path: Path) -> None:
    rows = [
        generate(tmp_path / name, Plan(target=50, seed=seed), method)[1]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert timeless(rows[0]) == timeless(rows[1])
    assert timeless(rows[0]) != timeless(rows[2])


@EACH
def test_a_journal_cut_anywhere_ends_in_the_same_rows(method: str, tmp_path: Path) -> None:
    """A power cut may leave any beginning of the file, in the middle of a line too."""
    plan = Plan(target=40)
    _, rows = generate(tmp_path / "whole", plan, method)
    written = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    for number in range(9):
        out = tmp_path / f"cut {number}"
        out.mkdir()
        (out / "journal.jsonl").write_bytes(written[: len(written) * number // 9 + 7 * number])
        _, again = generate(out, plan, method)
        assert timeless(again) == timeless(rows)


class Dying(Scripted):
    """Answers so many requests and is gone then."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.left = answers

    def complete(self, requests: Any) -> Any:
        for number, reply in super().complete(requests):
            if not self.left:
                raise TeacherError("is out of reach", where=self.name)
            self.left -= 1
            yield number, reply


def test_what_was_answered_before_the_teacher_died_is_not_asked_again(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="run the same command again to go on"):
        generate(tmp_path / "died", Plan(target=30), teacher=Dying(21))
    assert len(journal(tmp_path / "died", "answer")) == 21
    teacher = Scripted()
    outcome, rows = generate(tmp_path / "died", Plan(target=30), teacher=teacher)
    assert len(teacher.asked) == outcome.requests - 21
    assert timeless(rows) == timeless(generate(tmp_path / "lived", Plan(target=30))[1])


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch": 4}, {"rouge": 0.6}, {"temperature": 1.0}, {"instances": 2}])
def test_other_settings_are_another_run(change: dict[str, Any], tmp_path: Path) -> None:
    generate(tmp_path, Plan(target=5))
    with pytest.raises(UsageError, match=next(iter(change))):
        generate(tmp_path, Plan(target=5, **change))


def test_another_method_or_other_seeds_are_another_run(tmp_path: Path, shared_data: Path) -> None:
    generate(tmp_path, Plan(target=5))
    with pytest.raises(UsageError, match="method"):
        generate(tmp_path, Plan(target=5), "alpaca")
    with pytest.raises(UsageError, match="seeds"):
        generate(tmp_path, Plan(target=5), seeds=read_seeds(shared_data / "self-instruct-seed-tasks.jsonl"))


# ---- seeds, rows -------------------------------------------------------------------------------------------------


def test_one_seed_task_is_enough(tmp_path: Path) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Say hello to a cat.", "output": "Hello, cat."}\n')
    outcome, _ = generate(tmp_path / "out", Plan(target=10), seeds=read_seeds(tmp_path / "seeds.jsonl"))
    assert outcome.ended == "target"


def test_public_seeds(tmp_path: Path, shared_data: Path) -> None:
    seeds = read_seeds(shared_data / "self-instruct-seed-tasks.jsonl")
    assert generate(tmp_path, Plan(target=20), seeds=seeds)[0].ended == "target"


def test_other_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "写一首关于秋天的诗", "output": "叶落"}\n', encoding="utf-8")
    seeds = read_seeds(tmp_path / "seeds.jsonl")
    text = "Task 9: 写一首关于秋天的歌\nTask 10: 为什么天空是蓝色的呢\nExample 1\nOutput: 好"
    teacher = Scripted(lambda prompt: text.replace("Task 9", "Task 2").replace("Task 10", "Task 3"))
    plan = Plan(target=1, batch=1, unicode=True, rouge=0.7)
    generate(tmp_path / "unicode", plan, teacher=teacher, seeds=seeds)
    decisions = [line["decision"] for line in journal(tmp_path / "unicode", "decision")]
    assert decisions[0]["reason"] == "too near to another"
    assert decisions[1]["instruction"].startswith("为什么天空是蓝色的呢")
    assert "have no words in a-z" not in capsys.readouterr().err
    generate(tmp_path / "plain", Plan(patience=1, batch=1), teacher=teacher, seeds=seeds)
    assert "1 of 1 seed tasks have no words in a-z" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("form", growing.FORMS)
def test_rows_are_chats_to_train_on(form: str, tmp_path: Path) -> None:
    _, rows = generate(tmp_path / "out", Plan(target=30))
    write_rows(tmp_path / "data.jsonl", rows, form)
    read = read_records(tmp_path / "data.jsonl")
    assert len(read) == 30
    for record, row in zip(read, rows, strict=True):
        chat = to_chat(record)
        question, reply = chat.turns
        assert chat.input == row["input"]
        assert question.content == "\n\n".join(filter(None, (row["instruction"], row["input"])))
        assert reply.content == row["output"]
        assert record.fields["provenance"] == row["provenance"]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"target": 0}, "--target"),
        ({"patience": 0}, "--patience"),
        ({"batch": 0}, "--batch"),
        ({"instances": -1}, "--instances"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"max_requests": 7}, "--max-requests: 7 requests are fewer than one step of a round needs"),
        ({"rouge": 1.1}, "--rouge"),
        ({"rouge": float("nan")}, "--rouge"),
        ({"temperature": 3}, "--temperature"),
    ],
)
def test_a_plan_that_cannot_be(change: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError, match=where):
        Plan(**change)


def test_the_scripted_teacher_knows_every_prompt() -> None:
    assert answer("Task: Sort it.\nClassification:") == " Yes"
