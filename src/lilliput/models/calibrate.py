"""GPTQ through a whole model, a decoder layer after the other: what each gets from those before it, already quantized.

    for each layer:  fill it from the checkpoint, in float32
                     run through it what the original model's layers made of the text; note what linear layers get
                     run through it what the quantized layers made of the text; before a linear layer computes, quantize
                     it for what it gets and for what it would have got (so that the next one inside the layer sees
                     its errors: "true sequential")
                     write its codes, keep what comes out of both, empty it

Only one layer is in memory in full precision. All of a text that fits `memory` goes through a layer at once, which then
is computed once each way; a longer one goes in batches, and the layer once for each group of linear layers that share
an input.
Hidden states lie in memory, or in a mapped file. A finished layer is a file: a run that was stopped goes on behind it,
by running what is finished on the text again, and ends with the same bytes.
Source: GPTQ, arXiv 2210.17323, section 4. Not here: a layer's codes (gptq.py), the file layout (gptq_files.py), what
can be said of a result (gptq_report.py).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lilliput import memory as accounts
from lilliput.errors import CheckpointError, DataError, FormatError, UsageError
from lilliput.files import read_json, sha256_text, write_json, write_safetensors
from lilliput.kernels import dequantize
from lilliput.layers.identity import Stamp
from lilliput.layers.replace import shape_of
from lilliput.models.causal import context_length
from lilliput.models.drift import Drift
from lilliput.models.gptq import Gptq, Hessian, Inputs, factor, round_to_nearest, solve
from lilliput.models.gptq_files import GPTQ_CONFIG, PARTS, convention_for, gptq_config, pack_gptq, unpack_gptq
from lilliput.models.gptq_report import GptqReport, ModuleResult
from lilliput.models.load import Checkpoint, open_checkpoint, take_generation_config
from lilliput.models.locate import locate
from lilliput.models.save import save_tensors
from lilliput.models.skeleton import Call, Skeleton, run_layer
from lilliput.models.stream import StoredTensor, stored_file
from lilliput.progress import bar, say, warn

UNFINISHED = ".gptq"  # a folder of the result with the layers that are done
_STATE = "state.json"
_FEW = 4  # tokens for each column of the widest layer below which a warning is given
_STRIPE = 512  # rows of a weight that are compared at once
_ROOM = 6  # tensors as wide as a layer's widest that are alive at once while a layer runs, about
_ROOM_BESIDE = 2  # more of them where the original model's inputs are kept meanwhile


class _Reached(Exception):
    """Leaves a layer's forward before the linear layer whose inputs were wanted."""


