"""The benchmarks can be listed, imported and trusted to count: their common part on known numbers. No timings here."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import LlamaForCausalLM

from lilliput.formats import rowwise
from lilliput.layers import QuantizedLinear, unrounded

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
NAMES = sorted(
    file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith("_") and file.stem not in ("common", "peers")
)


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import each other by their plain names, which are forgotten again afterwards."""
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in (*NAMES, "common", "peers"):
        sys.modules.pop(name, None)


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_list_names_every_benchmark() -> None:
    done = run("--list")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES
    assert all(len(line.split()) > 3 for line in done.stdout.splitlines())


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    done = run("linear_4bits")
    assert done.returncode == 2
    assert "did you mean 'linear_4bit'?" in done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_script_with_run_and_a_docstring(name: str) -> None:
    module = load(name)
    assert module.__doc__
    assert f"benchmarks/{name}.py" in module.__doc__
    assert list(module.run.__annotations__) == ["arguments", "return"]


def test_sides_are_measured_in_turn_and_a_missing_one_says_so() -> None:
    common, order = load("common"), []

    def side(who: str, figure: float) -> dict[str, float]:
        order.append(who)
        return {"ms": figure * len(order)}

    sides = {"a": lambda: side("a", 1.0), "b": lambda: side("b", 10.0), "c": "not installed: c"}
    a, b, c = common.compare("work", sides, 3)
    assert order == ["a", "b"] * 3
    assert (a.samples, b.samples, c.samples) == ({"ms": [1.0, 3.0, 5.0]}, {"ms": [20.0, 40.0, 60.0]}, {})
    assert c.missing == "not installed: c"


def test_a_side_whose_process_fails_is_a_row_that_says_so() -> None:
    common = load("common")

    def fails() -> dict[str, float]:
        return common.in_process(str(FOLDER / "threads.py"), unknown=1)

    (row,) = common.compare("work", {"a": fails}, 2)
    assert row.missing.startswith("failed: TypeError")
    assert not row.samples


def report(common: ModuleType) -> object:
    rows = [
        common.Row("work", "Lilliput", {"ms": [1.0, 2.0, 4.0], "tokens/s": [9.0, 8.0, 7.0]}),
        common.Row("work", "peer", {"ms": [3.0, 4.0, 4.0], "tokens/s": [3.0, 8.0, 14.0]}),
        common.Row("work", "absent", missing="not installed: absent"),
    ]
    return common.Report(rows, {"ms": "less", "tokens/s": "more"}, notes=["a note"])


def test_ratios_are_taken_round_by_round_and_above_one_where_ours_is_better() -> None:
    common = load("common")
    made = report(common)
    mine, peer, absent = made.rows
    assert common.ratios(made, peer, "Lilliput") == {
        "ms": {"median": 2.0, "min": 1.0, "max": 3.0},  # 3/1, 4/2, 4/4
        "tokens/s": {"median": 1.0, "min": 0.5, "max": 3.0},  # 9/3, 8/8, 7/14
    }
    assert common.ratios(made, mine, "Lilliput") == {}
    assert common.ratios(made, absent, "Lilliput") == {}


def test_table_and_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = load("common")
    file = tmp_path / "new" / "work.json"
    common.show("work", report(common), {"processor": "P"}, {"rounds": "3"}, file)
    printed = capsys.readouterr().out
    for part in ("x 2.00 (1.00–3.00); x 1.00 (0.50–3.00)", "not installed: absent", "a note", "processor P"):
        assert part in printed
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["machine"] == {"processor": "P"}
    assert [row["missing"] for row in written["rows"]] == ["", "", "not installed: absent"]
    assert written["rows"][0]["figures"]["ms"] == {"median": 2.0, "min": 1.0, "max": 4.0, "rounds": [1.0, 2.0, 4.0]}
    assert written["rows"][1]["ratios"]["Lilliput"]["ms"]["median"] == 2.0


