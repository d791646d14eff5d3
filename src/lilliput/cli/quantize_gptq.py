"""`lilliput quantize --format gptq`: a checkpoint fitted to a calibration text, and what became of each layer.

Not here: the other formats, which need no text (quantize.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from lilliput.cli.base import facts, size
from lilliput.cli.door import Answer, Stopped, choose
from lilliput.errors import UsageError
from lilliput.progress import say, warn

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lilliput.models import GptqReport

GPTQ = "gptq"
UNFINISHED = ".gptq"  # models/calibrate.py has it too, and would cost the import of torch
_SOLVER = ("bits", "group", "symmetric", "act_order", "static_groups", "damp", "correct", "search", "refine")
_FOR_TEXT = ("calibration", "samples", "length", "act_order", "static_groups", "damp", "correct", "refine", "memory")
_DTYPES = ("float16", "bfloat16", "float32")
_ROUNDINGS = ("gptq", "nearest")
_SAMPLES, _LENGTH = 128, 2048  # arXiv 2210.17323, section 4


def quantize_with_text(model: str, out: Path, given: dict[str, Any], *, overwrite: bool) -> Answer:
    """Quantize MODEL into `out`; `given` are the options, None for those that were left out."""
    rounding = choose(given["rounding"] or "gptq", _ROUNDINGS, "--rounding")
    if given["dtype"] is not None:
        choose(given["dtype"], _DTYPES, "--dtype")
    _check_text(rounding, given)
    import torch

    from lilliput.models import Gptq, load_tokenizer, quantize_gptq
    from lilliput.models.gptq_report import draw_gptq

    settings = Gptq(**{name: given[name] for name in _SOLVER if given[name] is not None})
    tokenizer = load_tokenizer(model)
    ids = read_calibration(model, tokenizer, given) if rounding == "gptq" else None
    dtype = None if given["dtype"] is None else getattr(torch, given["dtype"])
    options: dict[str, Any] = {"rounding": rounding, "dtype": dtype, "overwrite": overwrite}
    if given["memory"] is not None:
        options["memory"] = given["memory"]
    try:
        report = quantize_gptq(model, out, ids, settings, tokenizer=tokenizer, **options)
    except KeyboardInterrupt as error:
        raise Stopped("stopped", where=str(out), todo="Give the same command again to go on.") from error
    picture = out / "gptq.png"
    draw_gptq(report, picture)
    return Answer({**report.to_json(), "path": str(out), "picture": str(picture)}, _people(report, out, picture))


def _check_text(rounding: str, given: dict[str, Any]) -> None:
    if rounding == "gptq" and given["calibration"] is None:
        raise UsageError(
            "gptq fits the weights to what the model reads, and needs some of it",
            where="--calibration",
            todo="Give a text or a file of rows: --calibration FILE; or --rounding nearest, which needs none.",
        )
    for name in _FOR_TEXT:
        if rounding == "nearest" and given[name] is not None:
            raise UsageError(f"--{name.replace('_', '-')} is of no use to --rounding nearest", todo="Leave it out.")
    if given["memory"] is not None and given["memory"] <= 0:
        raise UsageError(f"{given['memory']} is not a number above 0", where="--memory")


def read_calibration(model: str, tokenizer: PreTrainedTokenizerBase, given: dict[str, Any]) -> Tensor:
    """The text as segments; says how much it is."""
    from lilliput.data.calibration import load_calibration
    from lilliput.models.load import context_of

    samples = given["samples"] or _SAMPLES
    most = context_of(model)
    length = given["length"] or min(_LENGTH, most or _LENGTH)
    if most is not None and length > most:
        raise UsageError(f"{length} is more than the {most} positions this model has", where="--length")
    found = load_calibration(given["calibration"], tokenizer, samples=samples, length=length)
    count, each = found.ids.shape
    say(f"Calibration: {count:,} segments of {each:,} tokens, {found.tokens:,} of the {found.available:,} read")
    if found.tokens < samples * length:
        warn(f"{found.origin} has only {found.available:,} tokens; {samples:,} segments of {length:,} were asked for")
    return found.ids


def _people(report: GptqReport, out: Path, picture: Path) -> Group:
    rows = {
        "quantized": f"{report.weights:,} weights at {report.bits_per_weight:.3f} bits each",
        "file": size(report.file_bytes),
        "calibration": f"{report.tokens:,} tokens" if report.tokens else "none: rounded to nearest",
        "time": f"{report.seconds:.0f} s",
        "memory": f"{size(report.peak_bytes)} at the most",
        "written to": f"{out} (also gptq.json, {picture.name})",
    }
    return Group(_errors(report), facts(f"{report.model} in {report.settings.format.name}", rows))


def _errors(report: GptqReport) -> Table:
    """A line for each kind of module: the error over the layers, and the worst one."""
    said = "Lost of each layer's outputs, a share of their energy"
    if report.rounding == "nearest":
        said = "How far each layer's weights were moved, a share of their norm"
    table = Table(title=said, title_justify="left")
    for column in ("module", "mean", "largest", "in layer", "seconds"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for name, modules in report.kinds():
        worst = max(modules, key=lambda module: module.lost)
        table.add_row(
            name,
            f"{sum(module.lost for module in modules) / len(modules):.2e}",
            f"{worst.lost:.2e}",
            str(worst.layer),
            f"{sum(module.seconds for module in modules):.1f}",
        )
    return table
