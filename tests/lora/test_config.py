"""LoraConfig: PEFT's names and defaults, everything else refused with a helpful word; which modules a config picks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from lilliput.errors import CheckpointError, UsageError
from lilliput.lora import LoraConfig, adapters, add_adapter, target_layers
from lilliput.lora.config import NOT_SUPPORTED
from lilliput.lora.targets import DEFAULT_TARGETS, resolve

MakeLlama = Callable[..., LlamaForCausalLM]


def picked(model: nn.Module, **fields: Any) -> list[str]:
    return resolve(model, LoraConfig(**fields))[1]


def test_defaults_are_pefts() -> None:
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 8, 0.0, "none")
    assert (config.target_modules, config.modules_to_save, config.use_rslora) == (None, None, False)
    assert (config.init_lora_weights, config.rank_pattern, config.alpha_pattern) == (True, {}, {})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lora_alfa": 16}, "unknown field 'lora_alfa'; did you mean 'lora_alpha'"),
        ({"targetmodules": ["q"]}, "did you mean 'target_modules'"),
        ({"use_dora": True}, "use_dora=True is a field of PEFT that is not supported"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 0}, "r=0: Input should be greater than or equal to 1"),
        ({"r": "eight"}, "r='eight'"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"bias": "some"}, "bias='some'"),
        ({"task_type": "CASUAL_LM"}, "did you mean 'CAUSAL_LM'"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"rank_pattern": {"(q": 3}}, "no regular expression"),
        ({"target_modules": "q.*", "layers_to_transform": [0]}, "cannot be combined"),
        ({"target_modules": ["q_proj"], "layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        LoraConfig(**fields)
    assert said in str(caught.value)


def test_fields_of_peft_that_are_switched_off_are_accepted() -> None:
    assert LoraConfig(**NOT_SUPPORTED) == LoraConfig()


def test_a_file_of_a_newer_peft_is_read_when_its_new_fields_are_off() -> None:
    known = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    assert LoraConfig.from_peft({**known, "use_magic": False, "magic_config": None}, "x.json").r == 4
    with pytest.raises(CheckpointError, match=r"x\.json: unknown field 'use_magic'"):
        LoraConfig.from_peft({**known, "use_magic": True}, "x.json")


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", None])
def test_another_kind_of_adapter_is_refused(kind: str | None) -> None:
    with pytest.raises(CheckpointError, match="only LORA can be loaded"):
        LoraConfig.from_peft({"peft_type": kind}, "x.json")


def test_list_entries_match_whole_names_or_endings_after_a_dot(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    assert picked(model, target_modules=["mlp.up_proj"]) == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    assert picked(model, target_modules=["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(UsageError):
        picked(model, target_modules=["proj"])  # not an ending after a dot


def test_a_string_is_an_expression_for_the_whole_name(tiny_llama: MakeLlama) -> None:
    assert picked(tiny_llama(), target_modules=r".*\.1\..*\.[qk]_proj") == [
        f"model.layers.1.self_attn.{name}_proj" for name in "qk"
    ]


def test_all_linear_leaves_out_the_head(tiny_llama: MakeLlama) -> None:
    names = picked(tiny_llama(), target_modules="all-linear")
    assert len(names) == 14
    assert "lm_head" not in names


def test_all_linear_can_be_limited_to_layers_and_is_written_down_as_names(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    config, names, _ = resolve(model, LoraConfig(target_modules="all-linear", layers_to_transform=[1]))
    assert len(names) == 7
    assert all(".layers.1." in name for name in names)
    assert config.target_modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert resolve(model, config)[1] == names


def test_all_linear_of_a_plain_module_is_spelled_out_where_last_names_say_too_much() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Linear(2, 2)}), "b": nn.ModuleDict({"x": nn.Tanh()})})
    config, names, _ = resolve(model, LoraConfig(target_modules="all-linear"))
    assert config.target_modules == names == ["a.x"]


def test_default_targets_go_by_architecture(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    assert {name.rpartition(".")[2] for name in picked(model)} == set(DEFAULT_TARGETS["llama"])
    with pytest.raises(UsageError, match=r"no default for models of type None.*0 \(1\)"):
        picked(nn.Sequential(nn.Linear(2, 2)))


def test_a_target_that_matches_nothing_says_which_names_exist(tiny_llama: MakeLlama) -> None:
    with pytest.raises(UsageError) as caught:
        picked(tiny_llama(), target_modules=["q_proj", "vproj"])
    said = str(caught.value)
    assert "['vproj'] matches no module of LlamaForCausalLM; did you mean 'v_proj'" in said
    for name in ("down_proj (2)", "embed_tokens (1)", "gate_proj (2)", "lm_head (1)", "q_proj (2)"):
        assert name in said


def test_an_expression_that_matches_nothing_says_which_names_exist(tiny_llama: MakeLlama) -> None:
    with pytest.raises(UsageError, match=r"'q_proj' matches no module.*q_proj \(2\)"):
        picked(tiny_llama(), target_modules="q_proj")  # a string must match the whole name


def test_a_limit_that_leaves_nothing_is_named(tiny_llama: MakeLlama) -> None:
    with pytest.raises(UsageError, match=r"nothing is left of it after layers_to_transform=\[7\]"):
        picked(tiny_llama(), target_modules=["q_proj"], layers_to_transform=[7])


def test_a_module_that_cannot_be_adapted_is_refused(tiny_llama: MakeLlama) -> None:
    with pytest.raises(UsageError, match=r"'model\.layers\.0\.self_attn' is a LlamaAttention; only Linear"):
        picked(tiny_llama(), target_modules=["self_attn"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"modules_to_save": ["lmhead"]}, "'lmhead' matches no module; did you mean 'lm_head'"),
        ({"modules_to_save": ["layers"]}, "ModuleList"),
    ],
)
def test_modules_to_save_that_cannot_be_saved(tiny_llama: MakeLlama, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        picked(tiny_llama(), target_modules=["q_proj"], **fields)
    assert said in str(caught.value)


def test_modules_to_save_over_layers_of_another_adapter_are_refused(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    add_adapter(model, LoraConfig(target_modules=["q_proj"]), "one")
    with pytest.raises(UsageError, match="another adapter already sits"):
        add_adapter(model, LoraConfig(target_modules=["up_proj"], modules_to_save=["self_attn"]), "two")
    assert list(adapters(model)) == ["one"]
    assert len(target_layers(model)) == 2


def test_embeddings_with_max_norm_are_refused() -> None:
    with pytest.raises(UsageError, match="max_norm"):
        picked(nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)), target_modules=["0"])


def test_the_projection_that_torchs_attention_never_calls_is_refused() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 8)
    assert picked(model, target_modules="all-linear") == ["linear1", "linear2"]
    with pytest.raises(UsageError, match=r"'self_attn\.out_proj' is never called.*: linear1 \(1\), linear2 \(1\)\."):
        picked(model, target_modules=["out_proj"])


def test_a_module_that_another_adapter_trains_whole_is_refused(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    add_adapter(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "one")
    with pytest.raises(UsageError, match="'lm_head' is trained whole by another adapter"):
        picked(model, target_modules=["lm_head"])
    assert "lm_head" not in picked(model, target_modules="all-linear")


def test_rank_and_alpha_patterns_end_the_name() -> None:
    config = LoraConfig(r=8, rank_pattern={"q_proj": 2, r"layers\.1\..*": 3}, alpha_pattern={"up_proj": 64})
    assert config.rank_and_alpha("model.layers.1.self_attn.q_proj") == (2, 8)
    assert config.rank_and_alpha("model.layers.1.mlp.up_proj") == (3, 64)
    assert config.rank_and_alpha("model.layers.0.xq_proj") == (8, 8)


def test_the_base_is_named_in_the_settled_config(tiny_llama: MakeLlama) -> None:
    model = tiny_llama()
    model.name_or_path = "org/base"
    add_adapter(model, LoraConfig(target_modules=["q_proj"]))
    assert adapters(model)["default"].base_model_name_or_path == "org/base"
    assert torch.is_tensor(model.model.layers[0].self_attn.q_proj.weight)
