"""Reusing the frozen lower layers changes no result: by family, in whole runs, on a full disk and after kill -9."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lilliput import kernels
from lilliput.data import Pack, pack
from lilliput.errors import UsageError
from lilliput.kernels import core
from lilliput.layers import replace_linears
from lilliput.lora import LoraConfig, add_adapter
from lilliput.training import joined, tune
from lilliput.training import prefix as prefix_module
from lilliput.training.fused import fused
from lilliput.training.prefix import (
    CACHE_FILE,
    Plan,
    Prefix,
    StateCache,
    find_layers,
    frozen_depth,
    plan,
    row_key,
    why_not,
)
from lilliput.training.recipe import load_recipe
from lilliput.training.report import read_journal
from lilliput.training.resume import Checkpoints
from lilliput.training.trainer import LabelLoss, batch_of
from tests.conftest import make_tiny_llama
from tests.training.conftest import quick, write_rows
from tests.training.test_resume import assert_same_run
from tests.training.test_trainer import examples

UPPER = "lora.layers_to_transform=[2, 3]"
SMALL = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}


def llama(**changes: Any) -> PreTrainedModel:
    return make_tiny_llama(num_hidden_layers=4, **changes)


def gpt2(dropout: float = 0.0) -> PreTrainedModel:
    shares = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=4, n_head=4, n_positions=128, **shares))


def neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=64))


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**GROUPED))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**GROUPED))


def falcon() -> PreTrainedModel:
    """A family whose layers return tuples."""
    return FalconForCausalLM(FalconConfig(**SMALL))


def adapted(model: PreTrainedModel, **config: Any) -> PreTrainedModel:
    """With an adapter that matters on the upper half of four layers."""
    settings = {"r": 4, "target_modules": "all-linear", "layers_to_transform": [2, 3], **config}
    torch.manual_seed(1)
    add_adapter(model, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def planned(model: PreTrainedModel, packs: list[Pack], folder: Path, *settings: str, again: bool = True) -> Plan:
    return plan(LabelLoss(model), packs, load_recipe("qlora", settings).train, again, folder, 0)


def prefix_of(model: PreTrainedModel, packs: list[Pack], folder: Path) -> Prefix:
    found = planned(model, packs, folder, "train.reuse_prefix=on").prefix
    assert found is not None
    return found


def unpacked(lengths: tuple[int, ...] = (9, 5, 12, 7)) -> list[Pack]:
    return [Pack.of([row]) for row in examples(lengths)]


def loss_and_gradients(loss: LabelLoss, packs: list[Pack]) -> list[Tensor]:
    value = loss(**batch_of(packs, 0), packs=packs)["loss"]
    return [value, *torch.autograd.grad(value, [p for p in loss.parameters() if p.requires_grad])]


@pytest.mark.parametrize("make", [llama, gpt2, neox, mistral, qwen2, falcon])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_the_same_in_every_family(
    make: Callable[[], PreTrainedModel], packed: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = adapted(make())
    packs = pack(examples(), 20) if packed else unpacked()
    assert not packed or any(row.sequence_ids[-1] for row in packs)
    loss = LabelLoss(model)
    for mode in (False, True):
        model.train(mode)
        loss.prefix = None
        plain, alone = loss_and_gradients(loss, packs), loss_and_gradients(loss, packs[:1])
        loss.prefix = prefix_of(model, packs, tmp_path)
        assert loss.prefix.depth == 2
        first, again = loss_and_gradients(loss, packs), loss_and_gradients(loss, packs)
        for expected, got, kept in zip(plain, first, again, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(got, kept)
        for expected, got in zip(alone, loss_and_gradients(loss, packs[:1]), strict=True):
            assert torch.equal(got, expected)  # a row alone is the same computation


def test_a_model_that_shapes_its_logits_is_served_too(tmp_path: Path) -> None:
    loss, packs = LabelLoss(adapted(llama()), direct=False), unpacked()
    plain = loss_and_gradients(loss, packs)
    loss.prefix = prefix_of(loss.model, packs, tmp_path)
    for expected, got in zip(plain, loss_and_gradients(loss, packs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_lower_layers_run_once_a_row_and_without_a_graph(tmp_path: Path) -> None:
    """Three epochs in batches that differ, and evaluations between them; a repeated row counts once."""
    model = adapted(llama()).train()
    packs = [*unpacked((9, 5, 12, 7, 8, 6)), *unpacked((9,))]
    loss = LabelLoss(model)
    loss.prefix = prefix_of(model, packs, tmp_path)
    layers = find_layers(model)
    assert layers is not None
    calls = dict.fromkeys(("embeddings", 0, 1, 2, 3), 0)

    def count(name: str | int) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            calls[name] += 1
            if name in ("embeddings", 0, 1):
                assert not torch.is_grad_enabled()
                assert output.grad_fn is None

        return note

    model.get_input_embeddings().register_forward_hook(count("embeddings"))
    for number, layer in enumerate(layers):
        layer.register_forward_hook(count(number))
    batches = [[0, 1, 2], [3, 4, 5, 6], [5, 0], [1, 4], [2, 3, 6], [6, 5, 4, 3, 2, 1, 0]]
    for batch in batches:
        loss_and_gradients(loss, [packs[number] for number in batch])
        with torch.no_grad():
            loss(**batch_of(packs[:2], 0), packs=packs[:2])
    upper = 2 * len(batches)
    assert calls == {"embeddings": 6, 0: 6, 1: 6, 2: upper, 3: upper}
    assert loss.prefix.runs == len(loss.prefix.cache) == 6


def test_the_model_is_whole_after_a_failure(tmp_path: Path) -> None:
    model, packs = adapted(llama()), unpacked()
    prefix, layers = prefix_of(model, packs, tmp_path), find_layers(model)
    assert layers is not None
    own, names = list(layers), list(model.state_dict())
    with pytest.raises(KeyboardInterrupt), prefix.reused({"input_ids": batch_of(packs, 0)["input_ids"]}, packs):
        assert layers[0] is not own[0]
        raise KeyboardInterrupt
    assert all(layer is before for layer, before in zip(layers, own, strict=True))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_stays_within_its_bounds(dtype: torch.dtype, tmp_path: Path) -> None:
    """Rows of 5 x 24 numbers: two fit into memory, three into the file, the rest nowhere."""
    states = [torch.randn(5, 24).to(dtype) for _ in range(8)]
    size = states[0].nbytes
    aligned = -(-size // 64) * 64
    cache = StateCache(tmp_path / "cache", memory=2 * size + 10, total=2 * size + 10 + 3 * aligned)
    for number, state in enumerate(states):
        cache.put(bytes([number]), state)
    assert (cache.memory_used, cache.file_used, len(cache)) == (2 * size, 3 * aligned, 5)
    assert (tmp_path / "cache").stat().st_size <= 3 * aligned
    for number, state in enumerate(states):
        got = cache.get(bytes([number]))
        assert got is None if number >= 5 else torch.equal(got, state)
    cache.close()
    assert not list(tmp_path.iterdir())
    assert cache.get(bytes([0])) is None


class Full:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])  # as write(2) does: what fits first
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_is_said_once_and_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, packs = adapted(llama()), unpacked()
    loss = LabelLoss(model)
    loss.prefix = prefix_of(model, packs, tmp_path)
    expected = loss_and_gradients(loss, packs)
    size = 64 * 4 * len(packs[0])
    opened = StateCache._open

    def open_full(self: StateCache) -> None:
        opened(self)
        self._file = Full(self._file, room=size + 100)  # one row and a part of the next

    monkeypatch.setattr(StateCache, "_open", open_full)
    loss.prefix.cache = StateCache(tmp_path / CACHE_FILE, memory=0, total=10**9)
    for _ in range(2):
        for got, wanted in zip(loss_and_gradients(loss, packs), expected, strict=True):
            assert torch.equal(got, wanted)
    assert len(loss.prefix.cache) == 1
    assert loss.prefix.runs == 4 + 4 + 3
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("cannot be written (No space left on device)") == 1
    assert "beyond 1 is computed anew" in said
    loss.prefix.close()
    assert not (tmp_path / CACHE_FILE).exists()


def test_a_folder_that_cannot_be_written_is_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = StateCache(tmp_path / "missing" / "cache", memory=0, total=10**6)
    for number in range(3):
        cache.put(bytes([number]), torch.zeros(2, 2))
    assert len(cache) == 0
    assert capsys.readouterr().err.count("warning") == 1
    cache.close()


def test_rows_are_told_apart_by_tokens_and_boundaries() -> None:
    one, two = examples((6, 6))
    rows = [Pack.of([one]), Pack.of([two]), Pack.of([one, two]), Pack.of([two, one])]
    ids, labels, positions = rows[2].input_ids, rows[2].label_mask, rows[2].position_ids
    others = [Pack(ids, labels, list(range(12)), rows[2].sequence_ids), Pack(ids, labels, positions, [0] * 12)]
    assert len({row_key(row) for row in [*rows, *others]}) == 6
    assert row_key(Pack.of([one])) == row_key(rows[0])


@pytest.mark.parametrize(
    ("config", "depth"),
    [
        ({"layers_to_transform": [2, 3]}, 2),
        ({"layers_to_transform": [3]}, 3),
        ({"layers_to_transform": [1, 3]}, 1),
        ({"layers_to_transform": None}, 0),
        ({"layers_to_transform": [3], "bias": "lora_only"}, 3),
        ({"layers_to_transform": [3], "modules_to_save": ["embed_tokens"]}, 0),
        ({"layers_to_transform": None, "target_modules": ["lm_head"]}, 3),  # the last layer always runs
        ({"layers_to_transform": None, "target_modules": ["embed_tokens"]}, 0),
    ],
)
def test_depth_is_what_nothing_trained_reaches(config: dict[str, Any], depth: int) -> None:
    model = adapted(llama(), **config)
    layers = find_layers(model)
    assert layers is not None
    assert frozen_depth(model, layers) == (depth, False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gpt2(dropout=0.1),
        lambda: llama(attention_dropout=0.1),  # no module of its own: a number in the attention
    ],
)
def test_dropout_in_the_prefix_refuses(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model, packs = adapted(make()), unpacked()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    refused = planned(model, packs, tmp_path)
    assert refused.prefix is None
    assert refused.said is not None
    assert "the lowest 2 of 4 layers are frozen, not reused" in refused.said
    assert "random numbers" in refused.said
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UsageError, match=r"reuse_prefix=on: it draws random numbers.*reuse_prefix=auto"):
        planned(model, packs, tmp_path, "train.reuse_prefix=on")


def test_dropout_of_the_adapter_above_is_the_same_with_and_without(tmp_path: Path) -> None:
    model, packs = adapted(llama(), lora_dropout=0.3).train(), unpacked()
    loss, found = LabelLoss(model), []
    for prefix in (None, prefix_of(model, packs, tmp_path)):
        loss.prefix = prefix
        torch.manual_seed(7)
        found.append(loss_and_gradients(loss, packs))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


class Leaping(LlamaForCausalLM):
    """Its last layer also sees the embeddings: no forward that one state can part."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedded = torch.zeros(())
        self.model.register_forward_pre_hook(self.note, with_kwargs=True)
        self.model.layers[3].register_forward_pre_hook(lambda _, args: (args[0] + self.embedded,))

    def note(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        self.embedded = kwargs["inputs_embeds"] if ids is None else self.get_input_embeddings()(ids)


def test_a_family_that_is_not_exact_is_refused(tmp_path: Path) -> None:
    model, packs = adapted(Leaping(llama().config)), unpacked()
    refused = planned(model, packs, tmp_path)
    assert refused.prefix is None
    assert refused.said is not None
    assert "the forward of Leaping in two parts differs from its forward in one" in refused.said


def test_a_family_that_wants_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, packs = adapted(llama()), unpacked()
    forward = type(model.model).forward

    def only_ids(self: nn.Module, input_ids: Tensor, inputs_embeds: None = None, **kwargs: Any) -> Any:
        if inputs_embeds is not None:
            raise ValueError("give input_ids")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", only_ids)
    said = planned(model, packs, tmp_path).said
    assert said is not None
    assert "cannot be parted (give input_ids)" in said


def test_positions_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = adapted(llama(rope_parameters=rope, max_position_embeddings=40))
    assert planned(model, unpacked(), tmp_path).prefix is not None
    prefix = prefix_of(model, unpacked(), tmp_path)
    assert "longest row of a batch beyond 40 tokens" in str(why_not(prefix, unpacked((50,))))


def test_auto_is_on_when_it_pays_and_says_why_not(tmp_path: Path) -> None:
    model, packs = adapted(llama()), unpacked()
    used = planned(model, packs, tmp_path)
    assert used.prefix is not None
    assert used.said == "the lowest 2 of 4 layers are frozen and run once a row"
    assert planned(model, packs, tmp_path, again=False) == Plan(None, None)
    assert planned(model, packs, tmp_path, "train.reuse_prefix=off") == Plan(None, None)
    assert planned(adapted(llama(), layers_to_transform=None), packs, tmp_path) == Plan(None, None)
    tight = planned(model, packs, tmp_path, "train.prefix_cache_gb=0.000001")
    assert tight.prefix is None
    assert "more than twice train.prefix_cache_gb" in str(tight.said)
    shallow = adapted(make_tiny_llama(num_hidden_layers=12), layers_to_transform=list(range(1, 12)))
    assert "less than an eighth of the 12 layers" in str(planned(shallow, packs, tmp_path).said)
    asked = planned(model, packs, tmp_path, "train.reuse_prefix=on", "train.prefix_cache_gb=0", again=False)
    assert asked.prefix is not None
    with pytest.raises(UsageError, match="no layer is frozen below the lowest trained one"):
        planned(adapted(llama(), layers_to_transform=None), packs, tmp_path, "train.reuse_prefix=on")


@pytest.mark.parametrize(("text", "value"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("true", "on")])
def test_yaml_on_and_off(text: str, value: str, tmp_path: Path) -> None:
    recipe = quick(f"train.reuse_prefix={text}")
    assert recipe.train.reuse_prefix == value
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml").train.reuse_prefix == value


def test_another_word_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train.reuse_prefix='maybe'.*'auto', 'on', 'off'"):
        quick("train.reuse_prefix=maybe")


# Rows together.


def quantized_and_fused(make: Callable[..., PreTrainedModel], undo: ExitStack, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make(**changes)
    replace_linears(model, "nf4")
    undo.enter_context(fused(adapted(model)))
    return model


LENGTHS = (37, 9, 61, 5, 8, 100, 33, 64, 12)


@pytest.mark.skipif(not core.status().loaded, reason="the references are run row by row")
@pytest.mark.parametrize("make", [llama, mistral, qwen2])
@pytest.mark.parametrize("packed", [False, True])
def test_states_of_rows_together_are_those_alone_bit_for_bit(
    make: Callable[..., PreTrainedModel], packed: bool, tmp_path: Path
) -> None:
    rows = pack(examples(LENGTHS), 110) if packed else unpacked(LENGTHS)
    with ExitStack() as undo:
        prefix = prefix_of(quantized_and_fused(make, undo), rows, tmp_path)
        assert prefix.joins
        alone = [prefix.run(row) for row in rows]
        calls: list[int] = []
        prefix.layers[0].register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape[1]))
        for order in (range(len(rows)), reversed(range(len(rows))), [2, 0], [1]):
            chosen = list(order)
            for number, state in zip(chosen, prefix.run_all([rows[number] for number in chosen]), strict=True):
                assert torch.equal(state, alone[number])
        few = [len(row) for row in rows if len(row) <= joined.FEW]  # their products are summed in another order
        assert calls[: 1 + len(few)] == [sum(LENGTHS) - sum(few), *few]


