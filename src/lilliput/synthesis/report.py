"""What a generated data set is like: what was accepted and refused and why, lengths, variety, nearness, samples.

Written beside the data as `report.md` for people, `report.json` for programs and `report.png` to look at. A file of
rows that nobody generated can be looked at in the same way; what only a journal knows is left out then.

What the methods (self_instruct.py, alpaca.py, evol_instruct.py) write into the journal for it:

    an accepted row      {"step": "…", "row": {"instruction": …, "output": …, "provenance": …}}
    something refused    {"step": "…", "reason": "the same words for each refusal of its kind",
                          "text": "what was refused", "detail": "a line more about this one, or nothing"}
    a step that passed   {"step": "…"} with anything else
    evol-instruct, too   "operation": …, "round": …                                                 counted apart

Sources: Self-Instruct, arXiv 2212.10560, section 3.1 and figures 3 to 5 (verbs and nouns, lengths, ROUGE-L).
Not here: the picture (`report_plot.py`), verbs and nouns (`diversity.py`), the look at any data set before training
(`lilliput data inspect`).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lilliput.files import write_json, write_text
from lilliput.synthesis.diversity import Variety
from lilliput.synthesis.filters import Rules
from lilliput.synthesis.journal import JOURNAL, State, read_journal
from lilliput.synthesis.pairs import RESULT, Pair, read_pairs
from lilliput.synthesis.report_page import page
from lilliput.synthesis.rouge import THRESHOLD, RougePool

_WORDS = (0, 1, 5, 10, 15, 20, 30, 50, 100, 200, 500, 1000)  # where the bars of lengths begin; the last one is open
_SCORES = 20  # bars of ROUGE-L, from 0 to 1
_COMPARED = 1000  # instructions whose nearest one is looked for; of more so many are drawn
_AT_ONCE = 64  # instructions in one table of scores
_PAIRS = 1000  # verbs and nouns written down
_ACCEPTED, _REFUSED = 8, 2  # samples: of the rows, and of each reason
_count_words = Rules(unicode=True).count  # also where a script writes no spaces


def write_report(
    out: str | Path,
    data: str | Path | None = None,
    *,
    title: str = "",
    seeds: Sequence[str] = (),
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> dict[str, Any]:
    """Write `report.md`, `report.json` and `report.png` into `out`; returns what is in `report.json`.

    Args:
        out: the folder of a run: its `journal.jsonl` tells what was accepted and refused, where there is one.
        data: a file of rows in any form that `lilliput.data` reads, or the folder of another run, whose journal is
            read then; by default `out` itself. A run that was stopped before it wrote its data.jsonl is known by its
            journal alone.
        title: of the page; the name of the data by default.
        seeds: instructions that the data was grown from: the report then also says how near the rows are to these.
        seed: draws the samples, and which instructions are compared where there are many.
        skip_bad_rows: leave out rows that cannot be used instead of refusing the file; they are counted.

    Raises:
        DataError: there are neither rows nor a journal, or they cannot be read. A run whose data.jsonl has no rows is
            no error: the report then says what was refused and why.
        DiskError: a file cannot be written.
    """
    from lilliput.synthesis.report_plot import draw_report

    out = Path(out)
    source = out if data is None else Path(data)
    report = make_report(source, title=title, seeds=seeds, seed=seed, skip_bad_rows=skip_bad_rows)
    write_json(out / "report.json", report)
    write_text(out / "report.md", page(report))
    draw_report(report, out / "report.png")
    return report


def make_report(
    source: str | Path, *, title: str = "", seeds: Sequence[str] = (), seed: int = 0, skip_bad_rows: bool = False
) -> dict[str, Any]:
    """What `report.json` says, as plain values; arguments and errors as `write_report`.

    `journal` is null for rows that nobody generated; `nearest` has a part for each thing that rows are compared with.
    """
    source = Path(source)
    journal = read_journal(source) if (source / JOURNAL).is_file() else None
    pairs, skipped = _rows_of(source, journal, skip_bad_rows)
    instructions = [pair.instruction for pair in pairs]
    return {
        "title": title or source.resolve().name,
        "rows": len(pairs),
        "originals": sum(pair.provenance.get("round") == 0 for pair in pairs),
        "skipped": skipped,
        "repeated_instructions": len(pairs) - len({pair.question for pair in pairs}),
        "journal": None if journal is None else _history(journal),
        "lengths": {
            "instruction": _lengths(instructions),
            "input": _lengths([pair.input for pair in pairs if pair.input]),
            "output": _lengths([pair.output for pair in pairs]),
        },
        "variety": _variety(instructions),
        "nearest": _nearness(pairs, seeds, seed),
        "samples": {"rows": _sampled_rows(pairs, seed), "refused": _sampled_refusals(journal, seed)},
    }


def _rows_of(source: Path, journal: State | None, skip_bad_rows: bool) -> tuple[list[Pair], int]:
    """The rows, and how many were skipped; those of a journal where a run has written no others."""
    written = source / RESULT if source.is_dir() else source
    if journal is not None and not (written.is_file() and written.stat().st_size):
        if written.is_file():  # a run that accepted nothing
            return [], 0
        rows = journal.rows
        return [Pair(r["instruction"], r["output"], r.get("input", ""), "", r.get("provenance", {})) for r in rows], 0
    read = read_pairs(source, skip_bad_rows=skip_bad_rows)
    return read.pairs, len(read.skipped)


# ---- what the journal knows ------------------------------------------------------------------------------------------


def _history(journal: State) -> dict[str, Any]:
    decisions = list(journal.decisions.values())
    spent = journal.spent
    cost = journal.price.of(spent.prompt_tokens, spent.completion_tokens)
    return {
        "settings": journal.settings,
        "starts": len(journal.starts),
        "seconds": round(journal.seconds, 3),
        "requests": spent.requests,
        "failed": spent.failed,
        "retries": spent.retries,
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "cost": round(cost, 6),
        "accepted": sum("row" in decision for decision in decisions),
        "refused": sum("reason" in decision for decision in decisions),
        "steps": _steps(decisions),
        "operations": _passed_by(decisions, "operation"),
        "rounds": _passed_by(decisions, "round"),
    }


def _steps(decisions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each step, in the order in which they first occurred: how many passed, and the refused ones by reason."""
    passed: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    order: dict[str, None] = {}
    for decision in decisions:
        step = str(decision.get("step", ""))
        order.setdefault(step)
        if "reason" in decision:
            reasons[step][decision["reason"]] += 1
        else:
            passed[step] += 1
    return [{"step": step, "passed": passed[step], "refused": dict(reasons[step].most_common())} for step in order]


