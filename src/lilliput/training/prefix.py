"""Frozen-prefix reuse: the layers below the lowest trained one run once a row, and what they gave is kept over epochs.

    tokens -> embeddings -> layer 0 .. layer k-1 -> state -> layer k .. last layer -> loss
              '---- frozen: no graph, once a row ----'        '---- every step; backward stops here ----'

A row's state [tokens, hidden] is what comes from that row alone, without padding and without its neighbours in a batch.
It is therefore a function of the row and the base only: whether it is remembered, read back from a file or computed
again after a crash changes no bit of a run, and packed rows (isolated attention, positions that begin anew) need no
special case. Against a run without reuse, which pads it in a batch, it differs by rounding (over a base in int8 by that
of the inputs, whose outliers are then those of the row alone). Where neighbours change no bit (joined.py), the new rows
of a batch run together; else one by one.

The decoder's own forward does the work, in two calls. In the first, stand-ins take the place of the layers from k on,
and the one at k notes what came in; in the second, stand-ins take the place of the layers below k and hand out the
state. The rest (masks, positions, the last norm) stays the family's own business. What this is worth for a family is
not known beforehand, so `plan` compares it with the plain forward before it is used.

Not here: the loss (trainer.py), prefixes that chats share while generating.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lilliput.data import Example, Pack
from lilliput.errors import FormatError, UsageError
from lilliput.layers import unrounded
from lilliput.progress import warn
from lilliput.training import joined
from lilliput.training.attention import block_by_block, longest_block
from lilliput.training.recipe import TrainSection
from lilliput.training.trainer import LabelLoss, batch_of

CACHE_FILE = "prefix.cache"  # in the run's folder, while the run lasts
_SMALLEST_SHARE = 1 / 8  # of the layers: below it there is little to win
_MOST_LEFT_OUT = 1 / 2  # of the bytes: rows that are not kept are computed alone each time, slower than in a batch
_ALIGNED = 64  # bytes; a state in the file begins at a multiple of it
_GB = 10**9
# Largest relative difference between a row in a batch and the row alone, by the hidden states' number type.
_AGREES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# What the forward of a family says when it cannot be called like this.
_UNFIT = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, FormatError)


class StandIn(nn.Module):
    """Answers in a layer's place: with `state` when there is one, else with the hidden states that came in.

    Args:
        layer: the layer whose attributes a decoder may ask for.
        as_tuple: the family's layers return a tuple that begins with the hidden states.
    """

    def __init__(self, layer: nn.Module, *, as_tuple: bool) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that its weights are not counted as ours
        self._as_tuple = as_tuple
        self.state: Tensor | None = None
        self.came_in: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [rows, tokens, hidden], and whatever else the family hands to its layers."""
        self.came_in = _hidden(args, kwargs)
        answer = self.came_in if self.state is None else self.state
        return (answer,) if self._as_tuple else answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)


