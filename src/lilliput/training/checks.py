"""The promises of exactness, checked on a person's own model and rows before an hour of training is spent on them.

Each check is a function that returns what it measured and what to do when that is not good enough. They run on a few
short pieces of the rows with an adapter that is made to matter (B starts at zero, which would hide most faults), and
over a base in int8 without rounding its inputs, which would hide faults as well (layers.unrounded); afterwards weights,
gradients, modes and random states are as before. Under a minute for a 135 M model on two cores.

Not here: that a resumed run equals an uninterrupted one, which takes a run to see (tests/training/test_resume.py).
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.data import Chat, Example, ExampleSet, Pack, collate, end_of_turn_id, pack, show_example, to_chat
from lilliput.data.packing import NO_LABEL
from lilliput.errors import CheckFailed, UsageError
from lilliput.layers import unrounded
from lilliput.lora import (
    active_adapters,
    adapters,
    delete_adapter,
    load_adapter,
    save_adapter,
    set_adapter,
    target_layers,
)
from lilliput.models.causal import longest_row
from lilliput.progress import console, track
from lilliput.training.trainer import Batch, Collate, LabelLoss, batch_of, pad_id

_PIECES = 8  # rows in the accumulation check
_PROMPT, _ANSWER = 48, 32  # tokens that a piece of a long row keeps before and from its first label
_READ_BACK = "written_and_read_back"  # the name of an adapter for a moment
_MOST_ROWS = 2000  # that the token checks read
# Largest relative difference between two ways of adding up the same numbers, by the model's number type.
LOSS_AGREES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}
GRADIENT_AGREES = {torch.float64: 1e-8, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class CheckResult:
    """What became of one promise: `detail` has the numbers, `todo` what to do when it failed (empty when it passed)."""

    name: str
    passed: bool
    detail: str
    todo: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do when it did not pass."""

    passed: bool
    detail: str
    todo: str = ""


def run_checks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSet,
    *,
    collate: Collate = collate,
    show: bool = True,
    progress: bool = True,
) -> list[CheckResult]:
    """Check every promise; a broken one is a result, not an exception (`require` makes it one).

    Args:
        model: with an active adapter; left as it is found.
        tokenizer: the model's.
        examples: what the run is to learn from.
        collate: how packs become a batch (`lilliput.data.collate`; tests pass broken ones).
        show: print one example with its labels coloured, on standard error.
        progress: show a bar.

    Raises UsageError when the model has no active adapter.
    """
    if not active_adapters(model):
        raise UsageError("the model has no active adapter to check", todo="Call add_adapter first.")
    setup = _Setup(model, tokenizer, examples, collate)
    if show:
        console.print(show_example(setup.shown, tokenizer))
    return run_each(model, {name: partial(check, setup) for name, check in CHECKS.items()}, progress=progress)


def run_each(
    model: PreTrainedModel, checks: Mapping[str, Callable[[], Finding]], *, progress: bool = True
) -> list[CheckResult]:
    """Run checks by name on a model with an adapter that is made to matter; the model is left as it is found."""
    results = []
    with untouched(model), adapter_that_matters(model), unrounded(model):
        for name, check in track(list(checks.items()), "checking", shown=progress):
            began = time.perf_counter()
            found = check()
            seconds = time.perf_counter() - began
            results.append(CheckResult(name, found.passed, found.detail, "" if found.passed else found.todo, seconds))
    return results


def require(results: Sequence[CheckResult]) -> None:
    """Raise CheckFailed that names each broken promise and what to do; nothing when all passed."""
    broken = [result for result in results if not result.passed]
    if broken:
        raise CheckFailed(
            "; ".join(f"the promise '{result.name}' is broken: {result.detail}" for result in broken),
            todo=" ".join(dict.fromkeys(result.todo for result in broken)),
        )


