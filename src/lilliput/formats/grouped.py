"""Whole numbers by groups of a row, in plain torch: the reference that every kernel is tested against.

    W[n, order[j]] = scale[n, g] (code[n, j] - zero[n, g])        g = j // group

Source: GPTQ, arXiv 2210.17323, section 4 (a grid for each group of consecutive numbers of a row; columns lie in the
order that they were quantized in). Which grid a group has: `grids.py`; how codes lie in bytes: `packing.py`. Not here:
codes that make up for each other's errors (`lilliput.models.gptq`), the quick versions (`lilliput.kernels`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lilliput.errors import FormatError
from lilliput.formats.blockwise import FLOATS, check_finite
from lilliput.formats.format import ROW, Format, Quantized, Room, get_format, group_count, rows_and_columns
from lilliput.formats.grids import codes_on, minmax_grid
from lilliput.formats.packing import pack_codes, unpack_codes

__all__ = [
    "GroupedTensor",
    "dequantize_groups",
    "group_count",
    "grouped",
    "pack_codes",
    "quantize_groups",
    "unpack_codes",
]


@dataclass(frozen=True)
class GroupedTensor(Quantized):
    """A tensor by groups of its rows, which run along the last dimension: each code a whole number of steps.

    Attributes:
        format: of kind "groups"; its block is the numbers of a group, or ROW.
        shape: the shape of the reals, (out, in) for a layer.
        codes: uint8 [out * row_bytes(in, bits)]: packed rows, see `pack_codes`.
        scale: float16, bfloat16 or float32 [out, groups], groups = ceil(in / group): the last may be shorter.
        zero: uint8 [out, groups]: the code of 0; None: 2**(bits - 1) for all groups (symmetric).
        order: int32 [in]: stored column j is column order[j] of the tensor; None: columns are stored as they are.

    Raises:
        FormatError: the number of codes or of constants does not belong to the shape, or they are of another type.
    """

    CONSTANTS = ("scale", "zero", "order")

    scale: Tensor
    zero: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        blocks = self.format.blocks(self.shape)
        expected = {
            "codes": (self.format.code_bytes(self.shape), (torch.uint8,)),
            "scale": (blocks, FLOATS),
            "zero": (blocks, (torch.uint8,)),
            "order": (rows_and_columns(self.shape)[1], (torch.int32,)),
        }
        for name, (count, types) in expected.items():
            tensor = getattr(self, name)
            if tensor is not None:
                self._expect_type(name, tensor, *types)
                self._expect(name, tensor, count)

    @classmethod
    def room(cls, format: Format, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[Room | None, ...]:
        chosen = {name: format.option(name, options.get(name)) for name in format.options}
        rows, columns = rows_and_columns(shape)
        constants = rows, group_count(columns, format.block)
        return (
            ((format.code_bytes(shape),), torch.uint8),
            (constants, scale_type(chosen["scale_dtype"])),
            None if chosen["symmetric"] else (constants, torch.uint8),
            ((columns,), torch.int32) if chosen["ordered"] else None,
        )

    @property
    def options(self) -> dict[str, Any]:
        return {
            "symmetric": self.zero is None,
            "ordered": self.order is not None,
            "scale_dtype": str(self.scale.dtype).removeprefix("torch."),
        }


def grouped(
    codes: Tensor, scale: Tensor, zero: Tensor | None, format: str | Format, order: Tensor | None = None
) -> GroupedTensor:
    """Codes as they are, one a number, packed and with their constants.

    Args:
        codes: whole numbers of 0..2**bits - 1, uint8 [out, in].
        scale: float16, bfloat16 or float32 [out, groups].
        zero: whole numbers of 0..255, of any type, [out, groups]; None: 2**(bits - 1) everywhere.
        format: of kind "groups", or its name.
        order: int32 or int64 [in], a permutation: column j of `codes` is column order[j] of the matrix.

    Raises:
        FormatError: sizes, types or values that do not belong together; a format of another kind.
    """
    row = get_format(format)
    if row.kind != "groups":
        raise FormatError(f"{row.name} has no groups", todo="Give int4, int3, int2 or int8g.")
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise FormatError(f"codes are {codes.dtype} {list(codes.shape)}, expected uint8 [out, in]")
    if codes.numel() and int(codes.max()) >= 2**row.bits:
        raise FormatError(f"code {int(codes.max())} does not fit {row.bits} bits")
    shape = codes.shape[0], codes.shape[1]
    constants = shape[0], group_count(shape[1], row.block)
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None and tuple(tensor.shape) != constants:
            raise FormatError(f"{name} is {list(tensor.shape)}, {row.name} of {list(shape)} needs {list(constants)}")
    if zero is not None and zero.numel() and not 0 <= int(zero.min()) <= int(zero.max()) <= 255:
        raise FormatError(f"zeros of {int(zero.min())}..{int(zero.max())}, expected 0..255")
    return GroupedTensor(
        row,
        shape,
        pack_codes(codes, row.bits),
        scale.detach().contiguous(),
        None if zero is None else zero.to(torch.uint8).contiguous(),
        None if order is None else _permutation(order, shape[1]),
    )


def _permutation(order: Tensor, columns: int) -> Tensor:
    if order.numel() != columns or not torch.equal(order.long().sort().values, torch.arange(columns)):
        raise FormatError(f"order is no permutation of {columns} columns")
    return order.to(torch.int32).contiguous()


def scale_type(name: str) -> torch.dtype:
    """The type of that name: "float16", "bfloat16" or "float32". Raises FormatError for another."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    if name not in known:
        raise FormatError(f"scales cannot be held in {name}", todo=f"Known: {', '.join(known)}.")
    return known[name]


