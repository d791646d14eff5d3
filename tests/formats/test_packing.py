"""Nibbles to bytes and back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lilliput.formats.packing import pack_nibbles, unpack_nibbles


def test_the_earlier_code_is_the_high_nibble() -> None:
    assert pack_nibbles(torch.tensor([0xA, 0xB, 0xC], dtype=torch.uint8), filler=7).tolist() == [0xAB, 0xC7]


@given(st.lists(st.integers(0, 15), max_size=40))
def test_unpacking_inverts_packing(codes: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.uint8))
    assert packed.numel() == (len(codes) + 1) // 2
    assert unpack_nibbles(packed.view(-1, 1), len(codes)).tolist() == codes
