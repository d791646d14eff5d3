"""Every family of models in every number format: loaded, run, adapted, saved, generated with and packed.

A format is added by its name in FORMATS and its row in BOUNDS; a family by a row of family_table.py. Where two ways of
computing the same are compared, int8 does not round its inputs (`unrounded`): a last bit can decide a code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lilliput import load_model, lora, save_model
from lilliput.data import Example, Pack, pack
from lilliput.errors import UsageError
from lilliput.evaluation.perplexity import perplexity
from lilliput.generation.chat import ChatSession
from lilliput.layers import QuantizedLinear, identity_of, quantized_layers, replace_linears, unrounded
from lilliput.layers.replace import linear_names
from lilliput.lora.targets import DEFAULT_TARGETS, resolve
from lilliput.models.hf import config_for
from lilliput.training.fused import fused
from lilliput.training.prefix import plan
from lilliput.training.run import tune
from lilliput.training.trainer import LabelLoss, batch_of
from tests.models.family_table import FAMILIES, VOCABULARY, Family, inputs_of, labels_of, make_family
from tests.training.conftest import quick, write_rows

FORMATS = ["nf4", "int8"]


@dataclass(frozen=True)
class Bound:
    """How far a format may be from full precision.

    Attributes:
        weights: of a layer's weight, relative to its norm.
        products: of the logits from those of the same model with the dequantized weights, relative to their norm;
            rounding only, but for formats that round what comes into a layer too.
        agreement: least correlation of the logits with the full-precision model's.
    """

    weights: float
    products: float
    agreement: float


BOUNDS = {
    "nf4": Bound(weights=0.12, products=1e-5, agreement=0.9),
    "fp4": Bound(weights=0.15, products=1e-5, agreement=0.85),
    "int8": Bound(weights=0.012, products=0.05, agreement=0.99),
}
AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "classify": transformers.AutoModelForSequenceClassification,
    "translate": transformers.AutoModelForSeq2SeqLM,
}
SHORT = ("model.format=nf4", "lora.target_modules=all-linear", "train.max_steps=1", "data.eval_fraction=0")
LENGTHS = (20, 31, 9, 14, 40, 11)  # some longer than the table's windows of 16
IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
CAUSAL = [family for family in FAMILIES if family.task == "causal"]


def each(families: Any) -> Any:
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


each_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of each family's full-precision model, by name, as transformers writes it."""
    made = {family.name: tmp_path_factory.mktemp(family.name) for family in FAMILIES}
    for family in FAMILIES:
        make_family(family).save_pretrained(made[family.name])
    return made


def logits(family: Family, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(family, IDS)).logits


