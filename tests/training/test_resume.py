"""A resumed run equals an uninterrupted one bit for bit, after kill -9 and after Ctrl-C; runs are not mixed up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerState

from lilliput.errors import CheckpointError, DiskError, UsageError
from lilliput.training import Interrupted, tune
from lilliput.training.recipe import Recipe
from lilliput.training.report import read_journal
from lilliput.training.resume import Checkpoints, disk_errors, load_trained, stopped_early
from lilliput.training.trainer import LabelTrainer
from tests.training.conftest import quick, write_rows

STEPS = 21  # 28 rows and 2 held out: 7 steps an epoch, 3 epochs

# Dies when the Trainer has written a checkpoint: just before it is renamed into place, or just after.
KILLED = """
import os, signal, sys
from lilliput.training.resume import Checkpoints
publish, step, when = Checkpoints.publish, int(sys.argv[4]), sys.argv[5]
def deadly(self, at, best):
    if at == step and when == "before": os.kill(os.getpid(), signal.SIGKILL)
    publish(self, at, best)
    if at == step: os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.publish = deadly
from tests.training.conftest import quick
from lilliput.training import tune
tune(sys.argv[1], sys.argv[2], sys.argv[3], quick(), check=False, progress=False)
"""


@pytest.fixture(scope="module")
def uninterrupted(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the rows, the folder of a run that nothing disturbed)."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    rows = write_rows(folder / "rows.jsonl")
    tune(str(tiny_model_dir), rows, folder / "run", quick(), check=False, progress=False)
    return rows, folder / "run"


def assert_same_run(there: Path, here: Path) -> None:
    """Adapters, optimizers and journals (timings aside) are equal to the last bit."""
    expected, got = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (there, here))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    states = [
        torch.load(Checkpoints(run / "checkpoints").at(STEPS) / "optimizer.pt", weights_only=True)
        for run in (there, here)
    ]
    for expected_state, got_state in zip(*(state["state"].values() for state in states), strict=True):
        assert all(torch.equal(expected_state[key], got_state[key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    timings = ("seconds", "tokens_per_second")
    journals = [
        [{k: v for k, v in line.items() if k not in timings} for line in read_journal(run / "metrics.jsonl")]
        for run in (there, here)
    ]
    assert journals[0] == journals[1]
    assert [line["step"] for line in journals[1]] == list(range(STEPS + 1))


@pytest.mark.parametrize(("step", "when"), [(10, "after"), (14, "after"), (10, "before")])
def test_killed_and_resumed_is_bit_for_bit(
    step: int, when: str, uninterrupted: tuple[Path, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """14 is the end of an epoch; 10 lies within one, and within it dropout and the order of rows must go on."""
    rows, expected = uninterrupted
    arguments = [str(tiny_model_dir), str(rows), str(tmp_path / "run"), str(step), when]
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    died = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    saved = Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1]
    assert saved < step if when == "before" else saved == step
    with pytest.raises(UsageError, match=rf"this run, unfinished \(saved at step {saved}\).*--resume"):
        tune(str(tiny_model_dir), rows, tmp_path / "run", quick(), check=False, progress=False)
    tune(str(tiny_model_dir), rows, tmp_path / "run", quick(), check=False, progress=False, resume=True)
    assert_same_run(expected, tmp_path / "run")


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, batches: set[int], times: int = 1) -> None:
    """Ctrl-C while these batches are computed, counted from 1."""
    original, seen = LabelTrainer.training_step, [0]

    def step(self: LabelTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        seen[0] += 1
        for _ in range(times if seen[0] in batches else 0):
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments, **options)

    monkeypatch.setattr(LabelTrainer, "training_step", step)


def test_interrupted_twice_and_resumed_is_bit_for_bit(
    uninterrupted: tuple[Path, Path], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, expected = uninterrupted
    handler = signal.getsignal(signal.SIGINT)
    press_ctrl_c(monkeypatch, {9, 20})  # in step 5, and in step 10 of the run resumed from there
    for resume, step in ((False, 5), (True, 10)):
        with pytest.raises(Interrupted, match=f"saved at step {step} of {STEPS}.*--resume"):
            tune(str(tiny_model_dir), rows, tmp_path / "run", quick(), check=False, progress=False, resume=resume)
        assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == step
        assert signal.getsignal(signal.SIGINT) is handler
    tune(str(tiny_model_dir), rows, tmp_path / "run", quick(), check=False, progress=False, resume=True)
    assert_same_run(expected, tmp_path / "run")


def test_second_ctrl_c_stops_at_once(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    press_ctrl_c(monkeypatch, {9}, times=2)
    with pytest.raises(KeyboardInterrupt):
        tune(str(tiny_model_dir), rows, tmp_path / "run", quick(), check=False, progress=False)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [3, 4]


def test_a_run_that_only_lacks_its_report_is_finished_by_resuming(
    uninterrupted: tuple[Path, Path], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, expected = uninterrupted

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("power failure")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="power failure"):
        broken.setattr("lilliput.training.run.save_adapter", fail)
        tune(str(tiny_model_dir), rows, tmp_path / "run", quick(), check=False, progress=False)
    tune(str(tiny_model_dir), rows, tmp_path / "run", quick(), check=False, progress=False, resume=True)
    assert_same_run(expected, tmp_path / "run")


def test_checkpoints_hold_nothing_of_the_base(uninterrupted: tuple[Path, Path]) -> None:
    folder = Checkpoints(uninterrupted[1] / "checkpoints").latest()
    assert folder is not None
    assert all("lora_" in name for name in load_file(folder / "model.safetensors"))
    assert len(list(uninterrupted[1].glob("checkpoints/step-*"))) <= 3  # the last two and the best
    assert not list((uninterrupted[1] / "checkpoints" / ".unfinished").glob("*"))


def test_finished_other_and_foreign_folders_are_refused(
    uninterrupted: tuple[Path, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows, run = uninterrupted

    def again(out: Path, recipe: Recipe, **options: Any) -> None:
        tune(str(tiny_model_dir), rows, out, recipe, check=False, progress=False, **options)

    before = (run / "report.md").read_bytes()
    with pytest.raises(UsageError, match=r"holds this run, finished.*--overwrite"):
        again(run, quick())
    with pytest.raises(UsageError, match=r"another run: lora.r is 4 there and 2 here"):
        again(run, quick("lora.r=2"), resume=True)
    copied = shutil.copytree(tiny_model_dir, tmp_path / "copied")
    with pytest.raises(UsageError, match=r"another run: MODEL is .* there and .*copied' here"):
        tune(str(copied), rows, run, quick(), check=False, progress=False)
    with pytest.raises(UsageError, match="another run: the data's SHA-256 is"):
        other = write_rows(tmp_path / "other.jsonl", 25)
        tune(str(tiny_model_dir), other, run, quick(), check=False, progress=False, resume=True)
    with pytest.raises(UsageError, match="there is no run to resume"):
        again(tmp_path / "nothing", quick(), resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UsageError, match="holds no run of ours"):
            again(tmp_path / "mine", quick(), **options)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert (run / "report.md").read_bytes() == before


def test_overwrite_replaces_a_run_and_only_it(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for steps in (2, 4):
        recipe = quick(f"train.max_steps={steps}")
        tune(str(tiny_model_dir), rows, out, recipe, check=False, progress=False, overwrite=steps == 4)
        (out / "notes.txt").write_text("mine")
    assert read_journal(out / "metrics.jsonl")[-1]["step"] == 4
    assert (out / "notes.txt").read_text() == "mine"


def test_another_base_under_the_same_name_is_not_resumed(
    tiny_model_dir: Path,
    tiny_llama: Callable[..., nn.Module],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    press_ctrl_c(monkeypatch, {9})
    with pytest.raises(Interrupted):
        tune(str(base), rows, tmp_path / "run", quick(), check=False, progress=False)
    tiny_llama(seed=1).save_pretrained(base)
    with pytest.raises(UsageError, match="the base is not the one that this run began with"):
        tune(str(base), rows, tmp_path / "run", quick(), check=False, progress=False, resume=True)


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "step-000004"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"step-000004: incomplete, without model.safetensors"):
        Checkpoints(tmp_path).latest()
    module = nn.Linear(2, 2)
    save_file({"weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds other weights"):
        load_trained(module, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="cut short"):
        load_trained(module, folder)


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([3, 2, 1], 1, False),
        ([3, 2, 2], 1, True),
        ([1, 2, 3], 3, False),
        ([1, 2, 3, 4], 3, True),
        ([1, 2], None, False),
    ],
)
def test_early_stop_counts_evaluations_without_a_better_one(
    losses: list[float], patience: int | None, stops: bool
) -> None:
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses, start=1)]
    before = {"step": 0, "eval_loss": 0.1}  # the base does not count
    assert stopped_early(TrainerState(log_history=[before, *history]), patience) is stops


def test_the_journal_survives_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_journal(path) == [{"step": 1}]


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_at_work(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original, refused = tmp_path / "run", LabelTrainer.training_step, []

    def step(self: LabelTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        if not refused:
            with pytest.raises(UsageError, match="run: another run is at work in this folder") as error:
                tune(str(tiny_model_dir), rows, out, quick("lora.r=2"), check=False, progress=False)
            refused.append(error)
        return original(self, *arguments, **options)

    monkeypatch.setattr(LabelTrainer, "training_step", step)
    tune(str(tiny_model_dir), rows, out, quick("train.max_steps=2"), check=False, progress=False)
    assert refused
    assert read_journal(out / "metrics.jsonl")[-1]["step"] == 2


def test_a_refused_run_leaves_no_folder(tiny_model_dir: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run to resume"):
        tune(str(tiny_model_dir), rows, tmp_path / "run", quick(), progress=False, resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "run/metrics.jsonl"), r"run/metrics.jsonl: .*No space left.*--resume"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 203840 vs 203732"), "disk is full"),
    ],
)
def test_a_disk_that_fills_up_under_torch_is_a_disk_error(error: Exception, said: str, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=said), disk_errors(tmp_path):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), disk_errors(tmp_path):
        raise RuntimeError("shapes do not fit")


def test_going_on_with_other_versions_is_said(
    tiny_model_dir: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        press_ctrl_c(patched, {9})
        tune(str(tiny_model_dir), rows, out, quick(), check=False, progress=False)
    versions = json.loads((out / "versions.json").read_text())
    (out / "versions.json").write_text(json.dumps({**versions, "threads": 99}))
    capsys.readouterr()
    tune(str(tiny_model_dir), rows, out, quick(), check=False, progress=False, resume=True)
    said = " ".join(capsys.readouterr().err.split())
    assert f"not bit for bit: threads 99 then, {torch.get_num_threads()} now" in said


def test_a_copy_of_a_checkpoint_that_a_person_made_is_passed_over(tmp_path: Path) -> None:
    for name in ("step-000003", "step-000050-old", "step-foo"):
        (tmp_path / name).mkdir()
    assert Checkpoints(tmp_path).steps() == [3]
