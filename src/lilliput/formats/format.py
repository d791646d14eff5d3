"""A number format is a row of data, and a quantized tensor is codes with their constants.

Sources: block-wise quantization, arXiv 2110.02861; NF4 and double quantization, arXiv 2305.14314; int8 by rows, arXiv
2208.07339; groups along rows, GPTQ, arXiv 2210.17323. A new format is a new row in FORMATS (and, to be quick, a
kernel); no branch. Not here: the arithmetic (`blockwise.py`, `rowwise.py`, `grouped.py`), tensors in groups
(`grouped.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from math import prod
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from lilliput.errors import FormatError, UsageError, nearest
from lilliput.formats import codebooks
from lilliput.formats.packing import RUN, row_bytes

ROW = 0  # as a format's block: one row, all numbers along the last dimension, shares its constants
GROUP = 128  # numbers of a group where a name does not say otherwise

Kind = Literal["blocks", "rows", "groups"]

# What can be chosen about a format besides its name, with the value that means "not at all".
_OFF: dict[str, Any] = {
    "double_quant": False,
    "threshold": 0.0,
    "embeddings": False,
    "symmetric": False,
    "ordered": False,
    "scale_dtype": None,
}


@dataclass(frozen=True)
class Format:
    """How a block of reals becomes a few bits.

    Attributes:
        name: what `--format` and files call it.
        bits: bits of a code.
        block: numbers that share their constants: counted in flat storage ("blocks"), or along a row; ROW: a whole row.
        codebook: returns the values that codes stand for, in shares of the absmax or (groups) of the scale and before
            the zero is taken off, float32, in code order (of signed codes from the lowest on).
        code_type: of the tensor that holds codes; those of fewer than 8 bits share bytes.
        options: what can be chosen about it, with the default: `double_quant` (quantize the absmax too), `threshold`
            (input columns with a larger number leave the product in few bits), `embeddings` (tables of embeddings too),
            `symmetric` (zero is the middle code in all groups), `ordered` (columns are stored in an order of their
            own), `scale_dtype` (name of the type that scales are held in).
        kind: how constants lie: "blocks" of flat storage (nf4, fp4), "rows" (int8), or "groups" along rows.
    """

    name: str
    bits: int
    block: int
    codebook: Callable[[], Tensor] = field(compare=False)
    code_type: torch.dtype = torch.uint8
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    kind: Kind = "blocks"

    def blocks(self, shape: tuple[int, ...]) -> int:
        """How many absmax, or scales, a tensor of that shape has; a scalar is a row of one number."""
        if self.kind == "blocks":
            return -(prod(shape) // -self.block)
        rows, columns = rows_and_columns(shape)
        return rows * group_count(columns, self.block)

    def code_bytes(self, shape: tuple[int, ...]) -> int:
        """How many bytes the codes of a tensor of that shape take."""
        if self.kind != "groups":
            return -(prod(shape) * self.bits // -8)
        rows, columns = rows_and_columns(shape)
        return rows * row_bytes(columns, self.bits)

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
INT8 = Format("int8", 8, ROW, codebooks.int8, torch.int8, {"threshold": 6.0, "embeddings": False}, "rows")
# What double quantization stores the absmax in; not a format for weights, so not in FORMATS.
DYNAMIC8 = Format("dynamic8", 8, 256, codebooks.dynamic8)

_GROUPED = {"int4": 4, "int3": 3, "int2": 2, "int8g": 8}  # int8 alone means rows
_GROUPED_NAME = re.compile(rf"({'|'.join(_GROUPED)})(?:-(row|g[1-9]\d*))?")


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """A row runs along the last dimension; a scalar is a row of one number."""
    return prod(shape[:-1]), shape[-1] if shape else 1


def group_count(columns: int, group: int) -> int:
    """How many groups a row of so many numbers has; the last may be shorter."""
    return 1 if group == ROW else -(columns // -group)


@cache
def grouped_format(bits: int, group: int = GROUP) -> Format:
    """The format of codes of so many bits with a scale and a zero for each `group` numbers of a row (ROW: a whole row).

    Its name is that of the bits ("int4"; "int8g", since int8 means rows), with "-g64" or "-row" behind it for a group
    other than 128.

    Raises:
        UsageError: other bits than 2, 3, 4 and 8; a group that is no multiple of 32.
    """
    names = {known: name for name, known in _GROUPED.items()}
    if bits not in names:
        raise UsageError(f"no format has groups of {bits}-bit codes", todo="There are 2, 3, 4 and 8 bits.")
    if group < 0 or group % RUN:
        raise UsageError(f"groups of {group} numbers", todo=f"Give a multiple of {RUN}, or {ROW} for whole rows.")
    ending = {GROUP: "", ROW: "-row"}.get(group, f"-g{group}")
    options = {"symmetric": False, "ordered": False, "scale_dtype": "float16"}
    return Format(
        names[bits] + ending, bits, group, partial(codebooks.whole_numbers, bits), options=options, kind="groups"
    )


FORMATS: dict[str, Format] = {
    row.name: row for row in (NF4, FP4, INT8, *(grouped_format(bits) for bits in _GROUPED.values()))
}


def get_format(name: str | Format) -> Format:
    """The format of that name: one of FORMATS, or a grouped one with another group ("int4-g64", "int4-row").

    Raises:
        UsageError: no such format; says the known ones and the nearest.
    """
    if isinstance(name, Format):
        return name
    if name in FORMATS:
        return FORMATS[name]
    if found := _GROUPED_NAME.fullmatch(name):
        bits, group = found.groups()
        return grouped_format(_GROUPED[bits], ROW if group == "row" else int(group[1:]))
    raise UsageError(
        f"unknown number format '{name}'{nearest(name, FORMATS)}",
        todo=f"Known: {', '.join(FORMATS)}; and int4-g64, int4-row and the like for other groups than {GROUP}.",
    )


Self = TypeVar("Self", bound="Quantized")
Room = tuple[tuple[int, ...], torch.dtype]  # size and type of a tensor to be


@dataclass(frozen=True)
class Quantized:
    """A tensor in few bits: what memory holds instead of the reals. What both classes, below and in grouped.py, share.

    Attributes:
        format: the number format of the codes.
        shape: the shape of the reals.
        codes: flat.

    The constants of the codes are three further attributes, any of which may be None; CONSTANTS has their names.
    """

    CONSTANTS: ClassVar[tuple[str, str, str]]

    format: Format
    shape: tuple[int, ...]
    codes: Tensor

    @classmethod
    def room(cls, format: Format, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[Room | None, ...]:
        """Sizes and types of codes and constants of a tensor of that shape under those of the format's options."""
        raise NotImplementedError

    @classmethod
    def empty(
        cls: type[Self],
        format: Format,
        shape: tuple[int, ...],
        options: Mapping[str, Any],
        device: str | torch.device = "meta",
    ) -> Self:
        """Codes and constants, uninitialised. Raises UsageError for an option that the format has not."""
        chosen = {name: format.option(name, given) for name, given in options.items()}
        made: list[Any] = [
            None if room is None else torch.empty(room[0], dtype=room[1], device=device)
            for room in cls.room(format, shape, chosen)
        ]
        return cls(format, shape, *made)

    @property
    def options(self) -> dict[str, Any]:
        """What was chosen of those options of the format that codes and constants tell."""
        raise NotImplementedError

    @property
    def constants(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three constants in the order of CONSTANTS."""
        first, second, third = self.CONSTANTS
        return getattr(self, first), getattr(self, second), getattr(self, third)

    @property
    def packed(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Codes and constants, as the operations take them."""
        return (self.codes, *self.constants)

    @property
    def numel(self) -> int:
        """How many reals this stands for."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(tensor.nbytes for tensor in self.packed if tensor is not None)

    def _expect(self, name: str, tensor: Tensor, count: int) -> None:
        if tensor.numel() != count:
            raise FormatError(
                f"{name} has {tensor.numel()} entries, {self.format.name} of shape {list(self.shape)} needs {count}"
            )

    def _expect_type(self, name: str, tensor: Tensor, *types: torch.dtype) -> None:
        if tensor.dtype not in types:
            known = " or ".join(str(known) for known in types)
            raise FormatError(f"{name} are {tensor.dtype}, {self.format.name} has {known}")


@dataclass(frozen=True)
class QuantizedTensor(Quantized):
    """A tensor by blocks (nf4, fp4) or by rows (int8): each code a share of its block's absmax.

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

    CONSTANTS = ("absmax", "absmax_scale", "absmax_offset")

    absmax: Tensor
    absmax_scale: Tensor | None = None
    absmax_offset: Tensor | None = None

    def __post_init__(self) -> None:
        self._expect_type("codes", self.codes, self.format.code_type)
        self._expect("codes", self.codes, self.format.code_bytes(self.shape))
        self._expect("absmax", self.absmax, self.format.blocks(self.shape))
        if self.absmax_scale is not None:
            self._expect("absmax_scale", self.absmax_scale, -(self.absmax.numel() // -DYNAMIC8.block))
        if (self.absmax_scale is None) != (self.absmax_offset is None):
            raise FormatError("absmax_scale and absmax_offset belong together: give both or neither")

    @classmethod
    def room(cls, format: Format, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[Room | None, ...]:
        blocks, double = format.blocks(shape), format.option("double_quant", options.get("double_quant"))
        nested: tuple[Room | None, ...] = (None, None)
        if double:
            nested = ((-(blocks // -DYNAMIC8.block),), torch.float32), ((), torch.float32)
        codes = (format.code_bytes(shape),), format.code_type
        return codes, ((blocks,), torch.uint8 if double else torch.float32), *nested

    @property
    def options(self) -> dict[str, Any]:
        return {"double_quant": self.double_quant} if "double_quant" in self.format.options else {}

    @property
    def double_quant(self) -> bool:
        """Whether the absmax itself is quantized."""
        return self.absmax_scale is not None
