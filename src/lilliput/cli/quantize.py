"""`lilliput quantize`: write a model in a small number format, and say what that saved."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lilliput.cli.base import facts, size
from lilliput.cli.door import FORMATS, Answer, Model, choose
from lilliput.cli.quantize_gptq import GPTQ, UNFINISHED, quantize_with_text
from lilliput.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def quantize(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Directory to write; made if it is not there.")
    ],
    number_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="nf4, fp4, int8; int4, int3, int2, int8g (to nearest); gptq (with a text); none (convert only).",
        ),
    ] = "nf4",
    double_quant: Annotated[
        bool | None,
        typer.Option(
            "--double-quant/--no-double-quant", help="nf4, fp4: quantize the blocks' constants as well (yes)."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="X", help="int8: input columns with a larger number are multiplied in float32 (6.0)."),
    ] = None,
    embeddings: Annotated[
        bool | None,
        typer.Option("--embeddings/--no-embeddings", help="int8: the token table and a head tied to it as well (no)."),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--sym/--asym", help="gptq, int4 …: the middle code is the zero of all groups (no)."),
    ] = None,
    bits: Annotated[int | None, typer.Option(metavar="N", help="gptq: bits a weight, 4 (default), 3, 2 or 8.")] = None,
    group: Annotated[
        int | None, typer.Option(metavar="N", help="gptq: weights that share a scale (128); -1: a whole row.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="gptq: text, or rows, like those that the model will read.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="gptq: segments of the text that are taken (128).")
    ] = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="gptq: tokens of a segment (2048, or what the model can).")
    ] = None,
    act_order: Annotated[
        bool | None, typer.Option("--act-order/--no-act-order", help="gptq: columns with large inputs first (yes).")
    ] = None,
    static_groups: Annotated[
        bool | None,
        typer.Option("--static-groups/--no-static-groups", help="gptq: groups of neighbours in any order (yes)."),
    ] = None,
    damp: Annotated[
        float | None, typer.Option(metavar="X", help="gptq: share of the Hessian's mean added to its diagonal (0.01).")
    ] = None,
    correct: Annotated[
        float | None,
        typer.Option(metavar="X", help="gptq: how far layers make up for the errors of those before: 0 to 1 (0.25)."),
    ] = None,
    search: Annotated[
        bool | None, typer.Option("--search/--no-search", help="gptq: grids of least error, not of min and max (yes).")
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="gptq: rounds of refitted scales and codes; 0: as published (2)."),
    ] = None,
    rounding: Annotated[
        str | None, typer.Option(metavar="NAME", help="gptq: gptq (default), or nearest, which needs no text.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="gptq: float16, bfloat16 or float32 for what is not quantized (as stored)."),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="gptq: what running a layer on the text may take (1).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a directory that is not empty.")] = False,
) -> Answer:
    """Quantize a model and save it as a Hugging Face directory that loads in seconds.

    Example:  lilliput quantize smollm2-135m-instruct --format nf4 -o smollm2-nf4

    Example:  lilliput quantize MODEL --format gptq --bits 4 --calibration book.txt -o DIR

    Stopped with Ctrl-C, gptq goes on where it was when the same command is given again.
    """
    given = {
        "bits": bits, "group": group, "calibration": calibration, "samples": samples, "length": length,
        "act_order": act_order, "static_groups": static_groups, "damp": damp, "correct": correct, "search": search,
        "refine": refine, "rounding": rounding, "dtype": dtype, "memory": memory,
    }  # fmt: skip
    choose(number_format.partition("-")[0], (*FORMATS, GPTQ), "--format")
    options: dict[str, Any] = {
        "double_quant": double_quant, "threshold": threshold, "embeddings": embeddings, "symmetric": symmetric
    }  # fmt: skip
    if out.is_file():
        raise UsageError("is a file", where=str(out), todo="Give -o a directory.")
    if number_format == GPTQ:
        _refuse({name: value for name, value in options.items() if name != "symmetric"}, "another format than gptq")
        _check_empty(out, overwrite, going_on=True)
        return quantize_with_text(model, out, {**given, "symmetric": symmetric}, overwrite=overwrite)
    _refuse(given, "--format gptq")
    _check_options(number_format, options)
    _check_empty(out, overwrite, going_on=False)
    return _quantize_by_itself(model, out, number_format, options)


def _refuse(options: dict[str, Any], owner: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} belongs to {owner}", todo="Leave it out.")


def _check_empty(out: Path, overwrite: bool, going_on: bool) -> None:
    """Refuse a directory that holds anything, but for the unfinished layers of gptq."""
    if overwrite or not out.is_dir():
        return
    unfinished = [path for path in out.iterdir() if path.name == UNFINISHED]
    if any(path not in unfinished for path in out.iterdir()) or (unfinished and not going_on):
        raise UsageError("is not empty", where=str(out), todo="Choose another directory, or add --overwrite.")


def _quantize_by_itself(model: str, out: Path, number_format: str, options: dict[str, Any]) -> Answer:
    from lilliput.models import load_model, load_tokenizer, save_model

    started = time.perf_counter()
    tokenizer = load_tokenizer(model)  # before the model: what is missing is told at once
    small = load_model(model, format=number_format, **options)
    save_model(small, out, tokenizer)
    counts = {**_count(small), "seconds": round(time.perf_counter() - started, 2)}
    held = getattr(small.config, "quantization_config", None)
    chosen = {name: getattr(held, name, None) for name in options}
    results = {"model": model, "format": number_format, **chosen, "path": str(out), **counts}
    return Answer(results, _table(results))


def _check_options(number_format: str, options: dict[str, Any]) -> None:
    """Refuse what the format has not before a model is looked for."""
    from lilliput.formats import get_format
    from lilliput.formats.rowwise import check_threshold

    if number_format != "none":
        for name, given in options.items():
            get_format(number_format).option(name, given)
    if options["threshold"] is not None:
        check_threshold(options["threshold"])


def _count(model: nn.Module) -> dict[str, Any]:
    """Parameters and bytes, before (every parameter in float32) and after."""
    from lilliput.layers import quantized_layers

    layers = {id(layer.weight): layer for _, layer in quantized_layers(model)}.values()  # tied ones come once
    inside = {id(tensor) for layer in layers for tensor in layer.parameters()}
    weights = sum(layer.quantized.numel for layer in layers)
    weight_bytes = sum(layer.quantized.nbytes for layer in layers)
    others = [tensor for tensor in model.parameters() if id(tensor) not in inside]
    biases = [bias for layer in layers if (bias := getattr(layer, "bias", None)) is not None]
    parameters = weights + sum(tensor.numel() for tensor in (*others, *biases))
    footprint = model.get_memory_footprint()  # type: ignore[operator]
    return {
        "parameters": parameters,
        "quantized_parameters": weights,
        "original_bytes": 4 * parameters,
        "quantized_bytes": footprint,
        "bits_per_quantized_parameter": round(8 * weight_bytes / weights, 4) if weights else None,
        "bits_per_parameter": round(8 * footprint / parameters, 4),
    }


def _table(results: dict[str, Any]) -> Table:
    rows = {
        "in float32": f"{size(results['original_bytes'])}, {results['parameters']:,} parameters",
        "now": size(results["quantized_bytes"]),
        "quantized": _quantized(results),
        "all together": f"{results['bits_per_parameter']:.3f} bits a parameter (what is not quantized stays float32)",
        "written to": results["path"],
    }
    return facts(f"{results['model']} in {results['format']}", rows)


def _quantized(results: dict[str, Any]) -> str:
    if not results["quantized_parameters"]:
        return "nothing: the checkpoint's own numbers"
    return f"{results['quantized_parameters']:,} at {results['bits_per_quantized_parameter']} bits each"
