"""The 4-bit core beside its peers: products, quantizing, dequantizing; a table of ratios, and JSON with `--json FILE`.

Each row times both sides in turn in this process and takes the quickest of many runs. A ratio above 1 means that
Lilliput is quicker. Peers: bitsandbytes (NF4, float32 compute) where it is installed, and torch's float32 product on a
dense matrix.

    python benchmarks/linear_4bit.py [--threads 2] [--seconds 1.5] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lilliput import kernels
from lilliput.formats import QuantizedTensor
from lilliput.kernels import core

# (rows, in, out): a training step's layers of SmolLM2-135M, a 7B-sized layer, generating with each.
MANY = [(1024, 576, 1536), (1024, 1536, 576), (1024, 576, 192), (1024, 4096, 4096)]
FEW = [(1, 576, 1536), (1, 4096, 4096), (2, 4096, 4096), (8, 4096, 4096), (16, 4096, 4096)]


@dataclass
class Row:
    """One line of the table: seconds of each side."""

    what: str
    shape: str
    peer: str
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours


def race(ours: Callable[[], object], theirs: Callable[[], object], seconds: float) -> tuple[float, float]:
    """The quickest run of each, taken in turn for `seconds`, at least three times."""
    best = [float("inf"), float("inf")]
    ours(), theirs()
    stop, runs = time.perf_counter() + seconds, 0
    while runs < 3 or time.perf_counter() < stop:
        for side, call in enumerate((ours, theirs)):
            start = time.perf_counter()
            call()
            best[side] = min(best[side], time.perf_counter() - start)
        runs += 1
    return best[0], best[1]


def products(seconds: float) -> Iterator[Row]:
    """Forward and gradient to the input, against torch and bitsandbytes."""
    for rows, columns, out in MANY + FEW:
        weight, x, grad = torch.randn(out, columns), torch.randn(rows, columns), torch.randn(rows, out)
        q = kernels.quantize(weight)
        shape = f"{rows} x {columns} x {out}"
        theirs = bitsandbytes_product(weight)
        forward = lambda x=x, q=q: kernels.linear_4bit(x, q)  # noqa: E731
        yield Row("forward", shape, "torch fp32", *race(forward, lambda x=x, w=weight: x @ w.t(), seconds))
        if theirs:
            yield Row("forward", shape, "bitsandbytes", *race(forward, lambda x=x, f=theirs: f(x), seconds))
        if rows > 16:
            backward = lambda g=grad, q=q: input_gradient(g, q)  # noqa: E731
            yield Row("gradient", shape, "torch fp32", *race(backward, lambda g=grad, w=weight: g @ w, seconds))


def input_gradient(grad: Tensor, q: QuantizedTensor) -> Tensor:
    """The backward operation alone."""
    packed = (q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.format.name)
    return torch.ops.lilliput.linear_4bit_backward(grad, *packed, q.shape[1])


def blocks(seconds: float) -> Iterator[Row]:
    """Quantizing and dequantizing a 4096 x 4096 matrix, against bitsandbytes."""
    functional = bitsandbytes()
    if functional is None:
        return
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(4096, 4096).to(dtype)
        for double in (False, True):
            what = f"quantize {str(dtype).removeprefix('torch.')}{', double' if double else ''}"
            ours = lambda w=weight, d=double: kernels.quantize(w, "nf4", d)  # noqa: E731
            theirs = lambda w=weight, d=double: functional.quantize_4bit(  # noqa: E731
                w, quant_type="nf4", compress_statistics=d
            )
            yield Row(what, "4096 x 4096", "bitsandbytes", *race(ours, theirs, seconds))
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        q = kernels.quantize(weight)
        what = f"dequantize {str(dtype).removeprefix('torch.')}, double"
        ours_back = lambda q=q, t=dtype: kernels.dequantize(q, t)  # noqa: E731
        theirs_back = lambda c=codes, s=state: functional.dequantize_4bit(c, s)  # noqa: E731
        yield Row(what, "4096 x 4096", "bitsandbytes", *race(ours_back, theirs_back, seconds))


def references(seconds: float) -> Iterator[Row]:
    """What a machine without the compiled core loses: our reference as the peer."""
    for rows, columns, out in ((1024, 576, 1536), (1, 576, 1536), (1, 4096, 4096)):
        q, x = kernels.quantize(torch.randn(out, columns)), torch.randn(rows, columns)
        slow = in_reference(lambda x=x, q=q: kernels.linear_4bit(x, q))
        pair = race(lambda x=x, q=q: kernels.linear_4bit(x, q), slow, seconds)
        yield Row("forward", f"{rows} x {columns} x {out}", "our reference", *pair)
    weight = torch.randn(2048, 2048)
    pair = race(lambda: kernels.quantize(weight), in_reference(lambda: kernels.quantize(weight)), seconds)
    yield Row("quantize float32, double", "2048 x 2048", "our reference", *pair)


def in_reference(call: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        with kernels.use("reference"):
            return call()

    return inside


def bitsandbytes() -> object | None:
    """bitsandbytes.functional, or None where it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    return functional


def bitsandbytes_product(weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """bitsandbytes' own 4-bit linear layer (NF4, double quantization, float32 compute), without gradients."""
    if bitsandbytes() is None:
        return None
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return torch.no_grad()(layer.to("cpu"))


def machine() -> dict[str, object]:
    """Where and with what the figures were taken."""
    names = ("lilliput", "torch", "bitsandbytes")
    versions = {
        name: metadata.version(name) for name in names if not (name == "bitsandbytes" and bitsandbytes() is None)
    }
    status = core.status()
    return {
        "processor": platform.processor() or platform.machine(),
        "instruction_set": status.instruction_set,
        "threads": status.threads,
        "date": time.strftime("%Y-%m-%d"),
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.5, help="for each pair")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine()
    table = Table(
        "what",
        "shape",
        "peer",
        "Lilliput ms",
        "peer ms",
        "ratio",
        title=", ".join(f"{k} {v}" for k, v in about.items()),
    )
    rows = []
    for part in (products, blocks, references):
        for row in part(options.seconds):
            rows.append(row)
            figures = (f"{row.ours * 1e3:.3f}", f"{row.theirs * 1e3:.3f}", f"{row.ratio:.2f}")
            table.add_row(row.what, row.shape, row.peer, *figures)
    Console(width=110).print(table)
    if options.json:
        report = {"machine": about, "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