@dataclass(frozen=True)
class _Job:
    """What is wanted, checked. dtype: of what is not quantized; memory: bytes for running a layer."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    settings: Gptq
    out: Path
    rounding: str
    dtype: torch.dtype
    memory: int


def quantize_gptq(
    model: str | Path,
    out: str | Path,
    ids: Tensor | None,
    settings: Gptq | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rounding: str = "gptq",
    dtype: torch.dtype | None = None,
    memory: float = 1.0,
    on_disk: bool | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> GptqReport:
    """Quantize the decoder layers of a causal model and write them as a GPTQ checkpoint.

    Args:
        model: a MODEL argument (see `load_model`); not quantized.
        out: the directory to write; made if it is not there. One with the unfinished layers of the same job goes on.
        ids: int64 [segments, length], the calibration text; None with rounding="nearest".
        settings: bits, groups and the solver's options; None: the defaults.
        tokenizer: written beside, when given.
        rounding: "gptq", or "nearest" for each number by itself, without a text.
        dtype: of what is not quantized; None: as stored, but float32 becomes float16.
        memory: GiB that running one layer on the text may take; more text than fits goes in batches.
        on_disk: whether hidden states lie in a mapped file; None: when they take more than a quarter of the memory.
        overwrite: unfinished layers of another job in `out` are thrown away instead of refused.
        progress: show a bar.

    Returns:
        What each layer came to; also written to `out` as gptq.json.

    Raises:
        UsageError: a model that is quantized already, is no causal model or has no plain list of decoder layers; `out`
            is a file, or holds the unfinished layers of another job; sizes that are no multiples of 32; an unknown
            rounding.
        DataError: no text, or one with tokens that the model does not know or segments longer than it can read.
        FormatError: a weight or an input that is NaN or Inf, or a number too large for float16 (says which).
        CheckpointError: files missing or malformed, or of several types where `dtype` is None.
    """
    settings = settings or Gptq()
    started = time.perf_counter()
    job = _prepare(model, Path(out), settings, rounding, dtype, memory)
    _check_text(ids, job)
    state = _State.open(job, ids, overwrite)
    before = state.seconds
    if ids is not None and rounding == "gptq":
        _walk(job, state, ids, on_disk, progress)
    else:
        _round_all(job, state, progress)
    _finish(job, state, tokenizer, progress)
    seconds = before + time.perf_counter() - started
    report = GptqReport(
        job.checkpoint.source.name,
        settings,
        rounding,
        state.modules,
        0 if ids is None else ids.numel(),
        round(seconds, 2),
        accounts.held()[0],
        (job.out / "model.safetensors").stat().st_size,
    )
    write_json(job.out / "gptq.json", report.to_json())
    shutil.rmtree(job.out / UNFINISHED, ignore_errors=True)
    return report


# ---- before ----


def _prepare(
    model: str | Path, out: Path, settings: Gptq, rounding: str, dtype: torch.dtype | None, memory: float
) -> _Job:
    if rounding not in ("gptq", "nearest"):
        raise UsageError(f"unknown rounding '{rounding}'", todo="There are: gptq, nearest.")
    if out.exists() and not out.is_dir():
        raise UsageError("is a file, expected a directory to save into", where=str(out))
    checkpoint = open_checkpoint(locate(model))
    if checkpoint.stored is not None:
        raise UsageError(
            f"is quantized to {checkpoint.stored.format} already",
            where=checkpoint.source.name,
            todo="Quantize the original model.",
        )
    skeleton = Skeleton(checkpoint)
    take_generation_config(skeleton.model, checkpoint.directory)
    if not any(skeleton.linears):
        raise UsageError("has no linear layers in its decoder layers", where=checkpoint.source.name)
    _check_sizes(skeleton)
    kept = _kept_type(skeleton) if dtype is None else dtype
    job = _Job(checkpoint, skeleton, settings, out, rounding, kept, int(memory * 2**30))
    _check_numbers(job)
    return job


def _check_sizes(skeleton: Skeleton) -> None:
    """Refuse at once what the file layout cannot hold; packing would refuse it after hours."""
    for name in skeleton.weights:
        shape = skeleton.tensors[name].shape
        if any(side % 32 for side in shape):
            raise UsageError(
                f"'{name}' is {list(shape)}; GPTQ files hold layers whose sizes are multiples of 32",
                where=skeleton.name,
                todo="Use --format int4, which holds any size.",
            )


def _check_numbers(job: _Job) -> None:
    """Refuse at once what cannot be written in the type for what is not quantized."""
    for name, tensor in job.skeleton.tensors.items():
        if name not in job.skeleton.weights and tensor.dtype != job.dtype:
            _small(name, tensor.load(), job)


def _check_text(ids: Tensor | None, job: _Job) -> None:
    if job.rounding == "nearest":
        return
    if ids is None or ids.dim() != 2 or ids.numel() < 2:
        raise DataError("there is no calibration text", todo="Give one, or round to nearest.")
    if int(ids.max()) >= job.skeleton.model.config.get_text_config().vocab_size or int(ids.min()) < 0:
        raise DataError("the calibration text has tokens that the model does not know", todo="Use its own tokenizer.")
    most = context_length(job.skeleton.model)
    if most is not None and ids.shape[1] > most:
        raise DataError(
            f"segments of {ids.shape[1]:,} tokens are more than the {most:,} positions this model has",
            todo="Cut the text into shorter ones.",
        )
    widest = max(columns for _, columns in _shapes(job.skeleton))
    if ids.numel() < _FEW * widest:
        warn(
            f"{ids.numel():,} tokens of calibration for layers of up to {widest:,} inputs: below {_FEW * widest:,} "
            "errors grow on other texts; give more text, or more and longer samples"
        )


def _shapes(skeleton: Skeleton) -> list[tuple[int, int]]:
    """(out, in) of the layers' linear layers."""
    layers = zip(skeleton.layers, skeleton.linears, strict=True)
    return [shape_of(layer.get_submodule(name)) for layer, names in layers for name in names]