class _Setup:
    """What the checks look at."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: ExampleSet, collate: Collate
    ) -> None:
        self.model, self.tokenizer, self.collate = model, tokenizer, collate
        self.examples = examples.examples[:_MOST_ROWS]
        by_origin = {record.origin: record for record in examples.records or ()}
        self.chats = {e.origin: to_chat(by_origin[e.origin]) for e in self.examples if e.origin in by_origin}
        self.cut = set(examples.overlong)
        self.shown = min(self.examples, key=len)

    @cached_property
    def loss(self) -> LabelLoss:
        return LabelLoss(self.model)

    @cached_property
    def pieces(self) -> list[Example]:
        """Eight short pieces, different ones as far as there are."""
        cut = [_piece(example) for example in self.examples]
        cut = sorted((piece for piece in cut if piece.labels), key=len)[:_PIECES]
        return (cut * _PIECES)[:_PIECES]

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Of all pieces in one batch."""
        return self.gradients_of([self.batch([Pack.of([piece]) for piece in self.pieces])])

    def batch(self, packs: Sequence[Pack]) -> Batch:
        made = batch_of(packs, pad_id(self.tokenizer, self.model), self.collate)
        return {name: tensor.to(self.model.device) for name, tensor in made.items()}

    def gradients_of(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Of one optimizer step over these batches, by the trained parameters' names."""
        count = sum(int(batch["labels"][:, 1:].ne(NO_LABEL).sum()) for batch in batches)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            parameter.grad = None
        with torch.enable_grad():
            for batch in batches:
                self.loss(**batch, num_items_in_batch=count)["loss"].backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}

    def agrees(self, table: dict[torch.dtype, float]) -> float:
        return table.get(self.model.dtype, 1e-2)


def _piece(example: Example) -> Example:
    """At most 80 tokens of an example, around its first label; for the checks that compare sums, any tokens will do."""
    first = example.label_mask.index(True, 1) if True in example.label_mask[1:] else 0
    part = slice(max(0, first - _PROMPT), first + _ANSWER)
    return Example(example.input_ids[part], example.label_mask[part], example.origin)


# ---- the promises ------------------------------------------------------------------------------------------------


def _packed_loss(setup: _Setup) -> Finding:
    """Our loss of all pieces in one packed row, against the model's plain forward on each piece alone.

    In several rows where one may not be so long, and in rows of one piece where the model takes no packed ones (a run
    refuses to pack for it).
    """
    with torch.no_grad():
        alone = sum(_plain_loss(setup, piece) for piece in setup.pieces)
        lengths = [len(piece) for piece in setup.pieces]
        whole = min(sum(lengths), longest_row(setup.model) or sum(lengths))
        rows = pack(setup.pieces, whole) if setup.loss.packs else [Pack.of([piece]) for piece in setup.pieces]
        packed = setup.loss(**setup.batch(rows), num_items_in_batch=1)["loss"].item()
    apart = abs(packed - alone) / abs(alone)
    how = "packed" if setup.loss.packs else "in rows of one, since the model takes no packed ones"
    detail = f"{packed:.6f} {how}, {alone:.6f} one by one; {apart:.1e} apart"
    todo = (
        "Tokens see other examples of their row, or the loss is not the model's: "
        "set data.packing=false, and report the model's architecture."
    )
    return Finding(apart <= setup.agrees(LOSS_AGREES), detail, todo)


def _plain_loss(setup: _Setup, piece: Example) -> float:
    """The sum of cross entropies as the definition has it: the model's own logits, no mask, no packing."""
    ids = torch.tensor([piece.input_ids], device=setup.model.device)
    logits = setup.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    wanted = torch.tensor(piece.label_mask[1:], device=ids.device)
    return functional.cross_entropy(logits[wanted], ids[0, 1:][wanted], reduction="sum").item()


def _accumulation(setup: _Setup) -> Finding:
    """The gradients of a step in one batch of eight rows and in eight batches of one."""
    at_once = setup.gradients
    one_by_one = setup.gradients_of([setup.batch([Pack.of([piece])]) for piece in setup.pieces])
    size = torch.stack([g.double().norm() for g in at_once.values()]).norm().item()
    apart = torch.stack([(at_once[name] - g).double().norm() for name, g in one_by_one.items()]).norm().item()
    detail = f"gradient norm {size:.6g} at once; {apart / max(size, 1e-30):.1e} of it apart"
    todo = "Rows of a batch disturb each other: set train.batch_size=1 and report the model's architecture."
    return Finding(size > 0 and apart <= setup.agrees(GRADIENT_AGREES) * size, detail, todo)