def test_the_smallest_row_that_joins_is_more_than_the_core_calls_few() -> None:
    source = (Path(__file__).parents[2] / "csrc" / "ops" / "ops.h").read_text()
    assert f"few_rows_limit = {joined.FEW};" in source


def test_rows_run_alone_where_neighbours_could_change_bits(tmp_path: Path) -> None:
    """Dense products, torch's own activations, the references, and a model whose attention knows no blocks."""
    rows = unpacked(LENGTHS)
    assert not prefix_of(adapted(llama()), rows, tmp_path).joins
    assert not prefix_of(adapted(gpt2()), rows, tmp_path).joins
    plain = llama()
    replace_linears(plain, "nf4")
    assert not prefix_of(adapted(plain), rows, tmp_path).joins
    with ExitStack() as undo:
        model = quantized_and_fused(llama, undo)
        with kernels.use("reference"):
            assert not prefix_of(model, rows, tmp_path).joins
        loss = LabelLoss(model)
        loss.in_blocks = False
        found = plan(loss, rows, load_recipe("qlora", ["train.reuse_prefix=on"]).train, True, tmp_path, 0).prefix
        assert found is not None
        assert not found.joins


@pytest.mark.skipif(not core.status().loaded, reason="the references are run row by row")
def test_rows_beyond_a_window_and_packs_that_are_recomputed_run_alone(tmp_path: Path) -> None:
    with ExitStack() as undo:
        model = quantized_and_fused(lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=40)), undo)
        prefix = prefix_of(model, unpacked((9, 20, 30, 39)), tmp_path)
        assert prefix.joins
        rows = [*unpacked((30, 61)), *pack(examples((12, 15)), 30)]
        assert [prefix._can_join(row) for row in rows] == [True, False, True]
        model.gradient_checkpointing_enable()
        assert [prefix._can_join(row) for row in rows] == [True, False, False]


