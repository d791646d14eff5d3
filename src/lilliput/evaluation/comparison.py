"""The ways to round a product to int8, compared in perplexity: whole tensors, rows of x, rows of both; with and without
the decomposition.

Source: LLM.int8(), arXiv 2208.07339, table 1. The model stays in float32 and each way is simulated: both operands of a
linear layer are rounded to what their codes stand for, and multiplied in float32. That is the product in whole numbers
but for the rounding of its sums. Columns of x with an outlier are not rounded and take no part in x's constants; W is
rounded whole, since it is stored before any x is known.

Not here: speed and memory, which a simulation has not; the operation itself (`lilliput.kernels.linear_int8`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.errors import UsageError
from lilliput.evaluation.outliers import dense_weight, require_linears
from lilliput.evaluation.perplexity import perplexity
from lilliput.formats import rowwise
from lilliput.formats.rowwise import rows_of
from lilliput.progress import bar

Rounding = Callable[[Tensor], Tensor]  # float32 [rows, columns] to the nearest numbers that int8 codes stand for


def by_absmax(x: Tensor) -> Tensor:
    """One absmax for all of x."""
    codes, absmax = rowwise.quantize_absmax(x)
    return codes.float() * (absmax / rowwise.LARGEST)


def by_zeropoint(x: Tensor) -> Tensor:
    """One range, from the smallest to the largest number, for all of x."""
    return rowwise.dequantize_zeropoint(*rowwise.quantize_zeropoint(x))


def by_rows(x: Tensor) -> Tensor:
    """An absmax for each row of x."""
    return rowwise.dequantize_rows(*rowwise.quantize_rows(x), tuple(x.shape))


@dataclass(frozen=True)
class Way:
    """How the two operands of x Wᵀ are rounded; W is [out, in], so that its rows are the columns of Wᵀ."""

    name: str
    of_x: Rounding
    of_weight: Rounding


WAYS = (
    Way("absmax", by_absmax, by_absmax),
    Way("zero-point", by_zeropoint, by_zeropoint),
    Way("row-wise", by_rows, by_absmax),
    Way("vector-wise", by_rows, by_rows),
)


@dataclass(frozen=True)
class ComparisonRow:
    """A way, with or without the decomposition; difference: its perplexity less that of float32."""

    way: str
    decomposition: bool
    perplexity: float
    difference: float


@dataclass(frozen=True)
class Int8Comparison:
    """float32: the perplexity of the model as it is; tokens: predictions that counted; rows: each way, first without
    the decomposition, then with it."""

    float32: float
    threshold: float
    tokens: int
    segments: int
    layers: int
    rows: list[ComparisonRow]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_int8(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 512,
    segments: int | None = 2,
    threshold: float = 6.0,
    progress: bool = True,
) -> Int8Comparison:
    """The perplexity of `text` in float32 and for every row of WAYS; the model is afterwards as it was.

    Args:
        context: tokens in a segment, scored on its own. segments: so many of them, from the beginning; None: all.
        threshold: columns of x with a number beyond it, in any position of a segment, are outliers.

    Raises UsageError and DataError as `perplexity`, and UsageError for a threshold that is not above 0 and for a model
    without linear layers in floating point.
    """
    names = require_linears(model)
    if rowwise.check_threshold(threshold) == 0:
        raise UsageError("0 leaves no column out, so that there is no decomposition to compare", where="threshold")
    score = partial(perplexity, model, tokenizer, text, context=context, segments=segments, progress=False)
    rows = []
    with bar("comparing", 1 + 2 * len(WAYS), shown=progress) as advance:
        plain = score()
        advance(note=f"float32 {plain.perplexity:.3f}")
        for way, limit in ((way, limit) for way in WAYS for limit in (0.0, threshold)):
            with rounded(model, names, way, limit):
                found = score().perplexity
            rows.append(ComparisonRow(way.name, limit > 0, found, found - plain.perplexity))
            advance(note=f"{way.name}{' with decomposition' if limit else ''} {found:.3f}")
    return Int8Comparison(plain.perplexity, threshold, plain.tokens, plain.segments, len(names), rows)


@contextmanager
def rounded(model: nn.Module, names: list[str], way: Way, threshold: float = 0.0) -> Iterator[None]:
    """Inside the block layers that round stand in place of the named linear ones, which are put back at its end."""
    linears = {name: model.get_submodule(name) for name in names}
    try:
        for name, linear in linears.items():
            model.set_submodule(name, RoundedLinear(linear, way, threshold))
        yield
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)


class RoundedLinear(nn.Module):
    """Stands in for a linear layer and answers as if it computed in int8; the weight is rounded anew for each input."""

    def __init__(self, linear: Any, way: Way, threshold: float) -> None:
        super().__init__()
        self.linear, self.way, self.threshold = linear, way, threshold

    @property
    def weight(self) -> Tensor:
        """The layer's own, for models that look at its type."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own."""
        return self.linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out] of the input's type."""
        y = rounded_product(rows_of(input).float(), dense_weight(self.linear), self.way, self.threshold)
        if self.bias is not None:
            y += self.bias.float()
        return y.to(input.dtype).view(*input.shape[:-1], y.shape[1])


def rounded_product(x: Tensor, weight: Tensor, way: Way, threshold: float = 0.0) -> Tensor:
    """x Wᵀ with both operands rounded `way`, x's outlier columns aside: float32 [rows, out].

    x: float32 [rows, in]; weight: float32 [out, in]; threshold 0: no column is an outlier. Raises FormatError for NaN
    or Inf in the columns that are rounded.
    """
    usual = ~rowwise.outlier_columns(x, threshold)
    near = x.clone()
    near[:, usual] = way.of_x(x[:, usual])
    return near @ way.of_weight(weight).T
