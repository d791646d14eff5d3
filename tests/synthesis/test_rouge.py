"""ROUGE-L is the `rouge-score` package's to the last bit, alone and against a pool."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.errors import UsageError
from lilliput.synthesis import rouge
from lilliput.synthesis.rouge import (
    RougePool,
    Vocabulary,
    overlap_for,
    pairs_above,
    rouge_l,
    score_table,
    split_words,
)

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
tokenize = pytest.importorskip("rouge_score.tokenize")

FEW_WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g"]), max_size=14).map(" ".join)
NASTY = [
    "",
    " ",
    "a",
    "A a.",
    "İstanbul",
    "naïve café",
    "x_y",
    "1,000.5",
    "你好吗",
    "\ud800 half",
    "a" * 300,
    "🙂",
    "é",
]


@pytest.fixture(scope="module")
def package() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def by_package(package: rouge_scorer.RougeScorer, target: str, text: str) -> float:
    return package.score(target, text)["rougeL"].fmeasure


@pytest.mark.parametrize("text", NASTY)
def test_words_are_the_packages(text: str) -> None:
    assert split_words(text) == tokenize.tokenize(text, None)


@given(st.text(max_size=60))
def test_words_of_any_text_are_the_packages(text: str) -> None:
    assert split_words(text) == tokenize.tokenize(text, None)


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=60))
def test_for_ascii_words_of_any_script_are_the_same_words(text: str) -> None:
    assert split_words(text, "unicode") == split_words(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Où est l'été ?", ["où", "est", "l", "été"]),
        ("e\u0301te\u0301", ["été"]),  # composed or not is one word
        ("Где кот?", ["где", "кот"]),
        ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
        ("用Python写排序", ["用", "python", "写", "排", "序"]),
        ("ねこ", ["ね", "こ"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("고양이가 잔다", ["고양이가", "잔다"]),
        ("snake_case 3.14", ["snake", "case", "3", "14"]),
        ("🙂 —", []),
    ],
)
def test_words_of_any_script(text: str, expected: list[str]) -> None:
    import unicodedata

    assert split_words(text, "unicode") == [unicodedata.normalize("NFKC", word) for word in expected]


def test_unknown_words_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown words 'unicod'; did you mean 'unicode'"):
        split_words("a", "unicod")
    with pytest.raises(UsageError):
        RougePool(words="stemmed")


@given(FEW_WORDS, FEW_WORDS)
def test_a_score_is_the_packages_float(a: str, b: str) -> None:
    expected = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False).score(a, b)["rougeL"].fmeasure
    assert rouge_l(a, b) == rouge_l(b, a) == expected


def test_seven_of_ten_words_is_what_the_package_says_it_is() -> None:
    """At the threshold the package's own rounding decides: 2 · 0.7 · 0.7 / 1.4 is 0.7 and is taken."""
    a, b = "one two three four five six seven x y z", "one two three four five six seven p q r"
    assert rouge_l(a, b) == 0.7
    assert not RougePool([a]).any_above(b, 0.7)
    assert RougePool([a]).any_above(b, 0.6999)


# ---- a pool ------------------------------------------------------------------------------------------------------


def random_texts(count: int, seed: int, longest: int = 40) -> list[str]:
    """Texts of few words, so that scores are spread from 0 to 1, some very short, empty or repeated."""
    dice = random.Random(seed)
    words = [f"w{i}" for i in range(40)]
    texts: list[str] = []
    for _ in range(count):
        if texts and dice.random() < 0.3:
            old = dice.choice(texts).split()
            texts.append(" ".join(word for word in old if dice.random() < 0.9))
        else:
            texts.append(" ".join(dice.choices(words, k=dice.randint(0, longest))))
    return texts


def test_a_pool_scores_as_the_package_does_whatever_is_asked(package: rouge_scorer.RougeScorer) -> None:
    texts = random_texts(150, seed=1)
    pool = RougePool(texts)
    for text in [*random_texts(40, seed=2), *texts[:10], "unknown words only", ""]:
        expected = np.array([by_package(package, other, text) for other in texts])
        assert (pool.scores(text) == expected).all()
        place = int(expected.argmax())
        assert pool.nearest(text) == ((expected[place], place) if expected[place] else (0.0, -1))
        for threshold in (0.0, 0.3, 0.7, 0.95, 1.0):
            assert pool.any_above(text, threshold) == bool((expected > threshold).any())


def test_words_that_are_only_asked_for_are_not_learned() -> None:
    pool = RougePool(["a b"])
    assert pool.scores("x y").tolist() == [0.0]
    assert pool.scores("x b").tolist() == [0.5]
    pool.add("y x")
    assert pool.scores("x y").tolist() == [0.0, 0.5]
    assert pool.nearest("y x") == (1.0, 1)


