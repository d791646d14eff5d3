"""Pictures of what int8 does to a model: layers, outlier features and thresholds; the ways of rounding side by side.

Not here: the numbers (outliers.py, comparison.py). matplotlib takes a second to import, which only those who draw pay;
without pyplot no display is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.evaluation.comparison import Int8Comparison
from lilliput.evaluation.outliers import OutlierReport, block_of, kind_of
from lilliput.files import replace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WITHOUT, _WITH = "tab:orange", "tab:blue"  # the decomposition, in every picture
_KINDS = 10  # colours of matplotlib's table: more kinds of layers than that share one
_LOG_FROM = 5.0  # times: numbers further apart are drawn on a logarithmic axis
_BLOCK_LABELS = 32  # that fit along the width


def draw_outliers(report: OutlierReport, path: Path, title: str) -> None:
    """Write a PNG: each layer's error, each layer's outlier features, and the curves over the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 11), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(3, 2, height_ratios=(4, 3, 3))
    errors = figure.add_subplot(grid[0, :])
    _draw_errors(errors, report)
    _draw_features(figure.add_subplot(grid[1, :], sharex=errors), report)
    _draw_curve(figure.add_subplot(grid[2, 0]), report, "error", "Relative error, mean of the layers")
    _draw_curve(figure.add_subplot(grid[2, 1]), report, "float32_columns", "Columns in float32, mean share")
    _save(figure, path)


def draw_comparison(comparison: Int8Comparison, path: Path, title: str) -> None:
    """Write a PNG: two bars for each way of rounding, from float32's perplexity to its own (none for infinity)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    names, base = list(dict.fromkeys(row.way for row in comparison.rows)), comparison.float32
    for shift, decomposition, colour in ((-0.2, False, _WITHOUT), (0.2, True, _WITH)):
        values = [row.perplexity for row in comparison.rows if row.decomposition == decomposition]
        heights = [value - base if isfinite(value) else 0 for value in values]
        said = f"outlier columns (> {comparison.threshold:g}) in float32" if decomposition else "all columns in int8"
        at = [i + shift for i in range(len(names))]
        bars = axes.bar(at, heights, width=0.38, bottom=base, color=colour, label=said)
        axes.bar_label(bars, labels=[f"{value:,.2f}" for value in values], padding=3, fontsize=9)
    axes.axhline(base, color="black", linewidth=1, label=f"float32: {base:,.2f}")
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="perplexity", title=title)
    finite = [value for value in (base, *(row.perplexity for row in comparison.rows)) if isfinite(value)]
    if max(finite) > _LOG_FROM * min(finite):
        axes.set(yscale="log", ylabel="perplexity (logarithmic)")
        axes.yaxis.set_major_formatter("{x:,g}")
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    _save(figure, path)


# ---- parts of the first picture ----


def _draw_errors(axes: Axes, report: OutlierReport) -> None:
    """A line for each layer from its error with the decomposition to the one without."""
    x = range(len(report.layers))
    without, with_it = [lay.error_without for lay in report.layers], [lay.error for lay in report.layers]
    axes.vlines(x, with_it, without, color="lightgrey", linewidth=1.5, zorder=1)
    axes.scatter(x, without, s=14, color=_WITHOUT, label="all columns in int8", zorder=2)
    said = f"outlier columns (> {report.threshold:g}) in float32"
    axes.scatter(x, with_it, s=14, color=_WITH, label=said, zorder=3)
    axes.set_ylim(bottom=0)
    if max(without) > _LOG_FROM * min(with_it) > 0:
        axes.set(yscale="log", ylim=(0.8 * min(with_it), 1.25 * max(without)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.set(ylabel="relative error of the product", xlim=(-1, len(x)))
    axes.set_title("Error of each layer against float32", loc="left")
    axes.grid(axis="y", which="both", alpha=0.2)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0.2)
    _mark_blocks(axes, [layer.name for layer in report.layers])


def _draw_features(axes: Axes, report: OutlierReport) -> None:
    """A bar for each layer, in the colour of its kind."""
    kinds = [kind_of(layer.name) for layer in report.layers]
    for kind, colour in _colours(kinds).items():
        at = [i for i, other in enumerate(kinds) if other == kind]
        axes.bar(at, [len(report.layers[i].outlier_features) for i in at], width=0.9, color=colour, label=kind)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, max(2.0, 1.5 * max(len(layer.outlier_features) for layer in report.layers)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(ylabel="input columns")
    axes.set_title(f"Outlier features of each layer: columns with a number beyond {report.threshold:g}", loc="left")
    axes.grid(axis="y", alpha=0.2)
    axes.set_axisbelow(True)
    if len(_colours(kinds)) <= _KINDS:
        axes.legend(frameon=False, fontsize=9, ncols=1, loc="upper left", bbox_to_anchor=(1, 1))
    _mark_blocks(axes, [layer.name for layer in report.layers])


def _draw_curve(axes: Axes, report: OutlierReport, what: str, label: str) -> None:
    """One of the curve's columns over the thresholds, evenly spaced."""
    curve = report.curve()
    names = [f"{row['threshold']:g}" if row["threshold"] else "none" for row in curve]
    values = [row[what] for row in curve]
    axes.plot(range(len(names)), values, marker="o", color=_WITH)
    share = what == "float32_columns"
    for i, value in enumerate(values):
        said = f"{value:.2%}" if share else f"{value:.4f}"
        beside, side = ((-6, 5), "right") if share else ((4, 5), "left")  # not on the line
        axes.annotate(said, (i, value), textcoords="offset points", xytext=beside, ha=side, fontsize=9)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="threshold: columns with a larger number are in float32")
    axes.set_title(label, loc="left")
    top = 1.15 * max(values) or 1.0
    axes.set(xlim=(-0.9, len(names) - 0.1), ylim=(-0.03 * top, top))
    if share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 2):g}%")
    axes.grid(alpha=0.2)


def _mark_blocks(axes: Axes, names: Sequence[str]) -> None:
    """A tick where a block begins, as many as can be read."""
    starts, at = [], 0
    for block, inside in groupby(names, block_of):
        starts.append((at, block.rpartition(".")[2]))
        at += len(list(inside))
    shown = starts[:: -(-len(starts) // _BLOCK_LABELS)]
    axes.set_xticks([x - 0.5 for x, _ in shown], [label for _, label in shown], ha="left")
    axes.set_xlabel("block (its layers from left to right in the model's order)")


def _colours(kinds: Sequence[str]) -> dict[str, Any]:
    """A colour for each kind of layer, in order of appearance; one for all when there are too many."""
    known = list(dict.fromkeys(kinds))
    return {kind: f"C{i}" if len(known) <= _KINDS else "C0" for i, kind in enumerate(known)}


def _save(figure: Figure, path: Path) -> None:
    with replace(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
