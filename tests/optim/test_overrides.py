"""What keeps 32 bits whatever the rest does, and options by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lilliput import optim
from lilliput.errors import UsageError
from lilliput.optim.overrides import is_embedding


class Tiny(nn.Module):
    """A language model's names: a table, a layer, a head."""

    def __init__(self, vocabulary: int = 100) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, 64)
        self.layer = nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, vocabulary, bias=False)


def bits(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    return {
        name: kept
        for group in optimizer.param_groups
        for name, kept in zip(group["param_names"], group["param_bits"], strict=True)
    }


def test_small_tensors_and_embeddings_keep_32_bits() -> None:
    assert bits(optim.AdamW8bit(Tiny().named_parameters())) == {
        "embed_tokens.weight": 32,
        "layer.weight": 8,
        "layer.bias": 32,
        "lm_head.weight": 8,
    }


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "gpt_neox.embed_in.weight",
        "bert.embeddings.word_embeddings.weight",
        "tok_emb.weight",
        "emb.weight",
    ],
)
def test_embeddings_are_known_by_name(name: str) -> None:
    assert is_embedding(name)


@pytest.mark.parametrize("name", ["member.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight", None])
def test_others_are_not(name: str | None) -> None:
    assert not is_embedding(name)


def test_without_names_embeddings_can_be_marked(capsys: pytest.CaptureFixture[str]) -> None:
    model = Tiny(vocabulary=9000)
    optim.AdamW8bit(model.parameters())
    said = " ".join(capsys.readouterr().err.split())
    assert "parameter 0 of group 0 [9000, 64] may be an embedding" in said
    assert optim.keep_in_32_bits(model) == ["embed_tokens.weight"]
    optimizer = optim.AdamW8bit([model.embed_tokens.weight, model.layer.weight])
    assert optimizer.param_groups[0]["param_bits"] == [32, 8]
    assert "may be an embedding" not in capsys.readouterr().err


def test_no_hint_where_names_or_32_bits_make_it_needless(capsys: pytest.CaptureFixture[str]) -> None:
    optim.AdamW8bit(Tiny(vocabulary=9000).named_parameters())
    optim.AdamW(Tiny(vocabulary=9000).parameters())
    assert capsys.readouterr().err == ""


def test_an_override_sets_options_by_name() -> None:
    model = Tiny()
    optimizer = optim.AdamW8bit(
        model.named_parameters(),
        lr=1e-3,
        overrides={"lm_head.*": {"bits": 32, "lr": 1e-5}, "*.bias": {"weight_decay": 0.0}, "embed*": {"bits": 8}},
    )
    groups = [(group["param_names"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert groups == [
        (["embed_tokens.weight", "layer.weight"], 1e-3, 1e-2),
        (["layer.bias"], 1e-3, 0.0),
        (["lm_head.weight"], 1e-5, 1e-2),
    ]
    assert bits(optimizer) == {"embed_tokens.weight": 8, "layer.weight": 8, "layer.bias": 32, "lm_head.weight": 32}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[model.embed_tokens.weight]["exp_avg"].dtype == torch.uint8


def test_of_several_patterns_the_later_wins() -> None:
    optimizer = optim.AdamW8bit(
        Tiny().named_parameters(), overrides={"*": {"lr": 0.5, "weight_decay": 0.0}, "layer.*": {"lr": 0.25}}
    )
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.0), (0.25, 0.0)]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {"*.lm_haed.*": {"bits": 32}},
            r"overrides: no parameter matches '\*.lm_haed.\*'; did you mean 'lm_head.weight'",
        ),
        ({"*": {"learning": 1.0}}, r"overrides\['\*'\]: no option 'learning'"),
        ({"*": {"bits": 16}}, "overrides: bits=16: expected 8 or 32"),
        ({"*": {"lr": -1.0}}, "lr=-1.0"),
    ],
)
def test_an_override_that_is_wrong_is_said(overrides: dict[str, dict[str, Any]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        optim.AdamW8bit(Tiny().named_parameters(), overrides=overrides)


def test_overrides_need_names() -> None:
    with pytest.raises(UsageError, match=r"the parameters have none. Give model.named_parameters\(\)"):
        optim.AdamW8bit(Tiny().parameters(), overrides={"*": {"bits": 32}})
    pairs = list(Tiny().named_parameters())
    with pytest.raises(UsageError, match="some parameters come with a name and some without"):
        optim.AdamW8bit([pairs[0], pairs[1][1]])
