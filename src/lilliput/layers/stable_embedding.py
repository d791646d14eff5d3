"""StableEmbedding: a token table for training from scratch, whose rows are normalised and whose optimizer has 32 bits.

Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861, section 2.3. A token's gradient comes and goes
with the token, so that a table has the most uneven gradients of a model, and the moments that are hardest to hold.
Not here: what an optimizer makes of the mark (`lilliput.optim`), the int8 table of a frozen model (`embedding.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZER_BITS = 32


class StableEmbedding(nn.Embedding):
    """`nn.Embedding` with layer norm after the look-up, Xavier uniform values and 32-bit optimizer state.

    ids int [...] -> [..., embedding_dim] in the weight's type; the norm is computed in torch's default type. The state
    dict holds `weight`, `norm.weight` and `norm.bias`, as `bitsandbytes.nn.StableEmbedding` has them.

    It is for models trained from scratch. **In a pretrained model it changes the function**: rows get another length
    and mean than the layers above have learned to read. For fine-tuning take only the third part, the 32-bit state,
    which the optimizers of `lilliput.optim` give tables of embeddings anyway.

    What optimizers read is the attribute `weight.optimizer_bits`; it is on whatever parameter is the weight, after
    copies, moves and loads too.

    Args: those of `nn.Embedding`; `norm` is made on the same device, in torch's default type.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def reset_parameters(self) -> None:
        """Xavier uniform values, `padding_idx` zero; the norm is left as it is."""
        nn.init.xavier_uniform_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)

    def forward(self, input: Tensor) -> Tensor:
        """ids int [...] -> [..., embedding_dim] in the weight's type; raises IndexError for an id outside the table."""
        wide, norm = torch.get_default_dtype(), self.norm
        rows = super().forward(input).to(wide)
        normed = nn.functional.layer_norm(
            rows, norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps
        )
        return normed.to(self.weight.dtype)

    # ---- the mark, wherever a weight comes from ----

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # a deep copy of a parameter forgets its attributes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StableEmbedding:
        super()._apply(fn, recurse)
        self._mark()
        return self

    def _mark(self) -> None:
        setattr(self.weight, "optimizer_bits", OPTIMIZER_BITS)  # noqa: B010 - tensors declare no such attribute
