"""What a layer is asked for when its inputs are no longer the original model's: the outputs that it used to have.

The layers before it are quantized, so that a layer gets x where the original model's gets x0. Wanted are codes that
keep

    sum over the text of |x0 W^T - x Q^T|^2 = sum over the text of |x T^T - x Q^T|^2 + what no Q can change

small, with T = W + W D H^-1, H = 2 X^T X / n and D = 2 (X0 - X)^T X / n: the weight of least squares. H is dampened,
so that T stays near W where the text says little. All of the way to T fits the text too closely (docs/log.md): what
GPTQ quantizes in place of W is W + share W D H^-1.
Source: GPTAQ, arXiv 2504.02692, section 3, whose objective this is (asymmetric calibration); there it is spread over
the columns' own steps, here it is solved before the first one. Not here: where x0 comes from (calibrate.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.models.gptq import ROWS_AT_ONCE, STRIPE, Inputs, add_product, no_sums


class Drift:
    """The sums that T needs of two texts' inputs, for all weights that share them; nothing of the inputs is kept.

    D [in, in] where the weights have more rows than columns together, else W D [rows, in]; float64, but float32 for
    more than 4096 columns.

    Args:
        weights: floating [out, in] each, as they are in the original model.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        columns = weights[0].shape[1]
        rows = [len(weight) for weight in weights]
        self._left = None if sum(rows) >= columns else weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self._rows = rows
        self._sums = no_sums(columns if self._left is None else sum(rows), columns)

    def add(self, original: Tensor, x: Tensor) -> None:
        """Both floating [..., columns], the same tokens in the same places.

        Raises FormatError for shapes that differ.
        """
        if original.shape != x.shape:
            raise FormatError(f"the original model's inputs are {list(original.shape)}, these {list(x.shape)}")
        columns = self._sums.shape[1]
        pairs = (each.detach().reshape(-1, columns).split(ROWS_AT_ONCE) for each in (original, x))
        for before, now in zip(*pairs, strict=True):
            right = now.float()
            moved = before.float() - right
            left = moved if self._left is None else moved @ self._left.float().T
            add_product(self._sums, left, right)

    def target(self, weight: Tensor, place: int, inputs: Inputs, rows: int, share: float = 1.0) -> Tensor:
        """W + share W D H^-1, float32 [out, in].

        Args:
            weight: floating [out, in], the one at `place` among those that were given.
            inputs: what `gptq.factor` made of H over the same text.
            rows: of that text; those that were not added here count as inputs that did not move.
            share: how much of the way to T.
        """
        start = sum(self._rows[:place])
        share, upper, order = 2 * share / max(rows, 1), inputs.upper, inputs.order
        found = weight.detach().float().clone()
        at_once = max(1, STRIPE // max(weight.shape[1], 1))
        for first in range(0, len(found), at_once):
            some = found[first : first + at_once]
            if self._left is None:
                moved = some.to(self._sums.dtype) @ self._sums
            else:
                moved = self._sums[start + first : start + first + len(some)]
            moved = (moved[:, order] * share).float() @ upper.T @ upper
            some.index_add_(1, order, moved)
        return found
