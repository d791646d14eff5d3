"""Each promise holds on a good setup, and each check sees its promise broken."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lilliput.data import Example, ExampleSet, Pack, collate, load_examples
from lilliput.errors import CheckFailed, UsageError
from lilliput.lora import LoraConfig, active_adapters, adapters, add_adapter, load_adapter
from lilliput.training.checks import CHECKS, CheckResult, require, run_checks


@pytest.fixture
def model(tiny_llama: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    made = tiny_llama()
    for parameter in made.parameters():
        parameter.data.mul_(3)  # a random model hardly looks at its context; this one does
    add_adapter(made, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    return made


@pytest.fixture
def examples(rows: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> ExampleSet:
    return load_examples(rows, tiny_tokenizer, max_length=128, progress=False)


def broken(results: Sequence[CheckResult]) -> set[str]:
    assert [result.name for result in results] == list(CHECKS)
    assert all(result.todo for result in results if not result.passed)
    return {result.name for result in results if not result.passed}


def changed(examples: ExampleSet, change: Callable[[Example], Example]) -> ExampleSet:
    return dataclasses.replace(examples, examples=[change(example) for example in examples])


def check(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: ExampleSet, **options: object
) -> set[str]:
    return broken(run_checks(model, tokenizer, examples, show=False, progress=False, **options))


def test_all_promises_hold(
    model: PreTrainedModel, examples: ExampleSet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    results = run_checks(model, tiny_tokenizer, examples, show=False, progress=False)
    assert not broken(results)
    assert all(result.detail for result in results)
    require(results)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_nothing_is_changed(
    bias: str, tiny_llama: Callable[..., PreTrainedModel], examples: ExampleSet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(attention_bias=True)
    add_adapter(model, LoraConfig(r=4, target_modules="all-linear", bias=bias))
    model.train()

    def everything() -> tuple[dict[str, Tensor], list[object]]:
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        drawn = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
        modes = [module.training for module in model.modules()]
        gradients = [parameter.grad for parameter in model.parameters()]
        return tensors, [trained, drawn, modes, gradients, active_adapters(model), list(adapters(model))]

    tensors, rest = everything()
    assert not check(model, tiny_tokenizer, examples)
    after, rest_after = everything()
    assert rest == rest_after
    assert tensors.keys() == after.keys()
    assert all(torch.equal(tensors[name], after[name]) for name in tensors)


def test_tokens_that_see_their_neighbours_are_caught(
    model: PreTrainedModel,
    examples: ExampleSet,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By blocks that are too long, and by a mask that is too open."""

    def leaky(packs: Sequence[Pack], pad: int) -> dict[str, Tensor]:
        batch = collate(packs, pad)
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"]).tril()  # causal, across examples
        return batch

    with monkeypatch.context() as patched:
        patched.setattr("lilliput.training.trainer.blocks_of", lambda positions: [[positions.shape[1]]])
        assert check(model, tiny_tokenizer, examples) == {"packed loss = unpacked loss"}
    model.set_attn_implementation("eager")
    assert not check(model, tiny_tokenizer, examples)
    assert check(model, tiny_tokenizer, examples, collate=leaky) == {"packed loss = unpacked loss"}


def test_positions_that_run_on_are_not_seen_by_rope_but_by_learned_ones_they_are(
    examples: ExampleSet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=1024)).eval()
    add_adapter(model, LoraConfig(r=4, target_modules=["c_attn"]))

    def running(packs: Sequence[Pack], pad: int) -> dict[str, Tensor]:
        batch = collate(packs, pad)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        return batch

    assert not check(model, tiny_tokenizer, examples)
    assert check(model, tiny_tokenizer, examples, collate=running) == {"packed loss = unpacked loss"}


