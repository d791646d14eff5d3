"""Everything that makes the second half of a run equal to an uninterrupted one, bit for bit.

A checkpoint is a folder `checkpoints/step-000150` with what the Trainer needs: the trained weights, the optimizer, the
schedule, the random states (dropout) and its own counters; the order of the rows is a function of seed and epoch
(trainer.Rows). It is written under another name and renamed when it is complete, so a folder that is there can be
resumed from. The base is never in it.

    Ctrl-C       the step is finished, a checkpoint is saved, `Interrupted` is raised; a second Ctrl-C stops at once
    kill -9      the last checkpoint stands
    resume       only onto the same recipe, base and data (`run.json` remembers them)

Equal bits need the same machine, versions and number of threads. Not here: what is logged (report.py).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lilliput.errors import CheckpointError, DiskError, LilliputError, UsageError
from lilliput.files import open_safetensors, read_json, write_json
from lilliput.progress import say, warn

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

RUN_FILE = "run.json"
_STAGING = ".unfinished"
_KEEP = 2  # checkpoints, beside the best: a damaged disk block in one is not the end
_NEEDED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
# What a run writes into its folder; `overwrite` removes these and nothing else.
_OURS = ("checkpoints", "adapter", "recipe.yaml", "versions.json", "metrics.jsonl", "loss.png", "report.md",
         "skipped_rows.jsonl", "prefix.cache", RUN_FILE)  # fmt: skip


class Interrupted(LilliputError):
    """Ctrl-C during training, after the checkpoint was saved. The message says how to go on; exit status 1."""


class Checkpoints:
    """The checkpoints of a run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.staging = folder / _STAGING  # where the Trainer writes; never read

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        numbers = (entry.name.removeprefix("step-") for entry in self.folder.glob("step-*"))
        return sorted(
            int(number) for number in numbers if number.isdecimal()
        )  # a copy like step-000050-old is not ours

    def at(self, step: int) -> Path:
        """The folder of the checkpoint at a step."""
        return self.folder / f"step-{step:06d}"

    def latest(self) -> Path | None:
        """The last complete checkpoint. Raises CheckpointError when a file of it is gone."""
        steps = self.steps()
        if not steps:
            return None
        path = self.at(steps[-1])
        missing = [name for name in _NEEDED if not (path / name).is_file()]
        if missing:
            todo = "Remove this folder to go on from an earlier one, or start again with --overwrite."
            raise CheckpointError(f"incomplete, without {', '.join(missing)}", where=str(path), todo=todo)
        return path

    def publish(self, step: int, best: int | None) -> None:
        """Make what the Trainer wrote the checkpoint of `step`, then remove all but the last two and the best."""
        written, target = self.staging / f"checkpoint-{step}", self.at(step)
        for file in written.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(target, ignore_errors=True)  # of a run that was resumed before it
        os.replace(written, target)
        for old in self.steps()[:-_KEEP]:
            if old != best:
                shutil.rmtree(self.at(old))

    def clean(self) -> None:
        """Remove what was left half-written."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)


class Guard(TrainerCallback):
    """Saves, keeps the best, stops early, and lets Ctrl-C end a run cleanly."""

    def __init__(self, checkpoints: Checkpoints, early_stop: int | None, interrupted: threading.Event) -> None:
        self.checkpoints, self.early_stop, self.interrupted = checkpoints, early_stop, interrupted

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ctrl-C was pressed: save and stop here."""
        if self.interrupted.is_set():
            control.should_save = control.should_training_stop = True
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """A better loss than ever is worth a checkpoint; too long without one ends the run."""
        if state.global_step == 0:
            return control
        if state.best_metric is None or kwargs["metrics"]["eval_loss"] < state.best_metric:
            control.should_save = True
        elif stopped_early(state, self.early_stop):
            control.should_save = control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """The Trainer has written its folder."""
        self.checkpoints.publish(state.global_step, state.best_global_step)
        return control


