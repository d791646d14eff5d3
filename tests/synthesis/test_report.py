"""The quality report: counts are those of the journal, lengths and scores those of a plain count; nothing breaks it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from lilliput.errors import DataError
from lilliput.synthesis.evol_instruct import Plan, evol_instruct, read_originals
from lilliput.synthesis.journal import read_journal
from lilliput.synthesis.report import make_report, write_report
from lilliput.synthesis.report_page import duration, page
from lilliput.synthesis.run import Run
from tests.evaluation.test_comparison import not_blank
from tests.synthesis.evol_brain import ROWS, Scripted

TEXTS = ["Name three birds.", "Name three fish.", "Write a poem about rain and snow.", "Why?", "Name three birds."]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A file of rows that nobody generated."""
    path = tmp_path / "plain.jsonl"
    rows = [
        {"instruction": text, "input": "a b" if n == 1 else "", "output": "word " * n + "end"}
        for n, text in enumerate(TEXTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def evolved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run; do not write into it."""
    folder = tmp_path_factory.mktemp("evolved")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    evol_instruct(folder, Scripted(), read_originals(folder / "rows.json"), Plan(rounds=4), progress=False)
    return folder


def test_counts_by_step_and_reason_are_the_journal_s(evolved: Path) -> None:
    found = make_report(evolved)
    history = found["journal"]
    decisions = list(read_journal(evolved).decisions.values())
    counted = [(step["step"], reason, n) for step in history["steps"] for reason, n in step["refused"].items()]
    for step, reason, n in counted:
        assert n == sum(one["step"] == step and one.get("reason") == reason for one in decisions)
    assert sum(n for *_, n in counted) == history["refused"] == sum("reason" in one for one in decisions)
    assert history["accepted"] == found["rows"] - found["originals"]
    assert found["originals"] == len(ROWS)
    for name in ("operations", "rounds"):
        assert sum(row["tried"] for row in history[name]) == len(decisions) == 4 * len(ROWS)
        assert sum(row["accepted"] for row in history[name]) == history["accepted"]
    answers = len(read_journal(evolved).answers)
    asked = (history["requests"], history["prompt_tokens"], history["completion_tokens"])
    assert asked == (answers, 7 * answers, 3 * answers)


def test_lengths_and_repetitions(plain: Path) -> None:
    found = make_report(plain)
    assert (found["rows"], found["originals"], found["journal"], found["repeated_instructions"]) == (5, 0, None, 1)
    length = found["lengths"]["instruction"]
    assert [length[name] for name in ("texts", "shortest", "median", "longest", "mean")] == [5, 1, 3, 7, 3.4]
    assert sum(count for _, count in length["bars"]) == 5
    assert dict(length["bars"])[1] == 4  # 1 to 4 words
    assert dict(length["bars"])[5] == 1
    assert found["lengths"]["input"]["texts"] == 1
    assert found["lengths"]["output"]["longest"] == 5


def test_nearness_is_that_of_rouge_score(tmp_path: Path) -> None:
    texts = [
        f"{verb} the {noun} of my {kind} house"
        for verb in ("Paint", "Sell")
        for noun in ("door", "roof of tin")
        for kind in ("old", "green")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": text, "output": "yes"}) + "\n" for text in texts))
    seeds = ["Sell the old house", "Paint it"]
    found = make_report(path, seeds=seeds)["nearest"]
    scorer = RougeScorer(["rougeL"])

    def best(text: str, others: list[str]) -> float:
        return max(scorer.score(other, text)["rougeL"].fmeasure for other in others)

    for name, scores in (
        ("another instruction", [best(text, [other for other in texts if other != text]) for text in texts]),
        ("a seed", [best(text, seeds) for text in texts]),
    ):
        bars = [0] * 20
        for score in scores:
            bars[min(int(score * 20 + 1e-9), 19)] += 1
        assert found[name]["bars"] == bars
        assert found[name]["above_0.7"] == sum(score > 0.7 for score in scores)
        assert found[name]["median"] == pytest.approx((sorted(scores)[3] + sorted(scores)[4]) / 2, abs=1e-4)


def test_evolved_rows_are_compared_with_their_parents(evolved: Path) -> None:
    nearest = make_report(evolved)["nearest"]
    assert nearest["its parent"]["instructions"] == make_report(evolved)["journal"]["accepted"]


def test_three_files_are_written(evolved: Path, tmp_path: Path) -> None:
    found = write_report(tmp_path, evolved, title="my data")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(found))
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# my data\n")
    for part in (
        "What was asked and decided",
        "Lengths",
        "Nearness",
        "Verbs and nouns",
        "Samples of the rows",
        "refused",
    ):
        assert f"## {part}" in text or part == "refused"
    assert "| constraints |" in text
    assert "words of the prompt leaked" in text
    assert not_blank(tmp_path / "report.png")


def test_a_plain_file_is_drawn_too(plain: Path, tmp_path: Path) -> None:
    write_report(tmp_path / "out", plain)
    assert not_blank(tmp_path / "out" / "report.png")
    assert "What was asked" not in (tmp_path / "out" / "report.md").read_text()


def test_nothing_that_a_teacher_writes_is_markup(tmp_path: Path) -> None:
    nasty = "````\n# heading | <b>\n![](x.png)\n```` $\\frac{$"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": nasty, "output": "| `a` |"}) + "\n")
    text = page(make_report(path, title="*a* | $b$ [c](d)"))
    assert text.startswith("# \\*a\\* \\| $b$ \\[c\\](d)\n")
    assert f"`````text\n{nasty}\n`````" in text
    write_report(tmp_path, path, title="*a* $b$ $\\x")


def test_a_run_that_accepted_nothing(tmp_path: Path) -> None:
    with Run(tmp_path, Scripted(), {"method": "none"}, progress=False) as run:
        run.decide("one", lambda: {"step": "parse", "reason": "no list", "text": "I | would", "detail": ""})
    (tmp_path / "data.jsonl").write_text("")
    found = write_report(tmp_path)
    assert (found["rows"], found["journal"]["refused"]) == (0, 1)
    assert "no list" in (tmp_path / "report.md").read_text()
    assert found["nearest"] == {}


def test_a_run_that_was_stopped_is_known_by_its_journal(tmp_path: Path) -> None:
    with Run(tmp_path, Scripted(), {"method": "none"}, progress=False) as run:
        for n in range(3):
            run.decide(
                f"{n}", lambda n=n: {"step": "instances", "row": {"instruction": f"Count {n} boats", "output": "no"}}
            )
    found = make_report(tmp_path)
    assert (found["rows"], found["journal"]["accepted"]) == (3, 3)


def test_other_scripts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["写一首关于雨的诗。", "写一首关于雪的诗。", "Напиши письмо бабушке", "Напиши письмо дедушке"]
    path.write_text("".join(json.dumps({"instruction": text, "output": "好"}) + "\n" for text in texts))
    found = make_report(path)
    assert found["lengths"]["instruction"]["longest"] == 8
    assert found["nearest"]["another instruction"]["median"] > 0.6
    assert found["variety"]["with_verb"] == 0


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no data.jsonl"):
        make_report(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        make_report(tmp_path / "none.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Go.", "output": "Gone."}\n{"instruction": "Go."}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2"):
        make_report(tmp_path / "rows.jsonl")
    assert make_report(tmp_path / "rows.jsonl", skip_bad_rows=True)["skipped"] == 1


@pytest.mark.parametrize(("seconds", "said"), [(3.2, "3 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
