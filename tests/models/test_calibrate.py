"""GPTQ through a whole model: what is written, in passes and in stages, stopped and gone on with; what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lilliput.errors import CheckpointError, DataError, FormatError, UsageError
from lilliput.files import write_safetensors
from lilliput.layers import QuantizedLinear, quantized_layers
from lilliput.models import Gptq, calibrate, load_model, quantize_gptq, save_model
from lilliput.models.calibrate import UNFINISHED
from lilliput.models.gptq import Inputs
from lilliput.models.skeleton import Skeleton
from lilliput.progress import console
from tests.conftest import make_tiny_llama
from tests.models.conftest import make_model
from tests.models.family_table import FAMILIES, VOCABULARY, make_family

IDS = torch.randint(3, 500, (8, 48), generator=torch.Generator().manual_seed(0))
SMALL = Gptq(group=32)
TINY = 1e-4  # GiB: so little that one segment goes through a layer at a time


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    make_tiny_llama(num_hidden_layers=3).save_pretrained(directory)
    return directory


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Fills with what the solver is given: (what is quantized in place of a weight, the Hessian)."""
    solve, seen = calibrate.solve, list[tuple[Tensor, Tensor]]()

    def note(weight: Tensor, inputs: Inputs, settings: Gptq) -> Any:
        seen.append((weight.clone(), inputs.dampened.clone()))
        return solve(weight, inputs, settings)

    monkeypatch.setattr(calibrate, "solve", note)
    return seen


def quantize(model: Path, out: Path, settings: Gptq = SMALL, ids: Tensor | None = IDS, **options: Any) -> Any:
    return quantize_gptq(model, out, ids, settings, progress=False, **options)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS[:2]).logits


@pytest.mark.parametrize(
    ("kind", "memory"),
    [("llama", 1.0), ("llama-tied", 1.0), ("qwen2", 1.0), ("phi3", 1.0), ("gpt2", 1.0), ("gpt2", TINY)],
)
def test_what_is_written_opens_and_computes_with_its_codes(kind: str, memory: float, tmp_path: Path) -> None:
    original = make_model(kind)
    original.save_pretrained(tmp_path / "dense")
    report = quantize(tmp_path / "dense", tmp_path / "out", memory=memory)
    opened = load_model(tmp_path / "out", progress=False)
    names = [name for name, _ in quantized_layers(opened)]
    assert len(names) == len(report.modules) == sum(1 for name in names if "layers." in name or ".h." in name)
    for name, layer in quantized_layers(opened):
        assert isinstance(layer, QuantizedLinear)
        held: Any = original.get_submodule(name).weight
        held.data = layer.dequantize().t().contiguous() if kind == "gpt2" else layer.dequantize()
    with torch.no_grad():
        expected = original.half().float()(IDS[:2]).logits  # what is not quantized is written in float16
    torch.testing.assert_close(logits(opened), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["gpt-neox", "opt", "bloom", "mistral", "falcon"])
@pytest.mark.parametrize("memory", [2.0, TINY])
def test_families_that_call_their_layers_in_other_ways(name: str, memory: float, tmp_path: Path) -> None:
    family = next(row for row in FAMILIES if row.name == name)
    original, ids = make_family(family), IDS % VOCABULARY
    original.save_pretrained(tmp_path / "dense")
    report = quantize(tmp_path / "dense", tmp_path / "out", Gptq(bits=8, group=32), ids, memory=memory)
    assert {module.module.rpartition(".")[2] for module in report.modules} == set(family.layers)
    assert len(report.modules) == 2 * len({module.module for module in report.modules})
    assert all(module.error is not None and module.error < 1e-3 for module in report.modules)
    with torch.no_grad():
        expected = original(ids[:2]).logits
        found = load_model(tmp_path / "out", progress=False)(ids[:2]).logits
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "settings",
    [
        Gptq(bits=2, group=32),
        Gptq(bits=3, group=64, symmetric=True),
        Gptq(bits=8, group=-1),
        Gptq(group=32, static_groups=False),
        Gptq(group=32, static_groups=False, symmetric=True, refine=0, search=False),
    ],
)
def test_bits_groups_and_orders(settings: Gptq, dense: Path, tmp_path: Path) -> None:
    report = quantize(dense, tmp_path, settings)
    opened = load_model(tmp_path, progress=False)
    kinds = {layer.format_name for _, layer in quantized_layers(opened)}
    assert kinds == {settings.format.name}
    content = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (content["bits"], content["desc_act"]) == (settings.bits, settings.ordered)
    assert content["sym"] == settings.symmetric
    assert all(module.error is not None and 0 < module.error < 1 for module in report.modules)
    near = (logits(opened) - logits(load_model(dense, progress=False))).norm() / logits(opened).norm()
    assert near < {2: 0.9, 3: 0.5, 4: 0.3, 8: 0.02}[settings.bits]