def _end_tokens(setup: _Setup) -> Finding:
    """As many labelled end tokens as the assistant has turns, the same in the batch that is trained on."""
    end = end_of_turn_id(setup.tokenizer)
    turns = wrong = 0
    where = ""
    for example in setup.examples:
        expected = _answers(setup, example)
        labelled = sum(
            label and token == end for token, label in zip(example.input_ids, example.label_mask, strict=True)
        )
        lacking = 1 if example.origin in setup.cut else 0  # a truncated row may have lost its last one
        turns += expected
        if not max(0, expected - lacking) <= labelled <= expected:
            wrong += 1
            where = where or f", first {example.origin}: {labelled} for {expected} turns"
    pieces = [Example(e.input_ids, e.label_mask) for e in setup.examples[:_PIECES]]
    batch = setup.batch([Pack.of([piece]) for piece in pieces])
    in_batch = int(batch["labels"].eq(end).sum())
    in_rows = sum(t == end and m for p in pieces for t, m in zip(p.input_ids, p.label_mask, strict=True))
    name = setup.tokenizer.convert_ids_to_tokens(end)
    detail = f"{name} of {turns:,} turns in {len(setup.examples):,} rows; wrong in {wrong:,}{where}"
    if in_batch != in_rows:
        detail += f"; a batch has {in_batch} where its rows have {in_rows}"
    todo = (
        "The tuned model would not know when to stop. Report the tokenizer's chat template, or use another tokenizer."
    )
    return Finding(wrong == 0 and in_batch == in_rows, detail, todo)


def _answers(setup: _Setup, example: Example) -> int:
    """Turns of the assistant: from the row where it is known, else runs of labels."""
    chat = setup.chats.get(example.origin)
    if chat is None or example.origin in setup.cut:
        return sum(label for label, _ in groupby(example.label_mask))
    return sum(turn.role == "assistant" for turn in chat.turns)


def _labels(setup: _Setup) -> Finding:
    """Each run of labels reads as the assistant's words of its turn, and then ends the turn."""
    wrong, read, where = 0, 0, ""
    for example in setup.examples:
        chat = setup.chats.get(example.origin)
        if chat is None or example.origin in setup.cut:
            continue
        read += 1
        if not _reads_as(setup, example, chat):
            wrong += 1
            where = where or f", first {example.origin}"
    detail = f"read {read:,} rows; wrong in {wrong:,}{where}"
    if not read:
        detail = "no row is whole enough to compare"
    todo = "Something else than the assistant's words would be learned. Report the tokenizer's chat template."
    return Finding(wrong == 0, detail, todo)


def _reads_as(setup: _Setup, example: Example, chat: Chat) -> bool:
    marked = zip(example.input_ids, example.label_mask, strict=True)
    runs = [[token for token, _ in run] for label, run in groupby(marked, key=lambda pair: pair[1]) if label]
    words = [turn.content.strip() for turn in chat.turns if turn.role == "assistant"]
    end = _decode(setup.tokenizer, [end_of_turn_id(setup.tokenizer)])
    said = [_decode(setup.tokenizer, run).strip().removesuffix(end).strip() for run in runs]
    expected = [
        _decode(setup.tokenizer, setup.tokenizer(w, add_special_tokens=False)["input_ids"]).strip() for w in words
    ]
    return said in (words, expected)  # `expected`: tokenizers that do not give a text back as it was (unknown letters)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _one_bos(setup: _Setup) -> Finding:
    """BOS once at the beginning where tokenizer or template put it, and twice in a row nowhere."""
    tokenizer, bos = setup.tokenizer, setup.tokenizer.bos_token_id
    if bos is None:
        return Finding(True, "none: the tokenizer has no BOS")
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    expected = tokenizer("a")["input_ids"][:1] == [bos] or "bos_token" in template
    wrong = [e.origin for e in setup.examples if (expected and e.input_ids[0] != bos) or _twice(e.input_ids, bos)]
    kind = "one at the start" if expected else "none of its own (neither tokenizer nor template puts one)"
    first = f", first {wrong[0]}" if wrong else ""
    detail = f"{kind} in {len(setup.examples):,} rows; wrong in {len(wrong):,}{first}"
    return Finding(
        not wrong, detail, "Set the tokenizer's add_bos_token to false, or take bos_token out of its template."
    )


