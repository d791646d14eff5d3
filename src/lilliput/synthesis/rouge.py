"""ROUGE-L of one text against a pool of many: the filter of Self-Instruct, bit-parallel over numbered words.

The score of two texts of m and n words whose longest common subsequence has l words is F = 2PR / (P + R) with
P = l/n and R = l/m. Every word gets a number, and a text becomes a string with one character a word; rapidfuzz finds l
64 words in a step. The last few operations are those of the `rouge-score` package in the same order, so that a score is
the same float as the package's, and a decision against a threshold the same decision.

Sources: ROUGE (Lin, 2004), section 3.1; Self-Instruct, arXiv 2212.10560, section 2.2: a new instruction is taken when
its ROUGE-L with every one of the pool is below 0.7. As in the code released with that paper, only a score *above* the
threshold refuses. Not here: what becomes of the near-duplicates in a file (near.py).
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from lilliput.errors import UsageError, nearest

WORDS = ("rouge", "unicode")
THRESHOLD = 0.7  # of Self-Instruct: a score above it is a near-duplicate

Code = str | array  # a text with one character a word, or the same numbers where they are too large for characters

_SLACK = 1e-9  # bounds are wider than the numbers by this, since they are rounded differently
_CUTOFF_SLACK = 1e-4  # rapidfuzz loses scores that stand at its cutoff itself: with a slack of 1e-9 about half of them
_PROMISING = 0.8  # `nearest` compares with the texts whose lengths allow such a score first: few others are left then
_ROUGE_WORD = re.compile(r"[a-z0-9]+")
# Scripts that put no spaces between words: each letter counts as a word (Thai, Lao, Burmese, Khmer, kana, Han).
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


def split_words(text: str, words: str = "rouge") -> list[str]:
    """The words that ROUGE-L compares, in lower case.

    Args:
        words: "rouge": runs of a-z and 0-9, as the `rouge-score` package without its stemmer; a text in another
            script has none. "unicode": runs of letters and digits of any script, each letter by itself where a script
            has no spaces; for a text in ASCII the same as "rouge".

    Raises UsageError: `words` is neither.
    """
    if words not in WORDS:
        raise UsageError(f"unknown words {words!r}{nearest(words, WORDS)}", todo=f"Known: {', '.join(WORDS)}.")
    if words == "rouge" or text.isascii():
        return _ROUGE_WORD.findall(text.lower())
    return _unicode_word().findall(unicodedata.normalize("NFKC", text).lower())


@cache
def _unicode_word() -> re.Pattern[str]:
    """Letters and digits with the marks above and below them, which Python's \\w leaves out."""
    marks = "".join(map(re.escape, filter(lambda sign: unicodedata.category(sign)[0] == "M", map(chr, range(0x10000)))))
    return re.compile(rf"[{_UNSPACED}][{marks}]*|(?:(?![{_UNSPACED}])[^\W_][{marks}]*)+")


def rouge_l(a: str, b: str, words: str = "rouge") -> float:
    """ROUGE-L F-measure of two texts, 0 to 1, to the last bit that of `rouge-score`; 0 where one has no words."""
    vocabulary = Vocabulary()
    first, second = (vocabulary.learn(split_words(text, words)) for text in (a, b))
    common = np.array([LCSseq.similarity(first, second)])
    return float(f_measure(common, np.array([len(first)]), np.array([len(second)]))[0])


def f_measure(common: NDArray[Any], m: NDArray[Any], n: NDArray[Any]) -> NDArray[np.float64]:
    """F of longest common subsequences of `common` words between texts of m and of n words; 0 where nothing is common.

    All three are broadcast against each other. The order of operations is `rouge-score`'s.
    """
    some = np.maximum(common, 1)
    precision, recall = some / np.maximum(n, 1), some / np.maximum(m, 1)
    return np.where(common > 0, 2 * precision * recall / (precision + recall), 0.0)


def overlap_for(threshold: float) -> float:
    """What follows from F >= threshold: this share of the longer text's words is common, and of the words of both.

    F = 2l / (m + n) >= t says l >= t (m + n) / 2. Since the shorter one has l words or more, l / max(m, n) is at least
    t / (2 - t). The multisets of words have c >= l in common, and their Jaccard similarity c / (m + n - c) grows with
    c: it is at least t / (2 - t) too.
    """
    return threshold / (2 - threshold)