def test_stages_give_what_one_pass_gives(dense: Path, tmp_path: Path) -> None:
    once = quantize(dense, tmp_path / "once")
    staged = quantize(dense, tmp_path / "staged", memory=TINY)
    assert [module.module for module in once.modules] == [module.module for module in staged.modules]
    for one, other in zip(once.modules, staged.modules, strict=True):
        assert one.error == pytest.approx(other.error, rel=0.05)  # sums in another order may choose other codes
    torch.testing.assert_close(
        logits(load_model(tmp_path / "once", progress=False)),
        logits(load_model(tmp_path / "staged", progress=False)),
        rtol=0,
        atol=0.05,
    )


def test_stages_see_the_sums_of_one_pass(dense: Path, tmp_path: Path, solved: list[tuple[Tensor, Tensor]]) -> None:
    quantize(dense, tmp_path / "once", Gptq(bits=8, group=32, correct=1.0))
    once, solved[:] = list(solved), []
    quantize(dense, tmp_path / "staged", Gptq(bits=8, group=32, correct=1.0), memory=TINY)
    assert len(once) == len(solved) == 21
    for (target, one), (other_target, other) in zip(once, solved, strict=True):
        assert (one - other).norm() < 0.01 * one.norm()
        assert (target - other_target).norm() < 0.01 * target.norm()
    original = load_model(dense, progress=False).get_submodule("model.layers.0.self_attn.o_proj").weight
    shift, other_shift = (found[3][0] - original for found in (once, solved))  # before it only q, k and v were rounded
    assert shift.norm() > 1e-4 * original.norm()
    assert (shift - other_shift).norm() < 0.1 * shift.norm()
    torch.testing.assert_close(once[0], solved[0], rtol=1e-4, atol=1e-5)  # nothing before it could differ


@pytest.mark.parametrize("memory", [1.0, TINY])
def test_layers_make_up_for_the_errors_of_those_before(memory: float, dense: Path, tmp_path: Path) -> None:
    truth = logits(load_model(dense, progress=False))

    def distance(correct: float) -> float:
        out = tmp_path / str(correct)
        quantize(dense, out, Gptq(bits=3, group=32, correct=correct), memory=memory)
        return float((logits(load_model(out, progress=False)) - truth).norm())

    assert distance(1.0) < 0.95 * distance(0.0)


def test_only_layers_with_something_before_them_are_corrected(
    dense: Path, tmp_path: Path, solved: list[tuple[Tensor, Tensor]]
) -> None:
    report = quantize(dense, tmp_path / "out", Gptq(bits=3, group=32))
    original = load_model(dense, progress=False)
    same = [
        original.get_submodule(f"model.layers.{module.layer}.{module.module}").weight.equal(weight)
        for module, (weight, _) in zip(report.modules, solved, strict=True)
    ]
    assert same == [True] * 3 + [False] * 18  # q, k and v of the first layer get what they always got


@pytest.mark.parametrize("memory", [1.0, TINY])
@pytest.mark.parametrize("name", ["falcon", "gpt-neox", "opt"])
def test_whatever_shape_and_order_a_layer_has_it_is_corrected(
    name: str, memory: float, tmp_path: Path, solved: list[tuple[Tensor, Tensor]]
) -> None:
    """Falcon's attention and MLP share an input with attention's output layer in between; OPT flattens its MLP's."""
    original = make_family(next(row for row in FAMILIES if row.name == name))
    original.save_pretrained(tmp_path / "dense")
    report = quantize(tmp_path / "dense", tmp_path / "out", Gptq(bits=3, group=32), IDS % VOCABULARY, memory=memory)
    held = dict(original.named_parameters())
    for module, (weight, _) in zip(report.modules, solved, strict=True):
        (own,) = (held[key] for key in held if key.endswith(f".{module.layer}.{module.module}.weight"))
        assert module.layer == 0 or not own.equal(weight), module.module


