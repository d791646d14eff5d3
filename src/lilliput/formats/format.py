"""A number format is a row of data, and a quantized tensor is codes with their constants.

Sources: block-wise quantization, arXiv 2110.02861; NF4 and double quantization, arXiv 2305.14314. A new format is a new
row in FORMATS (and, to be quick, a kernel); no class and no branch. Not here: the arithmetic (`blockwise.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import Tensor

from lilliput.errors import FormatError, UsageError, nearest
from lilliput.formats import codebooks


@dataclass(frozen=True)
class Format:
    """How a block of reals becomes a few bits.

    Attributes:
        name: what `--format` and files call it.
        bits: bits of a code.
        block: numbers that share an absmax, counted in flat storage.
        codebook: returns the values that codes stand for, float32 [2**bits] in code order.
    """

    name: str
    bits: int
    block: int
    codebook: Callable[[], Tensor]


NF4 = Format("nf4", 4, 64, codebooks.nf4)
FP4 = Format("fp4", 4, 64, codebooks.fp4)
# What double quantization stores the absmax in; not a format for weights, so not in FORMATS.
DYNAMIC8 = Format("dynamic8", 8, 256, codebooks.dynamic8)

FORMATS: dict[str, Format] = {row.name: row for row in (NF4, FP4)}


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
        codes: uint8 [ceil(numel / 2)]: two codes a byte, the earlier number in the high nibble; flat, row-major.
        absmax: one constant per block of `format.block` numbers of flat storage, which rows do not interrupt: float32
            [blocks], or, with double quantization, uint8 [blocks] codes of `DYNAMIC8`.
        absmax_scale: float32 [ceil(blocks / 256)]: the absmax of the absmax; None without double quantization.
        absmax_offset: float32 []: the mean that was taken off the absmax; None without double quantization.

    Raises:
        FormatError: the number of codes or of constants does not belong to the shape.
    """

    format: Format
    shape: tuple[int, ...]
    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None = None
    absmax_offset: Tensor | None = None

    def __post_init__(self) -> None:
        numel = self.numel
        self._expect("codes", self.codes, -(numel * self.format.bits // -8))
        self._expect("absmax", self.absmax, -(numel // -self.format.block))
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