def test_no_ratio_column_without_a_comparison() -> None:
    common = load("common")
    table = common.table_of(common.Report([common.Row("w", "a", {"GB/s": [1234.5]})], {"GB/s": ""}), "t")
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    assert "better by" not in console.file.getvalue()
    assert "1,234" in console.file.getvalue()


def test_machine_names_what_figures_depend_on() -> None:
    about = load("common").machine()
    assert {"processor", "cores", "threads", "instruction set", "torch", "lilliput"} <= set(about)
    assert about["threads"] >= 1


def test_rates_are_work_over_time() -> None:
    side = load("common").timed(lambda: sum(range(1000)), 0.001, **{"GFLOP/s": 5e9})
    figures = side()
    assert figures["GFLOP/s"] * figures["ms"] / 1e3 == pytest.approx(5.0)


def test_quick_sets_a_benchmarks_small_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    common, seen = load("common"), []

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--size", type=int, default=100)

    def measure(arguments: argparse.Namespace) -> object:
        seen.append((arguments.size, arguments.rounds))
        failures = ["too slow"] if arguments.size == 7 else []
        return common.Report([common.Row("w", "a", {"ms": [1.0]})], {"ms": "less"}, failures=failures)

    def status(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["x", *words])
        return common.main(measure, "x.py", "X.", options=options, quick={"size": 3}, rounds=5)

    assert [status(), status("--quick"), status("--size", "7")] == [0, 0, 1]
    assert seen == [(100, 5), (3, 1), (7, 5)]


def test_the_peers_batch_has_as_many_tokens_or_as_many_steps() -> None:
    epoch, data = load("epoch"), importlib.import_module("lilliput.data")
    rows = [data.Example([1] * length, [True] * length) for length in (20, 80) * 8]
    assert epoch.padded_tokens([8] * 12, 3) == 24
    batches, said = epoch.batches(rows, 100, 2)  # 8 packs of 100 tokens, 200 a step, 4 steps
    assert batches["lilliput"] == 2
    assert batches["peft-steps"] == 4
    assert batches["peft-tokens"] == 3  # of 80 tokens most of the time; 6 steps
    assert batches["lilliput-steps"] == 2  # 1 would be 8 steps
    assert "16 rows, 800 tokens, 784 labels" in said[0]
    assert "8 packed rows, 2 a batch, 200 tokens a step" in said[1]


def test_shares_are_of_the_limit_in_the_same_round() -> None:
    common, linear = load("common"), load("linear_4bit")
    limit = common.Row("w", linear.LIMIT, {"ms": [9.0, 9.0], "GB/s": [10.0, 20.0]})
    ours = common.Row("w", "Lilliput", {"ms": [1.0, 1.0], "GB/s": [5.0, 5.0]})
    _, found = linear.with_shares([limit, ours])
    assert found.samples["share"] == [0.5, 0.25]
    assert common.ratios(common.Report([limit, ours], {"ms": "less"}), limit, "Lilliput") == {}


# ---- trials at tiny sizes ----


def test_a_trial_of_linear_int8_has_all_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    common, linear, limits = load("common"), load("linear_int8"), load("limits")
    monkeypatch.setattr(load("linear_4bit"), "product", lambda _, seconds: limits.product(64, seconds))
    monkeypatch.setattr(limits, "BIG", 1024)
    made = linear.run(Namespace(shapes=["32x16"], rows=[1, 20], outliers=2, ring=0, seconds=0.001, rounds=1))
    found = {row.what: {r.who for r in made.rows if r.what == row.what} for row in made.rows}
    stacks = {*linear.THRESHOLDS, *linear.BITSANDBYTES, linear.TORCH, "(the limit)"}
    assert found["forward, 1 x 32 x 16"] == found["forward, 20 x 32 x 16"] == stacks | {"Lilliput's reference"}
    assert found["gradient, 20 x 32 x 16"] == stacks - linear.FORWARD_ONLY
    assert "gradient, 1 x 32 x 16" not in found
    dense = next(row for row in made.rows if row.who == linear.TORCH and row.what.startswith("gradient"))
    assert set(dense.samples) == {"ms", "GFLOP/s", "share"}
    assert set(common.ratios(made, dense, "Lilliput")) == {"ms"}