@pytest.mark.parametrize("memory", [1.0, TINY])
def test_inputs_of_some_tokens_only_are_not_compared(
    memory: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[tuple[Tensor, Tensor]]
) -> None:
    """An expert's rows are the tokens that chose it: as many in the original model may be others."""
    dense = tmp_path / "dense"
    make_tiny_llama(num_hidden_layers=2).save_pretrained(dense)
    forward = LlamaMLP.forward

    def of_some(self: LlamaMLP, x: Tensor) -> Tensor:
        chosen = x[..., 0] > 0
        out = torch.zeros_like(x)
        out[chosen] = forward(self, x[chosen])
        return out

    monkeypatch.setattr(LlamaMLP, "forward", of_some)
    report = quantize(dense, tmp_path / "out", memory=memory)
    original = load_model(dense, progress=False)
    for module, (weight, _) in zip(report.modules, solved, strict=True):
        held = original.get_submodule(f"model.layers.{module.layer}.{module.module}").weight
        assert held.equal(weight) == (
            module.module.startswith("mlp.") or (module.layer == 0 and "o_" not in module.module)
        )


def test_it_is_better_than_rounding_to_nearest(dense: Path, tmp_path: Path) -> None:
    quantize(dense, tmp_path / "gptq", Gptq(bits=3, group=64))
    report = quantize(dense, tmp_path / "nearest", Gptq(bits=3, group=64), None, rounding="nearest")
    assert {module.error for module in report.modules} == {None}
    truth = logits(load_model(dense, progress=False))
    fitted, nearest = (
        (logits(load_model(tmp_path / way, progress=False)) - truth).norm() for way in ("gptq", "nearest")
    )
    assert fitted < nearest


