"""Computed codebooks against published constants and against their definitions in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from lilliput.errors import FormatError
from lilliput.formats import codebooks
from lilliput.formats.blockwise import dequantize_dynamic, quantize_dynamic

# QLoRA, arXiv 2305.14314, appendix E.
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_equals_the_published_constants_bit_for_bit() -> None:
    assert codebooks.nf4().dtype == torch.float32
    assert codebooks.nf4().tolist() == PUBLISHED_NF4


def test_fp4_is_sign_exponent_mantissa() -> None:
    # Codes 1..7 by value, in twelfths of the largest: a subnormal, then 1.0 and 1.5 times 2, 4 and 8.
    by_code = [Fraction(n, 192) for n in (0, 1, 128, 192, 64, 96, 32, 48)]
    expected = torch.tensor([float(v) for v in by_code] + [-float(v) for v in by_code], dtype=torch.float32)
    assert torch.equal(codebooks.fp4(), expected)
    assert not codebooks.fp4()[8].signbit()


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic8_follows_the_definition(signed: bool) -> None:
    values = [Fraction(0), Fraction(1)]
    for exponent in range(7):
        steps = 2**exponent * (1 if signed else 2)
        for i in range(steps):
            middle = Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * i + 1, 2 * steps)
            values += [s * middle * Fraction(10) ** (exponent - 6) for s in ((1, -1) if signed else (1,))]
    expected = torch.tensor([float(v) for v in sorted(values)], dtype=torch.float64)
    got = codebooks.dynamic8(signed)
    assert got.shape == (256,)
    torch.testing.assert_close(got.double(), expected, rtol=2e-7, atol=0)


def test_a_worked_byte_of_the_dynamic_tree() -> None:
    """docs/formats.md: 0 00 1 1011 is + 10^-2 times the middle of step 11 of 16 over [0.1, 1]."""
    middle = Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * 0b1011 + 1, 2 * 2**4)
    below = sum(2**bits for bits in range(4))  # positive values with a smaller exponent
    code = 127 + 1 + below + 0b1011
    assert (code, float(middle / 100)) == (154, 0.00746875)
    assert codebooks.dynamic8()[[127, 154, 255]].tolist() == [0.0, pytest.approx(0.00746875, rel=1e-6), 1.0]


@pytest.mark.parametrize("signed", [True, False])
def test_linear8_is_that_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_linear_map(signed)
    if signed:
        theirs = torch.cat([theirs[:127], theirs[128:]])  # a second zero only fills it up to 256
    torch.testing.assert_close(codebooks.linear8(signed), theirs, rtol=0, atol=1e-7)
    assert 0.0 in codebooks.linear8(signed)


def test_values_of_quantile8_are_taken_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    for sample in (torch.randn(256 * 100, generator=generator), torch.rand(256 * 100, generator=generator) ** 4):
        book = codebooks.quantile8(sample)
        assert (book.shape, book.dtype, float(book.abs().max())) == ((256,), torch.float32, 1.0)
        assert bool((book.diff() > 0).all())
        edges = torch.quantile(sample.double(), torch.arange(257, dtype=torch.float64) / 256)
        middles = (edges[:-1] + edges[1:]) / 2
        torch.testing.assert_close(book.double(), middles / middles.abs().max(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sample", [[], [0.0, 0.0], [1.0, float("nan")], [float("inf")]])
def test_a_sample_without_quantiles_is_refused(sample: list[float]) -> None:
    with pytest.raises(FormatError, match=f"no quantiles of a sample of {len(sample)} numbers"):
        codebooks.quantile8(torch.tensor(sample))


def test_the_dynamic_tree_keeps_small_numbers_that_linear_steps_lose() -> None:
    moments = torch.tensor([1.0, 1e-2, -1e-3, 1e-4])
    for book, worst in ((codebooks.dynamic8(), 0.35), (codebooks.linear8(), 1.0)):
        back = dequantize_dynamic(*quantize_dynamic(moments, book, 4), book, 4)
        assert ((back - moments) / moments).abs().max() <= worst
        assert bool(back[3]) == (worst < 1)


def test_codebooks_ascend_but_for_fp4() -> None:
    books = (
        codebooks.nf4(),
        codebooks.int8(),
        *(make(signed) for make in (codebooks.dynamic8, codebooks.linear8) for signed in (True, False)),
    )
    for book in books:
        assert bool((book[1:] > book[:-1]).all())


def test_int8_is_the_whole_numbers_over_127() -> None:
    expected = torch.tensor([float(Fraction(n, 127)) for n in range(-127, 128)], dtype=torch.float32)
    assert torch.equal(codebooks.int8(), expected)