def test_a_trial_of_linear_grouped_counts_each_formats_own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, limits = load("linear_grouped"), load("limits")
    monkeypatch.setattr(load("linear_4bit"), "product", lambda _, seconds: limits.product(64, seconds))
    monkeypatch.setattr(limits, "BIG", 1024)
    layers = linear.make_layers(160, 8)
    assert {name: layer.quantized.nbytes for name, layer in layers.items() if name in linear.FORMATS} == {
        name: 8 * 160 * bits // 8 + 8 * 2 * 3 for name, bits in zip(linear.FORMATS, (4, 3, 2, 8), strict=True)
    }
    assert layers[linear.ORDERED].quantized.order is not None
    made = linear.run(Namespace(shapes=["160x8"], rows=[1, 20], ring=0, seconds=0.001, rounds=1))
    found = {row.what: {r.who for r in made.rows if r.what == row.what} for row in made.rows}
    assert found["gradient, 20 x 160 x 8"] == {*layers, "(the limit)"}
    assert found["forward, 1 x 160 x 8"] == {*layers, "(the limit)", "Lilliput's reference"}


def test_inputs_of_linear_int8_have_as_many_outlier_columns_as_asked_for() -> None:
    linear = load("linear_int8")
    for outliers in (0, 3):
        beyond = linear.normal_but(outliers, 50, 40).abs() > linear.THRESHOLD
        assert beyond.any(dim=0).sum() == beyond.all(dim=0).sum() == outliers


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_bitsandbytes_int8_layer_does_the_same_work(threshold: float) -> None:
    """In evaluation mode the paper's product, of which ours rounds x finer; in training mode x is not rounded. All
    numbers are float16's, to which theirs rounds."""
    pytest.importorskip("bitsandbytes")
    peers, linear = load("peers"), load("linear_int8")
    dense = nn.Linear(64, 48, bias=False).half().float()
    x = linear.normal_but(2, 10, 64).half().float()
    evaluated, trained = (peers.bitsandbytes_int8_linear(dense.weight, threshold, inference=i) for i in (True, False))
    assert evaluated.weight.dtype == trained.weight.dtype == torch.int8  # quantized when made, not at each call
    ours = QuantizedLinear.from_linear(dense, "int8", threshold=threshold)
    with torch.no_grad():
        paper = rowwise.vectorwise_product(x, ours.quantized.codes.view(48, 64), ours.quantized.absmax, threshold)
        torch.testing.assert_close(evaluated(x), paper, rtol=1e-4, atol=1e-3)
        with unrounded(ours):
            torch.testing.assert_close(trained(x), ours(x), rtol=1e-4, atol=1e-4)
        assert (ours(x) - trained(x)).norm() < (evaluated(x) - trained(x)).norm() / 20