class Vocabulary:
    """Numbers for words, from 1 in the order in which they are learned.

    A number is a character as long as there are such (1,114,111 words); a text with a later word is an array of
    numbers, which is compared in the same way, only more slowly. Nothing is ever confused.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def learn(self, words: Sequence[str]) -> Code:
        """The text as numbers; words that are new get theirs."""
        numbers = self._numbers
        return _code([numbers.setdefault(word, len(numbers) + 1) for word in words])

    def look_up(self, words: Sequence[str]) -> Code:
        """The text as numbers, with 0 for every word that was never learned: it is in no text that was."""
        return _code([self._numbers.get(word, 0) for word in words])


def _code(numbers: list[int]) -> Code:
    try:
        return "".join(map(chr, numbers))
    except ValueError:  # beyond the last code point
        return array("Q", numbers)


def score_table(
    texts: Sequence[Code],
    pool: Sequence[Code],
    *,
    lengths: NDArray[np.int64] | None = None,
    above: float = 0.0,
    threads: int = 1,
) -> NDArray[np.float64]:
    """ROUGE-L of each text with each of the pool: float64 [texts, pool].

    Args:
        lengths: words of each of the pool, int64 [pool], where they are known already.
        above: scores below it are of no interest, and may be 0 in the table: lengths that cannot reach it are skipped,
            and a comparison ends where too few words are left.
        threads: that share the texts; one text alone is compared by one.
    """
    m = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))[:, None]
    n = np.fromiter(map(len, pool), dtype=np.int64, count=len(pool)) if lengths is None else lengths
    shares = process.cdist(
        texts,
        pool,
        scorer=LCSseq.normalized_similarity,  # l / max(m, n)
        score_cutoff=max(overlap_for(above) - _CUTOFF_SLACK, 0.0),
        dtype=np.float64,
        workers=threads,
    )
    return f_measure(np.rint(shares * np.maximum(m, n)), m, n)


def pairs_above(
    texts: Sequence[Code], pool: Sequence[Code], threshold: float, *, threads: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """All pairs that score more than `threshold`: numbers in `texts` [k], ascending, in `pool` [k], and scores [k]."""
    shares = process.cdist(
        texts,
        pool,
        scorer=LCSseq.normalized_similarity,
        score_cutoff=max(overlap_for(threshold) - _CUTOFF_SLACK, 0.0),
        dtype=np.float32,  # half the memory; l is exact below eight million words
        workers=threads,
    )
    rows, columns = np.nonzero(shares)
    m = np.fromiter((len(texts[row]) for row in rows.tolist()), dtype=np.int64, count=len(rows))
    n = np.fromiter((len(pool[column]) for column in columns.tolist()), dtype=np.int64, count=len(rows))
    scores = f_measure(np.rint(shares[rows, columns] * np.maximum(m, n)), m, n)
    above = scores > threshold
    return rows[above], columns[above], scores[above]


class RougePool:
    """Texts that a new one is compared with; adding one is cheap.

    Args:
        texts: to begin with.
        words: which words count, see `split_words`.

    A text without words ("rouge": one in Greek or Chinese, for instance) scores 0 with everything, so that it would
    pass any filter: `wordless` counts them. Ask `split_words` before adding one, or take `words="unicode"`.
    """

    def __init__(self, texts: Iterable[str] = (), *, words: str = "rouge") -> None:
        self.words = words
        self.wordless = 0
        self._vocabulary = Vocabulary()
        self._codes: list[Code] = []
        self._lengths = array("q")
        split_words("", words)  # refuses a wrong name now, not at the first text
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, text: str) -> int:
        """Take a text into the pool; returns its number, from 0."""
        code = self._vocabulary.learn(split_words(text, self.words))
        self.wordless += not len(code)
        self._codes.append(code)
        self._lengths.append(len(code))
        return len(self._codes) - 1

    def scores(self, text: str) -> NDArray[np.float64]:
        """ROUGE-L with each text of the pool, in the order of adding: float64 [n]."""
        return self.table([text])[0]

    def table(self, texts: Sequence[str], *, threads: int = 1) -> NDArray[np.float64]:
        """ROUGE-L of many texts with each of the pool: float64 [texts, n], in `threads` threads."""
        codes = [self._look_up(text) for text in texts]
        return score_table(codes, self._codes, lengths=np.array(self._lengths), threads=threads)

    def nearest(self, text: str) -> tuple[float, int]:
        """The highest score and the number of the first text that has it; (0.0, -1) where no text shares a word."""
        code = self._look_up(text)
        bounds = _bounds(len(code), np.array(self._lengths))
        scores = np.zeros(len(self))
        promising = bounds >= _PROMISING
        scores[promising] = self._compare(code, promising)
        best = scores.max(initial=0.0)
        others = ~promising & (bounds >= best - _SLACK)
        scores[others] = self._compare(code, others, above=best)
        place = int(scores.argmax()) if len(self) else -1
        return (float(scores[place]), place) if place >= 0 and scores[place] > 0 else (0.0, -1)

    def any_above(self, text: str, threshold: float = THRESHOLD) -> bool:
        """Whether a text of the pool scores more than `threshold` with this one."""
        code = self._look_up(text)
        possible = _bounds(len(code), np.array(self._lengths)) > threshold - _SLACK
        return bool((self._compare(code, possible, above=threshold) > threshold).any())

    def _look_up(self, text: str) -> Code:
        return self._vocabulary.look_up(split_words(text, self.words))

    def _compare(self, code: Code, those: NDArray[np.bool_], above: float = 0.0) -> NDArray[np.float64]:
        """Scores with those of the pool where `those` [n] is true, in their order (which is that of the memory)."""
        pool = list(compress(self._codes, those))
        return score_table([code], pool, lengths=np.array(self._lengths)[those], above=above)[0]


def _bounds(m: int, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """The highest F that texts of m and of `lengths` words can have: all words of the shorter one are common."""
    return 2 * np.minimum(m, lengths) / np.maximum(m + lengths, 1)
