"""Computed codebooks against published constants and against their definitions in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from lilliput.formats import codebooks

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


def test_codebooks_ascend_but_for_fp4() -> None:
    for book in (codebooks.nf4(), codebooks.int8(), codebooks.dynamic8(), codebooks.dynamic8(signed=False)):
        assert bool((book[1:] > book[:-1]).all())


def test_int8_is_the_whole_numbers_over_127() -> None:
    expected = torch.tensor([float(Fraction(n, 127)) for n in range(-127, 128)], dtype=torch.float32)
    assert torch.equal(codebooks.int8(), expected)
