"""Block-wise quantization in plain torch: the reference that every kernel is tested against.

    absmax_b = max |x_i| over block b        q_i = nearest code to x_i / absmax_b        x_i ~ codebook[q_i] * absmax_b

Sources: arXiv 2110.02861, section 2.1 (blocks); arXiv 2305.14314, section 3 (NF4, double quantization). Every rounding
below is the one that bitsandbytes does on a CPU, so that codes, constants and values equal its own bit for bit. Not
here: the doors that make and open a QuantizedTensor (`doors.py`), the quick versions (`lilliput.kernels`).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.formats.format import DYNAMIC8, Format
from lilliput.formats.packing import pack_nibbles, unpack_nibbles

_SMALLEST_ABSMAX = 1e-38  # keeps 1 / absmax finite
_DYNAMIC8_CELLS = 65535  # steps of the grid over [-1, 1] that 8-bit codes are looked up on
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize_blocks(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [ceil(numel / 2)], and absmax, float32 [blocks], of a 4-bit format.

    A full block is multiplied by the reciprocal of its absmax, the ragged block at the end is divided by it; a ragged
    block of zeros gets the absmax 1e-38, a full one 0. A number half-way between two values takes the lower one.
    """
    check_finite(x)
    flat = x.detach().reshape(-1).float()
    full = flat.numel() // format.block * format.block
    blocks, tail = flat[:full].view(-1, format.block), flat[full:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST_ABSMAX))[:, None]).view(-1)
    if tail.numel():
        tail_absmax = tail.abs().max().clamp(min=_SMALLEST_ABSMAX)
        absmax, scaled = torch.cat([absmax, tail_absmax[None]]), torch.cat([scaled, tail / tail_absmax])
    bounds, order = rounding_table(format.codebook().to(x.device))
    codes = order[torch.bucketize(scaled.clamp(-1, 1), bounds)]
    zero = order[torch.bucketize(torch.zeros((), device=x.device), bounds)]
    return pack_nibbles(codes, filler=int(zero)), absmax


def rounding_table(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds between neighbouring values, float32 [n - 1], and the code of each value in ascending order, uint8 [n]."""
    values, order = codebook.sort(stable=True)
    return (values[:-1] + values[1:]) / 2, order.to(torch.uint8)


def dequantize_blocks(
    codes: Tensor, absmax: Tensor, format: Format, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """codebook[code] * absmax of the block, in float32; `absmax` float32 [blocks]."""
    numel = prod(shape)
    values = format.codebook().to(codes.device)[unpack_nibbles(codes, numel).long()]
    scales = absmax.repeat_interleave(format.block)[:numel]
    return (values * scales).to(dtype).view(shape)


def block_absmax(absmax: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """The absmax of each block, float32 [blocks], with double quantization undone."""
    if scale is None or offset is None:
        return absmax
    values = DYNAMIC8.codebook().to(absmax.device)[absmax.long()]
    return values * scale.repeat_interleave(DYNAMIC8.block)[: absmax.numel()] + offset


def quantize_dynamic8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 of x's length, and absmax, float32 [ceil(n / 256)], in the dynamic tree; x float32 [n].

    A scaled number is first rounded to a grid of 65,536 points over [-1, 1] and takes the code nearest to its grid
    point: this is what bitsandbytes' compiled CPU quantizer does, and it moves bounds by up to half a step of the grid.
    A block of zeros has absmax 0 and code 0.
    """
    blocks = -(x.numel() // -DYNAMIC8.block)
    padded = torch.nn.functional.pad(x, (0, blocks * DYNAMIC8.block - x.numel())).view(blocks, DYNAMIC8.block)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / absmax)[:, None]).nan_to_num(nan=-1.0).clamp(-1, 1)
    # One rounding after the product and the sum together (a fused multiply-add); exact in float64 until then.
    point = (((scaled + 1) * 0.5).double() * _DYNAMIC8_CELLS + 0.5).float().int()
    bounds, _ = rounding_table(DYNAMIC8.codebook().to(x.device))
    codes = torch.bucketize((2.0 * point.float()) / _DYNAMIC8_CELLS - 1, bounds).to(torch.uint8)
    return codes.view(-1)[: x.numel()], absmax


def quantize_dynamic(x: Tensor, codebook: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [n], and absmax, float32 [ceil(n / block)], of x float32 [n] in a codebook of 256 ascending values.

    What the 8-bit optimizers keep their moments in (arXiv 2110.02861, section 2). A number times the reciprocal of its
    block's absmax takes the nearest code; half-way between two values, the one nearer to zero. A block of zeros has
    absmax 0 and the codes of zero. Not `quantize_dynamic8`, which rounds to a grid first.
    """
    blocks = -(x.numel() // -block)
    padded = torch.nn.functional.pad(x, (0, blocks * block - x.numel())).view(blocks, block)
    absmax = padded.abs().amax(dim=1)
    scaled = padded * (1.0 / absmax.clamp(min=_SMALLEST_ABSMAX))[:, None]
    bounds, _ = rounding_table(codebook.to(x.device))
    codes = torch.where(scaled < 0, torch.bucketize(scaled, bounds, right=True), torch.bucketize(scaled, bounds))
    return codes.to(torch.uint8).view(-1)[: x.numel()], absmax


def dequantize_dynamic(codes: Tensor, absmax: Tensor, codebook: Tensor, block: int) -> Tensor:
    """codebook[code] * absmax of the block: float32 of the codes' shape; `codes` uint8, `absmax` float32 [blocks]."""
    values = codebook.to(codes.device)[codes.reshape(-1).long()]
    return (values * absmax.repeat_interleave(block)[: values.numel()]).view(codes.shape)


def check_finite(x: Tensor) -> None:
    """Refuse what no block can hold.

    Raises:
        FormatError: a dtype outside float32, float16, bfloat16; NaN or Inf (says where the first is).
    """
    if x.dtype not in FLOATS:
        raise FormatError(f"cannot quantize {x.dtype}", todo="Give float32, float16 or bfloat16.")
    finite = x.isfinite()
    if not finite.all():
        raise not_finite(x, int((~finite).reshape(-1).nonzero()[0]))


def not_finite(x: Tensor, index: int) -> FormatError:
    """The error for a number at flat `index` that is NaN or Inf."""
    place = [int(i) for i in torch.unravel_index(torch.tensor(index), x.shape)]
    return FormatError(
        f"the number at {place} of shape {list(x.shape)} is {x.reshape(-1)[index].item()}; blocks need finite numbers",
        todo="Look for an overflow where these weights were made.",
    )
