"""The lists of values that codes stand for, computed from their definitions: NF4, FP4, int8, the dynamic tree.

Sources: NF4 is QLoRA (arXiv 2305.14314, section 3 and appendix E); the dynamic tree is 8-bit Optimizers via Block-wise
Quantization (arXiv 2110.02861, section 2); FP4 has one sign, two exponent and one mantissa bit, in the code order that
bitsandbytes gave it. Not here: how numbers are rounded to these values (`blockwise.py`).

The published constants were computed in float32 along the way, and our values must equal them bit for bit. So each
function below rounds to float32 exactly where the definition's authors did, and says so.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from lilliput.errors import FormatError

# The outermost probability, 1 - (1/32 + 1/30) / 2, with the seven digits that the published table was made with.
_NF4_OUTERMOST = 0.9677083
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by the three bits under the sign bit
_DYNAMIC_EXPONENTS = 7


@cache
def nf4() -> Tensor:
    """NF4: 16 quantiles of the standard normal, one of them exactly zero, scaled to [-1, 1]. float32 [16], ascending.

    Eight positive values come from nine equally spaced probabilities from 1/2 to the outermost, seven negative from
    eight, so that both sides reach 1 and zero is a value of its own. Probabilities, quantiles and division are float32.
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in _grid(_NF4_OUTERMOST, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in _grid(_NF4_OUTERMOST, 0.5, 8)[:-1]]
    values = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32)
    return values / values.max()


@cache
def fp4() -> Tensor:
    """FP4: sign, two exponent bits, one mantissa bit, scaled to [-1, 1]. float32 [16] in code order; two say zero."""
    magnitudes = torch.tensor(_FP4_MAGNITUDES, dtype=torch.float32)
    values = torch.cat([magnitudes, -magnitudes]) / magnitudes.max()
    return values + 0.0  # code 8 would be -0.0: one zero, whichever code says it


@cache
def int8() -> Tensor:
    """int8: 255 equal steps over [-1, 1], the code -128 unused. float32 [255], code -127 first, ascending."""
    return torch.arange(-127, 128, dtype=torch.float32) / 127


@cache
def dynamic8(signed: bool = True) -> Tensor:
    """The 8-bit dynamic tree: a moving indicator bit splits the bits into exponent and fraction. float32 [256].

    For the exponent 10**-e the fraction has 6 - e bits (one more without a sign): the midpoints of that many equal
    steps of [0.1, 1]. Zero and one are added; ascending. Steps, midpoints and products are float32.
    """
    values = [0.0, 1.0]
    for exponent in range(_DYNAMIC_EXPONENTS):
        steps = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.tensor(_grid(0.1, 1.0, steps + 1), dtype=torch.float32)
        scale = 10.0 ** (exponent - _DYNAMIC_EXPONENTS + 1)
        midpoints = (scale * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += midpoints
        if signed:
            values += [-value for value in midpoints]
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def linear8(signed: bool = True) -> Tensor:
    """Equal steps over [-1, 1], float32 [255], or over [0, 1], float32 [256]; to compare the dynamic tree with."""
    return int8() if signed else torch.arange(256, dtype=torch.float32) / 255


@cache
def whole_numbers(bits: int) -> Tensor:
    """What codes of grouped formats say before their zero is taken off: 0, 1, .. float32 [2**bits]."""
    return torch.arange(2**bits, dtype=torch.float32)


def quantile8(sample: Tensor) -> Tensor:
    """Quantile quantization: 256 values that numbers like those of `sample` take equally often. float32 [256].

    Edges cut the sorted sample into 256 equal parts; the values are the middles between neighbouring edges, scaled to
    reach 1, ascending; zero is no value of its own. arXiv 2110.02861, section 1.3, where edges are at i / 257, so that
    the two ends differ. For comparison: values follow one sample, and dense ones are closer than their numbers need.

    Raises FormatError for a sample that is empty, of zeros alone or not finite.
    """
    ordered = sample.detach().reshape(-1).double().sort().values
    if not ordered.numel() or not ordered.isfinite().all() or not ordered.any():
        raise FormatError(
            f"no quantiles of a sample of {ordered.numel()} numbers", todo="Give finite numbers, not all zero."
        )
    places = torch.linspace(0, ordered.numel() - 1, 257, dtype=torch.float64, device=ordered.device)
    below, above = ordered[places.long()], ordered[places.ceil().long()]
    edges = below + (above - below) * places.frac()
    values = (edges[:-1] + edges[1:]) / 2
    return (values / values.abs().max()).float()


def _grid(start: float, end: float, count: int) -> list[float]:
    """`count` equally spaced float32 numbers, each rounded once, counted from the nearer end with a float32 step."""
    first, last = _float32(start), _float32(end)
    step = _float32((last - first) / (count - 1))
    half = count // 2
    lower = [_float32(first + step * i) for i in range(half)]
    return lower + [_float32(last - step * (count - 1 - i)) for i in range(half, count)]


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