def test_a_group_of_rows_has_a_bound() -> None:
    rows = unpacked((600, 424, 1, 1500, 20, 30))
    assert [[len(row) for row in group] for group in joined.groups(rows)] == [[600, 424], [1], [1500], [20, 30]]
    assert joined.lengths_of(pack(examples((12, 15, 1)), 30)) == [15, 12, 1]
    assert list(joined.groups([])) == []


# Whole runs.


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny Llama with four layers."""
    directory = tmp_path_factory.mktemp("four-layers")
    llama().save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def trained(model: Path, rows: Path, out: Path, *settings: str, **options: Any) -> Any:
    return tune(str(model), rows, out, quick(UPPER, *settings), **{"check": False, "progress": False, **options})


def adapter_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses_of(run: Path, key: str) -> Tensor:
    return torch.tensor([line[key] for line in read_journal(run / "metrics.jsonl") if key in line])


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("data.packing=true", "data.max_length=160"),
        ("train.gradient_checkpointing=true", "train.seed=5"),
        ("model.format=nf4", "train.batch_size=4", "train.accumulation=1"),
    ],
    ids=["plain", "packed", "checkpointed", "nf4"],
)
def test_a_run_comes_to_the_same(settings: tuple[str, ...], model_dir: Path, rows: Path, tmp_path: Path) -> None:
    results = [
        trained(model_dir, rows, tmp_path / reuse, *settings, f"train.reuse_prefix={reuse}")
        for reuse in ("off", "auto")
    ]
    assert results[0].prefix is None
    assert "the lowest 2 of 4 layers" in results[1].prefix
    for key in ("loss", "eval_loss"):
        torch.testing.assert_close(
            losses_of(tmp_path / "auto", key), losses_of(tmp_path / "off", key), rtol=1e-4, atol=0
        )
    expected, got = adapter_of(tmp_path / "off"), adapter_of(tmp_path / "auto")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)


def test_rows_alone_come_to_the_same_bit_for_bit(model_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Batches of one: each state is computed as it would be without reuse."""
    alone = ("train.batch_size=1", "train.accumulation=4")
    for reuse in ("off", "on"):
        trained(model_dir, rows, tmp_path / reuse, *alone, f"train.reuse_prefix={reuse}")
    expected, got = adapter_of(tmp_path / "off"), adapter_of(tmp_path / "on")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert torch.equal(losses_of(tmp_path / "on", "eval_loss"), losses_of(tmp_path / "off", "eval_loss"))


