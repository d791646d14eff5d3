"""Where a model's outlier features are, and how far int8 takes each linear layer from float32.

Source: LLM.int8(), arXiv 2208.07339, sections 3 and 4. An input column of a layer with a number beyond the threshold is
an outlier feature of that layer. The paper looks at the hidden states, the inputs of the model's width, and counts a
feature only where it stands out in at least 25 % of the layers (here: blocks) and at 6 % of all sequence positions.

A text runs through the model in float32 while each layer looks at its input: running sums are kept, activations never.
The product is the paper's, with x in 8 bits; our own operation rounds x finer (`lilliput.kernels.linear_int8`).
Not here: what the errors do to perplexity (comparison.py), and pictures (pictures.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lilliput.errors import FormatError, UsageError
from lilliput.evaluation.perplexity import token_windows
from lilliput.formats.rowwise import check_threshold, quantize_rows, rows_of, vectorwise_product
from lilliput.layers import quantized_layers
from lilliput.layers.replace import replaceable, shape_of
from lilliput.progress import bar

BLOCKS_SHARE, POSITIONS_SHARE = 0.25, 0.06  # the paper's criterion, section 4.1
THRESHOLDS = (0.0, 12.0, 8.0, 6.0, 4.0, 2.0, 1.0)  # of the curve, from no column in float32 to most of them


@dataclass(frozen=True)
class LayerOutliers:
    """What one linear layer takes in, and what int8 makes of its product x Wᵀ (the bias aside).

    Attributes:
        name: in the model; in_features, out_features: its sizes.
        outlier_features: the columns of its input with a number beyond the threshold, anywhere in the text.
        positions_share: of its input's positions, those with such a number; values_share: the same of all its numbers.
        largest: the largest |x|.
        error: |y₈ - y| / |y| over all positions with the decomposition at the threshold; error_without: without it.
        errors: the same for each threshold of the curve.
        float32_columns: the share of columns that each of these thresholds leaves out of int8, mean over the segments.
    """

    name: str
    in_features: int
    out_features: int
    outlier_features: list[int]
    positions_share: float
    values_share: float
    largest: float
    error: float
    error_without: float
    errors: list[float]
    float32_columns: list[float]


@dataclass(frozen=True)
class OutlierFeature:
    """A dimension of the hidden states that holds a number beyond the threshold somewhere.

    blocks_share: of the model's blocks, those where it does; positions_share: of the positions of all hidden states;
    largest: its largest |x|; by_paper: whether both shares reach the paper's 25 % and 6 %.
    """

    feature: int
    blocks_share: float
    positions_share: float
    largest: float
    by_paper: bool


@dataclass(frozen=True)
class OutlierReport:
    """The layers in the model's order and the features by number.

    Attributes:
        threshold: beyond which a number is an outlier. thresholds: of the curve, 0 (none is) first, then falling.
        positions: tokens that went through the model.
        width: numbers in a hidden state. hidden_states: how many inputs of that width the layers have; one that several
            layers read (q, k, v) is counted once. blocks: that hold them.
        unreached: linear layers that the text never came to (experts of a mixture).
    """

    threshold: float
    thresholds: list[float]
    positions: int
    width: int
    hidden_states: int
    blocks: int
    layers: list[LayerOutliers]
    features: list[OutlierFeature]
    unreached: list[str]

    def worst_first(self) -> list[LayerOutliers]:
        """The layers by their error with the decomposition, the largest first."""
        return sorted(self.layers, key=lambda layer: -layer.error)

    def curve(self) -> list[dict[str, float]]:
        """Threshold, mean error of the layers, and the mean share of columns that it keeps in float32."""
        errors = zip(*(layer.errors for layer in self.layers), strict=True)
        columns = zip(*(layer.float32_columns for layer in self.layers), strict=True)
        rows = zip(self.thresholds, errors, columns, strict=True)
        return [{"threshold": t, "error": fmean(e), "float32_columns": fmean(c)} for t, e, c in rows]

    def totals(self) -> dict[str, Any]:
        """The whole model in a few numbers; means are over the layers."""
        numbers = sum(layer.in_features for layer in self.layers)
        return {
            "layers": len(self.layers),
            "layers_with_outliers": sum(bool(layer.outlier_features) for layer in self.layers),
            "outlier_features": len(self.features),
            "outlier_features_by_paper": sum(feature.by_paper for feature in self.features),
            "values_share": sum(layer.values_share * layer.in_features for layer in self.layers) / numbers,
            "largest": max(layer.largest for layer in self.layers),
            "mean_error": fmean(layer.error for layer in self.layers),
            "mean_error_without": fmean(layer.error_without for layer in self.layers),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values: the totals and the curve first, then every field."""
        return {"totals": self.totals(), "curve": self.curve(), **asdict(self)}


# ---- a text through a model ----


