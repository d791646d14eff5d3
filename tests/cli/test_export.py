"""`lilliput export`: what is written is the tuned model, is certified from its files, or is not written at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from lilliput import lora
from lilliput.cli.export_targets import TARGETS, TYPES
from lilliput.files import sha256_file
from lilliput.layers import quantized_layers
from lilliput.lora.adapters import adapter_tensors
from lilliput.models import gguf_write, load_model, load_tokenizer
from tests.cli.test_commands import QUICK, answer, refusal, run
from tests.conftest import make_tiny_llama

ROWS = [{"prompt": f"What is {n} + 1?", "completion": f"It is {n + 1}."} for n in range(30)]
SHORT = ["--context", 32, "--segments", 4]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `run` on the tiny model in nf4, whose adapter was moved far from nothing, and a text; read only."""
    folder = tmp_path_factory.mktemp("exports")
    rows = write_rows(folder / "my.jsonl", ROWS)
    answer("tune", tiny_model_dir, "--data", rows, "-o", folder / "run", *QUICK, "--set", "data.eval_fraction=0.2")
    model = load_model(tiny_model_dir, format="nf4", progress=False)
    passport = lora.load_adapter(model, folder / "run")
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in adapter_tensors(model, "default").values():
            tensor.add_(torch.randn_like(tensor), alpha=0.05)
    lora.save_adapter(model, folder / "run" / "adapter", passport=passport)
    (folder / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return folder


@pytest.fixture(scope="module")
def as_trained(folder: Path, tiny_model_dir: Path) -> Tensor:
    model = load_model(tiny_model_dir, format="nf4", progress=False)
    lora.load_adapter(model, folder / "run")
    return logits(model)


@torch.no_grad()
def logits(model) -> Tensor:
    return model(input_ids=torch.arange(3, 60)[None]).logits


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---- what it does ------------------------------------------------------------------------------------------------


def test_a_directory_is_the_tuned_model_with_its_certificate(folder, tiny_model_dir, as_trained, tmp_path) -> None:
    out = tmp_path / "deep" / "merged"
    made = answer("export", tiny_model_dir, "--adapter", folder / "run", "--format", "hf", "-o", out)
    assert made["passed"] is True
    assert made["kl"] < 1e-8
    assert made["same_greedy"] == 1
    assert (made["base_format"], made["options"], made["same_tokens"]) == ("nf4", {"dtype": "float32"}, True)
    model = load_model(out, progress=False)
    assert not list(quantized_layers(model))
    torch.testing.assert_close(logits(model), as_trained, rtol=1e-4, atol=1e-4)
    certificate = json.loads((out / "certificate.json").read_text())
    for name, file in certificate["files"].items():
        assert file == {"bytes": (out / name).stat().st_size, "sha256": sha256_file(out / name)}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= certificate["files"].keys()
    assert certificate["bytes"] == sum(file["bytes"] for file in certificate["files"].values())
    assert {key: made[key] for key in certificate} == certificate
    assert load_tokenizer(out)("a b").input_ids == load_tokenizer(tiny_model_dir)("a b").input_ids
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    assert answer("chat", out, "--prompt", "Hi", "--max-new-tokens", 3)["tokens"] == 3


def test_it_is_compared_on_the_rows_that_the_run_held_out(folder, tiny_model_dir, tmp_path) -> None:
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "--format", "hf")
    by_itself = answer(*words, "-o", tmp_path / "one")
    assert by_itself["passages"] == 6
    assert "held out" in by_itself["text"]["source"]
    named = answer(*words, "--data", folder / "my.jsonl", "-o", tmp_path / "two")
    assert {key: named[key] for key in ("passages", "tokens", "reference_perplexity")} == {
        key: by_itself[key] for key in ("passages", "tokens", "reference_perplexity")
    }
    read = answer(*words, "--text", folder / "book.txt", *SHORT, "-o", tmp_path / "three")
    assert (read["passages"], read["tokens"]) == (4, 4 * 31)
    assert read["text"] == {"source": str(folder / "book.txt"), "sha256": sha256_file(folder / "book.txt")}
    scored = answer("eval", "perplexity", tiny_model_dir, "--adapter", folder / "run", "--text", folder / "book.txt",
                    "--context", 32, "--segments", 4)  # fmt: skip
    assert read["reference_perplexity"] == pytest.approx(scored["perplexity"], rel=1e-5)