def quantize_groups(w: Tensor, format: str | Format, symmetric: bool = False) -> GroupedTensor:
    """To the nearest number of each group's min/max grid (`grids.minmax_grid`); scales are float16.

    Args:
        w: float32, float16 or bfloat16 [..., in], finite.
        format: of kind "groups".
        symmetric: zero is the middle code in all groups.

    Raises:
        FormatError: NaN, Inf, another dtype, or numbers whose scale float16 cannot hold.
    """
    row = get_format(format)
    check_finite(w)
    rows, columns = rows_and_columns(tuple(w.shape))
    matrix = w.detach().reshape(rows, columns).float()
    scale, zero = minmax_grid(by_groups(matrix, row.block), row.bits, symmetric)
    return GroupedTensor(
        row,
        tuple(w.shape),
        pack_codes(nearest_codes(matrix, scale, zero, row), row.bits),
        scale.half(),
        None if symmetric else zero.to(torch.uint8),
    )


def nearest_codes(matrix: Tensor, scale: Tensor, zero: Tensor, format: Format) -> Tensor:
    """The nearest codes to a float32 matrix, uint8 [rows, columns], on grids of scale and zero [rows, groups]."""
    codes = codes_on(by_groups(matrix, format.block), scale, zero, format.bits)
    return codes.to(torch.uint8).flatten(1)[:, : matrix.shape[1]]


def by_groups(matrix: Tensor, group: int) -> Tensor:
    """[rows, columns] as [rows, groups, group], filled up with zeros, which every group's range holds anyway."""
    rows, columns = matrix.shape
    size = columns if group == ROW else group
    count = group_count(columns, group)
    return pad(matrix, (0, count * size - columns)).reshape(rows, count, size)


def dequantize_groups(q: GroupedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """scale * (code - zero) in float32, rounded once to `dtype`, of q's shape and in the tensor's own order."""
    codes, scale, zero, order = q.packed
    assert scale is not None
    return dequantize_packed(codes, scale, zero, order, q.format, q.shape, dtype)


def dequantize_packed(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    order: Tensor | None,
    format: Format,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """The same of the parts of a GroupedTensor."""
    rows, columns = rows_and_columns(shape)
    whole = unpack_codes(codes, (rows, columns), format.bits)
    values = values_of(whole, scale.float(), zeros_of(zero, scale, format), format.block)
    if order is not None:
        values = torch.empty_like(values).index_copy_(1, order.long(), values)
    return values.to(dtype).view(shape)


def zeros_of(zero: Tensor | None, scale: Tensor, format: Format) -> Tensor:
    """The zero of each group, float32 of scale's shape."""
    return torch.full_like(scale, 2 ** (format.bits - 1), dtype=torch.float32) if zero is None else zero.float()


def values_of(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """scale * (code - zero), float32 [rows, columns]; codes: [rows, columns], constants: float32 [rows, groups]."""
    columns = codes.shape[1]
    return spread(scale, group, columns) * (codes.float() - spread(zero, group, columns))


def spread(constants: Tensor, group: int, columns: int) -> Tensor:
    """[rows, groups] to [rows, columns]: each column's own."""
    return constants.repeat_interleave(columns if group == ROW else group, dim=1)[:, :columns]