def stopped_early(state: TrainerState, patience: int | None) -> bool:
    """Whether the last `patience` evaluations brought nothing better than an earlier one."""
    if patience is None:
        return False
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry and entry["step"] > 0]
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Inside the block the first Ctrl-C sets the event; the second raises KeyboardInterrupt as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield event
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        say("finishing this step and saving a checkpoint; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the run's folder, which is made, inside the block; the lock dies with the process. Not on Windows.

    Raises UsageError when another run holds it, DiskError when it cannot be made.
    """
    if out.exists() and not out.is_dir():
        yield  # `claim` says what is wrong
        return
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot be made ({error.strerror})", where=str(out), todo="Choose another -o.") from error
    handle = os.open(out, os.O_RDONLY) if fcntl else None
    try:
        if handle is not None:
            _lock(handle, out)
        yield
    finally:
        if handle is not None:
            os.close(handle)
        if new and not any(out.iterdir()):  # the run was refused
            out.rmdir()


def _lock(handle: int, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        todo = "Wait for it, stop it, or choose another -o."
        raise UsageError("another run is at work in this folder", where=str(out), todo=todo) from error
    except OSError as error:
        warn(f"{out}: the file system knows no locks ({error.strerror}); do not start a second run in this folder")


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """What torch and the Trainer raise inside the block when they cannot write becomes a DiskError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's archive writer tells a full disk as a RuntimeError of this file of its own
        if isinstance(error, RuntimeError) and "inline_container.cc" not in str(error):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or "the disk is full or broken"
        place = getattr(error, "filename", None) or out
        todo = "Free some space and run the same command with --resume: earlier checkpoints are unchanged."
        raise DiskError(f"could not be written ({reason})", where=str(place), todo=todo) from error


def load_trained(module: nn.Module, checkpoint: Path) -> None:
    """Put the trained weights of a checkpoint into `module` (a LabelLoss).

    Raises CheckpointError when the file is damaged or holds other weights.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    path = checkpoint / "model.safetensors"
    with open_safetensors(path) as file, torch.no_grad():
        if set(file.keys()) != set(trained):
            raise CheckpointError("holds other weights than this run trains", where=str(path))
        for name, parameter in trained.items():
            parameter.copy_(file.get_tensor(name))


def read_state(checkpoint: Path) -> TrainerState:
    """The Trainer's counters and history in a checkpoint."""
    read_json(checkpoint / "trainer_state.json")  # says so when the file is broken
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def claim(out: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
    """Decide whether a run may use the folder `out`, and from which checkpoint it goes on.

    Args:
        out: the run's folder, which may not exist.
        identity: what the run is: recipe, base and data, as plain values.
        resume: go on with the unfinished run that is there.
        overwrite: remove the run that is there.

    Returns: the checkpoint to go on from; None to begin at the beginning.
    Raises UsageError when the folder holds something else than was meant, and says what can be done.
    """
    if overwrite and resume:
        raise UsageError("resume and overwrite exclude each other")
    removed = overwrite and _remove_run(out)
    there = read_json(out / RUN_FILE) if (out / RUN_FILE).is_file() else None
    saved = Checkpoints(out / "checkpoints").steps()
    if there is not None and not there["finished"] and not saved and not resume:
        removed = _remove_run(out)  # it never came to a checkpoint: nothing is lost
    elif there is not None:
        _check_same(out, there, identity, resume)
        return Checkpoints(out / "checkpoints").latest()
    if resume:
        raise UsageError("there is no run to resume", where=str(out), todo="Leave out --resume, or correct -o.")
    if not removed and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("exists and holds no run of ours", where=str(out), todo="Choose another -o.")
    write_json(out / RUN_FILE, {"identity": identity, "finished": False})
    return None


def finish(out: Path) -> None:
    """Note that the run in `out` is complete."""
    write_json(out / RUN_FILE, {**read_json(out / RUN_FILE), "finished": True})


def _check_same(out: Path, there: dict[str, Any], identity: dict[str, Any], resume: bool) -> None:
    """Raise UsageError unless the run `there` is this one, unfinished, and to be resumed."""
    other = _differences(there["identity"], identity)
    again = "Choose another -o, or --overwrite it."
    if other:
        raise UsageError(f"holds another run: {'; '.join(other[:5])}", where=str(out), todo=again)
    if there["finished"]:
        raise UsageError("holds this run, finished", where=str(out), todo=again)
    if not resume:
        step = Checkpoints(out / "checkpoints").steps()[-1]
        todo = "Add --resume to go on with it, or --overwrite to begin again."
        raise UsageError(f"holds this run, unfinished (saved at step {step:,})", where=str(out), todo=todo)


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """`["train.epochs is 3 there and 2 here"]` for nested plain values."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*there, *(key for key in here if key not in there)]
        found = (_differences(there.get(key), here.get(key), f"{name}.{key}" if name else key) for key in keys)
        return [line for lines in found for line in lines]
    return [] if there == here else [f"{name} is {there!r} there and {here!r} here"]


def _remove_run(out: Path) -> bool:
    """Remove what a run has written into `out`, nothing else; False when there is no run."""
    if not (out / RUN_FILE).is_file():
        return False
    for name in _OURS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return True
