"""GGUF files give the model that they were made of, and a broken one gives an error that names it."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from lilliput.errors import CheckpointError
from lilliput.models import load_model, load_tokenizer
from lilliput.models.gguf import hash_gguf, open_gguf
from tests.models.conftest import make_model
from tests.models.gguf_files import arbitrary_blocks, write_gguf

IDS = torch.arange(3, 99).reshape(2, 48)


def _readable_kinds() -> list[Kind]:
    kinds = []
    for kind in Kind:
        if kind in gguf.GGML_QUANT_SIZES:
            try:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
                kinds.append(kind)
            except (NotImplementedError, ValueError, TypeError):
                continue
    return [kind for kind in kinds if kind not in (Kind.F32, Kind.F16, Kind.BF16)]


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "qwen3", "phi3", "gpt2"])
def test_a_gguf_gives_the_logits_of_the_model_it_was_made_of(kind, cache, tmp_path, tiny_tokenizer):
    model = make_model(kind)
    path = write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer)
    loaded = load_model(path, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    assert loaded.get_memory_footprint() == model.get_memory_footprint()


@pytest.mark.parametrize("kind", _readable_kinds(), ids=lambda kind: kind.name)
def test_every_tensor_type_the_library_dequantizes_is_read_as_it_reads_it(kind, tmp_path):
    blocks = arbitrary_blocks((40, 512), kind)
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    writer.add_tensor("other.weight", np.ones((3, 5), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "a.gguf")
    expected = gguf.GGUFReader(str(tmp_path / "a.gguf")).tensors[0]
    read = file.read("blk.0.ffn_up.weight")
    assert read.shape == (40, 512)
    np.testing.assert_array_equal(read.numpy(), gguf.dequantize(expected.data, expected.tensor_type))
    assert torch.equal(file.read("other.weight"), torch.ones(3, 5))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name)
def test_a_quantized_llama_has_the_weights_that_transformers_reads(kind, cache, tmp_path, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer, kind)
    ours = load_model(tmp_path / "tiny.gguf", progress=False).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_tokenizer_and_template_come_from_the_file_and_are_converted_once(cache, tmp_path, tiny_tokenizer, capfd):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer)
    tokenizer = load_tokenizer(path)
    turns = [{"role": "user", "content": "What is the capital?"}]
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert tokenizer.apply_chat_template(turns)["input_ids"] == tiny_tokenizer.apply_chat_template(turns)["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        tiny_tokenizer.eos_token_id,
        tiny_tokenizer.pad_token_id,
    )
    assert tokenizer("The river").input_ids == tiny_tokenizer("The river").input_ids
    assert "Converting the tokenizer of tiny.gguf (once)" in capfd.readouterr().err
    moved = path.rename(tmp_path / "moved.gguf")
    load_tokenizer(moved)
    assert capfd.readouterr().err == ""
    load_model(path := moved, progress=False)
    assert "Converting the configuration" in capfd.readouterr().err
    assert load_model(path, progress=False).generation_config.eos_token_id == tiny_tokenizer.eos_token_id


def test_numbers_are_cut_digit_by_digit_where_the_metadata_say_so(cache, tmp_path, tiny_tokenizer):
    model = make_model("llama")
    path = write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer)
    raw = path.read_bytes()
    changed = tmp_path / "smollm.gguf"
    old, new = struct.pack("<Q", 5) + b"gpt-2", struct.pack("<Q", 6) + b"smollm"
    assert raw.count(old) == 1
    # one byte more in the metadata: the data still begin at a multiple of 32 only by luck, so only the header is used
    changed.write_bytes(raw.replace(old, new) + bytes(64))
    pieces = load_tokenizer(changed).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2"]


@pytest.mark.parametrize("wanted", [True, False])
def test_one_bos_or_none_as_the_metadata_say(wanted, cache, tmp_path, tiny_tokenizer):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer, add_bos=wanted)
    tokenizer = load_tokenizer(path)
    plain = tiny_tokenizer("The river").input_ids
    assert tokenizer("The river").input_ids == ([tokenizer.bos_token_id] if wanted else []) + plain
    assert tokenizer("The river", add_special_tokens=False).input_ids == plain


def test_a_gguf_without_a_tokenizer_is_still_a_model(cache, tmp_path, tiny_tokenizer):
    model = make_model("llama")
    path = write_gguf(tmp_path / "tiny.gguf", model, None)
    with torch.no_grad():
        assert torch.equal(load_model(path, progress=False)(IDS).logits, model(IDS).logits)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(path)


def test_a_part_of_a_split_gguf_is_refused(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        open_gguf(tmp_path / "x.gguf")


def test_smollm2_cuts_text_as_its_own_tokenizer_does(smollm2):
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12").input_ids) == ["a", "ĠĠ", "1", "2"]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 8192)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])["input_ids"]
    assert ids[:2] == tokenizer("<|im_start|>system").input_ids
    assert ids.count(tokenizer.bos_token_id) == 2


@pytest.fixture
def whole(tmp_path, tiny_tokenizer) -> Path:
    return write_gguf(tmp_path / "whole.gguf", make_model("llama"), tiny_tokenizer)


@pytest.mark.parametrize("part", [0.001, 0.01, 0.1, 0.5, 0.9, 0.9999])
def test_a_gguf_cut_short_anywhere_names_the_file_and_what_was_expected(part, whole, tmp_path):
    raw = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(raw[: int(len(raw) * part)])
    with pytest.raises(CheckpointError, match=r"cut\.gguf: .*cut short.*(needs|ends at byte) \d+"):
        load_model(cut, progress=False)


def test_garbage_is_no_gguf(tmp_path):
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(bytes(range(256)) * 64)
    with pytest.raises(CheckpointError, match=r"garbage\.gguf: not a GGUF file: it begins with .* expected b'GGUF'"):
        open_gguf(garbage)


def test_counts_from_garbage_are_refused_before_anything_is_read(tmp_path):
    path = tmp_path / "counts.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    with pytest.raises(CheckpointError, match="claims"):
        open_gguf(path)


@pytest.mark.parametrize("seed", range(40))
def test_flipped_header_bytes_give_an_error_of_ours_or_a_file_that_reads(seed, whole, tmp_path):
    raw = bytearray(whole.read_bytes())
    rng = np.random.default_rng(seed)
    for place in rng.integers(4, 3000, size=4):
        raw[place] = rng.integers(0, 256)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(raw)
    try:
        file = open_gguf(broken)
    except CheckpointError as error:
        file, said = None, str(error)
    if file is None:
        assert "broken.gguf" in said
    else:
        assert all(file.read(name).shape == tensor.shape for name, tensor in file.tensors.items())


def test_another_version_and_byte_order_are_told_apart(tmp_path):
    for version, words in ((1, "version 1"), (3 << 24, "big endian")):
        path = tmp_path / f"{version}.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
        with pytest.raises(CheckpointError, match=words):
            open_gguf(path)


def test_an_architecture_without_a_row_is_refused_with_the_known_ones(cache, tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "bloom")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"architecture 'bloom' is not supported.*Supported: llama"):
        load_model(tmp_path / "x.gguf", progress=False)


def test_heads_that_do_not_fit_the_tensors_are_named(cache, tmp_path, tiny_tokenizer):
    raw = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer).read_bytes()
    key = b"llama.attention.head_count" + struct.pack("<I", 4)  # a uint32
    assert raw.count(key + struct.pack("<I", 4)) == 1
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(raw.replace(key + struct.pack("<I", 4), key + struct.pack("<I", 258)))
    with pytest.raises(CheckpointError, match=r"odd\.gguf: .*(heads|configuration)"):
        load_model(odd, progress=False)


def test_a_count_of_parts_that_is_no_number_is_refused(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_string("split.count", "three")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="one of three parts"):
        open_gguf(tmp_path / "x.gguf")


def test_scaled_rotary_positions_are_refused_not_dropped(cache, tmp_path, tiny_tokenizer):
    extra = {"llama.rope.scaling.type": "yarn"}
    path = write_gguf(tmp_path / "yarn.gguf", make_model("llama"), tiny_tokenizer, **extra)
    with pytest.raises(CheckpointError, match=r"rotary positions \(yarn\)"):
        load_model(path, progress=False)


def llama3(factor: float):
    """A model whose rotary frequencies reach into all three ranges of Llama 3's scaling."""
    model = make_model("llama")
    config = model.config
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = type(model)(config).eval()
    scaled.load_state_dict(model.state_dict())
    return scaled


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_rotary_factors_are_taken_over(factor, cache, tmp_path, tiny_tokenizer):
    model = llama3(factor)
    plain = model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, 16, 2) / 16)
    factors = plain / model.model.rotary_emb.inv_freq  # transformers' own scaling is the oracle
    path = write_gguf(tmp_path / "llama3.gguf", model, tiny_tokenizer, rope_factors=factors.numpy())
    loaded = load_model(path, progress=False)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_rotary_factors_of_another_kind_are_refused(cache, tmp_path, tiny_tokenizer):
    path = write_gguf(tmp_path / "odd.gguf", make_model("llama"), tiny_tokenizer, rope_factors=np.arange(1, 9))
    with pytest.raises(CheckpointError, match=r"rotary positions \(factors of its own\)"):
        load_model(path, progress=False)


def test_hash_depends_on_the_numbers_and_not_on_the_path(tmp_path, tiny_tokenizer):
    one = write_gguf(tmp_path / "one.gguf", make_model("llama"), tiny_tokenizer)
    two = write_gguf(tmp_path / "two.gguf", make_model("llama"), tiny_tokenizer)
    other = write_gguf(tmp_path / "other.gguf", make_model("llama", seed=1), tiny_tokenizer)
    assert hash_gguf(one) == hash_gguf(two) != hash_gguf(other)


def test_a_conversion_that_fails_leaves_nothing_behind(cache, tmp_path, tiny_tokenizer, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer)

    def fail(*args, **kwargs):
        raise ValueError("no such luck")

    monkeypatch.setattr("lilliput.models.tokenizer.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(CheckpointError, match="no such luck"):
        load_tokenizer(path)
    assert list((cache / "converted").iterdir()) == []
