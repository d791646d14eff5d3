"""Codes to bytes and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lilliput.formats.packing import pack_codes, pack_nibbles, row_bytes, unpack_codes, unpack_nibbles


def test_the_earlier_code_is_the_high_nibble() -> None:
    assert pack_nibbles(torch.tensor([0xA, 0xB, 0xC], dtype=torch.uint8), filler=7).tolist() == [0xAB, 0xC7]


@given(st.lists(st.integers(0, 15), max_size=40))
def test_unpacking_inverts_packing(codes: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.uint8))
    assert packed.numel() == (len(codes) + 1) // 2
    assert unpack_nibbles(packed.view(-1, 1), len(codes)).tolist() == codes


# ---- rows of runs ----


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(3, 64), (2, 33), (4, 5), (1, 128), (0, 40), (3, 0)])
def test_rows_come_back(bits: int, rows: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=draw)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows * row_bytes(columns, bits),)
    assert row_bytes(columns, bits) == -(columns // -32) * 4 * bits
    assert torch.equal(unpack_codes(packed.view(-1, 1), (rows, columns), bits), codes)
    assert torch.equal(pack_codes(codes.t().contiguous().t(), bits), packed)


def test_where_each_code_of_a_run_lies() -> None:
    """By setting one code after another to all ones: the layout that the compiled core reads and files have."""
    for place in range(32):
        codes = torch.zeros(1, 32, dtype=torch.uint8)
        lies = {}
        for bits in (2, 3, 4, 8):
            codes[0, place] = 2**bits - 1
            lies[bits] = {i: byte for i, byte in enumerate(pack_codes(codes, bits).tolist()) if byte}
        assert lies[8] == {place: 255}
        assert lies[4] == {place % 16: 15 << 4 * (place // 16)}
        assert lies[2] == {place % 8: 3 << 2 * (place // 8)}
        assert lies[3] == {**lies[2], 8 + place % 4: 1 << place // 4}
