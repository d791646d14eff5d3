"""`lilliput quantize`: write a model in a small number format, and say what that saved."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lilliput.cli.base import facts, size
from lilliput.cli.door import FORMATS, Answer, Model, choose
from lilliput.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def quantize(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Directory to write; made if it is not there.")
    ],
    number_format: Annotated[
        str, typer.Option("--format", metavar="NAME", help="nf4, fp4, int8, or none (convert only).")
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a directory that is not empty.")] = False,
) -> Answer:
    """Quantize a model and save it as a Hugging Face directory that loads in seconds.

    Example:  lilliput quantize smollm2-135m-instruct --format nf4 -o smollm2-nf4

    Example:  lilliput quantize MODEL --format int8 --threshold 6 --embeddings -o DIR
    """
    choose(number_format, FORMATS, "--format")
    options: dict[str, Any] = {"double_quant": double_quant, "threshold": threshold, "embeddings": embeddings}
    _check_options(number_format, options)
    if out.is_file():
        raise UsageError("is a file", where=str(out), todo="Give -o a directory.")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise UsageError("is not empty", where=str(out), todo="Choose another directory, or add --overwrite.")
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
    from lilliput.formats import FORMATS as ROWS
    from lilliput.formats.rowwise import check_threshold

    if number_format in ROWS:
        for name, given in options.items():
            ROWS[number_format].option(name, given)
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
