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
        str, typer.Option("--format", metavar="NAME", help="nf4, fp4, or none (convert only).")
    ] = "nf4",
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Quantize the blocks' constants as well.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a directory that is not empty.")] = False,
) -> Answer:
    """Quantize a model and save it as a Hugging Face directory that loads in seconds.

    Example:  lilliput quantize smollm2-135m-instruct --format nf4 -o smollm2-nf4
    """
    choose(number_format, FORMATS, "--format")
    if out.is_file():
        raise UsageError("is a file", where=str(out), todo="Give -o a directory.")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise UsageError("is not empty", where=str(out), todo="Choose another directory, or add --overwrite.")
    from lilliput.models import load_model, load_tokenizer, save_model

    started = time.perf_counter()
    tokenizer = load_tokenizer(model)  # before the model: what is missing is told at once
    small = load_model(model, format=number_format, double_quant=double_quant)
    save_model(small, out, tokenizer)
    counts = {**_count(small), "seconds": round(time.perf_counter() - started, 2)}
    results = {"model": model, "format": number_format, "double_quant": double_quant, "path": str(out), **counts}
    return Answer(results, _table(results))


def _count(model: nn.Module) -> dict[str, Any]:
    """Parameters and bytes, before (every parameter in float32) and after."""
    from lilliput.layers import QuantizedLinear

    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    inside = {id(tensor) for layer in layers for tensor in layer.parameters()}
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    weight_bytes = sum(layer.quantized.nbytes for layer in layers)
    others = [tensor for tensor in model.parameters() if id(tensor) not in inside]  # tied ones come once
    biases = [layer.bias for layer in layers if layer.bias is not None]
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
        "all together": f"{results['bits_per_parameter']:.3f} bits a parameter (embeddings and norms stay float32)",
        "written to": results["path"],
    }
    return facts(f"{results['model']} in {results['format']}", rows)


def _quantized(results: dict[str, Any]) -> str:
    if not results["quantized_parameters"]:
        return "nothing: the checkpoint's own numbers"
    return f"{results['quantized_parameters']:,} at {results['bits_per_quantized_parameter']} bits each"
