"""One optimizer over a rule: groups of parameters, where their state lives, one kernel call for many of them.

`BlockwiseOptimizer` is a `torch.optim.Optimizer`. Which arithmetic it does is a row of kernels/optimizer_rules.py, how
its state is kept (32 bits, 8 bits, in pages) is an option; no class knows both. The familiar names: optimizers.py.

Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861; paged: QLoRA, arXiv 2305.14314, section 3.
Not here: the arithmetic (kernels), files (paging.py), names and patterns (overrides.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lilliput.errors import CheckpointError, FormatError, UsageError, nearest
from lilliput.formats.blockwise import FLOATS
from lilliput.kernels.optimizer_rules import RULES, Moment
from lilliput.kernels.optimizer_step import MAX_BLOCK, gradient_norms, optimizer_step
from lilliput.optim.clipping import clipped_scale, new_history
from lilliput.optim.overrides import Overrides, bits_of, looks_like_a_table
from lilliput.optim.paging import Pages
from lilliput.optim.state import NORMS, AsStored, absmax_of, check_loaded, fresh, size_of, wrapped
from lilliput.progress import warn

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

# Options of torch.optim and bitsandbytes that change nothing at these values, and that we do not have at others.
_ONLY: dict[str, tuple[Any, ...]] = {
    "adam_w_mode": (True,),
    "amsgrad": (False,),
    "bias_correction": (True,),
    "block_wise": (True,),
    "capturable": (False,),
    "centered": (False,),
    "decoupled_weight_decay": (False,),
    "differentiable": (False,),
    "foreach": (None, False),
    "fused": (None, False),
    "maximize": (False,),
}
_WHY_NOT = {
    "decoupled_weight_decay": "Take AdamW.",
    "foreach": "One call takes all parameters anyway; leave it out.",
    "fused": "Each step is one pass over memory anyway; leave it out.",
    "maximize": "Minimise the negative loss.",
}
_CALLED_ELSEWHERE = {"optim_bits": "bits", "is_paged": "paged", "blocksize": "block", "block_size": "block"}
_OPTIONS = ("bits", "block", "min_8bit_size", "percentile_clipping", "overrides", "paged", "budget", "page_folder")
# What a group option may be: what to say, and the test.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("lr", "eps", "weight_decay", "momentum", "alpha", "lr_decay", "initial_accumulator_value",
         "trust_coefficient"),
        ("a finite number, at least 0", lambda value: 0 <= float(value) < math.inf),
    ),
    "betas": ("numbers from 0 to below 1", lambda value: all(0 <= float(beta) < 1 for beta in value)),
    "bits": ("8 or 32", lambda value: value in (8, 32)),
    "block": (
        f"a multiple of 64, at most {MAX_BLOCK}",
        lambda value: isinstance(value, int) and 0 < value <= MAX_BLOCK and value % 64 == 0,
    ),
    "min_8bit_size": ("a whole number, at least 0", lambda value: isinstance(value, int) and value >= 0),
    "percentile_clipping": ("1 to 99, or 100 for none", lambda value: isinstance(value, int) and 1 <= value <= 100),
    "t_alpha": ("a number of steps, or None", lambda value: value is None or float(value) >= 1),
    "t_beta3": ("a number of steps, or None", lambda value: value is None or float(value) >= 1),
}  # fmt: skip


class _Turn(NamedTuple):
    """A parameter that has a gradient: what it is and where it stands."""

    parameter: Tensor
    grad: Tensor
    group: int
    place: int


class BlockwiseOptimizer(Optimizer):
    """Base of all optimizers here: `torch.optim.Optimizer` with its state in 8 or 32 bits, in memory or in pages.

    Args:
        params: as torch's optimizers take them: tensors, (name, tensor) pairs as `model.named_parameters()` gives them,
            or groups of either. With names, embeddings keep 32-bit state and errors can name parameters. Parameters
            are float32, bfloat16 or float16 and contiguous; the arithmetic is float32 throughout.
        defaults: the options of the rule, which groups may change.
        bits: 8: moments are codes of the dynamic tree, with one absmax a block; 32: float32. None: the class's own.
        block: numbers that share an absmax: a multiple of 64, at most 4096.
        min_8bit_size: tensors of fewer numbers keep 32-bit state.
        percentile_clipping: 5 scales a gradient down to the 5th percentile of its tensor's last 100 norms; 100: never.
        overrides: group options by name pattern, `{"*.lm_head.*": {"bits": 32, "lr": 1e-5}}`; options other than
            `bits` make a group of their own.
        paged: keep the state in a mapped file (on a GPU: in pinned host memory). None: the class's own.
        budget: paged: how much of the state may stay in memory, e.g. "2GB"; None leaves it to the system.
        page_folder: paged: where the file lies; None: our cache.
        rest: torch's and bitsandbytes' other options, at the values that change nothing.

    `bits`, `block`, `min_8bit_size` and `percentile_clipping` are group options too.

    Raises:
        UsageError: an option that is unknown, not supported or out of range; overrides that match nothing.
        FormatError: a parameter that cannot be trained here, by its name.
    """

    rule: ClassVar[str]
    kept_bits: ClassVar[int] = 32
    kept_in_pages: ClassVar[bool] = False

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        bits: int | None = None,
        block: int = 256,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        paged: bool | None = None,
        budget: int | str | None = None,
        page_folder: str | Path | None = None,
        **rest: Any,
    ) -> None:
        _refuse_others(type(self).__name__, rest, (*defaults, *_OPTIONS))
        self.paged = self.kept_in_pages if paged is None else paged
        self.budget, self.page_folder = budget, page_folder
        if not self.paged and (budget is not None or page_folder is not None):
            raise UsageError("budget and page_folder are of paged state", todo="Set paged=True.")
        self.pages: dict[torch.device, Pages] = {}
        defaults = {
            **defaults,
            "bits": self.kept_bits if bits is None else bits,
            "block": block,
            "min_8bit_size": min_8bit_size,
            "percentile_clipping": percentile_clipping,
        }
        self.overrides = Overrides(overrides or {}, defaults)
        super().__init__(params, defaults)
        self.overrides.require_used()
        self._hint_at_tables()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; where overrides change options of some of its parameters, these become groups."""
        parts = list(self.overrides.split(param_group))
        for part, asked in parts:
            self._check({**self.defaults, **part})
            for bits in asked:
                if bits is not None:
                    _check_options({"bits": bits}, where="overrides")
        for part, asked in parts:
            super().add_param_group(part)
            group = self.param_groups[-1]
            names = group.get("param_names") or [None] * len(asked)
            group["param_bits"] = [
                bits_of(p, name, wish, group) for p, name, wish in zip(group["params"], names, asked, strict=True)
            ]
            for place, parameter in enumerate(group["params"]):
                if parameter.requires_grad:
                    _check_parameter(parameter, self._name(len(self.param_groups) - 1, place))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient; returns the closure's loss, or None.

        Nothing has changed where it raises.

        Raises:
            FormatError: a gradient with NaN or Inf, or of a kind that cannot be used (sparse), by its parameter's name.
            DiskError: paged state for which there is no room.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        turns = self._turns()
        sums = self._sums_of_squares(turns)
        self._make_states(turns)
        for (group, bits, step, scale, device), members in self._together(turns, sums).items():
            self._update(self.param_groups[group], bits, step, scale, device, members)
        return loss

    def state_bytes(self) -> int:
        """Bytes of all state that there is; before the first step that is none."""
        return size_of(self.state.values())

    def hyper(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        """The rule's hyper-parameters for a group's parameters at their step, from 1."""
        betas = {f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), start=1)}
        values = {**group, **betas, "step": step}
        return {name: float(values[name]) for name in RULES[self.rule].hyper}

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        """What is remembered of a group's parameters."""
        return RULES[self.rule].moments

    def initial(self, group: Mapping[str, Any]) -> float:
        """What moments begin with."""
        return 0.0

    def _check(self, options: Mapping[str, Any]) -> None:
        """Raise UsageError for options of a group that are out of their range."""
        _check_options(options, where=type(self).__name__)
        wanted = sum(name.startswith("beta") for name in RULES[self.rule].hyper)
        if "betas" in options and len(options["betas"]) != wanted:
            raise UsageError(f"betas={options['betas']!r}: expected {wanted} numbers", where=type(self).__name__)

    # ---- a step ----

    def _turns(self) -> list[_Turn]:
        """The parameters with a gradient, each of which can be used."""
        turns = []
        for at, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                grad = parameter.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided or grad.dtype not in FLOATS:
                    kind = grad.dtype if grad.layout is torch.strided else "sparse"
                    todo = "Take sparse=False for the embedding." if kind == "sparse" else None
                    raise FormatError(f"its gradient is {kind}", where=self._name(at, place), todo=todo)
                turns.append(_Turn(parameter, grad if grad.is_contiguous() else grad.contiguous(), at, place))
        return turns

    def _sums_of_squares(self, turns: Sequence[_Turn]) -> list[float]:
        """Of each gradient, and with that the proof that all of them are finite."""
        devices: dict[torch.device, list[int]] = defaultdict(list)
        for i, turn in enumerate(turns):
            devices[turn.grad.device].append(i)
        found = [0.0] * len(turns)
        for places in devices.values():
            sums = gradient_norms([turns[i].grad for i in places])
            for i, value in zip(places, sums.tolist(), strict=True):
                if not math.isfinite(value):
                    self._refuse_gradient(turns[i])
                found[i] = value
        return found

    def _refuse_gradient(self, turn: _Turn) -> None:
        wrong = int(turn.grad.numel() - turn.grad.isfinite().sum())
        raise FormatError(
            f"its gradient has {wrong:,} numbers that are NaN or Inf, of {turn.grad.numel():,}",
            where=self._name(turn.group, turn.place),
            todo="Nothing was changed. Lower the learning rate, clip gradients, or skip this step.",
        )

    def _make_states(self, turns: Sequence[_Turn]) -> None:
        """State for parameters that have none yet; with pages for all at once, since a disk may be too small."""
        missing = [(turn.group, turn.place) for turn in turns if not self.state.get(turn.parameter)]
        if not missing:
            return
        if self.paged:
            missing = [
                (at, place)
                for at, group in enumerate(self.param_groups)
                for place, parameter in enumerate(group["params"])
                if parameter.requires_grad and not self.state.get(parameter)
            ]
        made = {where: self._fresh(*where) for where in missing}
        for (at, place), state in made.items():
            self.state[self.param_groups[at]["params"][place]] = state

    def _fresh(self, at: int, place: int) -> dict[str, Any]:
        group = self.param_groups[at]
        parameter = group["params"][place]
        _check_parameter(parameter, self._name(at, place))
        full: Callable[..., Tensor] = partial(torch.full, device=parameter.device)
        if self.paged:
            full = self._pages_of(parameter).full
        tensors = fresh(
            parameter.shape,
            self.moments(group),
            group["param_bits"][place],
            group["block"],
            self.initial(group),
            lambda shape, value, dtype: full(shape, value, dtype=dtype),
        )
        return {"step": 0, **tensors}

    def _together(self, turns: Sequence[_Turn], sums: Sequence[float]) -> dict[tuple[Any, ...], list[_Turn]]:
        """What one call of the kernel can do: same group, bits, step, scale of the gradient, device."""
        found: dict[tuple[Any, ...], list[_Turn]] = defaultdict(list)
        for turn, total in zip(turns, sums, strict=True):
            group, state = self.param_groups[turn.group], self.state[turn.parameter]
            scale, percentile = 1.0, group["percentile_clipping"]
            if percentile < 100:
                if NORMS not in state:
                    state[NORMS] = new_history()
                scale = clipped_scale(state[NORMS], state["step"], total, percentile)
            bits = group["param_bits"][turn.place]
            found[turn.group, bits, state["step"] + 1, scale, turn.parameter.device].append(turn)
        return found

    def _update(
        self, group: dict[str, Any], bits: int, step: int, scale: float, device: torch.device, turns: list[_Turn]
    ) -> None:
        states = [self.state[turn.parameter] for turn in turns]
        moments = self.moments(group)
        names = [moment.name for moment in moments]
        keys = names + ([absmax_of(moment) for moment in moments] if bits == 8 else [])
        tensors = [[state[key] for key in keys] for state in states]
        hyper = {**self.hyper(group, step), "grad_scale": scale}
        for run, used in self._in_memory(device, tensors):
            with used as kept:
                optimizer_step(
                    self.rule,
                    [turn.parameter for turn in turns[run]],
                    [turn.grad for turn in turns[run]],
                    [each[: len(names)] for each in kept],
                    [each[len(names) :] for each in kept],
                    hyper,
                    group["block"],
                )
            for state in states[run]:
                state["step"] = step

    def _in_memory(
        self, device: torch.device, tensors: list[list[Tensor]]
    ) -> Iterator[tuple[slice, AbstractContextManager[list[list[Tensor]]]]]:
        """The runs of a list of parameters' state tensors, and a context in which each can be worked on."""
        if not self.paged:
            yield slice(0, len(tensors)), nullcontext(tensors)
            return
        pages = self.pages[device]
        for run in pages.runs(tensors):
            yield run, _Nested(pages.in_use([t for each in tensors[run] for t in each]), len(tensors[run]))

    def _pages_of(self, parameter: Tensor) -> Pages:
        if parameter.device not in self.pages:
            self.pages[parameter.device] = Pages(self.budget, self.page_folder, parameter.device)
        return self.pages[parameter.device]

    # ---- saving and loading ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave: tensors keep their types and move to their parameters' devices.

        Raises CheckpointError, before anything changes, where it is of another optimizer, of other bits or blocks, or
        of other parameters.
        """
        # torch casts floating state to its parameter's type, which would ruin codes and float32 moments of bfloat16
        # parameters. The hook is the last to see the dict; people's own hooks see plain tensors.
        hook = self.register_load_state_dict_pre_hook(_wrap)  # type: ignore[arg-type]
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "paged": self.paged,
            "budget": self.budget,
            "page_folder": self.page_folder,
            "overrides": self.overrides,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What torch calls at the end of loading, and what copies and unpickled optimizers begin with."""
        super().__setstate__(state)
        old, self.pages = self.__dict__.get("pages", {}), {}
        for parameter, kept in self.state.items():
            for key, value in kept.items():
                if self.paged and key != NORMS and isinstance(value, (AsStored, Tensor)):
                    tensor = value.tensor if isinstance(value, AsStored) else value
                    kept[key] = self._pages_of(parameter).copied(tensor)
                elif isinstance(value, AsStored):
                    kept[key] = value.unwrapped()
        for pages in old.values():
            pages.close()

    # ---- names ----

    def _name(self, at: int, place: int) -> str:
        """A parameter as an error calls it: its name, or where it stands, and its shape."""
        group = self.param_groups[at]
        names = group.get("param_names")
        called = f"'{names[place]}'" if names else f"{place} of group {at}"
        return f"parameter {called} {list(group['params'][place].shape)}"

    def _hint_at_tables(self) -> None:
        """Say once that embeddings cannot be told by tensors alone, where there seems to be one in 8 bits."""
        for at, group in enumerate(self.param_groups):
            if group.get("param_names") or group["bits"] == 32:
                continue
            for place, parameter in enumerate(group["params"]):
                if parameter.requires_grad and group["param_bits"][place] == 8 and looks_like_a_table(parameter):
                    warn(
                        f"{self._name(at, place)} may be an embedding, which is better kept in 32 bits, and without "
                        "names that cannot be told: give model.named_parameters(), or call keep_in_32_bits(model) first"
                    )
                    return