def test_half_the_bytes_in_bfloat16(folder, tiny_model_dir, tmp_path) -> None:
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "--format", "hf", "--text", folder / "book.txt")
    made = answer(*words, *SHORT, "--dtype", "bfloat16", "-o", tmp_path / "half")
    assert 1e-9 < made["kl"] < 0.01
    assert made["perplexity"] != made["reference_perplexity"]
    whole = answer(*words, *SHORT, "-o", tmp_path / "whole")
    sizes = [one["files"]["model.safetensors"]["bytes"] for one in (made, whole)]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.02)


def test_the_checkpoints_own_numbers_are_another_base(folder, tiny_model_dir, tmp_path) -> None:
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "--format", "hf", "--max-kl", "inf")
    trained, original = (
        answer(*words, "--onto", onto, "-o", tmp_path / onto) for onto in ("trained", "original")
    )  # fmt: skip
    assert (original["onto"], original["base_format"]) == ("original", "nf4")
    assert original["kl"] > 1000 * trained["kl"]
    found, plain = load_model(tmp_path / "original", progress=False), load_model(tiny_model_dir, progress=False)
    name = "model.layers.0.self_attn.q_proj"
    lora.load_adapter(plain, folder / "run")
    update = lora.target_layers(plain)[name].update_of("default")
    weight = plain.get_submodule(name).base_layer.weight
    torch.testing.assert_close(found.get_submodule(name).weight, weight + update)


def test_a_model_without_an_adapter_is_exported_as_it_is(folder, tiny_model_dir, tmp_path) -> None:
    made = answer("export", tiny_model_dir, "--format", "hf", "--text", folder / "book.txt", *SHORT,
                  "-o", tmp_path / "same")  # fmt: skip
    assert (made["kl"], made["logit_difference"], made["adapter"]) == (0, 0, None)
    assert torch.equal(logits(load_model(tmp_path / "same", progress=False)), logits(make_tiny_llama()))


def test_people_read_a_table(folder, tiny_model_dir, tmp_path) -> None:
    done = run("export", tiny_model_dir, "--adapter", folder / "run", "--format", "hf", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    for said in ("KL divergence", "the same at 100.00%", "as trained", "nf4", str(tmp_path / "out"), "certificate"):
        assert said in done.stdout


def test_an_adapter_without_a_passport_is_told_its_base(folder, tiny_model_dir, as_trained, tmp_path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder / "run" / "adapter", bare)
    from safetensors.torch import load_file, save_file

    save_file(load_file(bare / "adapter_model.safetensors"), bare / "adapter_model.safetensors", {"format": "pt"})
    words = ("export", tiny_model_dir, "--adapter", bare, "--format", "hf", "--text", folder / "book.txt", *SHORT)
    made = answer(*words, "--base-format", "nf4", "-o", tmp_path / "out")
    assert made["base_format"] == "nf4"
    torch.testing.assert_close(logits(load_model(tmp_path / "out", progress=False)), as_trained, rtol=1e-4, atol=1e-4)
    assert answer(*words, "-o", tmp_path / "other")["base_format"] == "none"


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_too_far_from_the_tuned_model_is_refused_and_the_better_is_named(folder, tiny_model_dir, tmp_path) -> None:
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "--format", "nf4", "-o", tmp_path / "out")
    done = run(*words, "--max-kl", 1e-6, "--json")
    assert done.exit_code == 1
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["passed"] is False
    assert said["path"] is None
    assert said["kl"] > 1e-6 > said["merged_kl"]
    fault = done.stderr.splitlines()[-1]
    assert fault.startswith("error: refused, nothing was written: the mean KL is ")
    for better in ("--format gptq", "--type q8_0", f"--format hf (KL {said['merged_kl']:.2g})", "keep the adapter"):
        assert better in fault
    assert "nothing was written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_leaves_the_export_that_was_there(folder, tiny_model_dir, tmp_path) -> None:
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "-o", tmp_path / "out")
    answer(*words, "--format", "hf")
    before = tree(tmp_path)
    done = run(*words, "--format", "hf", "--dtype", "float16", "--max-kl", 0, "--overwrite")
    assert done.exit_code == 1
    assert "--format hf (exact)" in done.stderr
    assert tree(tmp_path) == before


