"""The picture of a data set: lengths, turns, languages.

Not here: the numbers (portrait.py). matplotlib takes a second to import, which only those who draw pay; without pyplot
no display is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lilliput.data.portrait import QUANTILES, Lengths, Portrait
from lilliput.files import replace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"user": "tab:blue", "assistant": "tab:orange", "system": "tab:green", "tool": "tab:red"}
_MARKED = (0.5, 0.95)  # quantiles that are drawn
_FEWEST_BARS = 5  # so wide is the place, that a single one is no wall
_MOST_BARS = 10  # turns and languages that get one of their own


def draw_portrait(found: Portrait, path: Path) -> None:
    """Write a PNG: lengths of chats and of each role's turns, chats by turns, chats by language."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(f"{Path(found.file).name}: {found.chats:,} chats".replace("$", r"\$"))
    grid = figure.subplots(2, 2)
    if found.tokens is not None and found.tokens.lengths.count:
        of = "" if found.sampled == found.chats else f" (a sample of {found.sampled:,} chats)"
        _draw_lengths(grid[0, 0], found.tokens.lengths, f"Tokens in a chat{of}", "tokens")
    else:
        _draw_lengths(grid[0, 0], found.words, "Words in a chat", "words")
    _draw_roles(grid[0, 1], found)
    turns = {str(number): count for number, count in found.turns.items()}
    _draw_bars(grid[1, 0], turns, "Turns in a chat", "turns")
    of = f"a sample of {found.sampled:,} chats" if found.sampled < found.chats else "all chats"
    _draw_bars(grid[1, 1], found.languages, f"Languages of {of}", "")
    with replace(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_lengths(axes: Axes, lengths: Lengths, title: str, unit: str) -> None:
    """A histogram; the last bar, hatched, is all that is longer than the 99 % quantile's bin."""
    width = (lengths.bins[0].high or 1) - lengths.bins[0].low
    for one in lengths.bins:
        hatch = "//" if one.high is None else None
        axes.bar(one.low, one.count, width=width * 0.94, align="edge", color="tab:blue", alpha=0.75, hatch=hatch)
    ends = [lengths.bins[0].low, lengths.bins[-1].low + width]
    for share, value in zip(QUANTILES, lengths.quantiles, strict=True):
        if share in _MARKED:
            axes.axvline(value, color="black", linewidth=1, linestyle="--")
            axes.text(
                value, 1.0, f" {share:.0%}: {value:,}", transform=axes.get_xaxis_transform(), va="top", fontsize=9
            )
    axes.set(xlabel=f"{unit} (longest: {lengths.most:,})", ylabel="chats", xlim=ends)
    axes.set_title(title, loc="left")
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.2)
    axes.set_axisbelow(True)


def _draw_roles(axes: Axes, found: Portrait) -> None:
    """A line for each role from its shortest turn to its longest, with a dot for each quantile, the median's larger."""
    names = list(found.by_role)
    for place, name in enumerate(names):
        lengths = found.by_role[name]
        colour = _COLOURS.get(name, "tab:grey")
        axes.plot([max(lengths.least, 1), max(lengths.most, 1)], [place, place], color=colour, linewidth=2, alpha=0.4)
        quantiles = [max(value, 1) for value in lengths.quantiles]
        axes.scatter(quantiles, [place] * len(quantiles), s=[90, 40, 40, 40], color=colour, zorder=3)
        for share, value in ((QUANTILES[0], quantiles[0]), (QUANTILES[-1], quantiles[-1])):
            said = f"{share:.0%}: {value:,}"
            axes.annotate(said, (value, place), (0, 9), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks(range(len(names)), [f"{name}\n{found.roles[name]:,} turns" for name in names])
    longest = max(lengths.most for lengths in found.by_role.values())
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="words (logarithmic)", xlim=(0.8, 2 * max(longest, 1)), ylim=(len(names) - 0.5, -0.5))
    axes.set_title("Words in a turn, shortest to longest; dots: 50, 90, 95, 99 %", loc="left")
    axes.grid(axis="x", alpha=0.2)


def _draw_bars(axes: Axes, counts: dict[str, int], title: str, label: str) -> None:
    names, values = list(counts)[:_MOST_BARS], list(counts.values())[:_MOST_BARS]
    if rest := sum(list(counts.values())[_MOST_BARS:]):
        names, values = [*names, "others"], [*values, rest]
    bars = axes.bar(names, values, width=0.7, color="tab:blue", alpha=0.75)
    axes.bar_label(bars, labels=[f"{value:,}" for value in values], fontsize=8)
    axes.set(xlabel=label, ylabel="chats", xlim=(-0.6, max(len(names), _FEWEST_BARS) - 0.4))
    axes.set_title(title, loc="left")
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.2)
    axes.set_axisbelow(True)
