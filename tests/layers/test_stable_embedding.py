"""StableEmbedding is bitsandbytes' own, and its weight is marked for 32-bit optimizer state wherever it comes from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lilliput.layers import StableEmbedding


def make_table(**changes: object) -> StableEmbedding:
    torch.manual_seed(0)
    return StableEmbedding(50, 16, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 3])
def test_it_is_that_of_bitsandbytes(padding: int | None, dtype: torch.dtype) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, theirs = make_table(padding_idx=padding, dtype=dtype), bitsandbytes.nn.StableEmbedding(50, 16, padding)
    theirs.weight.data = theirs.weight.data.to(dtype)  # its dtype= is taken for a device
    nn.init.normal_(ours.norm.weight)
    nn.init.normal_(ours.norm.bias)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "norm.weight", "norm.bias"]
    theirs.load_state_dict(ours.state_dict())
    ids, grad = torch.tensor([[0, 3, 49], [3, 7, 7]]), torch.randn(2, 3, 16).to(dtype)
    a, b = ours(ids), theirs(ids)
    assert a.dtype == dtype
    assert torch.equal(a, b)
    a.backward(grad)
    b.backward(grad)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_rows_are_normalised() -> None:
    rows = make_table()(torch.arange(50))
    torch.testing.assert_close(rows.mean(dim=1), torch.zeros(50), atol=1e-6, rtol=0)
    table = make_table().weight
    expected = nn.functional.layer_norm(table, (16,))
    torch.testing.assert_close(rows, expected)


def test_values_are_xavier_uniform_and_padding_is_zero() -> None:
    torch.manual_seed(0)
    weight = StableEmbedding(4000, 64, padding_idx=5).weight.detach()
    limit = (6 / (4000 + 64)) ** 0.5
    assert limit * 0.999 < weight.abs().max() <= limit
    torch.testing.assert_close(weight.std(), torch.tensor(limit / 3**0.5), rtol=0.01, atol=0)
    assert not weight[5].any()


def test_a_pretrained_table_can_be_put_in() -> None:
    values = torch.randn(50, 16)
    table = StableEmbedding.from_pretrained(values)
    assert torch.equal(table.weight, values)
    assert not table.weight.requires_grad
    assert table.weight.optimizer_bits == 32


def test_half_precision_norms_are_computed_in_float32() -> None:
    ids = torch.arange(50)
    table = make_table()
    half = copy.deepcopy(table).to(torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16
    torch.testing.assert_close(half(ids).float(), table(ids), rtol=0.01, atol=0.01)


def test_the_weight_is_marked_after_copies_moves_and_loads() -> None:
    table = make_table()
    empty = make_table(device="meta")
    assert empty.to_empty(device="cpu").weight.optimizer_bits == 32
    assigned = make_table(device="meta")
    assigned.load_state_dict(table.state_dict(), assign=True)
    replaced = make_table()
    replaced.weight = nn.Parameter(torch.zeros(50, 16))
    moved = make_table().to(torch.float64).half()
    for other in (table, assigned, replaced, moved, copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert other.weight.optimizer_bits == 32
    assert not hasattr(table.norm.weight, "optimizer_bits")


@pytest.mark.parametrize("wrong", [-1, 50])
def test_an_id_outside_the_table_is_an_error(wrong: int) -> None:
    with pytest.raises(IndexError):
        make_table()(torch.tensor([wrong]))