class StateCache:
    """States by row, in memory first, then in a mapped file; never more than the bounds.

    Args:
        path: the file, made when memory is full.
        memory: bytes kept in memory.
        total: bytes kept in all.
    """

    def __init__(self, path: Path, *, memory: int, total: int) -> None:
        self.path, self.memory, self.total = path, min(memory, total), total
        self.memory_used = self.file_used = 0
        self._held: dict[bytes, Tensor] = {}
        self._stored: dict[bytes, tuple[int, torch.Size, torch.dtype]] = {}
        self._file: Any = None
        self._mapped: Tensor | None = None
        self._broken = False

    def __len__(self) -> int:
        return len(self._held) + len(self._stored)

    def get(self, key: bytes) -> Tensor | None:
        """The state of a row, on the CPU; None when it is not kept."""
        if key in self._held:
            return self._held[key]
        if key not in self._stored:
            return None
        assert self._mapped is not None
        at, shape, dtype = self._stored[key]
        return self._mapped[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def put(self, key: bytes, state: Tensor) -> None:
        """Keep a state [tokens, hidden] where there is room for it; else leave it."""
        if self.memory_used + state.nbytes <= self.memory:
            self._held[key] = state.to("cpu", copy=True).contiguous()
            self.memory_used += state.nbytes
        elif self.memory + self.file_used + state.nbytes <= self.total and not self._broken:
            try:
                self._store(key, state.cpu().contiguous())
            except OSError as error:
                self._broken = True
                warn(
                    f"{self.path}: cannot be written ({error.strerror or error}); the prefix of rows beyond "
                    f"{len(self):,} is computed anew each time, with equal results"
                )

    def _store(self, key: bytes, state: Tensor) -> None:
        if self._mapped is None:
            self._open()
        at = self.file_used
        self._file.seek(at)
        # Written as a file and read through the map: a full disk is an error here, and would be a crash there.
        rest = memoryview(state.view(torch.uint8).reshape(-1).numpy().data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._stored[key] = (at, state.shape, state.dtype)
        self.file_used += -(-state.nbytes // _ALIGNED) * _ALIGNED

    def _open(self) -> None:
        size = self.total - self.memory
        self._file = open(self.path, "w+b", buffering=0)  # noqa: SIM115  (lives as long as the cache)
        self._file.truncate(size)  # a hole: takes space as it is filled
        self._mapped = torch.from_file(str(self.path), shared=True, size=size, dtype=torch.uint8)

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._held, self._stored, self._mapped = {}, {}, None
        if self._file is not None:
            self._file.close()
            self._file = None
        self.path.unlink(missing_ok=True)


class Prefix:
    """The frozen lower part of a model, run once a row.

    Attributes:
        depth: how many layers are in it, k.
        runs: rows that went through it so far.
        joins: whether rows go through it together, with equal bits; `plan` finds out.

    Args:
        loss: holds the language model, adapters attached, and knows how it is called.
        layers: the decoder's list of layers.
        depth: k, at least 1 and less than the number of layers.
        pad_token_id: fills rows; never seen by another token.
        cache: where states are kept.
        as_tuple: the family's layers return tuples.
    """

    def __init__(
        self, loss: LabelLoss, layers: nn.ModuleList, depth: int, pad_token_id: int, cache: StateCache,
        *, as_tuple: bool = False,
    ) -> None:  # fmt: skip
        self.loss, self.model = loss, loss.model
        self.layers, self.depth, self.cache = layers, depth, cache
        self.pad_token_id = pad_token_id
        self._stand_ins = [StandIn(layer, as_tuple=as_tuple) for layer in layers]
        self.runs = 0
        self.joins = False

    @contextmanager
    def reused(self, inputs: dict[str, Any], packs: Sequence[Pack]) -> Iterator[dict[str, Any]]:
        """Inside the block the model's forward begins at layer k, with the states of `packs`.

        Args:
            inputs: what the model would be called with for the batch of these rows.
            packs: the rows of the batch, in order.

        Yields: what it is to be called with instead.
        """
        with self.above(inputs, self._padded(inputs["input_ids"], packs)) as instead:
            yield instead

    @contextmanager
    def above(self, inputs: dict[str, Any], states: Tensor) -> Iterator[dict[str, Any]]:
        """As `reused`, with the states [rows, tokens, hidden] at hand. They are zero at padding."""
        first = self._stand_ins[0]
        with self._replaced(range(self.depth)):
            first.state = states
            try:
                # The embeddings are not asked either; a family that adds positions or a scale adds it to numbers
                # that the first stand-in passes over.
                yield {**inputs, "input_ids": None, "inputs_embeds": states}
            finally:
                first.state = first.came_in = None

    def _padded(self, tokens: Tensor, packs: Sequence[Pack]) -> Tensor:
        """States [rows, tokens, hidden] for a batch int64 [rows, tokens]; beside them only the cache holds any."""
        return padded(tokens, self._states(packs))

    def _states(self, packs: Sequence[Pack]) -> list[Tensor]:
        """The states of the rows, remembered or computed now; a row that comes twice is computed once."""
        keys = [row_key(pack) for pack in packs]
        known = {key: state for key in keys if (state := self.cache.get(key)) is not None}
        missing = {key: pack for key, pack in zip(keys, packs, strict=True) if key not in known}
        for key, state in zip(missing, self.run_all(list(missing.values())), strict=True):
            self.cache.put(key, state)
            known[key] = state
        return [known[key] for key in keys]

    def run_all(self, packs: Sequence[Pack]) -> list[Tensor]:
        """The states [tokens, hidden] of rows, in order: those that can be joined together, the others one by one."""
        states: dict[int, Tensor] = {}
        together = [number for number, pack in enumerate(packs) if self.joins and self._can_join(pack)]
        for group in joined.groups([packs[number] for number in together]):
            numbers, together = together[: len(group)], together[len(group) :]
            states.update(zip(numbers, self._run_joined(group), strict=True))
        return [states[number] if number in states else self.run(pack) for number, pack in enumerate(packs)]

    def _can_join(self, pack: Pack) -> bool:
        """A function of the row alone. Packed rows whose layers are recomputed keep their mask, as without reuse."""
        limit = longest_block(self.model)
        if len(pack) <= joined.FEW or (limit and max(joined.lengths_of([pack])) > limit):
            return False
        return not (pack.sequence_ids[-1] and self.loss.recomputes())

    @torch.no_grad()
    def _run_joined(self, packs: Sequence[Pack]) -> Sequence[Tensor]:
        """As `run` gives them, bit for bit, where `joins` holds; each is a part of one tensor."""
        self.runs += len(packs)
        with block_by_block(self.model):
            state = self._came_out(joined.called_with(packs, self.model.device))
        return state[0].split([len(pack) for pack in packs])

    @torch.no_grad()
    def run(self, pack: Pack) -> Tensor:
        """The row alone through the embeddings and the layers below k: [tokens, hidden], without a graph."""
        self.runs += 1
        with self.called(batch_of([pack], self.pad_token_id)) as inputs:
            return self._came_out(inputs)[0]

    def _came_out(self, inputs: dict[str, Any]) -> Tensor:
        """What arrives at layer k: [rows, tokens, hidden]."""
        above = self._stand_ins[self.depth]
        with self._replaced(range(self.depth, len(self.layers))):
            self.model.base_model(**inputs)
        state, above.came_in = above.came_in, None
        if not isinstance(state, Tensor) or state.shape[:2] != inputs["input_ids"].shape or state.ndim != 3:
            raise ValueError("its layers do not pass on one state a token")
        return state

    def called(self, batch: dict[str, Tensor]) -> AbstractContextManager[dict[str, Any]]:
        """`LabelLoss.called` for a batch that may lie on another device."""
        names = ("input_ids", "attention_mask", "position_ids")
        return self.loss.called(**{name: batch[name].to(self.model.device) for name in names if name in batch})

    @contextmanager
    def _replaced(self, numbers: range) -> Iterator[None]:
        own = {number: self.layers[number] for number in numbers}
        try:
            for number in own:
                self.layers[number] = self._stand_ins[number]
            yield
        finally:
            for number, layer in own.items():
                self.layers[number] = layer

    def __str__(self) -> str:
        kept = f"{len(self.cache):,} rows kept: {self.cache.memory_used / 1e6:,.1f} MB in memory"
        filed = f", {self.cache.file_used / 1e6:,.1f} MB in a file" if self.cache.file_used else ""
        return f"{_named(self.depth, len(self.layers))} ran for {self.runs:,} rows, {kept}{filed}"

    def close(self) -> None:
        """Let the states go and remove the file."""
        self.cache.close()


def padded(tokens: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Rows [tokens, hidden] as one tensor [rows, tokens, hidden] of the size of a batch, zero at padding."""
    states = rows[0].new_zeros(*tokens.shape, rows[0].shape[-1], device=tokens.device)
    for place, row in zip(states, rows, strict=True):
        place[: len(row)] = row
    return states


def row_key(pack: Pack) -> bytes:
    """What a row's state depends on, beside the base: rows that are the same share one."""
    numbers = array("q", [*pack.input_ids, *pack.position_ids, *pack.sequence_ids])
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Plan:
    """Whether the prefix is reused. `said` is for people and the report; None where there is nothing to reuse."""

    prefix: Prefix | None
    said: str | None


def plan(
    loss: LabelLoss, rows: Sequence[Pack], train: TrainSection, again: bool, folder: Path, pad_token_id: int
) -> Plan:
    """Decide about `train.reuse_prefix`, and show that it is exact before it is used.

    With "auto" the prefix is reused when each of these holds; with "on" the last three are enough:
        the rows are passed over more than once;
        the prefix has at least an eighth of the layers;
        at least half of its states fit into `train.prefix_cache_gb`;
        something is frozen below the lowest trained layer;
        nothing in it draws random numbers while training (dropout);
        the forward in two parts equals the plain forward: bit for bit on rows alone, to rounding in a batch.

    Args:
        loss: its model has the adapters attached and active, as they will be trained.
        rows: all rows, to train on and held out.
        again: whether the training rows are passed over more than once.
        folder: where the cache's file may lie.

    Raises UsageError when "on" is asked for and cannot be.
    """
    cache = StateCache(
        folder / CACHE_FILE, memory=int(train.prefix_memory_gb * _GB), total=int(train.prefix_cache_gb * _GB)
    )
    cache.close()  # what a killed run left there
    asked = train.reuse_prefix == "on"
    if train.reuse_prefix == "off" or (not again and not asked):
        return Plan(None, None)
    model = loss.model
    layers = find_layers(model)
    depth, as_tuple = frozen_depth(model, layers) if layers else (0, False)
    if layers is None or not depth:
        reason = "no layer is frozen below the lowest trained one" if layers else "the list of its layers is not found"
        return _without(model, asked, reason, None)
    prefix = Prefix(loss, layers, depth, pad_token_id, cache, as_tuple=as_tuple)
    reason = why_not(prefix, rows) or ("" if asked else _does_not_pay(prefix, rows)) or ""
    prefix.joins = not reason and joins(prefix, rows)
    prefix.runs = 0
    if reason:
        return _without(model, asked, reason, f"{_named(depth, len(layers))} are frozen, not reused: {reason}")
    return Plan(prefix, f"{_named(depth, len(layers))} are frozen and run once a row")


def _without(model: PreTrainedModel, asked: bool, reason: str, said: str | None) -> Plan:
    if asked:
        todo = "Set train.reuse_prefix=auto; lora.layers_to_transform keeps an adapter to the upper layers."
        raise UsageError(f"train.reuse_prefix=on: {reason}", where=type(model).__name__, todo=todo)
    return Plan(None, said)


def find_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The decoder's list of layers; None when it is not clear which list that is."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    found = [child for child in lists if len(child) == count]
    return found[0] if len(found) == 1 else None


def frozen_depth(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[int, bool]:
    """(k, whether layers return tuples): nothing that is trained reaches the input of layer k, so 0 .. k-1 are frozen.

    Found by asking autograd, on a few tokens: trained embeddings, biases and copies count like adapters. Less than the
    number of layers, also where nothing but the head is trained.
    """
    entered: list[bool] = []
    tuples: list[bool] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = _hidden(args, kwargs)
        entered.append(not isinstance(hidden, Tensor) or hidden.requires_grad)

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks.append(layers[0].register_forward_hook(lambda _, __, answer: tuples.append(isinstance(answer, tuple))))
    try:
        with _mode(model, False), torch.enable_grad():
            model.base_model(input_ids=_tokens(model, 8), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    untouched = sum(1 for _ in takewhile(lambda trained: not trained, entered))
    once = len(entered) == len(layers)  # a family that passes its layers several times has no lower part
    return max(untouched - 1, 0) if once else 0, any(tuples)


@torch.no_grad()
def why_not(prefix: Prefix, rows: Sequence[Pack]) -> str | None:
    """Why reuse would not be exact for this model and these rows; None when it is.

    Tried on short rows of different lengths, one of them packed where the run packs.
    """
    model, name = prefix.model, type(prefix.model).__name__
    if (limit := _length_that_changes_positions(model)) and max(len(row) for row in rows) > limit:
        return f"{name}'s positions depend on the longest row of a batch beyond {limit:,} tokens"
    ids = _tokens(model, 24)[0].tolist()
    samples = [_alone(ids), _alone(ids[11:])]
    if any(row.sequence_ids[-1] for row in rows):
        samples.append(Pack.of([_example(ids[:9]), _example(ids[9:20])]))
    try:
        with _mode(model, True):
            if _draws(prefix, samples[0]):
                return "it draws random numbers while training (dropout)"
            trained = prefix.run(samples[0])
        with _mode(model, False):
            if not torch.equal(trained, prefix.run(samples[0])):
                return "it does not give while training what it gives else"
            alone = all(torch.equal(*_both_ways(prefix, [sample])) for sample in samples)
            with unrounded(prefix.model):
                together = alone and _agree(*_both_ways(prefix, samples), samples)
    except _UNFIT as error:
        return f"the forward of {name} cannot be parted ({error})"
    return None if together else f"the forward of {name} in two parts differs from its forward in one"


def _both_ways(prefix: Prefix, packs: Sequence[Pack]) -> tuple[Tensor, Tensor]:
    """Last hidden states [rows, tokens, hidden] of the plain forward, and of the one in two parts; nothing is kept."""
    with prefix.called(batch_of(packs, prefix.pad_token_id)) as inputs:
        plain = prefix.model.base_model(**inputs).last_hidden_state
        states = padded(inputs["input_ids"], [prefix.run(pack) for pack in packs])
        with prefix.above(inputs, states) as instead:
            return plain, prefix.model.base_model(**instead).last_hidden_state


def _agree(plain: Tensor, parted: Tensor, packs: Sequence[Pack]) -> bool:
    """Whether both are the same to rounding where there is no padding."""
    allowed = _AGREES.get(plain.dtype, 1e-4) * plain.abs().max()
    return all(
        bool((row[: len(pack)] - other[: len(pack)]).abs().max() <= allowed)
        for row, other, pack in zip(plain, parted, packs, strict=True)
    )


@torch.no_grad()
def joins(prefix: Prefix, rows: Sequence[Pack]) -> bool:
    """Whether rows may go through the prefix together: by what its layers do, and tried on the run's own rows.

    Those tried are a few of the shortest, of the middle and of the longest that can be joined.
    """
    if not prefix.loss.in_blocks:
        return False
    fit = sorted((row for row in rows if prefix._can_join(row)), key=len)
    tried = [*fit[:2], *fit[len(fit) // 2 :][:2], *fit[-1:]]
    if len(tried) < 2:
        return False
    layers = list(prefix.layers)[: prefix.depth]
    with _mode(prefix.model, False):
        done = joined.operations_in(layers, lambda: prefix._run_joined(tried[:2]))
        if joined.unlike(done, prefix.model.device):
            return False
        together = prefix._run_joined(tried)
        return all(torch.equal(state, prefix.run(row)) for state, row in zip(together, tried, strict=True))


def _draws(prefix: Prefix, pack: Pack) -> bool:
    """Whether the prefix takes random numbers, as dropout does where its share is above 0."""
    device = prefix.model.device
    with torch.random.fork_rng():
        before = _random_states(device)
        prefix.run(pack)
        return any(not torch.equal(was, now) for was, now in zip(before, _random_states(device), strict=True))


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _does_not_pay(prefix: Prefix, rows: Sequence[Pack]) -> str | None:
    """Why "auto" leaves it; None when it pays."""
    if prefix.depth < _SMALLEST_SHARE * len(prefix.layers):
        return f"it is less than an eighth of the {len(prefix.layers):,} layers"
    state = prefix.run(_alone(_tokens(prefix.model, 8)[0].tolist()))
    needed = sum(len(row) for row in rows) * state[0].nbytes
    if prefix.cache.total < (1 - _MOST_LEFT_OUT) * needed:
        return (
            f"its states take {needed / _GB:,.1f} GB, more than twice train.prefix_cache_gb "
            f"({prefix.cache.total / _GB:g})"
        )
    return None


def _length_that_changes_positions(model: PreTrainedModel) -> int | None:
    """Tokens from which on rotary positions change with the longest row of a batch (dynamic NTK, LongRoPE)."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("dynamic", "longrope"):
            original = part.get("original_max_position_embeddings")
            return original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    return None


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Some tokens, int64 [1, count]."""
    embeddings: Any = model.get_input_embeddings()
    return ((torch.arange(count, device=model.device) * 7 + 3) % len(embeddings.weight)).unsqueeze(0)


def _example(ids: list[int]) -> Example:
    return Example(ids, [True] * len(ids))


def _alone(ids: list[int]) -> Pack:
    return Pack.of([_example(ids)])


def _named(depth: int, layers: int) -> str:
    return f"the lowest {depth:,} of {layers:,} layers"