def test_labels_on_padding_are_caught(
    model: PreTrainedModel, examples: ExampleSet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def greedy(packs: Sequence[Pack], pad: int) -> dict[str, Tensor]:
        batch = collate(packs, pad)
        width = torch.arange(batch["input_ids"].shape[1])
        lengths = torch.tensor([[len(pack)] for pack in packs])
        batch["labels"] = torch.where(width >= lengths, batch["input_ids"], batch["labels"])
        return batch

    assert check(model, tiny_tokenizer, examples, collate=greedy) == {"accumulation 1 x 8 = 8 x 1"}


def test_a_collator_that_loses_the_end_is_caught(
    model: PreTrainedModel, examples: ExampleSet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def forgetful(packs: Sequence[Pack], pad: int) -> dict[str, Tensor]:
        batch = collate(packs, pad)
        batch["labels"][batch["labels"] == tiny_tokenizer.eos_token_id] = -100
        return batch

    assert "every turn's end is a label once" in check(model, tiny_tokenizer, examples, collate=forgetful)


def test_a_label_mask_without_the_end_is_caught(
    model: PreTrainedModel, examples: ExampleSet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def without_end(example: Example) -> Example:
        end = tiny_tokenizer.eos_token_id
        marked = [label and token != end for token, label in zip(example.input_ids, example.label_mask, strict=True)]
        return dataclasses.replace(example, label_mask=marked)

    assert check(model, tiny_tokenizer, changed(examples, without_end)) == {"every turn's end is a label once"}


@pytest.mark.parametrize(
    ("by", "promise"),
    [
        (-1, "every turn's end is a label once"),
        (1, "labels are the assistant's words"),
        (2, "labels are the assistant's words"),
    ],
)
def test_a_label_mask_that_is_shifted_is_caught(
    by: int, promise: str, model: PreTrainedModel, examples: ExampleSet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def shifted(example: Example) -> Example:
        return dataclasses.replace(example, label_mask=[*example.label_mask[-by:], *example.label_mask[:-by]])

    assert promise in check(model, tiny_tokenizer, changed(examples, shifted))


def test_a_second_and_a_missing_bos_are_caught(
    model: PreTrainedModel, examples: ExampleSet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template

    def with_bos(count: int) -> Callable[[Example], Example]:
        def change(example: Example) -> Example:
            return dataclasses.replace(
                example,
                input_ids=[tokenizer.bos_token_id] * count + example.input_ids,
                label_mask=[False] * count + example.label_mask,
            )

        return change

    assert not check(model, tokenizer, changed(examples, with_bos(1)))
    assert check(model, tokenizer, changed(examples, with_bos(2))) == {"one BOS"}
    assert check(model, tokenizer, changed(examples, with_bos(0))) == {"one BOS"}


def test_a_target_that_takes_no_part_is_caught(
    tiny_llama: Callable[..., PreTrainedModel], examples: ExampleSet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.spare_proj = nn.Linear(64, 64)
    add_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "spare_proj"]))
    results = run_checks(model, tiny_tokenizer, examples, show=False, progress=False)
    assert broken(results) == {"gradients at every target"}
    with pytest.raises(
        CheckFailed, match=r"'gradients at every target' is broken: 4 of 6.*spare_proj.*exclude_modules"
    ):
        require(results)


def test_an_adapter_that_comes_back_changed_is_caught(
    model: PreTrainedModel,
    examples: ExampleSet,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rounding(model: PreTrainedModel, directory: str, name: str, **options: bool) -> None:
        load_adapter(model, directory, name, **options)
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                if name in key:
                    tensor.copy_(tensor.bfloat16())

    monkeypatch.setattr("lilliput.training.checks.load_adapter", rounding)
    assert check(model, tiny_tokenizer, examples) == {"save, load, same logits"}


def test_a_model_without_an_adapter_is_refused(
    tiny_llama: Callable[..., PreTrainedModel], examples: ExampleSet, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UsageError, match="no active adapter"):
        run_checks(tiny_llama(), tiny_tokenizer, examples, show=False, progress=False)


def test_one_example_is_shown_with_its_labels_coloured(
    model: PreTrainedModel,
    examples: ExampleSet,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rich.console import Console

    console = Console(record=True, width=200, force_terminal=True, color_system="standard")
    monkeypatch.setattr("lilliput.training.checks.console", console)
    run_checks(model, tiny_tokenizer, examples, progress=False)
    shown = console.export_text(styles=True)
    assert "\x1b[1;32mThe answer is" in shown
