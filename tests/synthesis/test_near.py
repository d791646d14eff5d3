"""Which texts are near-duplicates, against a plain loop; what MinHash misses; files without their near-duplicates."""

from __future__ import annotations

import csv
import json
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lilliput.data.engine import ProcessEngine
from lilliput.errors import DataError, UsageError
from lilliput.synthesis import near
from lilliput.synthesis.dedupe import Deduped, dedupe, default_out
from lilliput.synthesis.near import Bands, Near, find_near, signatures
from lilliput.synthesis.rouge import overlap_for, rouge_l


def texts_with_copies(count: int, seed: int = 0) -> list[str]:
    """Random texts; about half are an earlier one with some words changed, or the very same."""
    dice = random.Random(seed)
    words = [f"w{i}" for i in range(400)]
    texts: list[str] = []
    for _ in range(count):
        if texts and dice.random() < 0.5:
            share = dice.choice((0, 0.05, 0.1, 0.2, 0.3, 0.4))
            old = dice.choice(texts).split()
            texts.append(" ".join(dice.choice(words) if dice.random() < share else word for word in old))
        else:
            texts.append(" ".join(dice.choices(words, k=dice.randint(3, 40))))
    return texts


def by_loop(texts: list[str], threshold: float) -> list[int]:
    """The plain algorithm: the best of the earlier ones that stay, if it is above the threshold."""
    first: list[int] = []
    for number, text in enumerate(texts):
        same = [other for other in range(number) if texts[other] == text]
        scores = [(rouge_l(text, texts[other], "unicode"), -other) for other in range(number) if first[other] < 0]
        score, other = max(scores, default=(0.0, 0))
        first.append(same[0] if same else -other if score > threshold else -1)
    return first


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_all_pairs_decide_as_a_plain_loop(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "_BLOCK", 16)  # several blocks
    monkeypatch.setattr(near, "_BLOCK_LEAST", 3)
    monkeypatch.setattr(near, "_TABLE", 600)
    texts = texts_with_copies(120)
    found = find_near(texts, threshold=threshold)
    assert found.bands is None
    assert found.first.tolist() == by_loop(texts, threshold)
    for number in np.flatnonzero(~found.stays & ~found.same):
        assert found.score[number] == rouge_l(texts[number], texts[found.first[number]])


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_minhash_finds_the_same(threshold: float) -> None:
    texts = texts_with_copies(300, seed=1)
    everything, candidates = (find_near(texts, threshold=threshold, exact=exact) for exact in (True, False))
    assert candidates.bands == Bands.for_threshold(threshold)
    assert (everything.first == candidates.first).all()
    assert (everything.score == candidates.score).all()


