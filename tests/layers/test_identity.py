"""A base is known by its numbers."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lilliput.errors import CheckpointError
from lilliput.files import TensorsHash
from lilliput.layers import BaseIdentity, IdentitySource, identity_of, replace_linears
from lilliput.layers.identity import Stamp


class Wrapper(nn.Module):
    """What an adapter does to a module: keeps it as `base_layer`, with its own weights beside."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ParameterDict({"default": nn.Parameter(torch.randn(2, 2))})


def test_the_hash_is_the_formula_over_the_state_dict(tiny_llama):
    model = tiny_llama()
    digest = TensorsHash()
    for name, tensor in model.state_dict().items():
        digest.add(name, tensor)
    assert identity_of(model) == BaseIdentity("LlamaForCausalLM", digest.hexdigest(), None, "none")


def test_the_same_numbers_have_the_same_identity_and_others_another(tiny_llama):
    assert identity_of(tiny_llama(seed=3)) == identity_of(tiny_llama(seed=3))
    assert identity_of(tiny_llama(seed=3)).weights_sha256 != identity_of(tiny_llama(seed=4)).weights_sha256


def test_quantized_numbers_have_a_hash_of_their_own(tiny_llama):
    hashes = set()
    for format, double_quant in (("nf4", True), ("nf4", False), ("fp4", True), ("int8", None), ("int4", None)):
        model = tiny_llama()
        replace_linears(model, format, double_quant)
        identity = identity_of(model)
        assert identity.format == format
        hashes.add(identity.quantized_sha256)
    assert len(hashes) == 5
    assert None not in hashes


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_do_not_change_who_the_base_is(tiny_llama, quantized):
    model = tiny_llama()
    if quantized:
        replace_linears(model)
    before = identity_of(model)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Wrapper(layer.self_attn.q_proj)
    assert identity_of(model) == before


def test_files_at_name_or_path_are_hashed_as_stored(tiny_llama, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    expected = identity_of(model).weights_sha256
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)  # rounded: the files are what counts
    assert identity_of(loaded) == BaseIdentity(str(tmp_path), expected, None, "none")


def test_files_of_others_in_the_directory_are_no_part_of_the_model(tiny_llama, tmp_path):
    model = tiny_llama()
    expected = identity_of(model).weights_sha256
    for place, shard in ((tmp_path / "whole", "10GB"), (tmp_path / "shards", "50KB")):
        model.save_pretrained(place, max_shard_size=shard)
        save_file({"other": torch.ones(2)}, place / "consolidated.safetensors")
        assert identity_of(type(model).from_pretrained(place)).weights_sha256 == expected


def count() -> str:
    count.calls += 1
    return "abc"


def test_what_a_loader_attached_is_asked_once_and_survives_copies(tiny_llama):
    count.calls = 0
    model = tiny_llama()
    model.base_identity = IdentitySource("org/name", count)
    assert count.calls == 0
    assert [identity_of(model).weights_sha256 for _ in range(3)] == ["abc"] * 3
    assert count.calls == 1
    assert identity_of(model).name == "org/name"
    assert identity_of(copy.deepcopy(model)) == identity_of(pickle.loads(pickle.dumps(model))) == identity_of(model)


def test_a_stamp_notices_another_file(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    stamp = Stamp.of(file)
    stamp.check()
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed since the model was loaded"):
        stamp.check()
    file.unlink()
    with pytest.raises(CheckpointError, match="changed"):
        stamp.check()
