"""A table of embeddings in int8, a scale a row: rows are looked up as codes, and only those are dequantized.

Source: LLM.int8(), arXiv 2208.07339, quantizes linear layers only; here its rows serve tables too, when asked for
(`embeddings=True`). A head that is tied to the table is a QuantizedLinear on the same codes (`QuantizedWeight.share`).
Not here: training of the table, which is frozen; a table to train from scratch (`stable_embedding.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lilliput import kernels
from lilliput.errors import FormatError
from lilliput.formats import TENSORS, Format, Quantized, get_format, rowwise
from lilliput.layers.weight import QuantizedWeight


class QuantizedEmbedding(QuantizedWeight, nn.Embedding):
    """Rows of a table [num_embeddings, embedding_dim] in int8. ids int [...] -> [..., embedding_dim] in `dtype`.

    `dtype` follows `.to(dtype)` and `.half()`, as the rows of a dense table would; codes and scales keep their types.
    """

    dtype: torch.dtype
    weight_absmax: nn.Parameter  # the only formats of tables have rows

    def __init__(
        self, quantized: Quantized, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Hold `quantized`, without a copy. Raises FormatError when it is no table or `dtype` is not floating,
        UsageError for a format that has no tables.
        """
        nn.Module.__init__(self)  # nn.Embedding's own would allocate the table in floats
        if len(quantized.shape) != 2:
            raise FormatError(f"a table of embeddings has two dimensions, not {tuple(quantized.shape)}")
        if not dtype.is_floating_point:
            raise FormatError(f"embeddings cannot be {dtype}", todo="Give a floating type.")
        quantized.format.option("embeddings", True)
        self.num_embeddings, self.embedding_dim = quantized.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.format_name, self.dtype = quantized.format.name, dtype
        self.hold(quantized)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, format: str | Format = "int8") -> QuantizedEmbedding:
        """Quantize an `nn.Embedding`; rows come back in its type. Raises FormatError for NaN or Inf."""
        weight = embedding.weight.detach()
        made = cls(kernels.quantize(weight, format), embedding.padding_idx, weight.dtype)
        return made.train(embedding.training)

    @classmethod
    def empty(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        format: str | Format = "int8",
        device: str | torch.device = "meta",
        dtype: torch.dtype = torch.float32,
    ) -> QuantizedEmbedding:
        """A table with room for the codes and nothing in it yet."""
        row = get_format(format)
        return cls(TENSORS[row.kind].empty(row, (num_embeddings, embedding_dim), {}, device), padding_idx, dtype)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(num_embeddings, embedding_dim)."""
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """ids int [...] -> [..., embedding_dim] in `dtype`; raises IndexError for an id outside the table."""
        codes = nn.functional.embedding(input, self.weight.view(self.weight_shape))
        absmax = nn.functional.embedding(input, self.weight_absmax[:, None])
        return rowwise.dequantize_rows(codes, absmax.flatten(), tuple(codes.shape), self.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, format={self.format_name}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self