def _passed_by(decisions: Iterable[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """By operation or round: how many were tried and how many became rows; nothing for methods that have none."""
    tried: Counter[Any] = Counter()
    accepted: Counter[Any] = Counter()
    for decision in decisions:
        if name in decision:
            tried[decision[name]] += 1
            accepted[decision[name]] += "row" in decision
    return [{name: value, "tried": tried[value], "accepted": accepted[value]} for value in sorted(tried)]


# ---- what the rows are like ------------------------------------------------------------------------------------------


def _lengths(texts: Sequence[str]) -> dict[str, Any]:
    """Numbers of words: some quantiles, and how many texts each bar has: (its fewest words, texts)."""
    counts = sorted(map(_count_words, texts))
    if not counts:
        return {"texts": 0, "bars": []}
    bars, _ = np.histogram(counts, bins=[*_WORDS, np.inf])
    at = {"shortest": 0.0, "median": 0.5, "p95": 0.95, "longest": 1.0}
    quantiles = {name: int(counts[round(share * (len(counts) - 1))]) for name, share in at.items()}
    return {
        "texts": len(counts),
        "mean": round(fmean(counts), 2),
        **quantiles,
        "bars": list(zip(_WORDS, bars.tolist(), strict=True)),
    }


def _variety(instructions: Sequence[str]) -> dict[str, Any]:
    found = Variety.of(instructions).to_json()
    return {**found, "pairs": found["pairs"][:_PAIRS]}


def _nearness(pairs: Sequence[Pair], seeds: Sequence[str], seed: int) -> dict[str, Any]:
    """The highest ROUGE-L of each distinct instruction with the others and with the seeds, without their inputs; and
    of each evolved one with what it evolved from, inputs included."""
    instructions = list(dict.fromkeys(pair.instruction for pair in pairs))
    drawn = _draw(range(len(instructions)), _COMPARED, f"{seed}/nearest")
    texts = [instructions[number] for number in drawn]
    found: dict[str, Any] = {}
    if len(instructions) > 1:
        found["another instruction"] = _scores(_highest(texts, RougePool(instructions, words="unicode"), own=drawn))
    if seeds and texts:
        found["a seed"] = _scores(_highest(texts, RougePool(seeds, words="unicode")))
    by_id = {str(pair.provenance["id"]): pair.question for pair in pairs if "id" in pair.provenance}
    evolved = [(pair.question, by_id.get(str(pair.provenance.get("parent")))) for pair in pairs]
    lineage = _draw([(text, parent) for text, parent in evolved if parent], _COMPARED, f"{seed}/parents")
    if lineage:
        scores = [float(RougePool([parent], words="unicode").scores(text)[0]) for text, parent in lineage]
        found["its parent"] = _scores(scores)
    return found


def _highest(texts: Sequence[str], pool: RougePool, own: Sequence[int] | None = None) -> list[float]:
    """Each text's highest score in the pool; `own` are the texts' numbers there, which do not count."""
    highest: list[float] = []
    for start in range(0, len(texts), _AT_ONCE):
        table = pool.table(texts[start : start + _AT_ONCE])
        if own is not None:
            table[np.arange(len(table)), own[start : start + _AT_ONCE]] = 0.0
        highest += table.max(axis=1).tolist()
    return highest


def _scores(scores: Sequence[float]) -> dict[str, Any]:
    bars, _ = np.histogram(scores, bins=_SCORES, range=(0.0, 1.0))
    above = sum(score > THRESHOLD for score in scores)
    return {
        "instructions": len(scores),
        "median": round(float(np.median(scores)), 4),
        "above_0.7": above,
        "bars": bars.tolist(),
    }


# ---- samples ---------------------------------------------------------------------------------------------------------


def _draw(items: Sequence[Any], count: int, key: str) -> list[Any]:
    """At most `count` of the items, in their order."""
    if len(items) <= count:
        return list(items)
    return [items[number] for number in sorted(random.Random(key).sample(range(len(items)), count))]


def _sampled_rows(pairs: Sequence[Pair], seed: int) -> list[dict[str, Any]]:
    """Some rows, written by the teacher where there are such, with what they came from."""
    written = [pair for pair in pairs if pair.provenance.get("round") != 0] or pairs
    names = ("id", "parent", "operation", "round", "origin")
    return [
        {
            "instruction": pair.instruction,
            "input": pair.input,
            "output": pair.output,
            **{name: pair.provenance[name] for name in names if name in pair.provenance},
        }
        for pair in _draw(written, _ACCEPTED, f"{seed}/rows")
    ]


def _sampled_refusals(journal: State | None, seed: int) -> list[dict[str, Any]]:
    """Some refused texts of each step and reason."""
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for decision in journal.decisions.values() if journal else ():
        if "reason" in decision:
            kinds[str(decision.get("step", "")), decision["reason"]].append(decision)
    return [
        {"step": step, "reason": reason, "text": str(one.get("text", "")), "detail": str(one.get("detail", ""))}
        for (step, reason), ones in kinds.items()
        for one in _draw(ones, _REFUSED, f"{seed}/{step}/{reason}")
    ]
