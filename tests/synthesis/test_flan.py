"""FLAN: what is drawn, how it is mixed and written; the same seed, the same bytes; tune can read it."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lilliput.data import read_records, to_chat
from lilliput.data.reservoir import Reservoir
from lilliput.errors import DataError, UsageError
from lilliput.synthesis import flan as method
from lilliput.synthesis.flan import Part, Wording, flan, interleave, proportional, survey, with_examples
from lilliput.synthesis.flan_mix import load_mix, make_part
from lilliput.synthesis.flan_tasks import load_task, parse_task


def table(folder: Path, counts: dict[str, int], name: str = "rows.csv") -> Path:
    """A file of so many rows of each label, shuffled; each sentence is another."""
    rows = [f"sentence {label} {n},{label}\n" for label, count in counts.items() for n in range(count)]
    random.Random(0).shuffle(rows)
    path = folder / name
    path.write_text("sentence,label\n" + "".join(rows))
    return path


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def words(row: dict[str, Any]) -> tuple[str, str]:
    return row["messages"][0]["content"], row["messages"][1]["content"]


def run(path: Path, task: str = "sentiment", wording: Wording | None = None, *, out: str = "out.jsonl", **how: Any):
    part = {name: how.pop(name) for name in ("balance", "cap", "separator", "columns") if name in how}
    file = path.parent / out
    report = flan([Part(path, load_task(task), **part)], file, wording, progress=False, **how)
    return report, written(file)


# ---- rows through templates --------------------------------------------------------------------------------------


def test_each_row_once_in_the_files_order_with_its_provenance(tmp_path: Path) -> None:
    report, rows = run(table(tmp_path, {"0": 30, "1": 20}))
    assert [row["source"] for row in rows] == [f"rows.csv:{line}" for line in range(2, 52)]
    assert {tuple(row) for row in rows} == {("messages", "task", "template", "shots", "source")}
    assert report.rows == 50
    assert report.parts[0].labels == {"negative": 30, "positive": 20}
    assert report.parts[0].templates == Counter(row["template"] for row in rows)
    assert len(report.parts[0].templates) > 5
    templates = load_task("sentiment").templates
    assert report.turned == sum(templates[row["template"] - 1].turned for row in rows)
    assert len(report.samples) == 3


def test_the_first_templates_only_and_each_of_them(tmp_path: Path) -> None:
    path = table(tmp_path, {"0": 10, "1": 10})
    _, rows = run(path, wording=Wording(templates=2))
    assert {row["template"] for row in rows} == {1, 2}
    report, rows = run(path, wording=Wording(templates=10, each=True))
    assert [row["template"] for row in rows[:10]] == list(range(1, 11))
    assert len({row["source"] for row in rows[:10]}) == 1
    assert set(report.parts[0].templates.values()) == {20}
    assert (report.rows, report.parts[0].drawn) == (200, 20)
    _, rows = run(path, wording=Wording(turned=False))
    templates = load_task("sentiment").templates
    assert not any(templates[row["template"] - 1].turned for row in rows)
    assert all(words(row)[1] in ("negative", "positive", "no", "yes") for row in rows)


@pytest.mark.parametrize("options", ["written", "always", "never"])
def test_options_as_written_always_or_never(options: Any, tmp_path: Path) -> None:
    task = load_task("sentiment")
    report, rows = run(table(tmp_path, {"0": 40, "1": 40}), wording=Wording(options=options, turned=False))
    shown = ["Answer with one of these:" in words(row)[0] for row in rows]
    inline = [task.templates[row["template"] - 1].inline for row in rows]
    if options == "written":
        assert shown == [task.templates[row["template"] - 1].options for row in rows]
    elif options == "always":
        assert shown == [not within for within in inline]
    else:
        assert not any(shown + inline)
    assert report.with_options == sum(shown) + sum(inline)


def test_options_are_shuffled_or_in_the_tasks_order(tmp_path: Path) -> None:
    path = table(tmp_path, {"0": 50, "1": 50})
    for shuffled in (True, False):
        _, rows = run(path, wording=Wording(templates=1, shuffled=shuffled))
        first = Counter(words(row)[0].splitlines()[-2] for row in rows)
        assert set(first) == ({"- negative", "- positive"} if shuffled else {"- negative"})


def test_choices_of_a_row_are_its_options(tmp_path: Path) -> None:
    path = tmp_path / "piqa.csv"
    path.write_text("goal,sol1,sol2,label\nopen a jar,twist the lid,paint the lid,0\nboil water,freeze it,heat it,1\n")
    _, rows = run(path, "commonsense", Wording(templates=1))
    assert [words(row)[1] for row in rows] == ["twist the lid", "heat it"]
    assert all(f"- {words(row)[1]}" in words(row)[0].splitlines() for row in rows)


def test_the_files_own_classes(tmp_path: Path) -> None:
    path = tmp_path / "news.csv"
    path.write_text("text,label\n" + "".join(f"t{n},{('World', 'Sport', 'Business')[n % 3]}\n" for n in range(30)))
    _, rows = run(path, "classification", Wording(templates=1, shuffled=False))
    assert words(rows[0])[0].endswith("- Business\n- Sport\n- World")
    assert words(rows[0])[1] == "World"
    task = load_task("classification").with_labels({"World": "abroad", "Sport": "games", "Business": "money"})
    flan([Part(path, task)], tmp_path / "named.jsonl", Wording(templates=1, shuffled=False), progress=False)
    assert words(written(tmp_path / "named.jsonl")[0])[0].endswith("- abroad\n- games\n- money")


def test_a_template_is_drawn_for_the_columns_that_a_row_has(tmp_path: Path) -> None:
    task = parse_task(
        "name: t\ncolumns: {q: {}, hint: {optional: true}, a: {kind: answer}}\nanswer: a\n"
        "templates: [{prompt: '{q}'}, {prompt: '{q} ({hint})'}]",
        "t.yaml",
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"q": f"q{n}", "a": "a", **({"hint": "h"} if n % 2 else {})}) + "\n" for n in range(40))
    )
    flan([Part(path, task)], tmp_path / "out.jsonl", progress=False)
    rows = written(tmp_path / "out.jsonl")
    assert {row["template"] for row in rows[0::2]} == {1}
    assert {row["template"] for row in rows[1::2]} == {1, 2}
    only = task.model_copy(update={"templates": task.templates[1:]})
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: has no 'hint', and no template goes without; 20 of 40 rows are"
    ):
        flan([Part(path, only)], tmp_path / "out.jsonl", progress=False)


# ---- solved examples ---------------------------------------------------------------------------------------------


def test_solved_examples_look_like_this() -> None:
    assert with_examples("C?", [("A?", "a"), ("B?", "b")]) == (
        "### Example 1\nA?\n\nAnswer: a\n\n### Example 2\nB?\n\nAnswer: b\n\n### Your turn\nC?\n\nAnswer:"
    )
    assert with_examples("C?", []) == "C?"


def test_solved_examples_are_balanced_and_never_the_row_itself(tmp_path: Path) -> None:
    report, rows = run(table(tmp_path, {"0": 12, "1": 3}), wording=Wording(templates=1, shots=4))
    assert report.shots == {4: 15}
    for row in rows:
        prompt, _ = words(row)
        *solved, asked = prompt.split("\n\n### ")
        sentence = asked.split("\n\n")[1]
        assert sentence.startswith("sentence ")
        assert sentence not in "".join(solved)
        assert Counter(one.rsplit("Answer: ", 1)[1] for one in solved) == {"negative": 2, "positive": 2}
        assert len(set(solved)) == 4


def test_a_row_with_the_same_input_is_not_shown_either(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("sentence,label\n" + "same,0\nsame,1\n" * 5 + "other,0\nanother,1\n")
    report, rows = run(path, wording=Wording(templates=1, shots=3))
    assert not any(
        "same" in words(row)[0].split("### Your turn")[0]
        for row in rows
        if "same" in words(row)[0].split("### Your turn")[1]
    )
    assert report.shots == {2: 10, 3: 2}  # two others are all there is


def test_a_turned_template_shows_no_row_with_the_same_answer(tmp_path: Path) -> None:
    """Several hypotheses share a premise: where the premise is asked for, another row with it would give it away."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"premise": f"premise {n // 3}", "hypothesis": f"h{n}", "label": ("entailment", "neutral")[n % 2]}
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, made = run(path, "nli", wording=Wording(templates=10, shots=4, each=True))
    turned = [words(row) for row in made if words(row)[1].startswith("premise")]
    assert turned
    assert not any(f"Answer: {told}\n" in asked for asked, told in turned)


def test_the_labels_own_words_are_for_the_label_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("sentence,label\npositive,1\n")
    _, made = run(path, wording=Wording(templates=12, each=True))
    assert all("positive" in " ".join(words(row)) for row in made)


def test_a_share_of_the_rows_gets_solved_examples(tmp_path: Path) -> None:
    report, rows = run(table(tmp_path, {"0": 200, "1": 200}), wording=Wording(shots=2, few_shot_share=0.25))
    few = sum("### Example 1" in words(row)[0] for row in rows)
    assert few == report.shots[2] == sum(row["shots"] == 2 for row in rows)
    assert 60 < few < 140
    assert report.to_json()["zero_shot"] == 400 - few


def test_solved_examples_of_a_task_without_labels(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("document,summary\n" + "".join(f"long {n},short {n}\n" for n in range(9)))
    _, rows = run(path, "summarisation", Wording(shots=2))
    for n, row in enumerate(rows):
        before = words(row)[0].split("### Your turn")[0]
        assert before.count("### Example") == 2
        assert f"long {n}\n" not in before
        assert f"short {n}\n" not in before


def test_too_few_rows_for_the_examples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 usable rows are too few for --shots 2"):
        run(table(tmp_path, {"0": 1, "1": 1}), wording=Wording(shots=2))


# ---- which rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "cap", "expected"),
    [({"0": 50, "1": 7}, None, 7), ({"0": 50, "1": 40}, 21, 10), ({"0": 5, "1": 5}, 1000, 5)],
)
def test_balance_is_exact(counts: dict[str, int], cap: int | None, expected: int, tmp_path: Path) -> None:
    report, rows = run(table(tmp_path, counts), balance=True, cap=cap)
    assert report.parts[0].labels == {"negative": expected, "positive": expected}
    assert report.parts[0].left_out == sum(counts.values()) - 2 * expected
    assert len({row["source"] for row in rows}) == 2 * expected


def test_a_cap_draws_over_the_whole_file(tmp_path: Path) -> None:
    report, rows = run(table(tmp_path, {"0": 500, "1": 500}), cap=100)
    lines = [int(row["source"].split(":")[1]) for row in rows]
    assert lines == sorted(set(lines))
    assert (len(lines), report.parts[0].left_out) == (100, 900)
    assert sum(line > 501 for line in lines) == pytest.approx(50, abs=20)


def test_more_rows_than_there_are_come_again_in_other_words(tmp_path: Path) -> None:
    _, rows = run(table(tmp_path, {"0": 20, "1": 20}), rows=100, balance=True)
    times = Counter(row["source"] for row in rows)
    assert sorted(times.values()) == [2] * 20 + [3] * 20
    assert len({words(row) for row in rows}) > 80
    assert len(run(table(tmp_path, {"0": 20, "1": 20}), rows=13)[1]) == 13


def test_no_label_to_balance_by_and_too_small_a_cap(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("document,summary\nlong,short\n")
    with pytest.raises(UsageError, match="no labels to balance by"):
        run(tmp_path / "rows.csv", "summarisation", balance=True)
    with pytest.raises(UsageError, match="1 rows are too few for 2 labels"):
        run(table(tmp_path, {"0": 2, "1": 2}), balance=True, cap=1)


def test_proportional_mixing_by_hand() -> None:
    # min(e, 3000) = 500, 3000, 3000; of 6,500 in all: 1/13, 6/13, 6/13
    assert proportional([500, 3000, 30000], 1300, 3000) == [100, 600, 600]
    assert proportional([500, 3000, 30000], None, 3000) == [500, 3000, 3000]
    assert proportional([500, 3000, 30000], 13, 3000) == [1, 6, 6]
    assert proportional([500, 3000, 30000], 67, None) == [1, 6, 60]
    assert proportional([1, 1, 1], 4) == [2, 1, 1]  # equal remainders: the first
    assert proportional([10, 20, 30], 7, 100) == [1, 2, 4]  # 1.17, 2.33, 3.5: the largest remainder gets the odd one
    assert sum(proportional([7, 11, 13], 1000, 9)) == 1000


def test_interleaving_takes_all_in_order_and_mixes_well() -> None:
    counts = [1000, 250, 0]
    streams = [iter(range(count)) for count in counts]
    mixed = list(interleave(streams, counts, random.Random(0)))
    for place, count in enumerate(counts):
        assert [number for stream, number in mixed if stream == place] == list(range(count))
    assert sum(stream for stream, _ in mixed[:625]) == pytest.approx(125, abs=30)


def test_a_reservoir_draws_uniformly() -> None:
    times: Counter[int] = Counter()
    for seed in range(2000):
        reservoir = Reservoir[int](3, random.Random(seed))
        for number in range(10):
            reservoir.offer(number)
        times.update(reservoir.kept)
    assert all(count == pytest.approx(600, abs=100) for count in times.values())


# ---- a mix -------------------------------------------------------------------------------------------------------

MIX = """
rows: 60
parts:
  - {file: rows.csv, task: sentiment, balance: true, labels: {0: negative, 1: positive}}
  - {file: e2e.txt, task: data-to-text, separator: "||"}
  - {file: de.jsonl, task: translation, columns: {source: de, target: en},
     constants: {source_language: German, target_language: English}}
"""


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    table(tmp_path, {"0": 40, "1": 20})
    (tmp_path / "e2e.txt").write_text("".join(f"name : N{n}||This is N{n}.\n" for n in range(10)))
    (tmp_path / "de.jsonl").write_text(
        "".join(json.dumps({"de": f"Ja {n}", "en": f"Yes {n}"}) + "\n" for n in range(10))
    )
    (tmp_path / "mix.yaml").write_text(MIX)
    return tmp_path / "mix.yaml"


def test_a_mix_is_proportional_and_interleaved(mix: Path) -> None:
    described = load_mix(mix)
    assert (described.rows, described.max_rate, described.cap) == (60, 3000, 30000)
    parts = described.open(mix.parent)
    report = flan(parts, mix.parent / "out.jsonl", rows=60, max_rate=described.max_rate, progress=False)
    assert [part.drawn for part in report.parts] == [40, 10, 10]  # of 40 (balanced), 10 and 10
    tasks = [row["task"] for row in written(mix.parent / "out.jsonl")]
    assert Counter(tasks) == {"sentiment": 40, "data-to-text": 10, "translation": 10}
    assert len(set(tasks[:20])) > 1
    assert tasks != sorted(tasks)
    report = flan(parts, mix.parent / "out.jsonl", max_rate=10, progress=False)
    assert [part.rows for part in report.parts] == [10, 10, 10]
    assert report.parts[0].labels == {"negative": 5, "positive": 5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parts: []", "parts"),
        ("files: []", "unknown key"),
        ("parts: [{file: a.csv}]", "parts[1].task: is missing"),
        ("parts: [{file: a.csv, task: nli, capp: 3}]", "parts[1].capp: unknown key; did you mean 'cap'?"),
        ("parts: [{file: a.csv, task: nli, cap: 0}]", "parts[1].cap"),
        ("parts: [{file: a.csv, task: nli, count_from: 2}]", "parts[1].count_from"),
        ("rows: many\nparts: [{file: a.csv, task: nli}]", "rows: is 'many'"),
    ],
)
def test_a_wrong_mix_says_where_and_what(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        load_mix(tmp_path / "mix.yaml")
    assert str(error.value).startswith(str(tmp_path / "mix.yaml"))
    assert said in str(error.value)


def test_a_mix_that_names_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_mix(tmp_path / "mix.yaml")
    (tmp_path / "mix.yaml").write_text("parts: [{file: a.csv, task: mine.yaml}]")
    with pytest.raises(UsageError, match="no task and no file"):
        load_mix(tmp_path / "mix.yaml").open(tmp_path)
    (tmp_path / "mix.yaml").write_text("parts: [{file: a.csv, task: nli}]")
    with pytest.raises(DataError, match="no such file"):
        flan(load_mix(tmp_path / "mix.yaml").open(tmp_path), tmp_path / "out.jsonl", progress=False)


def test_long_fields_in_several_csv_files(tmp_path: Path) -> None:
    """The csv module's limit is one for all readers; the first that ends must not lower it for the others."""
    for name, count in (("a.csv", 1), ("b.csv", 3)):
        (tmp_path / name).write_text("document,summary\n" + f"{'long ' * 40_000},short\n" * count)
    parts = [Part(tmp_path / name, load_task("summarisation")) for name in ("a.csv", "b.csv")]
    assert flan(parts, tmp_path / "out.jsonl", progress=False).rows == 4


# ---- promises ----------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    path = table(tmp_path, {"0": 40, "1": 40})
    wording = Wording(shots=2, few_shot_share=0.5)
    digests = []
    for seed in (0, 0, 1):
        run(path, wording=wording, seed=seed, cap=50)
        digests.append(hashlib.sha256((tmp_path / "out.jsonl").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_a_rows_words_do_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    """More rows at the end of a file change nothing in those before, so that a data set can grow."""
    path = table(tmp_path, {"0": 20, "1": 20})
    _, before = run(path)
    path.write_text(path.read_text() + "one more,1\n")
    _, after = run(path)
    assert after[:-1] == before


@pytest.mark.parametrize(
    ("target", "keys"), [("prompt-completion", ("prompt", "completion")), ("p3", ("inputs", "targets"))]
)
def test_other_forms_hold_the_same_words(target: str, keys: tuple[str, str], tmp_path: Path) -> None:
    path = table(tmp_path, {"0": 5, "1": 5})
    _, chats = run(path)
    _, pairs = run(path, target=target)
    assert [tuple(row[key] for key in keys) for row in pairs] == [words(row) for row in chats]


def test_a_fault_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("before\n")
    path = table(tmp_path, {"0": 5, "1": 5, "2": 1})
    with pytest.raises(DataError, match="the label '2' is none of"):
        run(path)
    assert (tmp_path / "out.jsonl").read_text() == "before\n"
    report, rows = run(path, skip_bad_rows=True)
    assert (report.parts[0].skipped, len(rows)) == (1, 10)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path, {"0": 5, "1": 5})
    drawn = method.draw_pool

    def change(*args: Any) -> bytearray:
        path.write_text("sentence,label\nx,0\n")
        return drawn(*args)

    monkeypatch.setattr(method, "draw_pool", change)
    with pytest.raises(DataError, match="changed while it was read"):
        run(path)


def test_a_header_that_may_be_one_is_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("phrase\tverdict\na\t0\nb\t1\nc\t1\n")
    with pytest.raises(DataError, match=r"rows.tsv:1: .*may be a header.*--columns sentence=NAME,label=NAME"):
        run(path)
    assert run(path, columns={"sentence": "phrase", "label": "verdict"})[0].rows == 3
    path.write_text("phrase\tsort\na\tx\nb\ty\nc\tx\n")
    with pytest.raises(DataError, match="'sort' stands nowhere else"):
        run(path, "classification")


def test_what_is_said_besides(tmp_path: Path) -> None:
    path = tmp_path / "rte.tsv"
    path.write_text("p\th\t0\np\tg\t1\n")
    report, _ = run(path, "nli")
    assert report.notes == [
        "rte.tsv has no header: its columns are read as premise, hypothesis, label",
        "no row of rte.tsv has the label contradiction, which is offered as an option",
    ]
    many = tmp_path / "many.csv"
    many.write_text("text,label\n" + "".join(f"t,{n}\n" for n in range(300)))
    with pytest.raises(DataError, match="300 different labels in 300 rows"):
        run(many, "classification")


def test_labels_of_a_person_leave_templates_out_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = make_part(tmp_path / "x.csv", "nli", labels={"0": "ja", "1": "nein"})
    assert f"{12 - len(part.task.templates)} of the 12 templates of nli are left out" in capsys.readouterr().err
    with pytest.raises(UsageError, match=f"the task nli has {len(part.task.templates)} templates, not 10"):
        Wording(templates=10).of(part.task)
    with pytest.raises(UsageError, match="templates that go with the other options, not 12"):
        Wording(templates=12, turned=False).of(load_task("nli"))


# ---- real data ---------------------------------------------------------------------------------------------------


def test_sst2_from_end_to_end(shared_data: Path, tmp_path: Path) -> None:
    part = Part(shared_data / "sst2-dev.tsv", load_task("sentiment"), balance=True)
    wording = Wording(templates=10, shots=3, few_shot_share=0.5)
    report = flan([part], tmp_path / "flan.jsonl", wording, progress=False)
    assert report.parts[0].labels == {"negative": 428, "positive": 428}
    records = read_records(tmp_path / "flan.jsonl")
    chats = [to_chat(record) for record in records]
    assert len(chats) == 856
    assert all([turn.role for turn in chat.turns] == ["user", "assistant"] for chat in chats)


def test_e2e_slots_and_text(shared_data: Path, tmp_path: Path) -> None:
    part = Part(shared_data / "e2e-valid.txt", load_task("data-to-text"), separator="||", cap=200)
    report = flan([part], tmp_path / "flan.jsonl", Wording(turned=False, shots=1), progress=False)
    assert (report.parts[0].read, report.rows) == (4672, 200)
    assert report.shots == {1: 200}
    for row in written(tmp_path / "flan.jsonl"):
        prompt, answer = words(row)
        assert "||" not in prompt + answer
        assert prompt.count("name : ") >= 2


def test_survey_keeps_little(shared_data: Path) -> None:
    part = Part(shared_data / "sst2-train.tsv", load_task("sentiment"))
    found = survey(part, Wording(shots=1), seed=0, skip_bad_rows=False, progress=False)
    assert {label: len(rows) for label, rows in found.exemplars.items()} == {"negative": 200, "positive": 200}
    assert found.labels.itemsize * len(found.labels) == 4 * 6920