def test_nf4_is_certified_from_its_codes(folder, tiny_model_dir, tmp_path) -> None:
    made = answer("export", tiny_model_dir, "--adapter", folder / "run", "--format", "nf4", "--max-kl", 1,
                  "-o", tmp_path / "out")  # fmt: skip
    assert made["kl"] > 1e-6
    assert {layer.format_name for _, layer in quantized_layers(load_model(tmp_path / "out", progress=False))} == {"nf4"}


def test_an_export_is_replaced_and_what_was_put_beside_it_stays(folder, tiny_model_dir, tmp_path) -> None:
    out, words = tmp_path / "out", ("export", tiny_model_dir, "--adapter", folder / "run", "-o", tmp_path / "out")
    answer(*words, "--format", "hf")
    (out / "notes.txt").write_text("mine")
    line = refusal(*words, "--format", "hf", status=2)
    assert "holds an export" in line
    answer(*words, "--format", "nf4", "--max-kl", 1, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["format"] == "nf4"
    assert "notes.txt" not in certificate["files"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_places_that_are_not_ours_are_left_alone(folder, tiny_model_dir, tmp_path) -> None:
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "--overwrite")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    assert "no export of ours" in refusal(*words, "--format", "hf", "-o", tmp_path / "taken", status=2)
    assert "is a file" in refusal(*words, "--format", "hf", "-o", tmp_path / "taken" / "thesis.txt", status=2)
    assert "ends in .gguf" in refusal(*words, "--format", "gguf", "-o", tmp_path / "model.bin", status=2)
    (tmp_path / "dir.gguf").mkdir()
    assert "is a directory" in refusal(*words, "--format", "gguf", "-o", tmp_path / "dir.gguf", status=2)
    (tmp_path / "there.gguf").write_text("")
    assert "is there already" in refusal(*words[:-1], "--format", "gguf", "-o", tmp_path / "there.gguf", status=2)
    (tmp_path / "there.gguf").unlink()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_what_stops_it_loses_nothing(fault, folder, tiny_model_dir, tmp_path, monkeypatch) -> None:
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "--format", "hf", "-o", tmp_path / "out")
    answer(*words)
    before = tree(tmp_path)

    def stop(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("lilliput.models.save.write_tensors", stop)
    line = refusal(*words, "--overwrite")
    assert "stopped" in line or "No space left" in line
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_broken_export_is_refused(folder, tiny_model_dir, tmp_path, monkeypatch) -> None:
    """A writer that loses numbers: the certificate is taken from the files, so that it sees it."""
    from lilliput.lora import merging

    kept = merging.merged_tensors

    def losing(model, dtype):
        tensors = kept(model, dtype)
        name = "model.layers.0.mlp.down_proj.weight"
        lost = merging.MergedTensor(dtype, tensors[name].shape, lambda: torch.zeros(tensors[name].shape), (0,))
        return {**tensors, name: lost}

    monkeypatch.setattr("lilliput.lora.merged_tensors", losing)
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "--format", "hf", "-o", tmp_path / "out")
    done = run(*words, "--max-kl", 1e-6)
    assert done.exit_code == 1
    assert "refused" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "hf", "--type", "q8_0"], "--type belongs to --format gguf, not to hf"),
        (["--format", "gguf", "--dtype", "float16"], "--dtype belongs to --format hf, not to gguf"),
        (["--format", "nf4", "--bits", "4"], "--bits belongs to --format gptq, not to nf4"),
        (["--format", "hf", "--adapter-only"], "--adapter-only belongs to --format gguf"),
        (["--format", "bnb", "--calibration", "a.txt"], "--calibration belongs to --format gptq"),
        (["--format", "gguf", "--type", "q9_0"], "did you mean"),
        (["--format", "hf", "--dtype", "float64"], "did you mean"),
        (["--format", "onnx"], "unknown value 'onnx'"),
        (["--format", "gptq"], "--calibration FILE"),
        (["--format", "gptq", "--bits", "5", "--calibration", __file__], "5 bits"),
        (["--format", "hf", "--samples", "5"], "--samples belongs to --format gptq"),
        (["--format", "hf", "--onto", "orignal"], "did you mean 'original'"),
        (["--format", "hf", "--base-format", "nf5"], "did you mean 'nf4'"),
        (["--format", "hf", "--max-kl", "nan"], "nan is not a number from 0 up"),
        (["--format", "hf", "--max-kl", "-1"], "-1.0 is not a number from 0 up"),
        (["--format", "hf", "--text", "a.txt", "--data", "b.jsonl"], "--text and --data exclude each other"),
    ],
)
def test_impossible_options_are_wrong_use(options, said, folder, tiny_model_dir, tmp_path) -> None:
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "-o", tmp_path / "out", *options)
    assert said in refusal(*words, status=2)
    assert list(tmp_path.iterdir()) == []