def test_a_trial_of_quantize_has_nf4_and_int8_in_both_types() -> None:
    made = load("quantize").run(Namespace(size=16, seconds=0.001, rounds=1))
    names = ("NF4", "NF4, double quantization", "int8")
    expected = {
        f"{way} {dtype}, {name}"
        for way in ("quantize", "dequantize")
        for dtype in ("float32", "bfloat16")
        for name in names
    }
    assert {row.what for row in made.rows} == expected
    assert {row.who for row in made.rows} == {"Lilliput", "bitsandbytes", "Lilliput's reference"}
    assert all(row.missing or row.samples["ms"] for row in made.rows)


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_trials_with_a_tiny_model(
    name: str, monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    module, peers = load(name), load("peers")
    loads = {key: tiny_llama(vocab_size=40_000) for key in ("lilliput-int8", "bnb-int8-training")}
    for key, model in loads.items():
        stack = peers.INFERENCE[key]
        changed = peers.Stack(stack.name, lambda _, model=model: model, stack.training, stack.ours)
        monkeypatch.setitem(peers.INFERENCE, key, changed)
    monkeypatch.setattr(module, "dense_checkpoint", str)
    monkeypatch.setattr(peers, "not_installed", lambda *_: "")
    made = module.run(Namespace(stacks=list(loads), prompt=5, new=2, tokens=7, rounds=2))
    assert [row.who for row in made.rows] == ["Lilliput, int8", "bitsandbytes int8, training mode"]
    assert made.ours == ("Lilliput, int8",)
    for row in made.rows:
        count = {"decode": 2, "prefill": 7}[name]
        rates = zip(row.samples["seconds"], row.samples["tokens/s"], strict=True)
        assert [seconds * rate for seconds, rate in rates] == pytest.approx([count] * 2)
    assert [model.training for model in loads.values()] == [False, True]


def test_a_stack_that_is_not_installed_is_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = load("peers")
    monkeypatch.setattr(peers, "not_installed", lambda *_: "not installed: bitsandbytes")
    models = peers.inference_models(["bnb-int8", "bnb-nf4"], "nowhere")
    assert set(models.values()) == {"not installed: bitsandbytes"}


@pytest.mark.parametrize("name", ["decode", "prefill", "training_step"])
def test_stacks_can_be_chosen_and_an_unknown_one_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    load(name).options(parser)
    chosen = {"training_step": ["lilliput-int8", "peft-bnb-int8"]}.get(name, ["lilliput-int8", "bnb-int8"])
    assert parser.parse_args(["--stacks", *chosen]).stacks == chosen
    assert set(chosen) < set(parser.parse_args([]).stacks)
    with pytest.raises(SystemExit):
        parser.parse_args(["--stacks", "int9"])
    assert "invalid choice: 'int9'" in capsys.readouterr().err


def test_each_stack_of_a_training_step_has_a_base_and_says_what_it_needs() -> None:
    step = load("training_step")
    peers = {name for name in step.STACKS if not name.startswith("lilliput")}
    assert set(step.BASES) == set(step.NEEDS) == peers
    assert set(step.FORMATS) < set(step.STACKS) - peers


# ---- optimizers ----


def test_a_trial_of_optimizer_step_has_all_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    common, step = load("common"), load("optimizer_step")
    monkeypatch.setattr(step, "SHAPE", (64, 128))
    monkeypatch.setattr(step, "in_process", lambda _, **arguments: step.child(**arguments))
    monkeypatch.setattr(step, "not_installed", lambda *packages: f"not installed: {packages[0]}" if packages else "")
    made = step.run(Namespace(tensors=2, seconds=0.001, rounds=2, sides=list(step.SIDES)))
    rows = {row.who: row for row in made.rows}
    assert set(rows) == {name for name, _, _ in step.SIDES.values()}
    assert rows["torchao AdamW8bit"].missing == "not installed: torchao"
    assert rows["Lilliput"].samples["bytes"] == [2 + 8 / 256] * 2  # two codes, and two absmax a block of 256
    assert rows["Lilliput, paged, half of the state in memory"].samples["bytes"] == [2 + 8 / 256] * 2
    assert rows["Lilliput, 32 bits"].samples["bytes"] == [8.0] * 2
    assert rows["torch AdamW, fused"].samples["bytes"][0] == pytest.approx(8, abs=0.01)  # and its steps
    assert set(common.ratios(made, rows["torch AdamW"], "Lilliput")) == {"ms"}


def test_the_tensor_wise_optimizer_of_the_ablation_is_ours_with_one_block() -> None:
    ablation, optim = load("optimizer_ablation"), importlib.import_module("lilliput.optim")
    torch.manual_seed(0)
    pairs = [nn.Parameter(torch.randn(64, 64)) for _ in range(2)]
    pairs[1].data.copy_(pairs[0])
    theirs = ablation.TensorWise([("w", pairs[0])], 1e-2, ablation.codebooks.dynamic8)
    mine = ablation.ours([("w", pairs[1])], 1e-2, optim.AdamW8bit, block=4096)
    for _ in range(5):
        for parameter in pairs:
            parameter.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        theirs.step()
        mine.step()
    codes = [kept[0] for kept in theirs.state[pairs[0]]["moments"]]
    for a, name in zip(codes, ("exp_avg", "exp_avg_sq"), strict=True):
        assert (a == mine.state[pairs[1]][name]).float().mean() > 0.999
    torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-5, atol=1e-5)


