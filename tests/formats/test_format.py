"""The table of formats and what a QuantizedTensor refuses to hold."""

from __future__ import annotations

import pytest
import torch

from lilliput.errors import FormatError, UsageError
from lilliput.formats import DYNAMIC8, FORMATS, NF4, QuantizedTensor, get_format, quantize


def test_get_format_knows_each_row_and_suggests_the_nearest() -> None:
    assert [get_format(name).name for name in FORMATS] == ["nf4", "fp4"]
    assert get_format(NF4) is NF4
    with pytest.raises(UsageError, match=r"unknown number format 'nf-4'; did you mean 'nf4'\?"):
        get_format("nf-4")


def test_bits_per_number_of_a_double_quantized_tensor() -> None:
    q = quantize(torch.randn(512, 1024))
    # 4 bits, 8 bits per 64 numbers, 32 bits per 64 * 256 numbers (and one offset): QLoRA's 4.127.
    assert q.nbytes * 8 / q.numel == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert q.double_quant
    plain = quantize(torch.randn(512, 1024), double_quant=False)
    assert plain.nbytes * 8 / plain.numel == 4.5
    assert not plain.double_quant


@pytest.mark.parametrize("part", ["codes", "absmax", "absmax_scale"])
def test_parts_of_the_wrong_size_are_refused(part: str) -> None:
    q = quantize(torch.randn(64, 1024))
    parts = {name: getattr(q, name) for name in ("codes", "absmax", "absmax_scale", "absmax_offset")}
    parts[part] = parts[part][:-1]
    with pytest.raises(FormatError, match=rf"^{part} has .* nf4 of shape \[64, 1024\] needs"):
        QuantizedTensor(NF4, q.shape, **parts)


def test_half_of_a_double_quantization_is_refused() -> None:
    q = quantize(torch.randn(64))
    with pytest.raises(FormatError, match="belong together"):
        QuantizedTensor(NF4, q.shape, q.codes, q.absmax, q.absmax_scale, None)


def test_dynamic8_is_not_offered_for_weights() -> None:
    assert DYNAMIC8.name not in FORMATS
