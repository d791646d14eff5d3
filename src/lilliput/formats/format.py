"""A number format is a row of data, and a quantized tensor is codes with their constants.

Sources: block-wise quantization, arXiv 2110.02861; NF4 and double quantization, arXiv 2305.14314; int8 by rows, arXiv
2208.07339. A new format is a new row in FORMATS (and, to be quick, a kernel); no class and no branch. Not here: the
arithmetic (`blockwise.py`, `rowwise.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import FormatError, UsageError, nearest
from lilliput.formats import codebooks

ROW = 0  # as a format's block: one row, all numbers along the last dimension, shares an absmax

# What can be chosen about a format besides its name, with the value that means "not at all".
_OFF: dict[str, Any] = {"double_quant": False, "threshold": 0.0, "embeddings": False}


@dataclass(frozen=True)
class Format:
    """How a block of reals becomes a few bits.

    Attributes:
        name: what `--format` and files call it.
        bits: bits of a code.
        block: numbers that share an absmax, counted in flat storage; ROW: those of a row.
        codebook: returns the values that codes stand for, in shares of the absmax, float32, in code order (of signed
            codes from the lowest on).
        code_type: of the tensor that holds codes; those of 4 bits lie two to a byte.
        options: what can be chosen about it, with the default: `double_quant` (quantize the absmax too), `threshold`
            (input columns with a larger number leave the product in few bits), `embeddings` (tables of embeddings too).
    """

    name: str
    bits: int
    block: int
    codebook: Callable[[], Tensor]
    code_type: torch.dtype = torch.uint8
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def blocks(self, shape: tuple[int, ...]) -> int:
        """How many absmax a tensor of that shape has; a scalar is a row of one number."""
        return prod(shape[:-1]) if self.block == ROW else -(prod(shape) // -self.block)

    def code_bytes(self, shape: tuple[int, ...]) -> int:
        """How many bytes the codes of a tensor of that shape take."""
        return -(prod(shape) * self.bits // -8)

    def option(self, name: str, given: Any = None) -> Any:
        """What holds for the option `name`: as given, or the format's default where `given` is None.

        Raises:
            UsageError: the format has no such option and `given` asks for it; switched off (False, 0) it is no fault.
        """
        if name in self.options:
            return self.options[name] if given is None else given
        if given:
            having = ", ".join(row.name for row in FORMATS.values() if name in row.options)
            raise UsageError(
                f"{name}={given} was asked for, and {self.name} has no {name}",
                todo=f"Leave it out; these have it: {having}.",
            )
        return _OFF[name]


NF4 = Format("nf4", 4, 64, codebooks.nf4, options={"double_quant": True})
FP4 = Format("fp4", 4, 64, codebooks.fp4, options={"double_quant": True})
INT8 = Format("int8", 8, ROW, codebooks.int8, torch.int8, {"threshold": 6.0, "embeddings": False})
# What double quantization stores the absmax in; not a format for weights, so not in FORMATS.
DYNAMIC8 = Format("dynamic8", 8, 256, codebooks.dynamic8)

FORMATS: dict[str, Format] = {row.name: row for row in (NF4, FP4, INT8)}


def get_format(name: str | Format) -> Format:
    """The format of that name.

    Raises:
        UsageError: no such format; says the known ones and the nearest.
    """
    if isinstance(name, Format):
        return name
    if name not in FORMATS:
        raise UsageError(
            f"unknown number format '{name}'{nearest(name, FORMATS)}", todo=f"Known: {', '.join(FORMATS)}."
        )
    return FORMATS[name]


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in few bits: what memory holds instead of the reals.

    Attributes:
        format: the number format of the codes.
        shape: the shape of the reals.
        codes: flat, row-major. Of 4 bits uint8 [ceil(numel / 2)]: two codes a byte, the earlier number in the high
            nibble. Of int8 int8 [numel].
        absmax: one constant per block of `format.block` numbers of flat storage, which rows do not interrupt, or per
            row: float32 [blocks], or, with double quantization, uint8 [blocks] codes of `DYNAMIC8`.
        absmax_scale: float32 [ceil(blocks / 256)]: the absmax of the absmax; None without double quantization.
        absmax_offset: float32 []: the mean that was taken off the absmax; None without double quantization.

    Raises:
        FormatError: the number of codes or of constants does not belong to the shape, or codes are of another type.
    """

    format: Format
    shape: tuple[int, ...]
    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None = None
    absmax_offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != self.format.code_type:
            raise FormatError(f"codes are {self.codes.dtype}, {self.format.name} has {self.format.code_type}")
        self._expect("codes", self.codes, self.format.code_bytes(self.shape))
        self._expect("absmax", self.absmax, self.format.blocks(self.shape))
        if self.absmax_scale is not None:
            self._expect("absmax_scale", self.absmax_scale, -(self.absmax.numel() // -DYNAMIC8.block))
        if (self.absmax_scale is None) != (self.absmax_offset is None):
            raise FormatError("absmax_scale and absmax_offset belong together: give both or neither")

    def _expect(self, name: str, tensor: Tensor, count: int) -> None:
        if tensor.numel() != count:
            raise FormatError(
                f"{name} has {tensor.numel()} entries, {self.format.name} of shape {list(self.shape)} needs {count}"
            )

    @property
    def numel(self) -> int:
        """How many reals this stands for."""
        return prod(self.shape)

    @property
    def double_quant(self) -> bool:
        """Whether the absmax itself is quantized."""
        return self.absmax_scale is not None

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        held = (self.codes, self.absmax, self.absmax_scale, self.absmax_offset)
        return sum(tensor.nbytes for tensor in held if tensor is not None)