@torch.inference_mode()
def find_outliers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 512,
    segments: int | None = 2,
    threshold: float = 6.0,
    thresholds: Sequence[float] = THRESHOLDS,
    progress: bool = True,
) -> OutlierReport:
    """Send the first `segments` segments of `text` through `model`, each on its own, and report on its linear layers.

    Any transformers model that takes token ids will do; an encoder-decoder gets the segment at both ends. For other
    inputs there is `watched`, whose errors these are too.

    Args:
        context: tokens in a segment.
        segments: so many, from the beginning of the text; None: all.
        threshold: an outlier is beyond it; 6.0 in the paper.
        thresholds: of the curve; 0 and `threshold` belong to it in any case.

    Raises UsageError for impossible numbers, DataError for a text shorter than one segment.
    """
    ids, windows = token_windows(model, tokenizer, text, context, segments=segments)
    steps = len(windows) * len(replaceable(model))
    with (
        bar("inspecting", steps, shown=progress) as advance,
        watched(model, threshold=threshold, thresholds=thresholds, after_layer=lambda name: advance()) as watch,
    ):
        for window in windows:
            _forward(model, ids[None, window.start : window.stop].to(model.device))
    return watch.report()


def _forward(model: PreTrainedModel, ids: Tensor) -> None:
    """The body alone: heads stay in float32, and their logits are the largest tensor of all."""
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model.base_model(input_ids=ids, **both)


@contextmanager
def watched(
    model: nn.Module,
    *,
    threshold: float = 6.0,
    thresholds: Sequence[float] = THRESHOLDS,
    after_layer: Callable[[str], object] = lambda name: None,
) -> Iterator[Watch]:
    """Inside the block the linear layers of `model` look at what they are given; `report()` of what is yielded tells.

    Those layers that int8 would replace: heads and tied weights are not among them. For each input the products in
    int8 are computed beside the model's own, one layer after another; a layer's codes are made anew and dropped.

    Args:
        model: any module with linear layers, in floating point.
        after_layer: called with the name of a layer when its input has been looked at.

    Raises:
        UsageError: a negative threshold, or a model without linear layers in floating point.
        FormatError: inside the block, for an input or a weight with NaN or Inf.
    """
    names = require_linears(model)
    watch = Watch(model, names, check_threshold(threshold), [check_threshold(t) for t in thresholds], after_layer)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(watch.look, name), with_kwargs=True)
        for name in names
    ]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
        watch.forget()