def _twice(ids: list[int], token: int) -> bool:
    return any(one == two == token for one, two in pairwise(ids))


def _every_target(setup: _Setup) -> Finding:
    """No adapter matrix without a gradient, none with one that is no number."""
    gradients, dead, broken, total = setup.gradients, [], [], 0
    names = {id(parameter): name for name, parameter in setup.model.named_parameters()}
    for (target, _, key), tensor in _matrices(setup.model):
        total += 1
        gradient = gradients.get(names[id(tensor)])
        if gradient is None or not gradient.any():
            dead.append(f"{target}.{key}")
        elif not gradient.isfinite().all():
            broken.append(f"{target}.{key}")
    detail = f"{total - len(dead) - len(broken):,} of {total:,} adapter matrices"
    for kind, names_of in (("no gradient", dead), ("not finite", broken)):
        if names_of:
            detail += f"; {kind} at {', '.join(names_of[:3])}{' …' if len(names_of) > 3 else ''}"
    todo = "These modules take no part in the forward pass: leave them out with lora.exclude_modules."
    return Finding(total > 0 and not dead and not broken, detail, todo)


def _save_and_load(setup: _Setup) -> Finding:
    """The adapter written, read back, and run: the logits bit for bit."""
    model, active = setup.model, active_adapters(setup.model)
    ids = torch.tensor([setup.pieces[0].input_ids], device=model.device)
    try:
        with torch.no_grad(), tempfile.TemporaryDirectory(prefix="lilliput-") as folder:
            set_adapter(model, active[0])
            before = model(input_ids=ids, use_cache=False).logits
            save_adapter(model, folder, active[0])
            with read_back(model, folder, active[0]):
                after = model(input_ids=ids, use_cache=False).logits
    finally:
        set_adapter(model, active)
    apart = (before - after).abs().max().item()
    todo = "The saved adapter would not be the trained one: report lora's settings and the model's architecture."
    return Finding(apart == 0.0, f"logits differ by {apart:.3g} at most", todo)


@contextmanager
def read_back(model: PreTrainedModel, folder: str, name: str) -> Iterator[None]:
    """The adapter of `folder` runs instead of `name`, and replaces it where only one can train the biases."""
    instead = adapters(model)[name].bias != "none"
    if instead:
        delete_adapter(model, name)
    load_adapter(model, folder, name if instead else _READ_BACK, trainable=instead)
    try:
        yield
    finally:
        if not instead:
            delete_adapter(model, _READ_BACK)


CHECKS: dict[str, Callable[[_Setup], Finding]] = {
    "packed loss = unpacked loss": _packed_loss,
    "accumulation 1 x 8 = 8 x 1": _accumulation,
    "gradients at every target": _every_target,
    "labels are the assistant's words": _labels,
    "every turn's end is a label once": _end_tokens,
    "one BOS": _one_bos,
    "save, load, same logits": _save_and_load,
}


# ---- leaving everything as it was --------------------------------------------------------------------------------


@contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes, gradients and random states are as before."""
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    drawn = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.eval()
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        for module in model.modules():  # one that was put in meanwhile is as its model was
            module.training = modes.get(module, modes[model])
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


@contextmanager
def adapter_that_matters(model: PreTrainedModel) -> Iterator[None]:
    """Matrices of zeros get small numbers for a while: with B = 0 no gradient reaches A and no fault of B shows."""
    zeros = [place for place, tensor in _matrices(model) if not tensor.any()]
    with torch.no_grad():
        for place, tensor in _matrices(model):
            if place in zeros:
                tensor.normal_(std=0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for place, tensor in _matrices(model):  # looked up again: a check may have put in new ones
                if place in zeros:
                    tensor.zero_()


def _matrices(model: PreTrainedModel) -> Iterator[tuple[tuple[str, str, str], Tensor]]:
    """((target, adapter, matrix), its numbers) of all active adapters."""
    for target, layer in target_layers(model).items():
        for adapter in layer.active:
            for key, tensor in layer.tensors(adapter).items():
                yield (target, adapter, key), tensor