def test_a_large_file_is_compared_by_minhash_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "EXACT_UP_TO", 20)
    texts = texts_with_copies(21)
    assert find_near(texts[:20]).bands is None
    assert find_near(texts).bands is not None
    assert find_near(texts, exact=True).bands is None


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_bands_miss_no_more_than_they_may(threshold: float) -> None:
    bands = Bands.for_threshold(threshold)
    similarity = overlap_for(threshold)
    assert bands.missed(similarity) < near.MISSED
    assert bands.missed(similarity + 0.01) < bands.missed(similarity)
    assert bands.bands * bands.rows <= near.PERMUTATIONS
    if bands.rows == near._LONGEST_BAND:
        return
    longer = Bands(near.PERMUTATIONS // (bands.rows + 1), bands.rows + 1)
    assert longer.missed(similarity) > near.MISSED, "longer bands would have fewer candidates, and miss too much"


def test_pairs_just_above_the_threshold_are_missed_as_seldom_as_is_said() -> None:
    """800 pairs of texts with 7 of 10 words in common, in order: F is just 0.7, the Jaccard similarity 7/13."""
    bands = Bands(10, 4)  # fewer bands than are taken, so that something is missed at all
    dice = random.Random(5)
    pairs = []
    for number in range(800):
        common = [f"c{number}x{i}" for i in range(14)]
        pairs.append([_mixed(common, f"{side}{number}", dice) for side in "ab"])
    assert rouge_l(*pairs[0]) == pytest.approx(0.7)
    first, second = (signatures([pair[side] for pair in pairs], bands) for side in (0, 1))
    missed = float((~(first == second).any(axis=1)).mean())
    assert missed == pytest.approx(bands.missed(7 / 13), abs=0.05)  # 0.417; three deviations of 800 draws


def _mixed(common: list[str], own: str, dice: random.Random) -> str:
    words = [*common]
    for i in range(6):
        words.insert(dice.randint(0, len(words)), f"{own}{i}")
    return " ".join(words)


def test_signatures_depend_on_the_words_alone() -> None:
    bands = Bands.for_threshold(0.7)
    made = signatures(["the cat the dog", "Dog, THE cat: the!", "the cat dog", ""], bands)
    assert made.shape == (4, bands.bands)
    assert made.dtype == np.uint64
    assert (made[0] == made[1]).all()
    assert not (made[0] == made[2]).all()  # "the" once
    assert (made == signatures(["the cat the dog", "Dog, THE cat: the!", "the cat dog", ""], bands)).all()


def test_signatures_travel_to_other_processes() -> None:
    function = pickle.loads(pickle.dumps(partial(signatures, bands=Bands(4, 2), words="rouge")))
    assert (function(["a b"]) == signatures(["a b"], Bands(4, 2), "rouge")).all()


def test_an_engine_makes_the_signatures_in_order() -> None:
    calls: list[int] = []

    class Noted(ProcessEngine):
        def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                calls.append(len(item))
                yield function(item)

    texts = texts_with_copies(50)
    found = find_near(texts, exact=False, engine=Noted())
    assert sum(calls) == len({*texts})  # what repeats a text needs no signature
    assert (found.first == find_near(texts, exact=False).first).all()


def test_blank_and_wordless_texts() -> None:
    found = find_near(["", " ", "", "!?", "!?", "—", "a b c"])
    assert found.first.tolist() == [-1, -1, -1, -1, 3, -1, -1]  # blank is never a duplicate; "!?" is the same as "!?"
    assert found.wordless == [0, 1, 2, 3, 5]
    found = find_near(["用Python写排序", "用Python写搜索", "用Python写排序!"], words="rouge")
    assert found.first.tolist() == [-1, 0, 0]  # all that rouge sees is "python"
    found = find_near(["用Python写排序", "用Python写搜索", "用Python写排序!"])
    assert found.first.tolist() == [-1, -1, 0]


@pytest.mark.parametrize("exact", [None, True, False])
def test_nothing_is_near_in_nothing(exact: bool | None) -> None:
    found = find_near([], exact=exact)
    assert isinstance(found, Near)
    assert found.first.shape == found.score.shape == found.same.shape == (0,)


@pytest.mark.parametrize("exact", [True, False])
def test_at_one_only_the_same_text_goes(exact: bool) -> None:
    assert find_near(["a b c", "a b c d", "a b c", "A b c"], threshold=1.0, exact=exact).first.tolist() == [
        -1,
        -1,
        0,
        -1,
    ]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_is_between_0_and_1(threshold: float) -> None:
    with pytest.raises(UsageError, match="--rouge: .* is not between 0 and 1"):
        find_near(["a"], threshold=threshold)


def test_a_threshold_that_is_too_low_for_minhash() -> None:
    with pytest.raises(UsageError, match="--rouge: 0.01 is too low for MinHash. Compare all pairs: --exact"):
        find_near(["a"], threshold=0.01, exact=False)
    assert find_near(["a b", "b c"], threshold=0.01).first.tolist() == [-1, 0]


# ---- files -------------------------------------------------------------------------------------------------------

ROWS = [
    {
        "instruction": "Name three large rivers of Europe and their lengths.",
        "input": "",
        "output": "Volga, Danube, Ural.",
    },
    {"instruction": "Write a poem.", "output": "Roses."},
    {"instruction": "Name three large rivers of Europe and their length.", "output": "Rhine, Elbe, Seine."},
    {"instruction": "Write a poem.", "output": "Violets."},
    {"instruction": "What is 2 + 2?", "output": "4"},
]


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path


def quiet(path: Path, out: Path, **options: Any) -> Deduped:
    return dedupe(path, out, progress=False, **options)


def test_rows_that_stay_are_copied_byte_for_byte(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    lines[1] = '{ "output" :"Roses.",  "instruction":"Write a poem.", "é": "\\u00e9", "n": 1.0 }'
    source = tmp_path / "a.jsonl"
    source.write_bytes("\ufeff".encode() + f"{lines[0]}\r\n\n{lines[1]}\n{lines[2]}\n{lines[3]}\n{lines[4]}".encode())
    found = quiet(source, tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == "\ufeff".encode() + f"{lines[0]}\r\n{lines[1]}\n{lines[4]}\n".encode()
    assert (found.rows, found.kept, found.same, found.near, found.skipped) == (5, 3, 1, 1, 0)
    gone = [(one.origin, one.of, one.same) for one in found.duplicates]
    assert gone == [("a.jsonl:4", "a.jsonl:1", False), ("a.jsonl:5", "a.jsonl:3", True)]
    assert found.duplicates[0].score == pytest.approx(16 / 18)
    assert found.duplicates[0].of_text == ROWS[0]["instruction"]


def test_which_text_is_compared(tmp_path: Path) -> None:
    source, out = write_lines(tmp_path / "a.jsonl", ROWS), tmp_path / "b.jsonl"
    assert quiet(source, out, text="chat", threshold=0.8).kept == 5
    assert quiet(source, out, field="instruction").kept == 3
    assert quiet(source, out, field="output", threshold=0.1).kept == 5
    given = [{"instruction": "Translate.", "input": text, "output": text} for text in ("a b c d", "e f g h", "a b c d")]
    assert quiet(write_lines(source, given), out).kept == 2  # the input belongs to the first turn
    assert quiet(source, out, field="instruction").kept == 1
    assert (
        quiet(write_lines(source, [{"text": "a"}, {"text": None}, {"text": ""}, {"text": "a"}]), out, field="text").kept
        == 3
    )


def test_rows_of_other_forms(tmp_path: Path) -> None:
    chats = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": said}]} for said in "xyx"]
    out = tmp_path / "b.jsonl"
    assert quiet(write_lines(tmp_path / "a.jsonl", chats), out).kept == 1
    assert quiet(tmp_path / "a.jsonl", out, text="chat").kept == 2
    seeds = [{"instruction": "Add.", "instances": [{"input": i, "output": i}]} for i in "12"]
    assert quiet(write_lines(tmp_path / "a.jsonl", seeds), out, field="instruction").kept == 1
    assert quiet(tmp_path / "a.jsonl", out).kept == 2
    flat = [{"message_id": i, "parent_id": None, "text": "Hello there"} for i in "12"]
    assert quiet(write_lines(tmp_path / "a.jsonl", flat), out).kept == 1


def test_other_kinds_of_files(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    array.write_text(json.dumps([*ROWS, {"instruction": "half \ud800", "output": "x"}]), encoding="utf-8")
    quiet(array, tmp_path / "b.json")
    kept = [ROWS[0], ROWS[1], ROWS[4], {"instruction": "half \ud800", "output": "x"}]
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == kept
    quiet(array, tmp_path / "b.jsonl")
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()] == kept
    table = tmp_path / "a.csv"
    table.write_text('prompt,completion\n"a, ""b""",1\nc,2\n"a, ""b""",3\n', encoding="utf-8")
    quiet(table, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text(encoding="utf-8") == 'prompt,completion\n"a, ""b""",1\nc,2\n'
    quiet(table, tmp_path / "b.tsv")
    with (tmp_path / "b.tsv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file, delimiter="\t"))[1:] == [['a, "b"', "1"], ["c", "2"]]


def test_a_row_that_no_table_can_hold(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d", "x": []}]
    )
    with pytest.raises(DataError, match="a.jsonl:2: cannot be a line of a table"):
        quiet(source, tmp_path / "b.csv")
    assert not (tmp_path / "b.csv").exists()


def test_where_the_rows_go(tmp_path: Path) -> None:
    assert default_out("x/a.jsonl") == Path("x/a.deduped.jsonl")
    assert default_out("a.json") == Path("a.deduped.json")
    assert default_out("a.parquet") == Path("a.deduped.jsonl")
    source = write_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UsageError, match="-o .*a.jsonl: is the file that is read"):
        quiet(source, tmp_path / "." / "a.jsonl")
    with pytest.raises(
        UsageError, match="-o: 'b.parquet' is of no kind that is written here. Name a file that ends in"
    ):
        quiet(source, tmp_path / "b.parquet")
    (tmp_path / "c.json").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        quiet(source, tmp_path / "c.json")


def test_faults_are_said_before_anything_is_compared(tmp_path: Path) -> None:
    out = tmp_path / "b.jsonl"
    with pytest.raises(DataError, match="no such file"):
        quiet(tmp_path / "none.jsonl", out)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        quiet(tmp_path / "empty.jsonl", out)
    source = write_lines(tmp_path / "a.jsonl", ROWS)
    fault = (
        "a.jsonl:1: has no field 'instructions' .it has 'instruction', 'input', 'output'.; did you mean 'instruction'"
    )
    with pytest.raises(DataError, match=fault):
        quiet(source, out, field="instructions")
    with pytest.raises(DataError, match="a.jsonl:1: .*Name the field that is compared with --field"):
        quiet(write_lines(tmp_path / "a.jsonl", [{"text": "a"}]), out)
    with pytest.raises(UsageError, match="unknown text 'last'"):
        quiet(source, out, text="last")
    assert not out.exists()


def test_bad_rows_are_refused_or_left_out(tmp_path: Path) -> None:
    source, out = (
        write_lines(tmp_path / "a.jsonl", [ROWS[0], {"instruction": 5, "output": "x"}, ROWS[1]]),
        tmp_path / "b.jsonl",
    )
    with pytest.raises(DataError, match="a.jsonl:2: 'instruction' is of type int, not text; 1 of 3 rows is bad"):
        quiet(source, out)
    found = quiet(source, out, skip_bad_rows=True)
    assert (found.rows, found.kept, found.skipped) == (2, 2, 1)
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [ROWS[0], ROWS[1]]


def test_the_report_lists_every_row_that_went(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [*ROWS, {"instruction": f"Write a poem{'!' * 300}", "output": "x"}])
    found = quiet(source, tmp_path / "b.jsonl")
    found.write_report(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["method"], report["rows"], report["kept"], report["bands"]) == ("all pairs", 6, 3, None)
    assert [one["row"] for one in report["duplicates"]] == [3, 4, 6]
    assert len(report["duplicates"][2]["text"]) == 201


def test_real_rows(shared_data: Path, tmp_path: Path) -> None:
    """Of the 999 Alpaca rows, 14 repeat a question; by MinHash and by all pairs the same stay."""
    source = shared_data / "alpaca-en-1k.json"
    everything = quiet(source, tmp_path / "a.json", exact=True, threshold=0.6)
    candidates = quiet(source, tmp_path / "b.json", exact=False, threshold=0.6)
    assert everything.same == candidates.same == 14
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