def test_a_trial_of_the_ablation_has_all_variants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ablation = load("optimizer_ablation")
    for name, value in {
        "VOCABULARY": 300,
        "HIDDEN": 16,
        "LAYERS": 1,
        "TOKENS": 8,
        "ROWS": 2,
        "EVALUATION_ROWS": 4,
    }.items():
        monkeypatch.setattr(ablation, name, value)
    ids = torch.arange(400) % 50
    monkeypatch.setattr(ablation, "texts", lambda: (ids, ids))
    seen = []

    def adapter(side: str, rows: int, held_out: int) -> tuple[list[float], dict[str, float]]:
        seen.append((side, rows, held_out))
        return [3.0, 2.0, 1.0], {"loss": 1.5, "diverged": 0.0, "s": 1.0}

    monkeypatch.setattr(ablation, "train_adapter", adapter)
    picture = tmp_path / "new" / "curves.png"
    sides = [*ablation.VARIANTS, *ablation.QLORA]
    arguments = Namespace(steps=3, lr=1e-3, rows=5, held_out=2, sides=sides, plot=picture, rounds=2)
    made = ablation.run(arguments)
    assert [row.who for row in made.rows] == [v.name for v in ablation.VARIANTS.values()] + ["32 bits", "AdamW8bit"]
    assert [len(row.samples["loss"]) for row in made.rows] == [2] * 7 + [1, 1]
    assert all(loss <= 5.71 for row in made.rows for loss in row.samples["loss"])  # ln 300: that of guessing
    assert seen == [("qlora", 5, 2), ("qlora-8bit", 5, 2)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert any(
        line.startswith("AdamW8bit: 1.5000 ± 0.0000; 0 of 1 diverged; +0.00 % of 32 bits") for line in made.notes
    )


def test_a_run_of_the_ablation_that_is_not_finite_counts_as_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    ablation = load("optimizer_ablation")
    monkeypatch.setattr(ablation, "texts", lambda: (torch.arange(2000) % 50, torch.arange(2000) % 50))
    monkeypatch.setattr(ablation, "EVALUATION_ROWS", 8)
    curve, figures = ablation.train(ablation.VARIANTS["fp32"], 0, 4, lr=1e30)
    assert len(curve) < 4
    assert (figures["diverged"], figures["loss"]) == (1.0, pytest.approx(8.3178, abs=1e-3))


# ---- llama.cpp ----


def test_equal_steps_and_the_marks_of_llama_cpp() -> None:
    common, llama = load("common"), load("gguf_llama_cpp")
    assert [llama.equal_steps([1, 2, 3], other) for other in ([1, 2, 3], [1, 2, 4], [0, 2, 3])] == [3, 2, 0]

    def missed(ratio: float, steps: float) -> list[str]:
        rows = [common.Row("F32", "llama.cpp", {"greedy steps": [steps]})]
        return llama.missed([*rows, common.Row("Q8_0", "llama.cpp", {"ratio": [ratio]})], 32)

    assert missed(1.004, 32) == []
    assert [line.split(":")[0] for line in missed(0.994, 31)] == ["Q8_0", "F32"]


def test_greedy_tokens_are_those_of_generate(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    llama, model = load("gguf_llama_cpp"), tiny_llama()
    prompt = torch.tensor([[5, 9, 77]])
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert llama.greedy(model, prompt[0].tolist(), 6) == wanted[0, 3:].tolist()


def test_without_llama_cpp_a_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = load("gguf_llama_cpp")
    monkeypatch.setattr(llama, "not_installed", lambda *names: f"not installed: {names[0]}")
    (row,) = llama.run(Namespace(types=["f32"], segments=1, steps=2, keep=None)).rows
    assert row.missing == "not installed: llama-cpp-python"
