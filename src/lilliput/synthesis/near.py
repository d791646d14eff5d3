"""Near-duplicates among the rows of a file: MinHash finds candidates, ROUGE-L decides, the first of each kind stays.

A row goes when its text is that of an earlier row, or scores more than the threshold with an earlier row that stays.
Up to EXACT_UP_TO rows every pair is compared. In a larger file only the pairs that MinHash proposes are: a score of t
or more makes the multisets of words similar to t / (2 - t) at least (`rouge.overlap_for`), and the bands are chosen so
that a pair of just that similarity is missed with a probability below MISSED; one more similar is missed more seldom.

Sources: Broder, On the resemblance and containment of documents (1997), for MinHash, which datasketch computes;
Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4, for the bands. The bands are grouped here, on
arrays, since tables of Python objects (datasketch's own) hold kilobytes for each row. Not here: the score (rouge.py).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import numpy as np
from datasketch import MinHash  # type: ignore[import-untyped]
from numpy.typing import NDArray

from lilliput.data.engine import Engine, engine_of
from lilliput.errors import UsageError
from lilliput.progress import bar
from lilliput.synthesis.rouge import THRESHOLD, Code, Vocabulary, overlap_for, pairs_above, split_words

EXACT_UP_TO = 20_000  # rows; comparing all pairs of so many takes some ten seconds on two cores
MISSED = 0.001  # of the pairs at the threshold
PERMUTATIONS = 512  # the most that a row's signature may take
_LONGEST_BAND = 16  # longer ones save no more candidates
_SEED = 1  # of the permutations: the same candidates each time
_CHUNK = 2_000  # texts in one call of `signatures`
_BLOCK, _BLOCK_LEAST, _TABLE = 512, 32, 1 << 23  # texts compared with all earlier ones at once; pairs in one table
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 over the golden ratio


# ---- MinHash -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bands:
    """How signatures are cut: two texts are candidates when all `rows` MinHashes of one of the `bands` agree."""

    bands: int
    rows: int

    @classmethod
    def for_threshold(cls, threshold: float) -> Bands:
        """The longest bands (so the fewest candidates) that miss less than MISSED within PERMUTATIONS."""
        for rows in range(_LONGEST_BAND, 0, -1):
            share = overlap_for(threshold) ** rows  # the probability that a band agrees
            if (1 - share) ** (PERMUTATIONS // rows) < MISSED:
                return cls(1 if share == 1 else math.ceil(math.log(MISSED) / math.log1p(-share)), rows)
        raise UsageError(f"{threshold:g} is too low for MinHash", where="--rouge", todo="Compare all pairs: --exact.")

    def missed(self, similarity: float) -> float:
        """The probability that two texts of this Jaccard similarity are in no band together."""
        return float((1 - similarity**self.rows) ** self.bands)


def signatures(texts: Sequence[str], bands: Bands, words: str = "unicode") -> NDArray[np.uint64]:
    """What MinHash makes of texts, a number for each band: uint64 [texts, bands].

    Texts with the same multiset of words have the same numbers, on every machine; two texts share the number of a band
    with the probability (Jaccard similarity)^rows. A text without words has numbers too, which mean nothing.
    """
    empty = MinHash(num_perm=bands.bands * bands.rows, seed=_SEED, hashfunc=zlib.crc32)
    found = np.empty((len(texts), bands.bands, bands.rows), dtype=np.uint64)
    for number, text in enumerate(texts):
        one = empty.copy()
        one.update_batch(_counted(split_words(text, words)))
        found[number] = one.hashvalues.reshape(bands.bands, bands.rows)
    mixed = np.zeros((len(texts), bands.bands), dtype=np.uint64)
    for row in range(bands.rows):
        mixed = (mixed ^ found[:, :, row]) * _MIX
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _counted(words: Iterable[str]) -> list[bytes]:
    """A multiset as a set: the second "the" is another member than the first."""
    times: dict[str, int] = defaultdict(int)
    members = []
    for word in words:
        members.append(f"{word} {times[word]}".encode("utf-8", "surrogatepass"))
        times[word] += 1
    return members


def method_of(bands: Bands | None) -> str:
    """What is said about how texts were compared."""
    return "all pairs" if bands is None else "minhash"


# ---- which texts go ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Near:
    """What was found among n texts.

    Attributes:
        first: int64 [n]; the number of the text that this one repeats, or -1: it stays. Where it is near to that text,
            that one stays; where it is the same, that one may be near to a third.
        score: float64 [n]; ROUGE-L with that text; 1 where they are the same, 0 where it stays.
        same: bool [n]; it is that text letter for letter.
        wordless: numbers of texts in which ROUGE-L sees no words: they are only compared letter for letter.
        bands: how MinHash's signatures were cut; None where all pairs were compared.
        missed: the highest probability that a pair above the threshold was not seen; 0 for all pairs.
    """

    first: NDArray[np.int64]
    score: NDArray[np.float64]
    same: NDArray[np.bool_]
    wordless: list[int]
    bands: Bands | None
    missed: float

    @property
    def method(self) -> str:
        """ "all pairs" or "minhash"."""
        return method_of(self.bands)

    @property
    def stays(self) -> NDArray[np.bool_]:
        """bool [n]: the texts that are left."""
        return self.first < 0


def find_near(
    texts: Iterable[str],
    *,
    threshold: float = THRESHOLD,
    words: str = "unicode",
    exact: bool | None = None,
    engine: Engine | None = None,
    threads: int = 1,
    progress: bool = False,
) -> Near:
    """Which texts repeat an earlier one, or score more than `threshold` with an earlier one that stays.

    Args:
        texts: in their order; one that is blank is never a duplicate.
        threshold: ROUGE-L F-measure from 0 to 1; at 1 only equal texts go.
        words: which words are compared, see `rouge.split_words`.
        exact: compare all pairs, or (False) only candidates of MinHash; by default all pairs up to EXACT_UP_TO texts.
        engine: where signatures are computed; in this process by default.
        threads: that compare pairs.
        progress: draw a bar.

    Raises UsageError: a threshold outside 0 to 1, or one too low for MinHash.
    """
    if not 0 <= threshold <= 1:
        raise UsageError(f"{threshold:g} is not between 0 and 1", where="--rouge", todo="Self-Instruct takes 0.7.")
    texts = iter(texts)
    if exact is None:
        head = list(islice(texts, EXACT_UP_TO + 1))
        exact, texts = len(head) <= EXACT_UP_TO, chain(head, texts)
    bands = None if exact else Bands.for_threshold(threshold)
    found = _Found(words)
    if bands is None:
        deque(map(found.add, texts), maxlen=0)
        _compare_all(found, threshold, threads, progress)
    else:
        keys = _all_signatures(found, texts, bands, engine or engine_of("process"), progress)
        _compare_candidates(found, keys, threshold, progress)
    return found.near(bands, threshold)


class _Found:
    """The texts so far, and which of them are gone.

    `fresh` are the numbers of those that are compared by ROUGE-L, `codes` their words: the others are blank, wordless,
    or the same as an earlier one.
    """

    def __init__(self, words: str) -> None:
        self.words = words
        self.first: list[int] = []
        self.score: list[float] = []
        self.same: list[bool] = []
        self.wordless: list[int] = []
        self.fresh: list[int] = []
        self.codes: list[Code] = []
        self._vocabulary = Vocabulary()
        self._seen: dict[bytes, int] = {}

    def add(self, text: str) -> bool:
        """Take the next text; True if ROUGE-L has to compare it."""
        number = len(self.first)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first = self._seen.setdefault(digest, number) if text.strip() else number
        repeats = first != number
        self.first.append(first if repeats else -1)
        self.score.append(float(repeats))
        self.same.append(repeats)
        if repeats:
            return False
        code = self._vocabulary.learn(split_words(text, self.words))
        if not len(code):
            self.wordless.append(number)
            return False
        self.fresh.append(number)
        self.codes.append(code)
        return True

    def drop(self, place: int, first: int, score: float) -> None:
        """The fresh text at `place` is near to the one at `first`."""
        number = self.fresh[place]
        self.first[number], self.score[number] = self.fresh[first], score

    def near(self, bands: Bands | None, threshold: float) -> Near:
        return Near(
            first=np.array(self.first, dtype=np.int64),
            score=np.array(self.score, dtype=np.float64),
            same=np.array(self.same, dtype=np.bool_),
            wordless=self.wordless,
            bands=bands,
            missed=bands.missed(overlap_for(threshold)) if bands else 0.0,
        )


def _best(candidates: Iterable[tuple[int, float]]) -> tuple[int, float] | None:
    """Of (place, score) the one with the highest score, the first of these; None of none."""
    return min(candidates, key=lambda found: (-found[1], found[0]), default=None)


# ---- all pairs ---------------------------------------------------------------------------------------------------


def _compare_all(found: _Found, threshold: float, threads: int, progress: bool) -> None:
    """A block of texts at a time with those that stay of the blocks before it, then among themselves."""
    stay: list[int] = []
    codes: list[Code] = []  # of those that stay
    begin = 0
    with bar("comparing all pairs", len(found.codes), shown=progress) as advance:
        while begin < len(found.codes):
            block = found.codes[begin : begin + max(_BLOCK_LEAST, min(_BLOCK, _TABLE // (len(codes) + 1)))]
            near: dict[int, list[tuple[int, float]]] = defaultdict(list)
            for row, column, score in _pairs(block, codes, threshold, threads):
                near[row].append((stay[column], score))
            for row, column, score in _pairs(block, block, threshold, threads):
                if column < row:
                    near[row].append((begin + column, score))
            gone: set[int] = set()
            for row in range(len(block)):
                best = _best(pair for pair in near[row] if pair[0] not in gone)
                if best is None:
                    stay.append(begin + row)
                    codes.append(block[row])
                else:
                    gone.add(begin + row)
                    found.drop(begin + row, *best)
            begin += len(block)
            advance(len(block))


def _pairs(
    texts: Sequence[Code], pool: Sequence[Code], threshold: float, threads: int = 1
) -> Iterator[tuple[int, int, float]]:
    """`pairs_above`, one after the other."""
    rows, columns, scores = pairs_above(texts, pool, threshold, threads=threads)
    return zip(rows.tolist(), columns.tolist(), scores.tolist(), strict=True)


# ---- candidates of MinHash ---------------------------------------------------------------------------------------


def _all_signatures(
    found: _Found, texts: Iterator[str], bands: Bands, engine: Engine, progress: bool
) -> NDArray[np.uint64]:
    """Signatures of the fresh texts: uint64 [fresh, bands]. The texts themselves are not kept."""

    def fresh_chunks() -> Iterator[list[str]]:
        while chunk := list(islice(texts, _CHUNK)):
            yield [text for text in chunk if found.add(text)]

    function = partial(signatures, bands=bands, words=found.words)
    parts = []
    with bar("signatures", None, shown=progress) as advance:
        for part in engine.map(function, fresh_chunks()):
            parts.append(part)
            advance(len(part))
    return np.concatenate(parts) if parts else np.zeros((0, bands.bands), dtype=np.uint64)


def _compare_candidates(found: _Found, keys: NDArray[np.uint64], threshold: float, progress: bool) -> None:
    """Each text with the earlier ones that stay and share the number of a band with it."""
    groups, begins, count = _groups(keys)
    stay: list[list[int]] = [[] for _ in range(count)]  # of each group
    with bar("comparing candidates", len(found.codes), shown=progress) as advance:
        for place, code in enumerate(found.codes):
            mine = groups[begins[place] : begins[place + 1]].tolist()
            candidates = sorted(set(chain.from_iterable(stay[group] for group in mine)))
            pool = [found.codes[other] for other in candidates]
            best = _best((candidates[column], score) for _, column, score in _pairs([code], pool, threshold))
            if best is not None:
                found.drop(place, *best)
            else:
                for group in mine:
                    stay[group].append(place)
            advance()


def _groups(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Which texts share the number of a band, from signatures [texts, bands].

    Returns the groups of text 0, then those of text 1, …; where each text's begin, [texts + 1]; how many groups there
    are. A text that is alone with its number is in no group for it, and most are.
    """
    members, groups, count = [], [], 0
    for band in keys.T:
        order = np.argsort(band, kind="stable")
        equal = band[order][1:] == band[order][:-1]
        follows = np.append(False, equal)[: len(band)]
        shared = np.append(equal, False)[: len(band)] | follows
        starts = shared & ~follows
        members.append(order[shared])
        groups.append(np.cumsum(starts)[shared] - 1 + count)
        count += int(starts.sum())
    text = np.concatenate(members)
    by_text = np.argsort(text, kind="stable")
    begins = np.append(0, np.cumsum(np.bincount(text, minlength=len(keys))))
    return np.concatenate(groups)[by_text], begins, count