def test_a_pool_of_nothing() -> None:
    pool = RougePool()
    assert len(pool) == 0
    assert pool.nearest("a") == (0.0, -1)
    assert not pool.any_above("a", 0.0)
    assert pool.scores("a").shape == (0,)
    assert pool.table([]).shape == (0, 0)


def test_texts_without_words_are_counted_and_near_to_nothing() -> None:
    pool = RougePool(["写排序", "", "sort"])
    assert pool.wordless == 2
    assert pool.nearest("写排序") == (0.0, -1)
    pool = RougePool(["写排序", "sort"], words="unicode")
    assert pool.wordless == 0
    assert pool.nearest("写排序") == (1.0, 0)


def test_threads_change_nothing() -> None:
    texts = random_texts(60, seed=3)
    pool = RougePool(texts)
    assert (pool.table(texts, threads=2) == pool.table(texts)).all()
    assert (pool.table(texts)[3] == pool.scores(texts[3])).all()


def test_more_words_than_there_are_characters() -> None:
    vocabulary = Vocabulary()
    vocabulary._numbers = {f"w{i}": i + 1 for i in range(0x110000)}
    codes = [vocabulary.learn(text.split()) for text in ("w1 w2 w3 w4", "new w2 newer w4", "w1 newer new w9", "new")]
    assert [type(code).__name__ for code in codes] == ["str", "array", "array", "array"]
    scores = score_table(codes, codes)
    assert scores.tolist() == [
        [1.0, 0.5, 0.25, 0.0],
        [0.5, 1.0, 0.25, 0.4],
        [0.25, 0.25, 1.0, 0.4],
        [0.0, 0.4, 0.4, 1.0],
    ]
    assert type(vocabulary.look_up(["w55295", "w57343", "never"])).__name__ == "str"  # half characters are numbers too


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.7, 0.9, 1.0])
def test_no_pair_above_the_threshold_is_skipped_by_the_bounds(threshold: float) -> None:
    texts = random_texts(120, seed=4)
    vocabulary = Vocabulary()
    codes = [vocabulary.learn(text.split()) for text in texts]
    table = score_table(codes, codes)
    rows, columns, scores = pairs_above(codes, codes, threshold)
    assert {*zip(rows.tolist(), columns.tolist(), strict=True)} == {
        *map(tuple, np.argwhere(table > threshold).tolist())
    }
    assert (scores == table[rows, columns]).all()
    limited = score_table(codes, codes, above=threshold)
    assert (np.where(table >= threshold, table, 0) == np.where(limited >= threshold, limited, 0)).all()


def test_a_score_that_stands_at_the_cutoff_is_kept() -> None:
    """rapidfuzz drops about half of the scores that equal its cutoff; ours is lower."""
    dice = random.Random(6)
    for longest in (9, 90, 900):
        for _ in range(60):
            m, n = dice.randint(1, longest), dice.randint(1, longest)
            common = dice.randint(1, min(m, n))
            a, b = "c" * common + "a" * (m - common), "c" * common + "b" * (n - common)
            score = score_table([a], [b])[0, 0]
            assert score_table([a], [b], above=score)[0, 0] == score
            assert len(pairs_above([a], [b], score)[0]) == 0
            assert len(pairs_above([a], [b], np.nextafter(score, 0))[0]) == 1


def test_the_overlap_that_a_score_asks_for() -> None:
    assert overlap_for(0.7) == pytest.approx(7 / 13)  # 7 of 10 words common: 7 of the 13 that there are
    assert overlap_for(1.0) == 1.0


# ---- real instructions -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(shared_data: Path) -> list[str]:
    lines = (shared_data / "self-instruct-seed-tasks.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["instruction"] for line in lines]


def test_the_public_seeds_are_filtered_as_by_a_loop_over_the_package(
    seeds: list[str], package: rouge_scorer.RougeScorer
) -> None:
    assert len(seeds) == 175
    scores = [[by_package(package, other, text) for other in seeds[:number]] for number, text in enumerate(seeds)]
    decided = 0
    for threshold in (0.7, 0.5, 0.3):
        kept: list[int] = []
        pool = RougePool()
        for number, text in enumerate(seeds):
            refused = any(scores[number][other] > threshold for other in kept)
            assert pool.any_above(text, threshold) == refused
            decided += refused
            if not refused:
                kept.append(number)
                pool.add(text)
    assert decided > 20, "the lower thresholds refuse some"


def test_the_scores_of_real_rows_are_the_packages(shared_data: Path, package: rouge_scorer.RougeScorer) -> None:
    rows = json.loads((shared_data / "alpaca-en-1k.json").read_text(encoding="utf-8"))
    texts = [f"{row['instruction']} {row['input']}"[:300] for row in rows]
    pool = RougePool(texts[:250])
    for text in texts[250:256]:
        assert pool.scores(text).tolist() == [by_package(package, other, text) for other in texts[:250]]


def test_the_threshold_is_the_papers() -> None:
    assert rouge.THRESHOLD == 0.7