# ---- what is done already ----


@dataclass
class _State:
    """The layers that are done: their files, and what is known of them."""

    folder: Path
    job: str
    modules: list[ModuleResult]
    layers: int = 0
    seconds: float = 0.0

    @classmethod
    def open(cls, job: _Job, ids: Tensor | None, overwrite: bool) -> _State:
        """Go on with what `out` holds, or begin.

        Raises UsageError when the unfinished layers there are another job's, unless these may be overwritten.
        """
        folder, mark = job.out / UNFINISHED, _mark(job, ids)
        if overwrite and (folder / _STATE).is_file() and read_json(folder / _STATE).get("job") != mark:
            say(f"The unfinished layers of another job in {folder} are thrown away")
            shutil.rmtree(folder)
        if not (folder / _STATE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            return cls(folder, mark, [])
        known = read_json(folder / _STATE)
        if known.get("job") != mark:
            raise UsageError(
                "holds the unfinished layers of another model, text or settings",
                where=str(job.out),
                todo="Give the same command again to go on, another directory, or --overwrite to throw them away.",
            )
        state = cls(folder, mark, [ModuleResult(**m) for m in known["modules"]], known["layers"], known["seconds"])
        say(f"Going on behind layer {state.layers} of {len(job.skeleton)}")
        return state

    def file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"

    def add(self, tensors: dict[str, Tensor], modules: list[ModuleResult], seconds: float) -> None:
        """Write a layer, then that it is done."""
        write_safetensors(self.file(self.layers), tensors)
        self.layers, self.modules = self.layers + 1, [*self.modules, *modules]
        self.seconds += seconds
        known = [asdict(module) for module in self.modules]
        write_json(
            self.folder / _STATE,
            {"job": self.job, "layers": self.layers, "seconds": self.seconds, "modules": known},
        )


def _mark(job: _Job, ids: Tensor | None) -> str:
    """Another one for another checkpoint, text, settings or memory (which decides what is summed at once)."""
    source = job.checkpoint.source.path
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    stamps = [str((file.name, Stamp.of(file).size, Stamp.of(file).modified)) for file in files]
    text = "" if ids is None else sha256_text(str(ids.tolist()))
    config = job.checkpoint.config.to_json_string()
    wanted = (repr(job.settings), job.rounding, str(job.dtype), str(job.memory))
    return sha256_text("\n".join([*stamps, config, text, *wanted]))


# ---- layer after layer ----


def _walk(job: _Job, state: _State, ids: Tensor, on_disk: bool | None, progress: bool) -> None:
    skeleton = job.skeleton
    with (
        _hidden_states(job, state, ids, on_disk, "hidden") as hidden,
        _hidden_states(job, state, ids, on_disk, "original") if job.settings.correct > 0 else nullcontext() as original,
        torch.no_grad(),
        bar(_title(job), len(skeleton.weights), shown=progress) as advance,
    ):
        rows = _rows_at_once(job, ids)
        calls = _begin(skeleton, ids, hidden, rows)
        if original is not None:
            original.copy_(hidden)
        for index in range(len(skeleton)):
            parts = hidden.split(rows)
            others = [None] * len(parts) if original is None else original.split(rows)
            pairs = zip(parts, others, strict=True)
            batches = [_Batch(some, other, calls[len(some)][index]) for some, other in pairs]
            started = time.perf_counter()
            with skeleton.filled(index) as layer:
                work = _Layer(job, index, layer, advance)
                if index < state.layers:
                    work.again(batches, stored_file(state.file(index)))
                    continue
                work.in_one_pass(batches[0]) if len(batches) == 1 else work.in_stages(batches)
                state.add(work.tensors, work.results, time.perf_counter() - started)


def _title(job: _Job) -> str:
    return f"Quantizing {Path(job.checkpoint.source.name).name} to {job.settings.bits} bits"


def _rows_at_once(job: _Job, ids: Tensor) -> int:
    """Segments that can run through a layer at once: what is alive in it is some times its widest tensor."""
    widest = max(max(shape) for shape in _shapes(job.skeleton))
    room = _ROOM + (_ROOM_BESIDE if job.settings.correct > 0 else 0)
    return max(1, min(len(ids), job.memory // (4 * ids.shape[1] * widest * room)))


@dataclass(frozen=True)
class _Batch:
    """Some of the text on its way: what the next layer gets, float32 [rows, length, d], and how it is called.

    original: what it would get in the original model; None where that is not asked.
    """

    hidden: Tensor
    original: Tensor | None
    call: Call


@contextmanager
def _hidden_states(job: _Job, state: _State, ids: Tensor, on_disk: bool | None, name: str) -> Iterator[Tensor]:
    """Room for float32 [segments, length, d]: memory, or a mapped file that is gone afterwards."""
    shape = (*ids.shape, job.skeleton.model.config.get_text_config().hidden_size)
    size = ids.numel() * shape[-1]
    if on_disk is None:
        all_of_it = 4 * size * (2 if job.settings.correct > 0 else 1)
        on_disk = all_of_it > (accounts.total() or math.inf) // 4
    if not on_disk:
        yield torch.empty(shape)
        return
    path = state.folder / f"{name}.bin"
    try:
        yield torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)
    finally:
        path.unlink(missing_ok=True)


def _begin(skeleton: Skeleton, ids: Tensor, hidden: Tensor, rows: int) -> dict[int, list[Call]]:
    """Fill in what the first layer gets; what layers are called with, for each number of rows that comes up."""
    calls: dict[int, list[Call]] = {}
    with skeleton.beginning() as beginning:
        for some, place in zip(ids.split(rows), hidden.split(rows), strict=True):
            start = beginning.start(some)
            place.copy_(start.hidden)
            calls.setdefault(len(some), start.calls)
    return calls


def _comparable(name: str, x: Tensor, batch: _Batch) -> bool:
    """Whether a linear layer's input has a row for each token, one after the other.

    An expert's has one for each token that chose it: in the original model perhaps others, or in another order.
    """
    flat = x.dim() == 2 and len(x) == batch.hidden.shape[:-1].numel() and "experts" not in name.split(".")
    return flat or x.shape[:-1] == batch.hidden.shape[:-1]


class _Sums:
    """What is summed up over the text for linear layers that share an input."""

    def __init__(self, columns: int) -> None:
        self.hessian = Hessian(columns)
        self.drift: Drift | None = None
        self.names: list[str] = []

    def add(self, x: Tensor) -> None:
        self.hessian.add(x)

    def add_original(self, before: Tensor, x: Tensor, names: list[str], weights: list[Tensor]) -> None:
        """`before`: what the original model has instead of x, which linear layers of these names get; their `weights`
        are not quantized yet."""
        if self.drift is None:
            self.drift, self.names = Drift(weights), names
        self.drift.add(before, x)

    def factored(self, settings: Gptq) -> _Factored:
        """What becomes of the sums; there are none left."""
        rows, drift, self.drift = self.hessian.rows, self.drift, None
        return _Factored(factor(self.hessian.take_mean(), settings), rows, drift, self.names, settings.correct)


class _Factored:
    """What is known of an input when all of the text is summed up; `names` share it in the original model."""

    def __init__(self, inputs: Inputs, rows: int, drift: Drift | None, names: list[str], share: float) -> None:
        self.inputs, self.rows, self.drift, self.names, self.share = inputs, rows, drift, names, share
        self._waiting = set(names)

    def target(self, name: str, weight: Tensor) -> Tensor:
        """What is quantized in place of the weight of that linear layer. Sums that nobody waits for any more go."""
        if self.drift is None or name not in self._waiting:
            return weight
        found = self.drift.target(weight, self.names.index(name), self.inputs, self.rows, self.share)
        self._waiting.remove(name)
        if not self._waiting:
            self.drift = None
        return found


class _Layer:
    """One filled layer on its way: linear layers become codes, in the order in which they are computed."""

    def __init__(self, job: _Job, index: int, layer: nn.Module, advance: Callable[..., None]) -> None:
        self.job, self.index, self.layer, self.advance = job, index, layer, advance
        self.prefix = job.skeleton.prefix(index)
        self.linears = {name: layer.get_submodule(name) for name in job.skeleton.linears[index]}
        self.tensors = dict(_dense(job, self.prefix))
        self.results: list[ModuleResult] = []

    def again(self, batches: list[_Batch], stored: dict[str, StoredTensor]) -> None:
        """Run the text through a layer that is done already; `stored` are its codes."""
        self._run_originals(batches)
        for name, linear in self.linears.items():
            _own(linear).copy_(self._values({part: stored[f"{self.prefix}{name}.{part}"].load() for part in PARTS}))
            self.advance(note=f"layer {self.index}: done before")
        self._run(batches)

    def in_one_pass(self, batch: _Batch) -> None:
        """All of the text at once: each linear layer is quantized when its inputs arrive, and then computes."""
        before, original = self._original_inputs(batch)
        known: list[Any] = [None, None]  # an input, and what is made of it: layers that share one share the other

        def quantize_first(name: str, x: Tensor) -> None:
            if known[0] is not x:
                known[:] = None, None  # two matrices as large as H go before the next two come
                with self._named(name):
                    sums = _Sums(x.shape[-1])
                    sums.add(x)
                    if name in before and _comparable(name, x, batch):
                        names = [other for other in before if before[other] is before[name]]
                        sums.add_original(before.pop(name), x, names, self._weights(names))
                    known[:] = x, sums.factored(self.job.settings)
            before.pop(name, None)  # the others' stay: one may come when another input is known (parallel attention)
            self.quantize(name, known[1])

        with self._watching(quantize_first):
            batch.hidden.copy_(run_layer(self.layer, batch.hidden, batch.call))
        if batch.original is not None:
            batch.original.copy_(original)
        self._round_the_rest()

    def in_stages(self, batches: list[_Batch]) -> None:
        """Batch after batch, as often as there are groups of linear layers with an input of their own."""
        for stage in self._stages(batches):
            sums: _Sums | None = None
            for batch in batches:
                x = self._reach(stage[0], batch.hidden, batch.call)
                if x is None:
                    continue
                sums = sums or _Sums(x.shape[-1])
                with self._named(stage[0]):
                    sums.add(x)
                if batch.original is not None:
                    with self._as_it_was():
                        before = self._reach(stage[0], batch.original, batch.call)
                    if before is not None and all(_comparable(stage[0], each, batch) for each in (before, x)):
                        sums.add_original(before, x, stage, self._weights(stage))
            assert sums is not None, "a stage is what some batch has reached"
            with self._named(stage[0]):
                inputs = sums.factored(self.job.settings)
            for name in stage:
                self.quantize(name, inputs)
            del sums, inputs  # matrices as large as H
        self._round_the_rest()
        self._run(batches)
        self._run_originals(batches)

    def _original_inputs(self, batch: _Batch) -> tuple[dict[str, Tensor], Tensor]:
        """What linear layers get in the original model, by name, and what comes out; before any is quantized."""
        if batch.original is None:
            return {}, batch.hidden
        found: dict[str, Tensor] = {}
        with self._watching(found.setdefault):
            out = run_layer(self.layer, batch.original, batch.call)
        return {name: x for name, x in found.items() if _comparable(name, x, batch)}, out

    def _reach(self, name: str, hidden: Tensor, call: Call) -> Tensor | None:
        """What the linear layer `name` gets; None where it is not called."""
        found: list[Tensor] = []

        def see(some: str, x: Tensor) -> None:
            if some == name:
                found.append(x)
                raise _Reached

        with self._watching(see), suppress(_Reached):
            run_layer(self.layer, hidden, call)
        return found[0] if found else None

    def _run(self, batches: list[_Batch]) -> None:
        """Put what comes out of the layer in place of what went in."""
        for batch in batches:
            batch.hidden.copy_(run_layer(self.layer, batch.hidden, batch.call))

    def _run_originals(self, batches: list[_Batch]) -> None:
        """The same in the original model."""
        if batches[0].original is None:
            return
        with self._as_it_was():
            for batch in batches:
                if batch.original is not None:
                    batch.original.copy_(run_layer(self.layer, batch.original, batch.call))

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The layer with the checkpoint's weights; in the end those that are quantized have their codes' again."""
        done = [result.module for result in self.results]
        for name in done:
            held: Any = self.linears[name].weight
            held.copy_(self.job.skeleton.tensors[f"{self.prefix}{name}.weight"].load())
        try:
            yield
        finally:
            for name in done:
                parts = {part: self.tensors[f"{self.prefix}{name}.{part}"] for part in PARTS}
                _own(self.linears[name]).copy_(self._values(parts))

    def _values(self, parts: dict[str, Tensor]) -> Tensor:
        """What stored codes stand for, float32 [out, in]."""
        settings = self.job.settings
        return dequantize(unpack_gptq(parts, settings.bits, settings.group, convention_for(settings.symmetric)))

    def _weights(self, names: list[str]) -> list[Tensor]:
        return [_own(self.linears[name]) for name in names]

    def _stages(self, batches: list[_Batch]) -> list[list[str]]:
        """Names of the linear layers in the order of their computation; those with the same input together.

        The first batch reaches nearly all; the others are asked for what is left (experts that few tokens choose).
        """
        stages: list[list[str]] = []
        inputs: list[Tensor] = []
        seen: set[str] = set()

        def note(name: str, x: Tensor) -> None:
            if name in seen:
                return
            seen.add(name)
            if inputs and inputs[-1] is x:
                stages[-1].append(name)
            else:
                stages.append([name])
                inputs.append(x)

        for batch in batches:
            with self._watching(note):
                run_layer(self.layer, batch.hidden, batch.call)
            inputs.clear()
            if len(seen) == len(self.linears):
                break
        return stages

    @contextmanager
    def _watching(self, see: Callable[[str, Tensor], object]) -> Iterator[None]:
        """Call `see` with the name and the input of each linear layer before it computes."""

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def called(module: nn.Module, args: tuple[Any, ...]) -> None:
                see(name, args[0])  # not returned: that would be the layer's input

            return called

        handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in self.linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _round_the_rest(self) -> None:
        """Linear layers that the text never reached (an expert that nobody asked)."""
        done = {result.module for result in self.results}
        for name in self.linears:
            if name not in done:
                warn(f"layer {self.index}: the text never reached '{name}'; it is rounded to nearest")
                self.quantize(name, None)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Say of a fault inside which linear layer it is in."""
        try:
            yield
        except FormatError as error:
            raise FormatError(error.what, where=f"{self.prefix}{name}", todo=error.todo) from error

    def quantize(self, name: str, inputs: _Factored | None) -> None:
        """Codes for a linear layer; it computes with what they stand for from now on. A second time changes nothing."""
        if any(result.module == name for result in self.results):
            return
        started, linear, settings = time.perf_counter(), self.linears[name], self.job.settings
        weight = _own(linear)
        error, damp, dead = None, None, 0
        with self._named(name):
            if inputs is None:
                q = round_to_nearest(weight, settings)
            else:
                found = solve(inputs.target(name, weight), inputs.inputs, settings)
                q, error, damp, dead = found.quantized, found.error, found.damp, found.dead
            packed = pack_gptq(q, convention_for(settings.symmetric))
        self.tensors |= {f"{self.prefix}{name}.{part}": tensor for part, tensor in packed.items()}
        distance = _put(linear, dequantize(q))
        size = sum(tensor.nbytes for tensor in packed.values())
        self.results.append(
            ModuleResult(
                self.index, name, tuple(q.shape), error, distance, damp, dead, size, time.perf_counter() - started
            )
        )
        self.advance(note=f"layer {self.index} {name}" + ("" if error is None else f": error {error:.2e}"))


def _own(linear: nn.Module) -> Tensor:
    """A layer's weight as [out, in]."""
    held: Any = linear.weight
    return held.t() if isinstance(linear, Conv1D) else held


def _put(linear: nn.Module, weight: Tensor) -> float:
    """Let the layer compute with `weight` [out, in]; returns the relative distance from what it had."""
    moved, norm = 0.0, 0.0
    for old, new in zip(_own(linear).split(_STRIPE), weight.split(_STRIPE), strict=True):
        moved, norm = moved + float((old - new).square().sum()), norm + float(old.square().sum())
        old.copy_(new)
    return (moved / max(norm, 1e-60)) ** 0.5


def _dense(job: _Job, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """What is not quantized among the tensors that begin with `prefix`, a layer's."""
    for name, tensor in job.skeleton.tensors.items():
        if name.startswith(prefix) and name not in job.skeleton.weights:
            yield name, _small(name, tensor.load(), job)


def _small(name: str, tensor: Tensor, job: _Job) -> Tensor:
    """In the type that is wanted. Raises FormatError where a number becomes Inf."""
    if not tensor.is_floating_point():
        return tensor
    small = tensor.to(job.dtype)
    if not torch.equal(small.isinf(), tensor.isinf()):
        raise FormatError(
            f"{float(tensor.abs().max()):.3g} is too large for {str(small.dtype).removeprefix('torch.')}",
            where=name,
            todo="Give --dtype bfloat16 or float32 for what is not quantized.",
        )
    return small


def _round_all(job: _Job, state: _State, progress: bool) -> None:
    skeleton = job.skeleton
    with torch.no_grad(), bar(_title(job), len(skeleton.weights), shown=progress) as advance:
        for index in range(state.layers, len(skeleton)):
            started = time.perf_counter()
            with skeleton.filled(index) as layer:
                work = _Layer(job, index, layer, advance)
                for name in work.linears:
                    work.quantize(name, None)
                state.add(work.tensors, work.results, time.perf_counter() - started)
            advance(0)


# ---- after ----


def _finish(job: _Job, state: _State, tokenizer: PreTrainedTokenizerBase | None, progress: bool) -> None:
    """One file of all layers and of what stands around them, and the configs."""
    settings, skeleton = job.settings, job.skeleton
    tensors: dict[str, Any] = {}
    for index in range(len(skeleton)):
        tensors |= stored_file(state.file(index))
    for name, tensor in skeleton.outside().items():
        kept = job.dtype if tensor.dtype.is_floating_point else tensor.dtype
        tensors[name] = replace(tensor, dtype=kept, load=_converted(name, tensor, job))
    quantization = gptq_config(
        settings.format,
        symmetric=settings.symmetric,
        ordered=settings.ordered,
        static_groups=settings.static_groups,
        damp_percent=settings.damp,
        weights_sha256=job.checkpoint.hash_weights(),
        meta={
            "rounding": job.rounding,
            "correct": settings.correct if job.rounding == "gptq" else 0,
            "search": settings.search,
            "refine": settings.refine,
        },
    )
    save_tensors(
        skeleton.model,
        tensors,
        job.out,
        tokenizer,
        dtype=job.dtype,
        quantization=quantization,
        beside={GPTQ_CONFIG: quantization},
        progress=progress,
    )


def _converted(name: str, tensor: StoredTensor, job: _Job) -> Callable[[], Tensor]:
    return lambda: _small(name, tensor.load(), job)


def _kept_type(skeleton: Skeleton) -> torch.dtype:
    """Of what is not quantized, where nobody says otherwise."""
    types = {tensor.dtype for tensor in skeleton.tensors.values() if tensor.dtype.is_floating_point}
    if len(types) == 1 and (only := types.pop()) in (torch.bfloat16, torch.float16):
        return only
    if types & {torch.bfloat16}:
        raise CheckpointError(
            "holds tensors of several types", where=skeleton.name, todo="Say which to write with --dtype."
        )
    return torch.float16