@pytest.mark.parametrize(
    ("kind", "calls", "memory"),
    [
        ("llama", 0, 1.0),
        ("llama", 1, 1.0),
        ("llama", 9, 1.0),
        ("llama", 20, 1.0),
        ("llama", 16, TINY),
        ("gpt2", 6, 1.0),
        ("gpt2", 6, TINY),
    ],
)
def test_a_stopped_run_goes_on_with_the_same_bytes(
    kind: str, calls: int, memory: float, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "llama":
        dense = tmp_path / "dense"
        make_model(kind).save_pretrained(dense)
    modules = len(quantize(dense, tmp_path / "whole", memory=memory).modules)
    left, solve = [calls], calibrate.solve

    def stopping(*arguments: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return solve(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(calibrate, "solve", stopping)
        quantize(dense, tmp_path / "parts", memory=memory)
    assert not (tmp_path / "parts" / "config.json").exists()
    report = quantize(dense, tmp_path / "parts", memory=memory)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(report.modules) == modules > calls
    assert not (tmp_path / "parts" / UNFINISHED).exists()


def test_unfinished_layers_of_another_job_are_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(calibrate, "_finish", stop)
        quantize(dense, tmp_path)
    for changed in ({"settings": Gptq(group=64)}, {"ids": IDS + 1}, {"dtype": torch.float32}, {"memory": 0.5}):
        with pytest.raises(UsageError, match="another model, text or settings"):
            quantize(dense, tmp_path, **changed)
    quantize(dense, tmp_path)


def test_unfinished_layers_of_another_job_may_be_overwritten(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(calibrate, "_finish", stop)
        quantize(dense, tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # the same job: it goes on, nothing goes
        patched.setattr(calibrate, "_finish", stop)
        quantize(dense, tmp_path / "out", overwrite=True)
    said = capsys.readouterr().err
    assert "Going on behind layer 3" in said
    assert "thrown away" not in said
    quantize(dense, tmp_path / "out", Gptq(group=64), overwrite=True)
    assert "thrown away" in capsys.readouterr().err
    quantize(dense, tmp_path / "fresh", Gptq(group=64))
    files = [tmp_path / way / "model.safetensors" for way in ("out", "fresh")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("memory", [1.0, TINY])
def test_layers_may_differ(memory: float, tmp_path: Path) -> None:
    """A first layer without experts, as several mixtures have it: each layer's own linear layers are quantized."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=64, mlp_only_layers=[0], max_position_embeddings=128,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    config.save_pretrained(tmp_path / "dense")
    write_safetensors(tmp_path / "dense" / "model.safetensors", model.state_dict())
    report = quantize(tmp_path / "dense", tmp_path / "out", Gptq(bits=8, group=32), memory=memory)
    names = {layer: {m.module for m in report.modules if m.layer == layer} for layer in range(3)}
    assert "mlp.gate_proj" in names[0]
    assert "mlp.gate_proj" not in names[1]
    assert "mlp.shared_expert.gate_proj" in names[1]
    assert names[1] == names[2]
    found = logits(load_model(tmp_path / "out", progress=False))
    expected = logits(model)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_an_expert_that_only_a_later_batch_reaches_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer whose branch is taken by one batch only: what it holds gets codes for that batch's inputs."""
    dense = tmp_path / "dense"
    make_tiny_llama(num_hidden_layers=1).save_pretrained(dense)
    forward, calls = LlamaMLP.forward, [0]

    def sometimes(self: LlamaMLP, x: Tensor) -> Tensor:
        calls[0] += 1
        return forward(self, x) if calls[0] % 8 == 0 else x  # of the eight batches of one segment each, the last

    monkeypatch.setattr(LlamaMLP, "forward", sometimes)
    report = quantize(dense, tmp_path / "out", memory=TINY)
    assert all(module.error is not None for module in report.modules)
    assert "never reached" not in capsys.readouterr().err


def test_hidden_states_may_lie_on_the_disk(dense: Path, tmp_path: Path) -> None:
    quantize(dense, tmp_path / "memory", on_disk=False)
    quantize(dense, tmp_path / "disk", on_disk=True)
    files = [tmp_path / way / "model.safetensors" for way in ("memory", "disk")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_one_layer_is_filled_at_a_time(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    solve, skeletons = calibrate.solve, []
    built = Skeleton.__init__

    def keep(self: Skeleton, *arguments: Any) -> None:
        built(self, *arguments)
        skeletons.append(self)

    def look(*arguments: Any) -> Any:
        (skeleton,) = skeletons
        filled = [i for i, layer in enumerate(skeleton.layers) if any(not p.is_meta for p in layer.parameters())]
        outside = [n for n, p in skeleton.model.named_parameters() if not n.startswith(skeleton.path) and not p.is_meta]
        assert not outside
        seen.append(filled)
        return solve(*arguments)

    monkeypatch.setattr(Skeleton, "__init__", keep)
    monkeypatch.setattr(calibrate, "solve", look)
    quantize(dense, tmp_path)
    assert seen == [[layer] for layer in range(3) for _ in range(7)]


def test_the_report_is_written(dense: Path, tmp_path: Path) -> None:
    report = quantize(dense, tmp_path)
    content = json.loads((tmp_path / "gptq.json").read_text())
    assert content["tokens"] == IDS.numel()
    assert len(content["modules"]) == 21
    assert content["bits_per_weight"] == pytest.approx(report.bits_per_weight, abs=1e-4)
    assert 4 < report.bits_per_weight < 6.5


def test_little_text_is_a_warning_with_numbers(dense: Path, tmp_path: Path) -> None:
    with console.capture() as said:
        quantize(dense, tmp_path, ids=IDS[:1])
    assert "48 tokens of calibration for layers of up to 128 inputs" in " ".join(said.get().split())


def test_bad_input_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown rounding"):
        quantize(dense, tmp_path / "x", rounding="best")
    with pytest.raises(DataError, match="no calibration text"):
        quantize(dense, tmp_path / "x", ids=None)
    with pytest.raises(DataError, match="does not know"):
        quantize(dense, tmp_path / "x", ids=IDS + 500)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        quantize(dense, tmp_path / "file")
    save_model(load_model(dense, format="nf4", progress=False), tmp_path / "nf4")
    with pytest.raises(UsageError, match="quantized to nf4 already"):
        quantize(tmp_path / "nf4", tmp_path / "x")
    make_tiny_llama(intermediate_size=100).save_pretrained(tmp_path / "odd")
    with pytest.raises(UsageError, match="multiples of 32"):
        quantize(tmp_path / "odd", tmp_path / "x")
    with pytest.raises(UsageError, match="an encoder and a decoder"):
        translator = next(row for row in FAMILIES if row.task == "translate")
        make_family(translator).save_pretrained(tmp_path / "t5")
        quantize(tmp_path / "t5", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_segments_longer_than_the_model_can_read_are_refused(tmp_path: Path) -> None:
    make_model("gpt2").save_pretrained(tmp_path / "dense")
    with pytest.raises(DataError, match="segments of 200 tokens.*128 positions"):
        quantize(tmp_path / "dense", tmp_path / "out", ids=IDS[:1, :1].expand(1, 200))
    assert not (tmp_path / "out").exists()


def test_several_types_are_refused_before_any_work(tmp_path: Path) -> None:
    model = make_tiny_llama().bfloat16()
    model.model.norm.float()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="several types"):
        quantize(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize(tmp_path / "dense", tmp_path / "out", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_numbers_that_float16_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    model = make_tiny_llama()
    with torch.no_grad():
        model.get_parameter(name)[3] = 1e5
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(FormatError, match=re.escape(name)):
        quantize(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize(tmp_path / "dense", tmp_path / "wide", dtype=torch.float32)
    assert load_model(tmp_path / "wide", progress=False).get_parameter(name)[3] == 1e5


def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    model = make_tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj"):
        quantize(tmp_path / "dense", tmp_path / "out")
