"""Each command on a tiny model: what it prints, its JSON, and each bad input as one line with the right status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lilliput
from lilliput.cli.main import app

ROWS = [{"prompt": f"What is {n} + 1?", "completion": f"It is {n + 1}."} for n in range(12)]
QUICK = ["--set", "train.max_steps=2", "--set", "train.batch_size=2", "--set", "data.max_length=64", "--no-check"]


def run(*words: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def answer(*words: object) -> dict:
    """The JSON of a command that is to succeed."""
    done = run(*words, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def refusal(*words: object, status: int = 1) -> str:
    """The one line on standard error of a command that is to fail; the same is said as JSON."""
    done = run(*words, "--json")
    assert done.exit_code == status, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0] == done.stderr.splitlines()[-1]
    assert "Traceback" not in done.output
    assert json.loads(done.stdout.splitlines()[-1])["error"] == lines[0].removeprefix("error: ")
    return lines[0]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def tuned(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tiny model; do not write into it."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    result = answer("tune", tiny_model_dir, "--data", folder / "my.jsonl", "-o", folder / "run", *QUICK)
    assert result["steps"] == 2
    return folder / "run"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return path


# ---- what they do ------------------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert run("--version").stdout == f"lilliput {lilliput.__version__}\n"
    listed = run().stdout
    for name in ("demo", "pull", "tune", "check", "chat", "quantize", "export", "inspect", "doctor", "eval"):
        assert name in listed
        helped = run(name, "--help") if name != "eval" else run("eval", "perplexity", "--help")
        assert helped.exit_code == 0
        assert "Example:  lilliput" in helped.stdout
        assert "--json" in helped.stdout


def test_tune_writes_an_adapter_that_chat_and_eval_take(tuned: Path, tiny_model_dir: Path, text: Path) -> None:
    assert (tuned / "adapter" / "adapter_model.safetensors").is_file()
    spoken = answer("chat", tiny_model_dir, "--adapter", tuned, "--prompt", "What is 3 + 1?", "--max-new-tokens", 8)
    assert spoken["tokens"] == 8
    scored = answer("eval", "perplexity", tiny_model_dir, "--adapter", tuned, "--text", text, "--context", 64)
    assert (scored["format"], scored["adapter"]) == ("nf4", str(tuned))  # the format that it was trained over


def test_tune_without_json_says_where_the_adapter_is_and_what_to_try(rows, tiny_model_dir, tmp_path) -> None:
    done = run("tune", tiny_model_dir, "--data", rows, "-o", tmp_path / "run", *QUICK)
    assert done.exit_code == 0, done.stderr
    assert str(tmp_path / "run" / "adapter") in done.stdout
    assert "lilliput chat" in done.stdout


def test_format_wins_over_the_recipe(rows, tiny_model_dir, tmp_path) -> None:
    answer("tune", tiny_model_dir, "--data", rows, "-o", tmp_path / "run", *QUICK, "--format", "none")
    assert "format: none" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_check_lists_every_promise(rows, tiny_model_dir) -> None:
    found = answer("check", tiny_model_dir, "--data", rows, "--set", "data.max_length=64")
    assert found["passed"] is True
    assert all(check["passed"] for check in found["checks"])
    assert len(found["checks"]) >= 6
    shown = run("check", tiny_model_dir, "--data", rows, "--set", "data.max_length=64")
    assert shown.stdout.count("kept") >= 6
    assert "What is" in shown.stderr  # the coloured example


def test_a_broken_promise_is_status_one_with_its_table(rows, tiny_model_dir, monkeypatch) -> None:
    from lilliput import training
    from lilliput.training import CheckResult

    results = [CheckResult("one BOS", True, "one"), CheckResult("packing", False, "losses differ", "Set packing off.")]
    monkeypatch.setattr(training, "check_data", lambda *_, **__: results)
    done = run("check", tiny_model_dir, "--data", rows, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["checks"][1]["todo"] == "Set packing off."
    assert "BROKEN" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: 1 of 2 promises broken: packing"


def test_perplexity_has_the_promised_keys(tiny_model_dir, text) -> None:
    scored = answer("eval", "perplexity", tiny_model_dir, "--text", text, "--context", 64, "--segments", 3)
    assert {"perplexity", "tokens", "segments", "footprint_bytes", "seconds"} <= scored.keys()
    assert (scored["tokens"], scored["segments"]) == (189, 3)
    small = answer("eval", "perplexity", tiny_model_dir, "--text", text, "--context", 64, "--format", "nf4")
    assert small["footprint_bytes"] < scored["footprint_bytes"]
    assert "perplexity" in run("eval", "perplexity", tiny_model_dir, "--text", text, "--context", 64).stdout


@pytest.mark.parametrize(("options", "bits"), [([], 4.1), (["--no-double-quant"], 4.5), (["--format", "fp4"], 4.1)])
def test_quantize_writes_a_directory_that_loads_again(tiny_model_dir, text, tmp_path, options, bits) -> None:
    made = answer("quantize", tiny_model_dir, "-o", tmp_path / "small", *options)
    assert made["bits_per_quantized_parameter"] == pytest.approx(bits, abs=0.15)
    assert made["quantized_bytes"] < made["original_bytes"] == 4 * made["parameters"]
    direct = ["--format", made["format"]]
    ours = answer("eval", "perplexity", tmp_path / "small", "--text", text, "--context", 64)
    if made["double_quant"]:
        theirs = answer("eval", "perplexity", tiny_model_dir, "--text", text, "--context", 64, *direct)
        assert ours["perplexity"] == theirs["perplexity"]
        assert ours["footprint_bytes"] == theirs["footprint_bytes"] == made["quantized_bytes"]


@pytest.mark.parametrize("embeddings", [False, True])
def test_an_int8_directory_is_chatted_with_scored_and_tuned(
    embeddings: bool, rows, tiny_model_dir, text, tmp_path
) -> None:
    small, options = tmp_path / "int8", ["--embeddings"] if embeddings else []
    made = answer("quantize", tiny_model_dir, "--format", "int8", "--threshold", 5, *options, "-o", small)
    assert (made["double_quant"], made["threshold"], made["embeddings"]) == (False, 5.0, embeddings)
    assert made["bits_per_quantized_parameter"] == pytest.approx(8 + 32 / 64, abs=0.3)  # rows of 64 and 128
    held = json.loads((small / "config.json").read_text())["quantization_config"]
    assert (held["format"], held["threshold"], held["embeddings"]) == ("int8", 5.0, embeddings)
    scored = answer("eval", "perplexity", small, "--text", text, "--context", 64)
    assert scored["footprint_bytes"] == made["quantized_bytes"]
    assert answer("chat", small, "--prompt", "Hi", "--max-new-tokens", 3)["tokens"] == 3
    run = answer("tune", small, "--data", rows, "-o", tmp_path / "run", *QUICK, "--format", "int8")
    assert run["steps"] == 2
    again = answer("eval", "perplexity", small, "--adapter", tmp_path / "run", "--text", text, "--context", 64)
    assert again["format"] == "int8"


def test_int8_while_it_is_loaded(rows, tiny_model_dir, text, tmp_path) -> None:
    exact = answer("eval", "perplexity", tiny_model_dir, "--text", text, "--context", 64)
    small = answer("eval", "perplexity", tiny_model_dir, "--text", text, "--context", 64, "--format", "int8")
    assert small["perplexity"] == pytest.approx(exact["perplexity"], rel=0.01)
    assert small["footprint_bytes"] < exact["footprint_bytes"]
    out = tmp_path / "run"
    answer("tune", tiny_model_dir, "--data", rows, "-o", out, *QUICK, "--format", "int8", "--set", "model.threshold=4")
    assert "threshold: 4" in (out / "recipe.yaml").read_text()
    scored = answer("eval", "perplexity", tiny_model_dir, "--adapter", out, "--text", text, "--context", 64)
    assert scored["format"] == "int8"  # the passport's


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "int8", "--double-quant"], "int8 has no double_quant"),
        (["--threshold", "6"], "nf4 has no threshold"),
        (["--embeddings"], "nf4 has no embeddings"),
        (["--format", "int8", "--threshold", "-1"], "threshold=-1"),
        (["--format", "none", "--embeddings"], "not to be quantized"),
    ],
)
def test_options_that_a_format_has_not_are_wrong_use(options, said, tiny_model_dir, tmp_path) -> None:
    assert said in refusal("quantize", tiny_model_dir, "-o", tmp_path / "out", *options, status=2)
    assert not (tmp_path / "out").exists()


def test_quantize_to_none_only_converts(tiny_model_dir, text, tmp_path) -> None:
    made = answer("quantize", tiny_model_dir, "--format", "none", "-o", tmp_path / "same")
    assert made["quantized_parameters"] == 0
    scores = [
        answer("eval", "perplexity", path, "--text", text, "--context", 64) for path in (tiny_model_dir, made["path"])
    ]
    assert scores[0]["perplexity"] == scores[1]["perplexity"]
    assert "own numbers" in run("quantize", tiny_model_dir, "--format", "none", "-o", tmp_path / "again").stdout


def test_chat_prompt_prints_only_the_answer(tiny_model_dir) -> None:
    words = ("chat", tiny_model_dir, "--prompt", "Hello", "--max-new-tokens", 10)
    plain, spoken = run(*words), answer(*words)
    assert plain.stdout == spoken["answer"] + "\n"
    drawn = (*words, "--temperature", 1.5, "--top-p", 0.9, "--top-k", 50, "--min-p", 0.01, "--repetition-penalty", 1.1)
    assert answer(*drawn, "--seed", 1)["answer"] == answer(*drawn, "--seed", 1)["answer"] != spoken["answer"]


def test_chat_is_a_talk_with_commands(tiny_model_dir) -> None:
    lines = "Hello\n\n  \nAnd now?\n/unknown\n/system Be brief.\nHello\n/reset\nAgain\n/exit\nnever read\n"
    done = run("chat", tiny_model_dir, "--max-new-tokens", 5, "--json", stdin=lines)
    assert done.exit_code == 0, done.stderr
    talk = json.loads(done.stdout.splitlines()[-1])["turns"]
    assert [turn["content"] for turn in talk[::2]] == ["Again"]
    assert "/unknown is no command" in done.stderr
    assert (
        run("chat", tiny_model_dir, "--max-new-tokens", 5, stdin="Hello\n").exit_code == 0
    )  # the end of the input ends it


def test_pull_says_where_the_model_is(smollm2: str) -> None:
    pulled = answer("pull", smollm2)
    assert Path(pulled["path"]).stat().st_size == pulled["bytes"]


def test_doctor_examines_the_machine() -> None:
    found = answer("doctor")
    assert found["usable"] is True
    assert {"python", "compiled core", "cpu", "memory", "disk", "openmp", "models"} <= found.keys()
    assert found["compiled core"]["state"] in ("ok", "note")


def test_doctor_says_what_makes_lilliput_impossible(monkeypatch, tmp_path) -> None:
    from lilliput.cli import doctor

    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "no-such-package-at-all", "extra; extra == 'test'"])
    monkeypatch.setattr(doctor, "version", lambda name: _versions(name))
    done = run("doctor", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["usable"] is False
    assert "pip install" in found["torch"]["todo"]
    assert found["no-such-package-at-all"]["value"] == "not installed"
    assert "extra" not in found
    assert done.stderr.splitlines()[-1] == "error: lilliput cannot work here: torch, no-such-package-at-all"


def _versions(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    if name == "no-such-package-at-all":
        raise PackageNotFoundError(name)
    return "2.0"


def test_doctor_warns_of_two_openmp_runtimes(monkeypatch) -> None:
    from lilliput.cli import doctor

    lines = ["7f00-7f01 r-xp 0 00:00 1 /a/libgomp.so.1\n", "7f02-7f03 r-xp 0 00:00 2 /b/libiomp5.so\n"]
    monkeypatch.setattr(doctor, "_mapped", lambda: lines)
    found = answer("doctor")["openmp"]
    assert found["state"] == "note"
    assert "/a/libgomp.so.1, /b/libiomp5.so" in found["value"]


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_missing_files_are_named(tiny_model_dir, rows, tmp_path) -> None:
    out = tmp_path / "run"
    assert "nothing.jsonl" in refusal("tune", tiny_model_dir, "--data", tmp_path / "nothing.jsonl", "-o", out)
    assert not out.exists()
    assert "nothing.jsonl" in refusal("check", tiny_model_dir, "--data", tmp_path / "nothing.jsonl")
    assert "nothing.txt" in refusal("eval", "perplexity", tiny_model_dir, "--text", tmp_path / "nothing.txt")
    assert "no-model" in refusal("tune", tmp_path / "no-model", "--data", rows, "-o", out)
    assert "no-adapter" in refusal("chat", tiny_model_dir, "--adapter", tmp_path / "no-adapter", "--prompt", "Hi")


def test_empty_files_are_named(tiny_model_dir, tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.txt").write_text("")
    line = refusal("tune", tiny_model_dir, "--data", tmp_path / "empty.jsonl", "-o", tmp_path / "run", *QUICK)
    assert "empty.jsonl" in line
    assert "empty.txt: the file is empty" in refusal(
        "eval", "perplexity", tiny_model_dir, "--text", tmp_path / "empty.txt"
    )


def test_broken_json_says_the_line_and_can_be_skipped(tiny_model_dir, rows, tmp_path) -> None:
    lines = rows.read_text().splitlines()
    lines[4] = '{"prompt": "What?", "completion": '
    rows.write_text("\n".join(lines))
    words = ("tune", tiny_model_dir, "--data", rows, "-o", tmp_path / "run", *QUICK)
    line = refusal(*words)
    assert "my.jsonl:5" in line
    assert "--skip-bad-rows" in line
    answer(*words[:-1], "--no-check", "--skip-bad-rows", "--overwrite")
    assert "my.jsonl:5" in (tmp_path / "run" / "skipped_rows.jsonl").read_text()


def test_unknown_recipe_names_and_keys_are_wrong_use(tiny_model_dir, rows, tmp_path) -> None:
    words = ("tune", tiny_model_dir, "--data", rows, "-o", tmp_path / "run")
    assert "lora.r" in refusal(*words, "--set", "lora.rr=16", status=2)
    assert "train.learning_rate" in refusal(*words, "--set", "train.lr=1e-4", status=2)
    assert "guanaco" in refusal(*words, "--recipe", "guanako", status=2)
    assert "nf4" in refusal(*words, "--format", "nf5", status=2)
    (tmp_path / "my.yaml").write_text("train:\n  epoch: 3\n")
    assert "train.epochs" in refusal(*words, "--recipe", tmp_path / "my.yaml", status=2)
    assert not (tmp_path / "run").exists()


def test_a_target_that_matches_nothing_says_which_there_are(tiny_model_dir, rows, tmp_path) -> None:
    words = ("tune", tiny_model_dir, "--data", rows, "-o", tmp_path / "run", *QUICK)
    line = refusal(*words, "--set", "lora.target_modules=[query]", status=2)
    assert "query" in line
    assert "q_proj" in line


def test_an_adapter_for_another_base_is_refused_unless_allowed(tuned, tiny_llama, tiny_tokenizer, tmp_path) -> None:
    other = tmp_path / "other"
    tiny_llama(seed=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    words = ("chat", other, "--adapter", tuned, "--prompt", "Hi", "--max-new-tokens", 3)
    line = refusal(*words)
    assert "--allow-other-base" in line
    assert str(other) in line
    done = run(*words, "--allow-other-base")
    assert done.exit_code == 0
    assert "as asked" in done.stderr


def test_a_truncated_checkpoint_is_refused(tiny_model_dir, text, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = refusal("eval", "perplexity", broken, "--text", text, "--context", 64)
    assert "model.safetensors" in line
    assert "cut short" in line


def test_a_truncated_adapter_is_refused(tuned, tiny_model_dir, tmp_path) -> None:
    broken = tmp_path / "run"
    shutil.copytree(tuned, broken)
    weights = broken / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = refusal("chat", tiny_model_dir, "--adapter", broken, "--prompt", "Hi")
    assert "adapter_model.safetensors" in line
    assert "cut short" in line


def test_a_gguf_that_is_cut_short_is_refused(smollm2, tmp_path, monkeypatch) -> None:
    from lilliput.models import pull

    cut = tmp_path / "cut.gguf"
    with open(pull(smollm2), "rb") as file:
        cut.write_bytes(file.read(5_000_000))
    monkeypatch.setenv("LILLIPUT_HOME", str(tmp_path / "home"))
    line = refusal("quantize", cut, "-o", tmp_path / "out")
    assert "cut.gguf" in line
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_not_overwritten_by_accident(tiny_model_dir, rows, tmp_path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    assert "--overwrite" in refusal("quantize", tiny_model_dir, "-o", tmp_path / "taken", status=2)
    refusal("tune", tiny_model_dir, "--data", rows, "-o", tmp_path / "taken", status=2)
    refusal("tune", tiny_model_dir, "--data", rows, "-o", tmp_path / "taken", "--overwrite", status=2)
    refusal("quantize", tiny_model_dir, "-o", rows, status=2)
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "-1"],
        ["--top-p", "0"],
        ["--top-k", "-3"],
        ["--min-p", "2"],
        ["--repetition-penalty", "0"],
        ["--max-new-tokens", "0"],
        ["--seed", "-1"],
        ["--prompt", " "],
        ["--format", "int1"],
        ["--temprature", "1"],
    ],
    ids=lambda options: options[0],
)
def test_impossible_chat_options_are_wrong_use(tiny_model_dir, options) -> None:
    assert options[0].lstrip("-") in refusal("chat", tiny_model_dir, "--prompt", "Hi", *options, status=2)


def test_impossible_evaluation_options_are_wrong_use(tiny_model_dir, text, tmp_path) -> None:
    words = ("eval", "perplexity", tiny_model_dir, "--text", text)
    assert "context" in refusal(*words, "--context", 1, status=2)
    assert "positions" in refusal(*words, "--context", 4096, status=2)
    assert "stride" in refusal(*words, "--context", 64, "--stride", 100, status=2)
    (tmp_path / "short.txt").write_text("Too short.")
    assert "fewer than one segment" in refusal(*words[:-1], tmp_path / "short.txt", "--context", 64)


def test_resume_needs_a_run_and_excludes_overwrite(tiny_model_dir, rows, tuned, tmp_path) -> None:
    words = ("tune", tiny_model_dir, "--data", rows, *QUICK)
    assert "no run to resume" in refusal(*words, "-o", tmp_path / "run", "--resume", status=2)
    assert "exclude" in refusal(*words, "-o", tmp_path / "run", "--resume", "--overwrite", status=2)
    assert "--overwrite" in refusal(*words, "-o", tuned, status=2)


def test_a_prompt_longer_than_the_context_is_told(tiny_model_dir) -> None:
    assert "context is 512" in refusal("chat", tiny_model_dir, "--prompt", "word " * 600)


def test_an_unknown_model_name_gets_the_nearest() -> None:
    assert "smollm2-135m-instruct" in refusal("pull", "smollm2-135m-instrukt", status=2)
    assert "smollm2-135m-instruct" in refusal("chat", "smollm2-135m-instrukt", "--prompt", "Hi")


def test_an_adapter_over_constants_that_were_quantized_once_gets_them_again(tiny_model_dir, rows, tmp_path) -> None:
    out = tmp_path / "run"
    tuned = answer("tune", tiny_model_dir, "--data", rows, "-o", out, *QUICK, "--set", "model.double_quant=false")
    text = tmp_path / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    words = ("eval", "perplexity", tiny_model_dir, "--adapter", out, "--text", text, "--context", 64, "--json")
    done = run(*words)
    assert "trained over" not in done.stderr  # no other numbers than those of the training
    assert json.loads(done.stdout.splitlines()[-1])["footprint_bytes"] == tuned["footprint_bytes"]


@pytest.mark.parametrize("words", [["chat", "--prompt", "Hi"], ["quantize", "-o", "out"]], ids=lambda words: words[0])
def test_a_missing_tokenizer_is_told_before_the_model_is_loaded(words, tiny_llama, tmp_path, monkeypatch) -> None:
    from lilliput import models

    tiny_llama().save_pretrained(tmp_path / "bare")
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded first"))
    monkeypatch.chdir(tmp_path)
    assert "no tokenizer" in refusal(words[0], "bare", *words[1:])


def test_half_a_character_in_a_prompt_is_told(tiny_model_dir) -> None:
    """What a shell passes on when its text is not UTF-8."""
    assert "half a character" in refusal("chat", tiny_model_dir, "--prompt", "caf\udce9")


def test_ctrl_c_before_anything_was_trained_says_that_the_same_command_begins_again(
    tiny_model_dir, rows, tmp_path, monkeypatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = ("tune", tiny_model_dir, "--data", rows, "-o", tmp_path / "run", *QUICK)
    with monkeypatch.context() as patched:
        patched.setattr("lilliput.training.run.load_base", stop)
        assert "Nothing was trained yet: run the same command again" in refusal(*words)
    assert answer(*words)["steps"] == 2