def test_what_needs_an_adapter_says_so(tiny_model_dir, tmp_path) -> None:
    words = ("export", tiny_model_dir, "-o", tmp_path / "out.gguf")
    assert "--adapter-only is about an adapter" in refusal(*words, "--format", "gguf", "--adapter-only", status=2)
    assert "--onto original is about" in refusal(*words, "--format", "hf", "--onto", "original", status=2)
    assert "--base-format is about" in refusal(*words, "--format", "hf", "--base-format", "nf4", status=2)
    assert "Give --text FILE (plain text) or --data FILE" in refusal(*words, "--format", "hf")


def test_missing_and_unfit_files_are_named_before_the_model_is_loaded(
    folder, tiny_model_dir, tmp_path, monkeypatch
) -> None:
    from lilliput import models

    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded first"))
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "--format", "hf", "-o", tmp_path / "out")
    assert "nothing.txt: no such file" in refusal(*words, "--text", tmp_path / "nothing.txt")
    assert "nothing.jsonl" in refusal(*words, "--data", tmp_path / "nothing.jsonl")
    gptq = (*words[:4], "--format", "gptq", "-o", tmp_path / "out")
    assert "no-text.txt: no such file" in refusal(*gptq, "--calibration", tmp_path / "no-text.txt")
    none = ("export", tiny_model_dir, "--adapter", tmp_path / "none", "--format", "hf", "-o", tmp_path / "out")
    assert "no such directory" in refusal(*none)
    classifier = tmp_path / "classifier"
    shutil.copytree(folder / "run", classifier)
    (classifier / "adapter" / "classifier.json").write_text("{}")
    line = refusal("export", tiny_model_dir, "--adapter", classifier, "--format", "hf", "-o", tmp_path / "o", status=2)
    assert "is a classifier's" in line


