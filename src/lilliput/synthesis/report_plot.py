"""The quality report as a picture: verbs and their nouns in two rings, lengths, nearness, and what was refused why.

Source of the rings: Self-Instruct, arXiv 2212.10560, figure 3. Not here: the numbers (`report.py`). matplotlib takes a
second to import, which only those who draw pay; without pyplot no display is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import degrees, pi
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from lilliput.files import replace
from lilliput.synthesis.diversity import rings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_READABLE = 0.032  # of the radius: what is narrower gets no label
_BARS = 16  # that can be read beside each other
_NAME = 30  # characters of a bar's name in one line
_PASSED, _REFUSED, _PLAIN = "tab:blue", "tab:orange", "tab:blue"


def draw_report(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of what `report.make_report` found."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 11), layout="constrained")
    figure.suptitle(f"{report['title'].replace('$', chr(92) + '$')}: {report['rows']:,} rows", fontsize=15)
    halves = figure.add_gridspec(2, 1, height_ratios=(3, 2))
    above, below = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    _draw_rings(above.add_subplot(1, 2, 1, projection="polar"), report["variety"])
    if report["journal"]:
        _draw_decisions(above.add_subplot(1, 2, 2), report["journal"])
    else:
        _draw_pairs(above.add_subplot(1, 2, 2), report["variety"])
    grid = below.add_gridspec(1, 6)
    for column, (what, found) in enumerate(report["lengths"].items()):
        _draw_lengths(below.add_subplot(grid[column]), what, found)
    _draw_nearness(below.add_subplot(grid[3:]), report["nearest"])
    with replace(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_rings(axes: Axes, variety: Mapping[str, Any]) -> None:
    """Inside a piece for each verb, as wide as it is frequent; outside its nouns, the rarer ones as one pale piece."""
    from matplotlib import colormaps

    axes.set_axis_off()
    axes.set_title("Verbs and the nouns they act on", loc="left")
    found = rings(variety["pairs"])
    if not found:
        axes.text(0, 0, "no verb with a noun was found", ha="center", va="center")
        return
    colours = [colormaps["tab20"](number % 20) for number in range(len(found))]
    unit, start = 2 * pi / sum(count for _, count, _ in found), 0.0
    for (verb, count, nouns), colour in zip(found, colours, strict=True):
        _piece(axes, start, count * unit, 0.25, 0.37, colour, verb)
        at = start
        for noun, times in nouns:
            _piece(axes, at, times * unit, 0.63, 0.37, (*colour[:3], 0.6), noun)
            at += times * unit
        _piece(axes, at, start + count * unit - at, 0.63, 0.37, (*colour[:3], 0.15), "")
        start += count * unit
    axes.set_ylim(0, 1)


def _piece(axes: Axes, start: float, width: float, inner: float, height: float, colour: Any, label: str) -> None:
    """A piece of a ring from the angle `start`, with its word along the radius, never upside down."""
    axes.bar(start, height, width=width, bottom=inner, align="edge", color=colour, edgecolor="white", linewidth=0.8)
    if width * (inner + height / 2) < _READABLE:
        return
    angle = start + width / 2
    turned = degrees(angle) + (180 if pi / 2 < angle < 3 * pi / 2 else 0)
    size = 8.5 if len(label) < 11 else 6.5
    axes.text(angle, inner + height / 2, label, rotation=turned, ha="center", va="center", fontsize=size)


def _draw_pairs(axes: Axes, variety: Mapping[str, Any]) -> None:
    """The commonest verbs with their nouns, where there is no journal to tell of."""
    axes.set_title("The commonest of them", loc="left")
    _draw_bars(axes, [(f"{verb} {noun}", count, _PASSED) for verb, noun, count in variety["pairs"][:_BARS]])


def _draw_decisions(axes: Axes, journal: Mapping[str, Any]) -> None:
    """A bar for each step that passed and each reason to refuse."""
    axes.set_title("What was decided", loc="left")
    bars = [
        (f"{step['step']}: {reason}", count, _PASSED if reason == "passed" else _REFUSED)
        for step in journal["steps"]
        for reason, count in (("passed", step["passed"]), *step["refused"].items())
        if count
    ]
    shown = sorted(bars, key=lambda bar: -bar[1])[:_BARS]
    _draw_bars(axes, [bar for bar in bars if bar in shown])


def _draw_bars(axes: Axes, bars: Sequence[tuple[str, int, str]]) -> None:
    """Name, number and colour of each, from the top."""
    if not bars:
        _empty(axes, "nothing yet")
        return
    bars = bars[::-1]
    drawn = axes.barh(range(len(bars)), [count for _, count, _ in bars], color=[colour for *_, colour in bars])
    axes.bar_label(drawn, labels=[f"{count:,}" for _, count, _ in bars], padding=3, fontsize=9)
    axes.set_yticks(range(len(bars)), [fill(name, _NAME) for name, *_ in bars], fontsize=9)
    axes.set(xlabel="times")
    axes.margins(x=0.12)
    _quiet(axes, "x")
    _whole_numbers(axes)


def _draw_lengths(axes: Axes, what: str, found: Mapping[str, Any]) -> None:
    axes.set_title(what.capitalize(), loc="left")
    if not found["texts"]:
        _empty(axes, "none")
        return
    fewest, texts = zip(*found["bars"], strict=True)
    names = [_span(low, high) for low, high in zip(fewest, (*fewest[1:], None), strict=True)]
    axes.barh(range(len(names)), texts, color=_PLAIN)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="texts", ylabel="words" if what == "instruction" else "")
    axes.invert_yaxis()
    _quiet(axes, "x")
    _whole_numbers(axes)


def _span(low: int, high: int | None) -> str:
    if high is None:
        return f"{low:,}+"
    return f"{low}" if high - low == 1 else f"{low}–{high - 1}"


def _draw_nearness(axes: Axes, nearest: Mapping[str, Any]) -> None:
    """Shares of instructions over ROUGE-L, a line for each thing that they are compared with."""
    axes.set_title("ROUGE-L of each instruction with the nearest of …", loc="left")
    if not nearest:
        _empty(axes, "nothing to compare with")
        return
    for what, found in nearest.items():
        bars = found["bars"]
        middles = [(number + 0.5) / len(bars) for number in range(len(bars))]
        shares = [count / found["instructions"] for count in bars]
        axes.step(middles, shares, where="mid", label=f"{what} ({found['instructions']:,})")
        axes.fill_between(middles, shares, step="mid", alpha=0.15)
    axes.axvline(0.7, color="grey", linewidth=1, linestyle="--")
    axes.set(
        xlim=(0, 1),
        ylim=(0, None),
        xlabel="ROUGE-L (dashed: 0.7, Self-Instruct's threshold)",
        ylabel="share of instructions",
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.legend(frameon=False)
    _quiet(axes, "y")


def _quiet(axes: Axes, grid: Any) -> None:
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _empty(axes: Axes, said: str) -> None:
    axes.text(0.5, 0.5, said, ha="center", va="center", transform=axes.transAxes, color="grey")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