@torch.no_grad()
def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def leaves(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def ends_with(name: str, endings: tuple[str, ...]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


# ---- load, run, save ----


@each(FAMILIES)
@each_format
def test_loaded_by_either_door_and_close_to_full_precision(family: Family, format: str, directories) -> None:
    full, bound = make_family(family), BOUNDS[format]
    ours = load_model(directories[family.name], format=format, progress=False)
    theirs = AUTO[family.task].from_pretrained(
        directories[family.name], quantization_config=config_for(format), dtype=torch.float32
    )
    names = [name for name, _ in quantized_layers(ours)]
    assert type(ours).__name__ == type(theirs).__name__ == family.model
    assert names == [name for name, _ in quantized_layers(theirs)]
    assert leaves(names) == set(family.layers)
    assert all(ends_with(name, family.dense) for name in linear_names(ours))
    for name, layer in quantized_layers(ours):
        original = full.get_submodule(name)
        weight = layer.dequantize().T if layer.transposed else layer.dequantize()
        assert distance(weight, original.weight) < bound.weights, name
        original.weight.data = weight.contiguous()
    assert_dense_as_they_were(ours, full)
    assert distance(logits(family, ours), logits(family, full)) < bound.products
    assert torch.equal(logits(family, ours), logits(family, theirs))
    exact = logits(family, make_family(family))
    assert torch.corrcoef(torch.stack([logits(family, ours).flatten(), exact.flatten()]))[0, 1] > bound.agreement


def assert_dense_as_they_were(model: PreTrainedModel, full: PreTrainedModel) -> None:
    """Embeddings, heads, norms and biases: the same classes and bits; tied weights are still one."""
    for name, module in full.named_modules():
        same = model.get_submodule(name)
        if not isinstance(same, QuantizedLinear):
            assert type(same) is type(module), name
            for key, parameter in module.named_parameters(recurse=False):
                assert torch.equal(same.get_parameter(key), parameter), f"{name}.{key}"
    head, same_head = full.get_output_embeddings(), model.get_output_embeddings()
    if head is not None:
        tied = head.weight is full.get_input_embeddings().weight
        assert (same_head.weight is model.get_input_embeddings().weight) is tied


@each(FAMILIES)
@each_format
def test_saved_and_loaded_again_bit_for_bit(family: Family, format: str, directories, tmp_path: Path) -> None:
    model = load_model(directories[family.name], format=format, progress=False)
    save_model(model, tmp_path)
    ours = load_model(tmp_path, progress=False)
    theirs = AUTO[family.task].from_pretrained(tmp_path, dtype=torch.float32)
    assert identity_of(ours).quantized_sha256 == identity_of(model).quantized_sha256
    assert torch.equal(logits(family, ours), logits(family, model))
    assert torch.equal(logits(family, theirs), logits(family, model))


@each([family for family in FAMILIES if family.task != "classify"])
@each_format
def test_generates_the_same_with_a_cache_and_without(family: Family, format: str, directories) -> None:
    model = load_model(directories[family.name], format=format, progress=False)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(IDS[:1])
    with unrounded(model):
        cached, plain = (
            model.generate(IDS[:1], attention_mask=mask, use_cache=use, **options) for use in (True, False)
        )
    assert cached.shape[1] == 8 + (1 if family.task == "translate" else IDS.shape[1])
    assert torch.equal(cached, plain)


# ---- adapters ----


@each(FAMILIES)
@each_format
@pytest.mark.parametrize("targets", ["all-linear", None])
def test_an_adapter_learns_and_comes_back(
    family: Family, format: str, targets: str | None, directories, tmp_path: Path
) -> None:
    model = load_model(directories[family.name], format=format, progress=False)
    before = identity_of(model)
    task = {"task_type": "SEQ_CLS"} if family.task == "classify" else {}
    lora.add_adapter(model, lora.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **task))
    wrapped = leaves(list(lora.target_layers(model)))
    assert wrapped == (set(family.targets) if targets is None else all_linear(family))
    losses = train(family, model)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert identity_of(model) == before
    trained = logits(family, model)
    lora.save_adapter(model, tmp_path)
    again = load_model(directories[family.name], format=format, progress=False)
    lora.load_adapter(again, tmp_path)
    assert torch.equal(logits(family, again), trained)
    peers = by_peft(family, format, directories[family.name], tmp_path)
    with unrounded(again), unrounded(peers):
        assert distance(logits(family, peers), logits(family, again)) < 1e-5


def all_linear(family: Family) -> set[str]:
    return {*family.layers, *(name for name in family.dense if name == "wo")}


def train(family: Family, model: nn.Module, steps: int = 3) -> list[float]:
    """The losses before each step and after the last one. The last step's gradients are left."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    losses = []
    for step in range(steps + 1):
        optimizer.zero_grad()
        inputs = {key: value for key, value in inputs_of(family, IDS).items() if key != "decoder_input_ids"}
        loss = model(**inputs, labels=labels_of(family, IDS)).loss
        loss.backward()
        losses.append(loss.item())
        if step < steps:
            optimizer.step()
    model.eval()
    return losses


def by_peft(family: Family, format: str, directory: Path, adapter: Path) -> nn.Module:
    """The adapter on the quantized model, both read by the peers."""
    peft = pytest.importorskip("peft", reason="comparisons with PEFT need peft (extra `test`)")
    base = AUTO[family.task].from_pretrained(directory, quantization_config=config_for(format), dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, adapter).eval()


@each(FAMILIES)
def test_targets_are_those_of_peft(family: Family) -> None:
    peft = pytest.importorskip("peft", reason="comparisons with PEFT need peft (extra `test`)")
    assert DEFAULT_TARGETS[make_family(family).config.model_type] == family.targets
    for targets in (None, "all-linear"):
        task = "SEQ_CLS" if family.task == "classify" else None
        model = make_family(family)
        _, ours, _ = resolve(model, lora.LoraConfig(target_modules=targets, task_type=task))
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type=task))
        assert ours == theirs.base_model.targeted_module_names


# ---- training ----


@each(CAUSAL)
@each_format
def test_packed_loss_equals_unpacked_loss_or_packing_is_refused(family: Family, format: str) -> None:
    model = adapted(family, format)
    with torch.no_grad(), fused(model), unrounded(model):
        alone = sum(plain_loss(model, example) for example in examples())
        loss = LabelLoss(model)

        def total(rows: list[Pack]) -> float:
            return loss(**batch_of(rows, 0), num_items_in_batch=1)["loss"].item()

        assert loss.packs is family.packs
        assert total([Pack.of([example]) for example in examples()]) == pytest.approx(alone, rel=2e-6)
        for width in (64, 200):  # two rows, one row
            rows = pack(examples(), width)
            if family.packs:
                assert total(rows) == pytest.approx(alone, rel=2e-6)
            else:
                with pytest.raises(UsageError, match=r"packed row apart.*data\.packing=false"):
                    total(rows)


def adapted(family: Family, format: str, **fields: Any) -> PreTrainedModel:
    """The quantized family with an adapter that matters."""
    model = make_family(family)
    replace_linears(model, format)
    torch.manual_seed(2)
    config = lora.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **fields)
    lora.add_adapter(model, config)
    return model


def examples() -> list[Example]:
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in LENGTHS]
    return [Example(row, [place > len(row) // 3 for place in range(len(row))]) for row in rows]


@torch.no_grad()
def plain_loss(model: nn.Module, example: Example) -> float:
    """The sum of cross entropies by the definition, from the model's own logits."""
    ids, wanted = torch.tensor([example.input_ids]), torch.tensor(example.label_mask[1:])
    scores = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return functional.cross_entropy(scores[wanted], ids[0, 1:][wanted], reduction="sum").item()


@each(CAUSAL)
@each_format
def test_the_frozen_prefix_is_exact_or_left_alone(family: Family, format: str, tmp_path: Path) -> None:
    model = adapted(family, format, layers_to_transform=[1])
    loss = LabelLoss(model)
    rows = pack(examples(), 64) if family.packs else [Pack.of([example]) for example in examples()]
    batch = batch_of(rows, 0)
    with unrounded(model):
        plain = loss(**batch, num_items_in_batch=1)["loss"].item()
    planned = plan(loss, rows, quick().train, True, tmp_path, 0)
    assert (planned.prefix is not None) is family.parts, planned.said
    if planned.prefix is not None:
        loss.prefix = planned.prefix
        with unrounded(model):
            reused = loss(**batch, num_items_in_batch=1, packs=rows)["loss"].item()
        assert reused == pytest.approx(plain, rel=2e-6)
        planned.prefix.close()


@contextmanager
def on_disk(name: str, folder: Path, tokenizer: Any) -> Iterator[Path]:
    """A family with the tiny tokenizer's vocabulary, beside rows to train on."""
    family = next(family for family in FAMILIES if family.name == name)
    make_family(replace(family, config={**family.config, "vocab_size": 512})).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", 24)
    yield folder / "model"


@pytest.mark.parametrize("name", ["mpt", "falcon"])
def test_tuned_with_packed_rows_and_every_check(name: str, tmp_path: Path, tiny_tokenizer) -> None:
    settings = (*SHORT, "data.packing=true")
    with on_disk(name, tmp_path, tiny_tokenizer) as model:
        tune(str(model), tmp_path / "rows.jsonl", tmp_path / "run", quick(*settings), progress=False)
    checks = json.loads((tmp_path / "run" / "run.json").read_text())["checks"]
    assert len(checks) == 7
    assert all(check["passed"] for check in checks)
    base = load_model(model, format="nf4", progress=False)
    lora.load_adapter(base, tmp_path / "run")
    assert math.isfinite(perplexity(base, tiny_tokenizer, "A quick brown fox. " * 20, context=32).perplexity)
    assert isinstance("".join(ChatSession(base, tiny_tokenizer).reply("Hello")), str)


def test_a_family_that_cannot_pack_says_so_and_trains_without(tmp_path: Path, tiny_tokenizer) -> None:
    with on_disk("bloom", tmp_path, tiny_tokenizer) as model:
        with pytest.raises(UsageError, match=r"BloomForCausalLM cannot keep.*Set data\.packing=false"):
            packed = quick(*SHORT, "data.packing=true")
            tune(str(model), tmp_path / "rows.jsonl", tmp_path / "run", packed, progress=False)
        unpacked = quick(*SHORT, "data.packing=false")
        tune(str(model), tmp_path / "rows.jsonl", tmp_path / "run", unpacked, progress=False, overwrite=True)
    checks = json.loads((tmp_path / "run" / "run.json").read_text())["checks"]
    assert all(check["passed"] for check in checks)
    assert "takes no packed ones" in checks[0]["detail"]


def test_rows_longer_than_mpts_biases_are_refused(tmp_path: Path, tiny_tokenizer) -> None:
    with (
        on_disk("mpt", tmp_path, tiny_tokenizer) as model,
        pytest.raises(UsageError, match=r"rows of 512 tokens.*Set data\.max_length=256"),
    ):
        longer = quick("data.packing=true", "data.max_length=512")
        tune(str(model), tmp_path / "rows.jsonl", tmp_path / "run", longer, progress=False)


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_what_does_not_continue_text_is_refused_by_name(name: str, tmp_path: Path, tiny_tokenizer) -> None:
    said = "(T5ForConditionalGeneration is an encoder and a decoder|BertForSequenceClassification is no causal)"
    with on_disk(name, tmp_path, tiny_tokenizer) as directory:
        model = load_model(directory, progress=False)
        with pytest.raises(UsageError, match=f"{said}.*chatting takes"):
            ChatSession(model, tiny_tokenizer)
        with pytest.raises(UsageError, match=f"{said}.*perplexity takes"):
            perplexity(model, tiny_tokenizer, "some text")


def test_encoder_and_decoder_are_not_tuned_as_one_text(tmp_path: Path, tiny_tokenizer) -> None:
    with (
        on_disk("t5", tmp_path, tiny_tokenizer) as model,
        pytest.raises(UsageError, match="encoder and a decoder; training takes"),
    ):
        tune(str(model), tmp_path / "rows.jsonl", tmp_path / "run", quick(), progress=False)


# ---- checkpoints as they lie on the hub ----


@pytest.mark.parametrize("named", [None, ["NoClassOfTransformers"]])
@each([family for family in FAMILIES if family.task != "classify"])
def test_the_class_is_found_without_its_name(family: Family, named: list[str] | None, directories, tmp_path) -> None:
    for file in directories[family.name].iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": named}))
    assert type(load_model(tmp_path, progress=False)).__name__ == family.model


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt-neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt-neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt-neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("falcon", "transformer.h.0.self_attention.rotary_emb.inv_freq"),
        ("bert", "bert.embeddings.position_ids"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    ],
)
def test_constants_that_old_versions_wrote_are_passed_over(name: str, key: str, directories, tmp_path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    make_family(family).config.save_pretrained(tmp_path)
    tensors = load_file(directories[name] / "model.safetensors")
    save_file({**tensors, key: torch.ones(4)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directories[name] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path, progress=False)
    assert torch.equal(logits(family, model), logits(family, make_family(family)))
