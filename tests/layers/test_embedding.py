"""QuantizedEmbedding gives the rows of the dequantized table, in its type, and shares its codes with a tied head."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lilliput import formats
from lilliput.errors import FormatError, UsageError
from lilliput.layers import QuantizedEmbedding, QuantizedLinear, default_skip, quantized_layers, replace_linears


def make_table(dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(50, 33, padding_idx=3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (4,), (2, 5), (0,), (2, 0)])
def test_rows_are_those_of_the_dequantized_table(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    table = make_table(dtype)
    quantized = QuantizedEmbedding.from_embedding(table)
    ids = torch.randint(0, 50, shape)
    rows = quantized(ids)
    dense = formats.dequantize(formats.quantize(table.weight.detach(), "int8"), dtype)
    assert (rows.shape, rows.dtype) == ((*shape, 33), dtype)
    assert torch.equal(rows, dense[ids])
    assert torch.equal(quantized.dequantize(dtype), dense)
    assert isinstance(quantized, nn.Embedding)
    assert (quantized.num_embeddings, quantized.embedding_dim, quantized.padding_idx) == (50, 33, 3)


@pytest.mark.parametrize("wrong", [-1, 50])
def test_an_id_outside_the_table_is_an_error(wrong: int) -> None:
    with pytest.raises(IndexError):
        QuantizedEmbedding.from_embedding(make_table())(torch.tensor([wrong]))


def test_the_state_dict_is_plain_and_fills_an_empty_table() -> None:
    table = QuantizedEmbedding.from_embedding(make_table())
    assert {name: tuple(t.shape) for name, t in table.state_dict().items()} == {
        "weight": (50 * 33, 1), "weight_absmax": (50,)
    }  # fmt: skip
    assert not any(parameter.requires_grad for parameter in table.parameters())
    filled = QuantizedEmbedding.empty(50, 33).to_empty(device="cpu")
    filled.load_state_dict(table.state_dict())
    assert torch.equal(filled(torch.arange(50)), table(torch.arange(50)))


def test_the_type_of_rows_follows_and_codes_do_not() -> None:
    table = QuantizedEmbedding.from_embedding(make_table())
    before, ids = table.weight_absmax.clone(), torch.arange(50)
    rows = table(ids)
    table.half()
    assert table(ids).dtype == torch.float16
    assert torch.equal(table.weight_absmax, before)
    assert torch.equal(table.float()(ids), rows)
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(other(ids), rows)


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(FormatError, match="two dimensions"):
        QuantizedEmbedding(formats.quantize(torch.randn(5), "int8"))
    with pytest.raises(FormatError, match="floating type"):
        QuantizedEmbedding(formats.quantize(torch.randn(5, 4), "int8"), dtype=torch.int32)
    with pytest.raises(UsageError, match="nf4 has no embeddings"):
        QuantizedEmbedding.from_embedding(make_table(), "nf4")
    broken = make_table()
    broken.weight.data[7, 2] = float("inf")
    with pytest.raises(FormatError, match=r"\[7, 2\]"):
        QuantizedEmbedding.from_embedding(broken)


# ---- in a model ----


def test_a_tied_head_shares_the_codes(tiny_llama) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    names = replace_linears(model, "int8", embeddings=True)
    assert names[-2:] == ["model.embed_tokens", "lm_head"]
    table, head = model.model.embed_tokens, model.lm_head
    assert (type(table), type(head)) == (QuantizedEmbedding, QuantizedLinear)
    assert head.weight is table.weight
    assert head.weight_absmax is table.weight_absmax
    for moved in (model, model.half(), copy.deepcopy(model.float())):
        assert moved.lm_head.weight is moved.model.embed_tokens.weight
        assert moved.lm_head.weight_absmax is moved.model.embed_tokens.weight_absmax
        assert moved.lm_head.weight_absmax.dtype == torch.float32
    assert len({id(p) for _, layer in quantized_layers(model) for p in layer.parameters()}) == 2 * (14 + 1)


def test_an_untied_head_stays(tiny_llama) -> None:
    model = tiny_llama()
    assert default_skip(model) == ["lm_head"]
    replace_linears(model, "int8", embeddings=True)
    assert type(model.model.embed_tokens) is QuantizedEmbedding
    assert type(model.lm_head) is nn.Linear


def test_tables_are_quantized_only_when_asked_for_and_where_they_can_be(tiny_llama) -> None:
    model = tiny_llama()
    replace_linears(model, "int8")
    assert type(model.model.embed_tokens) is nn.Embedding
    with pytest.raises(UsageError, match="nf4 has no embeddings"):
        replace_linears(tiny_llama(), "nf4", embeddings=True)
    with pytest.raises(UsageError, match=r"plain nn\.Embedding"):
        replace_linears(nn.Sequential(nn.Linear(4, 4)), "int8", embeddings=True)
    with pytest.raises(UsageError, match="'lm_head' with the token table, and it is in skip"):
        replace_linears(tiny_llama(tie_word_embeddings=True), "int8", skip=["lm_head"], embeddings=True)


def test_int8_layers_and_tables_compile_in_one_piece(tiny_llama) -> None:
    model, ids = tiny_llama(tie_word_embeddings=True), torch.arange(12)[None]
    replace_linears(model, "int8", embeddings=True)

    def steps(ids: torch.Tensor) -> torch.Tensor:
        return model.lm_head(model.model.layers[0].mlp(model.model.embed_tokens(ids)))

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(steps, backend="eager", fullgraph=True)(ids), steps(ids))
