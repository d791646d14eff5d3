"""The reference against the definition: nearest codes, block by block, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lilliput.errors import FormatError
from lilliput.formats import DYNAMIC8, FORMATS, dequantize, get_format, quantize
from lilliput.formats.blockwise import block_absmax, quantize_dynamic8
from lilliput.formats.packing import unpack_nibbles
from tests.nasty import NASTY, NOT_FINITE

BLOCKWISE = [name for name, row in FORMATS.items() if row.kind == "blocks"]
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """float32 [0..200]: numbers of any size, drawn few and repeated, so that blocks differ and ends are ragged."""
    values = draw(st.lists(float32s, min_size=1, max_size=20))
    count = draw(st.integers(0, 200))
    return torch.tensor(values, dtype=torch.float32).repeat(count // len(values) + 1)[:count]


@settings(deadline=None, max_examples=60)
@given(tensors(), st.sampled_from(BLOCKWISE))
def test_every_number_gets_a_nearest_code(x: Tensor, name: str) -> None:
    q = quantize(x, name, double_quant=False)
    book = get_format(name).codebook().double()
    codes = unpack_nibbles(q.codes, x.numel()).long()
    scale = q.absmax.double().clamp(min=1e-38).repeat_interleave(64)[: x.numel()]
    scaled = x.double() / scale
    error = (book[codes] - scaled).abs()
    nearest = (book[:, None] - scaled).abs().amin(dim=0) if x.numel() else error
    # A reciprocal and a product round twice: at a bound between two codes either may be taken.
    assert bool((error <= nearest + 4e-7).all())


@pytest.mark.parametrize("name", BLOCKWISE)
def test_values_of_the_codebook_come_back_as_they_were(name: str) -> None:
    book = get_format(name).codebook()
    x = torch.cat([book, book, book, book, book[:5]]) * 3.0
    x[-1] = 3.0  # the ragged block has its own largest number
    assert torch.equal(dequantize(quantize(x, name, double_quant=False)), x)


@pytest.mark.parametrize("nasty", NASTY)
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_error_is_within_half_a_gap_of_the_codebook(nasty: str, double_quant: bool) -> None:
    x = NASTY[nasty]()
    q = quantize(x, "nf4", double_quant)
    got = dequantize(q)
    assert got.shape == x.shape
    absmax = block_absmax(q.absmax, q.absmax_scale, q.absmax_offset).repeat_interleave(64)[: x.numel()].view(x.shape)
    largest_gap = 0.31  # between -1 and -0.696
    exact = quantize(x, "nf4", False).absmax.repeat_interleave(64)[: x.numel()].view(x.shape)
    assert bool(((got - x).abs() <= largest_gap / 2 * exact + (absmax - exact).abs() + 1e-7).all())


def test_double_quantization_keeps_absmax_near() -> None:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 300)[:, None]
    plain, double = quantize(x, double_quant=False), quantize(x, double_quant=True)
    assert torch.equal(plain.codes, double.codes)
    assert double.absmax_scale is not None
    assert double.absmax_scale.shape == (2,)
    absmax = block_absmax(double.absmax, double.absmax_scale, double.absmax_offset)
    # The widest gap of the dynamic tree near 1 is 0.9 / 64; the grid adds 1 / 65535.
    bound = double.absmax_scale.max() * (0.9 / 64 / 2 + 2e-5)
    assert float((absmax - plain.absmax).abs().max()) <= float(bound)


def test_dynamic8_of_a_block_of_zeros() -> None:
    codes, absmax = quantize_dynamic8(torch.zeros(300))
    assert codes.tolist() == [0] * 300
    assert absmax.tolist() == [0.0, 0.0]


@settings(deadline=None, max_examples=40)
@given(tensors())
def test_dynamic8_takes_the_nearest_code_to_a_fine_grid(x: Tensor) -> None:
    x = x.clamp(-1e30, 1e30)
    codes, absmax = quantize_dynamic8(x)
    scale = absmax.repeat_interleave(DYNAMIC8.block)[: x.numel()]
    kept = scale > 1e-30
    scaled, book = (x / scale).double()[kept], DYNAMIC8.codebook().double()
    error = (book[codes.long()][kept] - scaled).abs()
    nearest = (book[:, None] - scaled).abs().amin(dim=0) if scaled.numel() else error
    assert bool((error <= nearest + 2 / 65535).all())


@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_not_finite_is_refused_with_its_place(value: str) -> None:
    x = torch.zeros(5, 40)
    x[3, 7] = NOT_FINITE[value]
    with pytest.raises(FormatError, match=r"the number at \[3, 7\] of shape \[5, 40\] is -?(nan|inf)"):
        quantize(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(FormatError, match="float32, float16 or bfloat16"):
        quantize(torch.zeros(64, dtype=dtype))
