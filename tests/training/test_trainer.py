"""The loss and the rows that the Trainer is given: against the definition, and against transformers' own loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from lilliput.data import Example, Pack, pack
from lilliput.errors import LilliputError
from lilliput.lora import LoraConfig, add_adapter
from lilliput.training import tune
from lilliput.training.recipe import Recipe, load_recipe
from lilliput.training.trainer import (
    LabelLoss,
    LabelTrainer,
    Rows,
    batch_of,
    count_steps,
    eval_interval,
    make_arguments,
)

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=128))


def granite() -> PreTrainedModel:
    return GraniteForCausalLM(
        GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=3.0, attn_implementation="sdpa")
    )


def gemma2() -> PreTrainedModel:
    config = Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, attn_implementation="eager"
    )
    return Gemma2ForCausalLM(config)


def examples(lengths: tuple[int, ...] = (9, 5, 12, 7)) -> list[Example]:
    """Random tokens; the last two thirds are labels."""
    made = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 512, (n,), generator=made).tolist() for n in lengths]
    return [Example(row, [t >= len(row) // 3 for t in range(len(row))]) for row in ids]


def defined_loss(model: PreTrainedModel, rows: list[Example]) -> tuple[torch.Tensor, int]:
    """(sum of cross entropies at labels, labels): each row alone through the model, all logits, no mask."""
    total, labels = torch.zeros(()), 0
    for row in rows:
        ids, wanted = torch.tensor([row.input_ids]), torch.tensor(row.label_mask[1:])
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + functional.cross_entropy(logits[wanted], ids[0, 1:][wanted], reduction="sum")
        labels += int(wanted.sum())
    return total, labels


@pytest.mark.parametrize(("make", "direct"), [(gpt2, True), (granite, False), (gemma2, False)])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_equals_the_definition_in_every_family(
    make: Callable[[], PreTrainedModel], direct: bool, packed: bool
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # logits that differ, so that a forgotten scale shows
    loss, rows = LabelLoss(model), examples()
    packs = pack(rows, 40) if packed else [Pack.of([row]) for row in rows]
    got = loss(**batch_of(packs, 0))["loss"]
    total, labels = defined_loss(model, rows)
    assert loss.direct is direct
    torch.testing.assert_close(got, total / labels, rtol=1e-5, atol=1e-6)


def test_loss_and_gradients_equal_transformers_own(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    model, rows = tiny_llama(), examples()
    batch = batch_of([Pack.of([row]) for row in rows], 0)
    own = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    parameters = list(model.model.parameters())
    theirs = torch.autograd.grad(own, parameters)
    ours = LabelLoss(model)(**batch)["loss"]
    torch.testing.assert_close(ours, own)
    for got, expected in zip(torch.autograd.grad(ours, parameters), theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_the_head_never_runs_over_all_tokens(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    model = tiny_llama()
    loss = LabelLoss(model)

    def fail(*_: object) -> None:
        raise AssertionError("the head ran")

    model.lm_head.register_forward_hook(fail)
    loss(**batch_of([Pack.of([row]) for row in examples()], 0))["loss"].backward()


def test_an_adapted_head_is_seen(tiny_llama: Callable[..., PreTrainedModel]) -> None:
    model = tiny_llama()
    add_adapter(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    loss = LabelLoss(model)
    total, labels = defined_loss(model, examples())
    assert not loss.direct
    torch.testing.assert_close(loss(**batch_of(pack(examples(), 40), 0))["loss"], total / labels)


def test_accumulation_does_not_change_a_run(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    adapters = []
    for batch_size, accumulation in ((1, 8), (8, 1), (2, 4)):
        settings = (f"train.batch_size={batch_size}", f"train.accumulation={accumulation}", "lora.lora_dropout=0")
        out = tmp_path / f"{batch_size}x{accumulation}"
        tune(str(tiny_model_dir), rows, out, recipe(*settings), check=False, progress=False)
        adapters.append(load_file(out / "adapter" / "adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        assert tensor.abs().max() > 0
        for other in adapters[1:]:
            torch.testing.assert_close(tensor, other[name], rtol=2e-3, atol=2e-5)


def test_gradient_checkpointing_changes_nothing(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    losses = []
    for on in ("false", "true"):
        result = tune(
            str(tiny_model_dir),
            rows,
            tmp_path / on,
            recipe(f"train.gradient_checkpointing={on}"),
            check=False,
            progress=False,
        )
        losses.append(result.train_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_evaluation_weighs_tokens_equally(tiny_llama: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model, rows = tiny_llama(), examples((30, 4, 5, 6, 7))
    add_adapter(model, LoraConfig(r=2, target_modules="all-linear"))
    train = load_recipe("qlora", ["train.batch_size=2"]).train
    packs = [Pack.of([row]) for row in rows]
    trainer = LabelTrainer(
        LabelLoss(model),
        make_arguments(train, str(tmp_path), 10, evaluate=True, resumed=False),
        pad_token_id=0,
        eval_dataset=packs,
    )
    with torch.no_grad():
        total, labels = defined_loss(model, rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx((total / labels).item(), rel=1e-5)


def test_a_loss_that_is_no_number_ends_the_run(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    wild = recipe("train.learning_rate=1e30", "train.max_grad_norm=0", "train.warmup=0")
    with pytest.raises(LilliputError, match=r"training step \d+: the loss is (nan|inf).*Lower train.learning_rate"):
        tune(str(tiny_model_dir), rows, tmp_path / "out", wild, check=False, progress=False)


def test_order_is_a_function_of_seed_and_epoch_and_mixes_lengths_into_steps() -> None:
    packs = [Pack.of([row]) for row in examples(tuple(range(3, 53)))]
    rows = Rows(packs, step_rows=8, seed=1)
    first = [rows[i] for i in range(len(rows))]
    assert sorted(map(len, first)) == list(range(3, 53))
    rows.set_epoch(1)
    assert [rows[i] for i in range(len(rows))] != first
    rows.set_epoch(0)
    assert [rows[i] for i in range(len(rows))] == first
    assert [Rows(packs, step_rows=8, seed=2)[i] for i in range(50)] != first
    spread = [max(map(len, first[at : at + 8])) - min(map(len, first[at : at + 8])) for at in range(0, 48, 8)]
    assert max(spread) <= 10  # of 49: rows of a step are of similar length, and the two odd ones come last


def test_steps_are_counted_as_the_trainer_does() -> None:
    train = load_recipe("qlora", ["train.batch_size=4", "train.accumulation=2", "train.epochs=2.5"]).train
    assert count_steps(33, train) == 13  # 9 batches, 5 steps an epoch
    assert eval_interval(13, train) == 2
    assert count_steps(33, load_recipe("qlora", ["train.max_steps=7"]).train) == 7
