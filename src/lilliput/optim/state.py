"""Where a moment lives: 32-bit floats or 8-bit codes, in memory or in pages; plain tensors in every case.

The state of a parameter is a dict: `step`, and for each moment of the rule its name with float32 of the parameter's
shape; or, in 8 bits, uint8 codes of that shape under its name and the blocks' absmax, float32 [ceil(numel/block)],
under `<name>_absmax`. With percentile clipping there is `grad_norms` too (clipping.py).

Not here: how codes become numbers (formats/blockwise.py), files (paging.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import CheckpointError
from lilliput.kernels.optimizer_rules import Moment
from lilliput.kernels.optimizer_step import zero_codes
from lilliput.optim.clipping import HISTORY

Full = Callable[[Sequence[int], float, torch.dtype], Tensor]
NORMS = "grad_norms"
_TOP_CODE = 255  # stands for 1.0 in both dynamic codebooks, so absmax itself


def layout(shape: Sequence[int], moments: Iterable[Moment], bits: int, block: int) -> dict[str, tuple[Any, ...]]:
    """Key -> (shape, dtype) of the tensors that hold the moments of a parameter of this shape."""
    found: dict[str, tuple[Any, ...]] = {}
    for moment in moments:
        found[moment.name] = (tuple(shape), torch.uint8 if bits == 8 else torch.float32)
        if bits == 8:
            numel = torch.Size(shape).numel()
            found[absmax_of(moment)] = ((-(-numel // block),), torch.float32)
    return found


def absmax_of(moment: Moment) -> str:
    """The key of a moment's absmax."""
    return f"{moment.name}_absmax"


def fresh(
    shape: Sequence[int], moments: Sequence[Moment], bits: int, block: int, value: float, full: Full
) -> dict[str, Tensor]:
    """Tensors that hold moments which are `value` everywhere.

    Args:
        shape: of the parameter.
        moments: of the rule; `value` other than 0 asks for unsigned ones.
        bits: 8 or 32.
        block: numbers that share an absmax.
        full: makes a tensor from its shape, the number that it is full of, and its dtype.
    """
    contents: dict[str, float] = {}
    for moment in moments:
        if bits == 8:
            contents[moment.name] = _TOP_CODE if value else zero_codes(moment.signed)
            contents[absmax_of(moment)] = value
        else:
            contents[moment.name] = value
    forms = layout(shape, moments, bits, block)
    return {key: full(form[0], contents[key], form[1]) for key, form in forms.items()}


class AsStored:
    """A tensor on its way through torch's `load_state_dict`, which would cast it to its parameter's dtype.

    What is no tensor passes there as it is.
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.tensor, self.device = tensor, device

    def unwrapped(self) -> Tensor:
        """A copy on the parameter's device, so that two optimizers never share a state."""
        return self.tensor.to(self.device, copy=True)


def wrapped(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A loaded state with its tensors in `AsStored`; the history of norms stays on the CPU."""
    cpu = torch.device("cpu")
    return {
        key: AsStored(value, cpu if key == NORMS else device) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def check_loaded(
    state: Mapping[str, Any], name: str, shape: Sequence[int], moments: Sequence[Moment], bits: int, block: int
) -> None:
    """Raise CheckpointError unless `state` is what a parameter of this shape has in this optimizer.

    Args:
        state: as loaded.
        name: of the parameter, for the error.
        shape, moments, bits, block: as for `layout`.
    """
    wanted = layout(shape, moments, bits, block)
    step = state.get("step")
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"step is {step!r}, expected a count", where=f"optimizer state of {name}")
    expected: dict[str, tuple[Any, ...]] = {**wanted, NORMS: ((HISTORY,), torch.float64)}
    for key in (*wanted, *(key for key in state if key != "step" and key not in wanted)):
        has, value = expected.get(key), state.get(key)
        if has is None:
            raise CheckpointError(f"holds '{key}', which is no moment here", where=f"optimizer state of {name}")
        if not isinstance(value, Tensor) or (tuple(value.shape), value.dtype) != has:
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
            raise CheckpointError(
                f"'{key}' is {found}, expected {has[1]} {list(has[0])}", where=f"optimizer state of {name}"
            )


def size_of(states: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of all tensors in these states."""
    tensors = (value for state in states for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
