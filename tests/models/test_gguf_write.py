"""A written GGUF file is the model again, for our reader and transformers; what cannot be said in one is refused."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lilliput import lora
from lilliput.errors import CheckpointError, DiskError, FormatError, UsageError
from lilliput.layers import QuantizedWeight, replace_linears
from lilliput.models import load_model, load_tokenizer, save_gguf
from lilliput.models.gguf import open_gguf
from lilliput.models.gguf_write import TYPES
from lilliput.models.pre_tokenizers import CUTS, PROBE, cut_named, name_of
from tests.models.conftest import make_model
from tests.models.gguf_files import write_gguf
from tests.models.pieces import SIZE, as_fast, train_pieces
from tests.models.test_gguf import IDS, llama3

FAMILIES = ["llama", "llama-tied", "qwen2", "qwen3", "phi3", "gpt2"]
TEXTS = ["The capital of France", "  12 345\n\nIt's a naïve 🦙, isn't it?\t", "order three boxes <|im_end|> of tea", ""]


def save(model: PreTrainedModel, path: Path, tokenizer: Any, type: str = "f32") -> Path:
    return save_gguf(model, path, tokenizer, type, progress=False).path


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ---- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_read_back_the_model_has_its_logits_to_the_bit(kind: str, cache, tmp_path: Path, tiny_tokenizer) -> None:
    model = make_model(kind)
    loaded = load_model(save(model, tmp_path / "tiny.gguf", tiny_tokenizer), progress=False)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.max_position_embeddings == model.config.max_position_embeddings
    assert loaded.get_memory_footprint() == model.get_memory_footprint()  # a tied head is one again


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2"])
def test_transformers_reads_the_same_model(kind: str, tmp_path: Path, tiny_tokenizer) -> None:
    model = make_model(kind)
    save(model, tmp_path / "tiny.gguf", tiny_tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("type", ["f32", "q8_0"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_tensors_are_those_that_a_writer_of_its_own_makes(kind: str, type: str, tmp_path: Path, tiny_tokenizer) -> None:
    model = make_model(kind)
    ours = open_gguf(save(model, tmp_path / "ours.gguf", tiny_tokenizer, type))
    theirs = open_gguf(write_gguf(tmp_path / "theirs.gguf", model, tiny_tokenizer, TYPES[type].kind))
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].shape == tensor.shape, name
        if name != "position_embd.weight":  # theirs is in blocks
            assert ours.tensors[name].kind == tensor.kind, name
            assert torch.equal(ours.read(name), theirs.read(name)), name


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_1", "q4_0"])
def test_matrices_are_in_the_type_norms_in_f32_and_a_head_of_four_bits_in_eight(
    type: str, tmp_path: Path, tiny_tokenizer
) -> None:
    written = save_gguf(make_model("llama"), tmp_path / "tiny.gguf", tiny_tokenizer, type, progress=False)
    file = open_gguf(written.path)
    wanted, head = {"f16": (Kind.F16, Kind.F16), "q8_0": (Kind.Q8_0, Kind.Q8_0)}.get(
        type, (TYPES[type].kind, Kind.Q8_0)
    )
    for name, tensor in file.tensors.items():
        expected = head if name == "output.weight" else wanted if len(tensor.shape) == 2 else Kind.F32
        assert tensor.kind == expected, name
    assert file.metadata["general.file_type"] == {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7}[type]
    assert written.nbytes == written.path.stat().st_size
    assert sum(written.tensors.values()) == len(file.tensors)
    assert written.notes == []


def test_a_tied_head_of_four_bits_is_the_table_in_eight(tmp_path: Path, tiny_tokenizer) -> None:
    file = open_gguf(save(make_model("llama-tied"), tmp_path / "tiny.gguf", tiny_tokenizer, "q4_0"))
    assert file.tensors["token_embd.weight"].kind == Kind.Q8_0
    assert "output.weight" not in file.tensors


def test_a_head_that_is_tied_by_its_config_alone_is_written(cache, tmp_path: Path, tiny_tokenizer) -> None:
    model = make_model("llama-tied")
    model.lm_head.weight = torch.nn.Parameter(torch.randn(512, 64))
    loaded = load_model(save(model, tmp_path / "tiny.gguf", tiny_tokenizer), progress=False)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_quantized_model_is_written_as_the_numbers_it_computes_with(
    kind: str, format: str, cache, tmp_path: Path, tiny_tokenizer
) -> None:
    model = make_model(kind)
    replace_linears(model, format)
    loaded = load_model(save(model, tmp_path / "tiny.gguf", tiny_tokenizer), progress=False)
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            weight = loaded.get_submodule(name).weight
            assert torch.equal(weight.T if kind == "gpt2" else weight, module.dequantize()), name
            found += 1
    assert found == (14 if kind == "llama" else 8)


def test_tables_in_int8_are_written_once(cache, tmp_path: Path, tiny_tokenizer) -> None:
    model = make_model("llama-tied")
    replace_linears(model, "int8", embeddings=True)
    path = save(model, tmp_path / "tiny.gguf", tiny_tokenizer)
    assert "output.weight" not in open_gguf(path).tensors
    table = model.model.embed_tokens.dequantize()
    assert torch.equal(load_model(path, progress=False).lm_head.weight, table)


def test_one_dequantized_matrix_lives_at_a_time(tmp_path: Path, tiny_tokenizer, monkeypatch) -> None:
    model = make_model("llama")
    replace_linears(model, "nf4")
    before, alive = QuantizedWeight.dequantize, []

    def watched(self: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        assert sum(ref() is not None for ref in alive) <= 1  # the last one, until this one takes its name
        alive.append(weakref.ref(made := before(self, dtype)))
        return made

    monkeypatch.setattr(QuantizedWeight, "dequantize", watched)
    save(model, tmp_path / "tiny.gguf", tiny_tokenizer, "q8_0")
    assert len(alive) == 14


def test_rows_that_are_not_cut_into_blocks_are_kept_in_f16_and_said(
    cache, tmp_path: Path, tiny_tokenizer, tiny_llama, capfd
) -> None:
    model = tiny_llama(intermediate_size=72)
    written = save_gguf(model, tmp_path / "odd.gguf", tiny_tokenizer, "q8_0", progress=False)
    file = open_gguf(written.path)
    assert {name for name, tensor in file.tensors.items() if tensor.kind == Kind.F16} == {
        "blk.0.ffn_down.weight",
        "blk.1.ffn_down.weight",
    }
    (note,) = written.notes
    assert "2 matrices are kept in F16: their rows of 72 numbers" in note
    assert f"odd.gguf: {note}" in capfd.readouterr().err.replace("\n", " ")
    torch.testing.assert_close(logits(load_model(written.path, progress=False)), logits(model), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_rotary_factors_come_back(factor: float, cache, tmp_path: Path, tiny_tokenizer) -> None:
    model = llama3(factor)
    loaded = load_model(save(model, tmp_path / "tiny.gguf", tiny_tokenizer), progress=False)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_window_that_llama_cpp_does_not_keep_is_said(tmp_path: Path, tiny_tokenizer) -> None:
    model = make_model("phi3")
    model.config.sliding_window = 64
    written = save_gguf(model, tmp_path / "tiny.gguf", tiny_tokenizer, "f32", progress=False)
    assert "not to the last 64" in written.notes[0]
    assert open_gguf(written.path).metadata["phi3.attention.sliding_window"] == 64


def test_biases_of_attention_and_mlp_are_kept(cache, tmp_path: Path, tiny_tokenizer, tiny_llama) -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    tensors = open_gguf(save(model, tmp_path / "tiny.gguf", tiny_tokenizer, "q4_0"))
    q = model.model.layers[0].self_attn.q_proj.bias.detach()
    stored = tensors.read("blk.0.attn_q.bias")
    assert torch.equal(stored.reshape(4, 8, 2), torch.stack((q.reshape(4, 2, 8)[:, 0], q.reshape(4, 2, 8)[:, 1]), -1))
    assert torch.equal(tensors.read("blk.1.ffn_down.bias"), model.model.layers[1].mlp.down_proj.bias)


# ---- tokenizers --------------------------------------------------------------------------------------------------


def test_the_tokenizer_comes_back(cache, tmp_path: Path, tiny_tokenizer) -> None:
    tokenizer = load_tokenizer(save(make_model("llama"), tmp_path / "tiny.gguf", tiny_tokenizer))
    for text in TEXTS:
        assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids, text
    turns = [{"role": "user", "content": "What is the capital?"}]
    assert tokenizer.apply_chat_template(turns) == tiny_tokenizer.apply_chat_template(turns)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (tiny_tokenizer.eos_token, tiny_tokenizer.pad_token)


def with_cut(tokenizer: PreTrainedTokenizerFast, pre_tokenizer: Any, ignore_merges: bool = False) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.pre_tokenizer = pre_tokenizer
    changed.backend_tokenizer.model.ignore_merges = ignore_merges
    return changed


def metadata(path: Path) -> dict[str, Any]:
    return {key.removeprefix("tokenizer."): value for key, value in open_gguf(path).metadata.items()}


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.names[0])
def test_how_text_is_cut_is_found_and_comes_back(cut: Any, cache, tmp_path: Path, tiny_tokenizer) -> None:
    tokenizer = with_cut(tiny_tokenizer, cut.pre_tokenizer(), cut.ignore_merges)
    path = save(make_model("llama"), tmp_path / "tiny.gguf", tokenizer)
    assert metadata(path)["ggml.pre"] == cut.names[0]
    again = load_tokenizer(path)
    assert again(PROBE).input_ids == tokenizer(PROBE).input_ids
    assert name_of(again.backend_tokenizer, cut.ignore_merges) == cut.names[0]


def test_the_probe_tells_all_cuts_apart_but_those_that_differ_in_merges_alone() -> None:
    pieces = {(str(cut.pre_tokenizer().pre_tokenize_str(PROBE)), cut.ignore_merges) for cut in CUTS}
    assert len(pieces) == len(CUTS)
    assert len({name for cut in CUTS for name in cut.names}) == sum(len(cut.names) for cut in CUTS)
    assert cut_named("starcoder") is cut_named("smollm")
    assert cut_named("no-such") is None


def test_the_way_of_the_tokenizers_library_to_say_it_counts_too(tmp_path: Path, tiny_tokenizer) -> None:
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    path = save(make_model("llama"), tmp_path / "tiny.gguf", with_cut(tiny_tokenizer, digits))
    assert metadata(path)["ggml.pre"] == "smollm"


def test_types_of_tokens_and_padding(tmp_path: Path, tiny_tokenizer, tiny_llama) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_tokens(["<|later|>"])
    path = save(tiny_llama(vocab_size=544), tmp_path / "tiny.gguf", tokenizer)
    said = metadata(path)
    types = dict(zip(said["ggml.tokens"], said["ggml.token_type"], strict=True))
    assert len(said["ggml.tokens"]) == 544
    assert (types["<|im_end|>"], types["a"], types["<tool>"]) == (3, 1, 4)
    assert types["<|later|>"] == 3  # looks special
    assert types["[PAD543]"] == 5
    assert said["ggml.eos_token_id"] == tokenizer.eos_token_id
    assert said["ggml.padding_token_id"] == tokenizer.pad_token_id
    assert (said["ggml.add_bos_token"], said["ggml.add_eos_token"]) == (False, False)
    assert said["chat_template"] == tokenizer.chat_template


def test_several_templates_are_kept_by_name(tmp_path: Path, tiny_tokenizer) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    said = metadata(save(make_model("llama"), tmp_path / "tiny.gguf", tokenizer))
    assert (said["chat_template"], said["chat_template.tool_use"]) == ("{{ 1 }}", "{{ 2 }}")


def test_sentencepiece_has_scores_in_the_order_of_its_own(cache, tmp_path: Path, tiny_llama) -> None:
    pieces = train_pieces()
    tokenizer = as_fast(pieces)
    path = save(tiny_llama(vocab_size=SIZE, bos_token_id=1), tmp_path / "tiny.gguf", tokenizer)
    said = metadata(path)
    assert (said["ggml.model"], said["ggml.pre"]) == ("llama", "default")
    assert said["ggml.tokens"] == [pieces.id_to_piece(i) for i in range(SIZE)]
    types = [2, 3, 3] + [6] * 256
    assert said["ggml.token_type"][: len(types)] == types
    assert (said["ggml.add_bos_token"], said["ggml.add_space_prefix"]) == (True, True)
    learnt = [i for i in range(len(types), SIZE) if len(pieces.id_to_piece(i)) > 1]
    order = sorted(learnt, key=lambda i: -said["ggml.scores"][i])
    assert order == sorted(learnt, key=lambda i: -pieces.get_score(i))
    assert min(said["ggml.scores"][i] for i in learnt) > max(
        said["ggml.scores"][i] for i in range(len(types), SIZE) if len(pieces.id_to_piece(i)) == 1
    )
    assert all(tokenizer(text, add_special_tokens=False).input_ids == pieces.encode(text) for text in TEXTS[:2])
    again = load_tokenizer(path)
    for text in TEXTS[:2]:
        assert again(text).input_ids == tokenizer(text).input_ids, text


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_an_unknown_type_is_refused_with_the_nearest(tmp_path: Path, tiny_tokenizer) -> None:
    with pytest.raises(UsageError, match=r"unknown GGUF type 'q8'; did you mean 'q8_0'\?.*There are: f32, f16"):
        save(make_model("llama"), tmp_path / "x.gguf", tiny_tokenizer, "q8")


def test_another_family_is_refused_with_the_known_ones(tmp_path: Path, tiny_tokenizer) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=64))
    with pytest.raises(UsageError, match=r"type 'gpt_neox' cannot be written as GGUF.*There are: llama, mistral"):
        save(model, tmp_path / "x.gguf", tiny_tokenizer)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, r"llama: hidden_act='gelu' is not what llama\.cpp computes.*'silu'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type='yarn'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    kind: str, change: dict[str, Any], said: str, tmp_path: Path, tiny_tokenizer
) -> None:
    model = make_model(kind)
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(UsageError, match=said):
        save(model, tmp_path / "x.gguf", tiny_tokenizer)


def test_a_model_with_an_adapter_is_refused(tmp_path: Path, tiny_tokenizer) -> None:
    model = make_model("llama")
    lora.add_adapter(model, lora.LoraConfig(r=2))
    with pytest.raises(UsageError, match=r"carries adapters.*Merge them.*save_lora_gguf"):
        save(model, tmp_path / "x.gguf", tiny_tokenizer)


def test_a_module_without_a_name_in_gguf_is_named(tmp_path: Path, tiny_tokenizer) -> None:
    model = make_model("llama")
    model.model.extra = torch.nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match=r"'model\.extra\.weight' has no name in GGUF"):
        save(model, tmp_path / "x.gguf", tiny_tokenizer)


@pytest.mark.parametrize(
    ("number", "type", "said"),
    [
        (float("nan"), "f32", "attn_q.weight: holds numbers from nan.*weights are broken"),
        (float("inf"), "q8_0", "to inf, which Q8_0 cannot hold. The weights are broken"),
        (1e5, "f16", "to 100000, which F16 cannot hold. Write it as f32"),
        (-1e5, "q4_0", "from -100000"),
    ],
)
def test_numbers_that_a_type_cannot_hold_leave_the_old_file(
    number: float, type: str, said: str, tmp_path: Path, tiny_tokenizer
) -> None:
    model, path = make_model("llama"), tmp_path / "x.gguf"
    path.write_bytes(b"old")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 4] = number
    with pytest.raises(FormatError, match=said):
        save(model, path, tiny_tokenizer, type)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]
    assert path.read_bytes() == b"old"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, tiny_tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"file/x\.gguf: could not be written"):
        save(make_model("llama"), tmp_path / "file" / "x.gguf", tiny_tokenizer)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, tiny_tokenizer, tiny_llama) -> None:
    with pytest.raises(CheckpointError, match=r"tokens up to id \d+, and the model an embedding of 300 rows"):
        save(tiny_llama(vocab_size=300), tmp_path / "x.gguf", tiny_tokenizer)


@pytest.mark.parametrize("cut", [None, pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Metaspace()])
def test_a_cut_without_a_name_is_refused(cut: Any, tmp_path: Path, tiny_tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"the tokenizer: cuts text .* no name for.*convert_hf_to_gguf"):
        save(make_model("llama"), tmp_path / "x.gguf", with_cut(tiny_tokenizer, cut))


def test_a_tokenizer_that_changes_text_is_refused(tmp_path: Path, tiny_tokenizer) -> None:
    from tokenizers import normalizers

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # as Qwen's
    save(make_model("llama"), tmp_path / "x.gguf", tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(CheckpointError, match="changes text before it is cut"):
        save(make_model("llama"), tmp_path / "x.gguf", tokenizer)


def test_words_and_slow_tokenizers_are_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(CheckpointError, match="is a WordLevel tokenizer, and only byte-pair encoding"):
        save(make_model("llama"), tmp_path / "x.gguf", PreTrainedTokenizerFast(tokenizer_object=words))

    class Slow:
        is_fast = False

    with pytest.raises(CheckpointError, match="no tokenizer of the `tokenizers` library"):
        save(make_model("llama"), tmp_path / "x.gguf", Slow())


def test_blocks_are_those_of_the_gguf_library(tmp_path: Path, tiny_tokenizer) -> None:
    model = make_model("qwen2")
    path = save(model, tmp_path / "tiny.gguf", tiny_tokenizer, "q4_1")
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    np.testing.assert_array_equal(stored.data, gguf.quantize(weight, Kind.Q4_1))
