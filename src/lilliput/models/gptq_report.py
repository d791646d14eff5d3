"""What GPTQ made of a model: error, bits, time and memory, layer by layer; as JSON and as a picture.

Not here: what it does to a model's answers (lilliput.evaluation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from lilliput.files import replace
from lilliput.models.gptq import Gptq


@dataclass(frozen=True)
class ModuleResult:
    """One linear layer.

    Attributes:
        layer: of which decoder layer, from 0.
        module: its name in there ("self_attn.q_proj").
        shape: (out, in) of its weight.
        error: sum of the squared changes of its outputs on the calibration text that rounding makes, as a share of the
            outputs' own; before rounding its weight is the corrected one (`Gptq.correct`). None where no text was run.
        distance: Frobenius norm of the change of its weight, as a share of the weight's own.
        damp: the dampening that was needed; None without a text.
        dead: columns that never had an input.
        nbytes: codes and constants in the file.
        seconds: for its codes; its inputs not counted.
    """

    layer: int
    module: str
    shape: tuple[int, ...]
    error: float | None
    distance: float
    damp: float | None
    dead: int
    nbytes: int
    seconds: float

    @property
    def lost(self) -> float:
        """The error, or where no text was run the weight's distance."""
        return self.distance if self.error is None else self.error


@dataclass(frozen=True)
class GptqReport:
    """A quantized model.

    Attributes:
        model: the MODEL argument.
        settings: of the solver.
        rounding: "gptq" or "nearest".
        modules: in the order in which they were quantized.
        tokens: of calibration.
        seconds: all in all, also those before a run was stopped.
        peak_bytes: the most that the process held, at its highest since it began.
        file_bytes: of model.safetensors.
    """

    model: str
    settings: Gptq
    rounding: str
    modules: list[ModuleResult]
    tokens: int
    seconds: float
    peak_bytes: int
    file_bytes: int

    @property
    def weights(self) -> int:
        """How many weights are quantized."""
        return sum(prod(module.shape) for module in self.modules)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a quantized weight, its constants counted."""
        return 8 * sum(module.nbytes for module in self.modules) / max(self.weights, 1)

    def kinds(self) -> Iterator[tuple[str, list[ModuleResult]]]:
        """The modules of each name, over all layers."""
        for name in dict.fromkeys(module.module for module in self.modules):
            yield name, [module for module in self.modules if module.module == name]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.model,
            "rounding": self.rounding,
            "settings": asdict(self.settings),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "file_bytes": self.file_bytes,
            "quantized_weights": self.weights,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "modules": [asdict(module) for module in self.modules],
        }


def draw_gptq(report: GptqReport, path: str | Path) -> None:
    """Write a PNG: the error of each module over the layers, and the seconds that each layer took.

    Where no text was run the errors are the weights' own distances. matplotlib takes a second to import.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(
        f"{report.model}: {report.settings.format.name}, {report.bits_per_weight:.2f} bits a weight, "
        f"{report.seconds:.0f} s"
    )
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    measured = any(module.error is not None for module in report.modules)
    for name, modules in report.kinds():
        layers = [module.layer for module in modules]
        above.plot(layers, [module.lost for module in modules], marker="o", markersize=3, label=name)
    if all(module.lost > 0 for module in report.modules):
        above.set_yscale("log")
    above.set_ylabel("share of the outputs' energy lost" if measured else "distance of the weights")
    above.legend(fontsize=8, ncols=2)
    above.grid(alpha=0.3)
    layers = sorted({module.layer for module in report.modules})
    seconds = [sum(module.seconds for module in report.modules if module.layer == layer) for layer in layers]
    below.bar(layers, seconds, color="tab:gray")
    below.set(xlabel="layer", ylabel="seconds for codes")
    with replace(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