def require_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers that int8 would replace; UsageError when there are none."""
    if names := replaceable(model):
        return names
    held = next(quantized_layers(model), None)
    if held is None:
        raise UsageError(f"{type(model).__name__} has no linear layers that int8 would hold")
    what = f"{type(model).__name__}'s linear layers are in {held[1].format_name} already"
    raise UsageError(what, todo="Give the model that it was made from.")


# ---- what is kept of the inputs ----


@dataclass
class _Sums:
    """Running sums of one layer. hits, largest: [in]; squared_errors, float32_columns: by threshold."""

    shape: tuple[int, int]
    hits: Tensor
    largest: Tensor
    squared_errors: list[float]
    float32_columns: list[float]
    positions: int = 0
    positions_hit: int = 0
    squared: float = 0.0
    calls: int = 0


class Watch:
    """What `watched` yields: sums that grow with every input, and the report on them."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        threshold: float,
        thresholds: Sequence[float],
        after_layer: Callable[[str], object],
    ) -> None:
        self.threshold, self.after_layer = threshold, after_layer
        self.thresholds = [0.0, *sorted({threshold, *thresholds} - {0.0}, reverse=True)]
        self._sums = {name: _empty_sums(model.get_submodule(name), len(self.thresholds)) for name in names}
        self._first_readers: list[str] = []  # of each input, the layer that was given it first
        self._last: Any = None  # the last layer's input, to see that the next layer is given the same

    def look(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before layer `name` runs: add its input to the sums. Its input is [..., in]."""
        given: Tensor = next(iter((*args, *kwargs.values())))
        if given is not self._last and name not in self._first_readers:
            self._first_readers.append(name)
        self._last = given
        with torch.no_grad():
            x = rows_of(given.detach()).float()
            if len(x):
                self._count(name, x)
                self._compare(name, module, x)
        self.after_layer(name)

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None

    def _count(self, name: str, x: Tensor) -> None:
        sums, beyond = self._sums[name], _beyond(x, self.threshold)
        largest = x.abs().amax(dim=0)
        if not largest.isfinite().all():
            raise FormatError("its input has NaN or Inf, which int8 cannot hold", where=name)
        sums.hits += beyond.sum(dim=0).cpu()
        sums.largest = torch.maximum(sums.largest, largest.cpu())
        sums.positions += len(x)
        sums.positions_hit += int(beyond.any(dim=1).sum())

    def _compare(self, name: str, module: Any, x: Tensor) -> None:
        """Products in int8 beside the one in float32; thresholds that take out the same columns are computed once."""
        sums, weight = self._sums[name], dense_weight(module)
        codes, absmax = quantize_rows(weight)
        codes = codes.view(weight.shape)
        exact = x @ weight.T
        largest, squares = x.abs().amax(dim=0), {}
        for i, threshold in enumerate(self.thresholds):
            columns = int((largest > threshold).sum()) if threshold else 0
            if columns not in squares:
                squares[columns] = _square(vectorwise_product(x, codes, absmax, threshold) - exact)
            sums.squared_errors[i] += squares[columns]
            sums.float32_columns[i] += columns / x.shape[1]
        sums.squared += _square(exact)
        sums.calls += 1

    def report(self) -> OutlierReport:
        """What the sums say so far. Raises UsageError when nothing went through the model."""
        reached = {name: sums for name, sums in self._sums.items() if sums.calls}
        if not reached:
            raise UsageError("nothing went through the model while it was watched")
        width = Counter(sums.shape[1] for sums in reached.values()).most_common(1)[0][0]
        hidden = {name: reached[name] for name in self._first_readers if reached[name].shape[1] == width}
        return OutlierReport(
            threshold=self.threshold,
            thresholds=self.thresholds,
            positions=max(sums.positions for sums in reached.values()),
            width=width,
            hidden_states=len(hidden),
            blocks=len({block_of(name) for name in hidden}),
            layers=[self._layer(name, sums) for name, sums in reached.items()],
            features=_features(hidden),
            unreached=[name for name in self._sums if name not in reached],
        )

    def _layer(self, name: str, sums: _Sums) -> LayerOutliers:
        errors = [_relative(square, sums.squared) for square in sums.squared_errors]
        return LayerOutliers(
            name=name,
            in_features=sums.shape[1],
            out_features=sums.shape[0],
            outlier_features=sums.hits.nonzero().flatten().tolist(),
            positions_share=sums.positions_hit / sums.positions,
            values_share=float(sums.hits.sum()) / (sums.positions * sums.shape[1]),
            largest=float(sums.largest.max()),
            error=errors[self.thresholds.index(self.threshold)],
            error_without=errors[0],
            errors=errors,
            float32_columns=[columns / sums.calls for columns in sums.float32_columns],
        )


def _empty_sums(module: Any, thresholds: int) -> _Sums:
    shape = shape_of(module)
    hits, largest = torch.zeros(shape[1], dtype=torch.int64), torch.zeros(shape[1])
    return _Sums(shape, hits, largest, [0.0] * thresholds, [0.0] * thresholds)


def _features(hidden: dict[str, _Sums]) -> list[OutlierFeature]:
    """The features of the hidden states, given as the sums of their first readers."""
    blocks: dict[str, Tensor] = {}  # hits in a block: int64 [width]
    for name, sums in hidden.items():
        blocks[block_of(name)] = blocks.get(block_of(name), 0) + sums.hits
    of_blocks = (torch.stack(list(blocks.values())) > 0).double().mean(dim=0)
    positions = sum(sums.positions for sums in hidden.values())
    of_positions = torch.stack([sums.hits for sums in hidden.values()]).sum(dim=0).double() / positions
    largest = torch.stack([sums.largest for sums in hidden.values()]).amax(dim=0)
    return [
        OutlierFeature(
            feature=i,
            blocks_share=float(of_blocks[i]),
            positions_share=float(of_positions[i]),
            largest=float(largest[i]),
            by_paper=bool(of_blocks[i] >= BLOCKS_SHARE and of_positions[i] >= POSITIONS_SHARE),
        )
        for i in of_blocks.nonzero().flatten().tolist()
    ]


# ---- small things ----


def dense_weight(module: nn.Linear | Conv1D) -> Tensor:
    """The weight in float32 as [out, in]."""
    weight = module.weight.detach().float()
    return weight.t().contiguous() if isinstance(module, Conv1D) else weight


def block_of(name: str) -> str:
    """The block that a layer lies in: its name up to the first number, or all of it where there is none."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else name


def kind_of(name: str) -> str:
    """The rest of the name, the same in every block: `self_attn.q_proj`."""
    return name.removeprefix(block_of(name)).removeprefix(".") or name


def _beyond(x: Tensor, threshold: float) -> Tensor:
    """Where x is an outlier; nowhere for the threshold 0, as in the product."""
    return x.abs() > (threshold or float("inf"))


def _square(x: Tensor) -> float:
    """The sum of squares, in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _relative(squared_error: float, squared: float) -> float:
    """The error in units of the result; 0 where both are 0."""
    return (squared_error / squared) ** 0.5 if squared else float(squared_error > 0) * float("inf")