@pytest.fixture(scope="module")
def in_memory(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the rows, the folder of an undisturbed run with reuse)."""
    folder = tmp_path_factory.mktemp("in-memory")
    rows = write_rows(folder / "rows.jsonl")
    trained(model_dir, rows, folder / "run", "train.reuse_prefix=on")
    return rows, folder / "run"


@pytest.mark.skipif(not core.status().loaded, reason="the references are run row by row")
@pytest.mark.parametrize("packing", ["false", "true"])
def test_joined_and_killed_in_the_first_epoch_is_bit_for_bit(
    packing: str, model_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the second epoch meet in batches that are not those of the first; their states are the same."""
    joins: list[bool] = []

    def note(prefix: Prefix, packs: Sequence[Pack], find: Callable[..., bool] = prefix_module.joins) -> bool:
        joins.append(find(prefix, packs))
        return joins[-1]

    monkeypatch.setattr(prefix_module, "joins", note)
    settings = ("model.format=nf4", "train.reuse_prefix=on", "train.batch_size=2", f"data.packing={packing}")
    settings = (*settings, "data.max_length=160", "train.accumulation=1", "train.save_every=5", "train.epochs=2")
    whole = trained(model_dir, rows, tmp_path / "whole", *settings)
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
        publish = Checkpoints.publish

        def deadly(self: Checkpoints, at: int, best: int | None) -> None:
            publish(self, at, best)
            raise Stopped

        patch.setattr(Checkpoints, "publish", deadly)
        trained(model_dir, rows, tmp_path / "cut", *settings)
    trained(model_dir, rows, tmp_path / "cut", *settings, resume=True)
    expected, got = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    for key in ("loss", "eval_loss"):
        assert torch.equal(losses_of(tmp_path / "cut", key), losses_of(tmp_path / "whole", key))
    assert joins == [True] * 3
    assert "the lowest 2 of 4 layers" in whole.prefix


