"""The recipe's optimizer in whole runs, and the same optimizer in transformers' own Trainer: resumed bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lilliput import optim
from lilliput.errors import UsageError
from lilliput.training import tune
from lilliput.training.optimizer import make_optimizer
from lilliput.training.recipe import OptimSection
from lilliput.training.resume import Checkpoints, Interrupted
from lilliput.training.trainer import LabelTrainer
from tests.training.conftest import quick

PAGED = ("optim.bits=8", "optim.paged=true", "optim.budget=20KB", "lora.r=32")


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    original, seen = LabelTrainer.training_step, []

    def step(self: LabelTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(1)
        if len(seen) == batches:
            self.callback_handler.callbacks[-1].interrupted.set()  # type: ignore[attr-defined]
        return original(self, *arguments, **options)

    monkeypatch.setattr(LabelTrainer, "training_step", step)


@pytest.mark.parametrize("settings", [PAGED, ("optim.name=ademamix", "optim.bits=8"), ("optim.name=sgd",)])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    settings: tuple[str, ...], tiny_model_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = quick(*settings, "train.max_steps=8")
    tune(str(tiny_model_dir), rows, whole, recipe, check=False, progress=False)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_after(patched, 9)
        tune(str(tiny_model_dir), rows, parts, recipe, check=False, progress=False)
    state = torch.load(Checkpoints(parts / "checkpoints").latest() / "optimizer.pt", weights_only=True)  # type: ignore[operator]
    assert state["param_groups"][0]["param_names"][0].startswith("model.")
    tune(str(tiny_model_dir), rows, parts, recipe, check=False, progress=False, resume=True)
    one, two = adapter(whole), adapter(parts)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_8_bits_learn_what_32_bits_learn(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    losses = [
        tune(
            str(tiny_model_dir), rows, tmp_path / str(bits),
            quick(f"optim.bits={bits}", "lora.r=32", "train.max_steps=10"), check=False, progress=False,
        ).train_loss
        for bits in (32, 8)
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


class Net(nn.Module):
    """A weight that decays, a bias that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 128)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_the_recipes_numbers_reach_the_optimizer() -> None:
    train = quick("train.weight_decay=0.1", "train.adam_beta2=0.9").train
    decayed = ["linear.weight", "frozen.weight"]
    made = make_optimizer(Net(), decayed, OptimSection(bits=8), train)
    assert type(made) is optim.AdamW
    groups = [(g["param_names"], g["weight_decay"], g["betas"], g["lr"], g["bits"]) for g in made.param_groups]
    assert groups == [
        (["linear.weight"], 0.1, (0.9, 0.9), 1e-2, 8),
        (["linear.bias"], 0.0, (0.9, 0.9), 1e-2, 8),
    ]
    assert make_optimizer(Net(), decayed, OptimSection(), train) is None
    paged = make_optimizer(Net(), decayed, OptimSection(paged=True, budget="1MB"), train)
    assert paged is not None
    assert paged.paged


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_every_name_of_the_recipe_is_an_optimizer(name: str) -> None:
    section = OptimSection(name=name, bits=8)  # type: ignore[arg-type]
    made = make_optimizer(Net(), ["linear.weight"], section, quick().train)
    assert type(made) is optim.OPTIMIZERS[name]
    assert made.defaults.get("momentum", 0.9) == 0.9


def test_a_budget_that_is_no_size_is_refused() -> None:
    with pytest.raises(UsageError, match="budget"):
        quick("optim.paged=true", "optim.budget=much")


# ---- transformers' own Trainer ----


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 512, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_training_stop = state.global_step == self.step
        return control


@pytest.mark.parametrize("kind", [optim.AdamW8bit, optim.PagedAdamW8bit, optim.Lion8bit])
def test_the_trainer_of_transformers_resumes_bit_for_bit(
    kind: type[optim.BlockwiseOptimizer], tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    def trainer(folder: str, *callbacks: TrainerCallback) -> Trainer:
        model = tiny_llama().train()
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=6, save_steps=3, per_device_train_batch_size=4, report_to="none",
            disable_tqdm=True, logging_strategy="no", use_cpu=True, lr_scheduler_type="linear", max_grad_norm=1.0,
        )  # fmt: skip
        optimizer = kind(model.named_parameters(), lr=1e-3)
        return Trainer(model, arguments, train_dataset=_Rows(), optimizers=(optimizer, None), callbacks=list(callbacks))

    whole = trainer("whole")
    whole.train()
    trainer("parts", _StopAt(3)).train()
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