def test_another_base_is_refused_unless_allowed(folder, tiny_tokenizer, tmp_path) -> None:
    other = tmp_path / "other"
    make_tiny_llama(seed=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    words = ("export", other, "--adapter", folder / "run", "--format", "hf", "-o", tmp_path / "out")
    assert "--allow-other-base" in refusal(*words)
    assert not (tmp_path / "out").exists()
    assert answer(*words, "--allow-other-base")["passed"]


def test_original_numbers_are_not_to_be_had_of_a_quantized_directory(folder, tiny_model_dir, tmp_path) -> None:
    small = tmp_path / "small"
    answer("quantize", tiny_model_dir, "--format", "nf4", "-o", small)
    words = ("export", small, "--adapter", folder / "run", "--format", "hf", "-o", tmp_path / "out")
    assert "holds rounded ones" in refusal(*words, "--onto", "original", status=2)
    assert answer(*words)["kl"] < 1e-8


# ---- the formats of others ---------------------------------------------------------------------------------------


def test_every_format_says_how_many_bits_a_weight_takes() -> None:
    for target in TARGETS.values():
        assert 2 <= target.bits(target.options) <= 32
    assert TYPES.keys() == gguf_write.TYPES.keys()


@pytest.mark.parametrize(("type", "largest"), [("f32", 1e-9), ("q8_0", 1e-4), ("q4_0", 0.01)])
def test_gguf_is_certified_from_the_file(type, largest, folder, tiny_model_dir, as_trained, tmp_path) -> None:
    out = tmp_path / "mine.gguf"
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "--format", "gguf", "-o", out)
    made = answer(*words, *([] if type == "q8_0" else ["--type", type]))
    assert made["options"] == {"type": type, "adapter_only": False}
    assert made["kl"] < largest
    assert made["same_tokens"] is True
    certificate = json.loads((tmp_path / "mine.certificate.json").read_text())
    assert certificate["files"] == {"mine.gguf": {"bytes": out.stat().st_size, "sha256": sha256_file(out)}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.certificate.json", "mine.gguf"]
    found = load_model(out, progress=False)
    torch.testing.assert_close(logits(found), as_trained, rtol=0, atol=0.2 if type == "q4_0" else 0.02)


def test_a_gguf_file_is_replaced_only_by_one_that_passes(folder, tiny_model_dir, tmp_path) -> None:
    out = tmp_path / "mine.gguf"
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "--format", "gguf", "-o", out, "--overwrite")
    answer(*words, "--type", "f32")
    before = tree(tmp_path)
    done = run(*words, "--type", "q4_0", "--max-kl", 1e-7)
    assert done.exit_code == 1
    assert "--format gguf --type q8_0 (8.5 bits a weight)" in done.stderr.splitlines()[-1]
    assert tree(tmp_path) == before
    answer(*words, "--type", "q8_0")
    assert tree(tmp_path) != before


def test_the_adapter_alone_as_gguf(folder, tiny_model_dir, tmp_path) -> None:
    out = tmp_path / "adapter.gguf"
    made = answer("export", tiny_model_dir, "--adapter", folder / "run", "--format", "gguf", "--adapter-only",
                  "-o", out)  # fmt: skip
    assert made["bytes"] == out.stat().st_size
    tensors = {tensor.name for tensor in GGUFReader(out).tensors}
    assert {"blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"} <= tensors
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.gguf"]  # nothing was merged, nothing certified


def test_bitsandbytes_files_are_certified_too(folder, tiny_model_dir, tmp_path) -> None:
    made = answer("export", tiny_model_dir, "--adapter", folder / "run", "--format", "bnb", "--max-kl", 1,
                  "-o", tmp_path / "out")  # fmt: skip
    ours = answer("export", tiny_model_dir, "--adapter", folder / "run", "--format", "nf4", "--max-kl", 1,
                  "-o", tmp_path / "ours")  # fmt: skip
    assert made["kl"] == pytest.approx(ours["kl"], rel=1e-3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"


def test_gptq_fits_the_merged_model_to_a_text(folder, tiny_model_dir, tmp_path) -> None:
    words = ("export", tiny_model_dir, "--adapter", folder / "run", "--format", "gptq", "--max-kl", 1, "--group", 32)
    text = ("--calibration", folder / "book.txt", "--samples", 4, "--length", 64)
    fine, coarse = (
        answer(*words, *text, "--bits", bits, "-o", tmp_path / str(bits)) for bits in (8, 3)
    )  # fmt: skip
    assert fine["kl"] < 1e-4 < coarse["kl"]
    assert coarse["options"] == {
        "bits": 3, "group": 32, "calibration": str(folder / "book.txt"), "samples": 4, "length": 64
    }  # fmt: skip
    config = json.loads((tmp_path / "3" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 3, 32)