class Stopped(Exception):
    """The end of a run in the middle."""


def test_it_is_said_once_and_stands_in_the_report(
    model_dir: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = trained(model_dir, rows, tmp_path / "run", progress=True)
    assert capsys.readouterr().err.count("the lowest 2 of 4 layers are frozen and run once a row") == 1
    assert result.prefix == result.to_json()["prefix"]
    assert result.prefix.startswith("the lowest 2 of 4 layers ran for 30 rows, 30 rows kept: ")
    assert f"| frozen prefix | {result.prefix} |" in (tmp_path / "run" / "report.md").read_text()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """(rows kept, bytes in memory, bytes in the file) whenever a cache is closed."""
    seen: list[tuple[int, int, int]] = []
    close = StateCache.close

    def note(self: StateCache) -> None:
        if self.file_used:
            assert self.path.name == CACHE_FILE
            assert self.path.stat().st_size <= self.total - self.memory
        seen.append((len(self), self.memory_used, self.file_used))
        close(self)

    monkeypatch.setattr(prefix_module.StateCache, "close", note)
    return seen


@pytest.mark.parametrize(("memory", "total", "kept"), [(0.0001, 1.0, 30), (0.0, 0.0002, None), (0.0, 0.0, 0)])
def test_where_states_are_kept_changes_no_bit(
    memory: float, total: float, kept: int | None, in_memory: tuple[Path, Path], model_dir: Path, tmp_path: Path,
    watched: list[tuple[int, int, int]],
) -> None:  # fmt: skip
    """A tenth of a megabyte in memory and the rest in the file; a file too small for all; nothing at all."""
    rows, expected = in_memory
    bounds = (f"train.prefix_memory_gb={memory}", f"train.prefix_cache_gb={total}")
    trained(model_dir, rows, tmp_path / "run", "train.reuse_prefix=on", *bounds)
    assert_same_run(expected, tmp_path / "run")
    assert not (tmp_path / "run" / CACHE_FILE).exists()
    rows_kept, in_memory_bytes, in_file_bytes = watched[-1]
    assert in_memory_bytes <= memory * 1e9
    assert in_memory_bytes + in_file_bytes <= total * 1e9
    assert rows_kept == kept or (kept is None and 0 < rows_kept < 30)
    assert (in_file_bytes > 0) == (total > 0)


KILLED = """
import os, signal, sys
from lilliput.training.resume import Checkpoints
publish = Checkpoints.publish
def deadly(self, at, best):
    publish(self, at, best)
    if at == 10: os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.publish = deadly
from tests.training.test_prefix import FILED, trained
trained(*sys.argv[1:4], *FILED)
"""
FILED = ("train.reuse_prefix=on", "train.prefix_memory_gb=0.0001")


def test_killed_and_resumed_is_bit_for_bit(in_memory: tuple[Path, Path], model_dir: Path, tmp_path: Path) -> None:
    """What was in memory is gone and the file is left, not to be trusted; states computed again are the same."""
    rows, expected = in_memory
    root = Path(__file__).parents[2]
    path = f"{root / 'src'}{os.pathsep}{root}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = [str(model_dir), str(rows), str(tmp_path / "run")]
    died = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (tmp_path / "run" / CACHE_FILE).exists()
    trained(model_dir, rows, tmp_path / "run", *FILED, resume=True)
    assert_same_run(expected, tmp_path / "run")
    assert not (tmp_path / "run" / CACHE_FILE).exists()