class _Nested(AbstractContextManager[list[list[Tensor]]]):
    """A context of a flat list of tensors as one of `count` lists of equal length."""

    def __init__(self, flat: AbstractContextManager[list[Tensor]], count: int) -> None:
        self.flat, self.count = flat, count

    def __enter__(self) -> list[list[Tensor]]:
        tensors = self.flat.__enter__()
        each = len(tensors) // self.count
        return [tensors[i * each : (i + 1) * each] for i in range(self.count)]

    def __exit__(self, *error: Any) -> bool | None:
        return self.flat.__exit__(*error)


def _wrap(optimizer: BlockwiseOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The last hook before a load: checks the dict, and hides its tensors from torch's casts."""
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
        return state_dict  # torch says so
    states = dict(state_dict["state"])
    for at, (ours, theirs) in enumerate(zip(groups, saved, strict=True)):
        _check_group(optimizer, at, ours, theirs)
        for place, key in enumerate(theirs["params"]):
            if key not in states:
                continue
            parameter, name = ours["params"][place], optimizer._name(at, place)
            bits, block = ours["param_bits"][place], ours["block"]
            if states[key]:
                check_loaded(states[key], name, parameter.shape, optimizer.moments(theirs), bits, block)
            states[key] = wrapped(states[key], parameter.device)
    return {**state_dict, "state": states}


def _check_group(optimizer: BlockwiseOptimizer, at: int, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise CheckpointError where a saved group is of another optimizer, or keeps its state otherwise."""
    where = f"optimizer state, group {at}"
    absent = [key for key in optimizer.defaults if key not in theirs and key != "differentiable"]
    if absent or "param_bits" not in theirs:
        raise CheckpointError(
            f"has no '{(absent or ['param_bits'])[0]}': it was not saved by {type(optimizer).__name__}", where=where
        )
    for place, (here, there) in enumerate(zip(ours["param_bits"], theirs["param_bits"], strict=True)):
        if here != there:
            raise CheckpointError(
                f"has {there}-bit state for {optimizer._name(at, place)}, which is kept in {here} bits here",
                where=where,
                todo="Make the optimizer with the options that the saved one had (bits, min_8bit_size, overrides, "
                "named parameters or not).",
            )
    if ours["block"] != theirs["block"] and 8 in ours["param_bits"]:
        raise CheckpointError(
            f"has blocks of {theirs['block']}, and here they are of {ours['block']}",
            where=where,
            todo=f"Make the optimizer with block={theirs['block']}.",
        )


def _refuse_others(optimizer: str, rest: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise UsageError for options that are unknown, or not supported at their value."""
    for key, value in rest.items():
        if key not in _ONLY:
            meant = _CALLED_ELSEWHERE.get(key)
            raise UsageError(
                f"no option '{key}'{f'; did you mean {meant!r}?' if meant else nearest(key, known)}", where=optimizer
            )
        if not any(value is allowed for allowed in _ONLY[key]):
            raise UsageError(f"{key}={value!r} is not supported", where=optimizer, todo=_WHY_NOT.get(key))


def _check_options(options: Mapping[str, Any], where: str) -> None:
    """Raise UsageError for a group option out of its range."""
    for key, value in options.items():
        said, fits = _ALLOWED.get(key, ("", None))
        if fits is None:
            continue
        try:
            right = fits(value)
        except (TypeError, ValueError):
            right = False
        if not right:
            raise UsageError(f"{key}={value!r}: expected {said}", where=where)


def _check_parameter(parameter: Tensor, name: str) -> None:
    """Raise FormatError for a parameter that no step could be done on."""
    if parameter.dtype not in FLOATS:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise FormatError(f"is {str(parameter.dtype).removeprefix('torch.')}", where=name, todo=f"Known: {kinds}.")
    if not parameter.is_contiguous():
        raise FormatError("is not contiguous", where=name, todo="Make it so: parameter.data = parameter.contiguous().")
