"""A step of an optimizer: dequantize its moments, update, requantize, write the parameters; one pass over memory.

One call takes a whole list of parameters. The arithmetic is optimizer_rules.py's; moments are float32, or 8-bit codes
of the dynamic tree with one absmax per block (formats/blockwise.py: `quantize_dynamic`). The parameter moves by the
updated moments before they are rounded to codes, as in bitsandbytes. Results do not depend on the number of threads.

Sources: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861, section 2; kernels csrc/ops/optimizer.cpp and
optimizer.simd.cpp. Not here: parameter groups, state dicts, pages (lilliput.optim).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from lilliput.errors import FormatError, UsageError, nearest
from lilliput.formats import DYNAMIC8
from lilliput.formats import blockwise as reference
from lilliput.formats.codebooks import dynamic8
from lilliput.kernels import dispatch
from lilliput.kernels.core import addresses, arrays
from lilliput.kernels.optimizer_rules import RULES, Rule

MAX_BLOCK = 4096  # csrc/ops/ops.h: the kernel keeps a block's moments on the stack


def optimizer_step(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    absmax: Sequence[Sequence[Tensor]],
    hyper: Mapping[str, float],
    block: int = DYNAMIC8.block,
) -> None:
    """One step of all parameters, in place.

    Args:
        rule: a key of RULES.
        params: contiguous tensors of one device; float32, bfloat16 or float16, mixed as you like. Computed in float32,
            rounded once.
        grads: of the parameters' shapes, contiguous, of the same three types; finite (`gradient_norms` tells).
        moments: of each parameter those of the rule, in its order, of the parameter's shape: float32, or uint8 codes.
        absmax: of each parameter and moment float32 [ceil(numel / block)]; empty lists where moments are float32.
        hyper: the rule's `hyper`, and optionally `grad_scale`, which gradients are multiplied by first.
        block: numbers that share an absmax: a multiple of 64, at most 4096.

    Raises:
        UsageError: no such rule, a hyper-parameter missing or unknown, a block that is not allowed.
        FormatError: tensors that do not belong together.
    """
    row = _rule(rule)
    values = _values(row, hyper)
    if block < 64 or block > MAX_BLOCK or block % 64:
        raise UsageError(f"block={block}", todo=f"Give a multiple of 64, at most {MAX_BLOCK}.")
    _check(row, params, grads, moments, absmax, block)
    flat_moments = [moment for each in moments for moment in each]
    flat_absmax = [scale for each in absmax for scale in each]
    torch.ops.lilliput.optimizer_step(rule, params, grads, flat_moments, flat_absmax, values, block)


def gradient_norms(grads: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor, summed in float64: float64 [n]; NaN or Inf where a number is not finite.

    Args:
        grads: float32, bfloat16 or float16 tensors of one device.
    """
    if not grads:
        return torch.empty(0, dtype=torch.float64)
    return torch.ops.lilliput.gradient_norms(list(grads))


def zero_codes(signed: bool) -> int:
    """The code of 0.0: what fresh 8-bit moments are full of, beside an absmax of zeros."""
    return int((dynamic8(signed) == 0).nonzero()[0])


# ---- what fits together ----


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise UsageError(f"unknown optimizer rule '{name}'{nearest(name, RULES)}", todo=f"Known: {', '.join(RULES)}.")
    return RULES[name]


def _values(rule: Rule, hyper: Mapping[str, float]) -> list[float]:
    """The rule's hyper-parameters in its order, then grad_scale."""
    missing = [name for name in rule.hyper if name not in hyper]
    unknown = [name for name in hyper if name not in (*rule.hyper, "grad_scale")]
    if missing or unknown:
        raise UsageError(
            f"{rule.name}: {'missing ' + ', '.join(missing) if missing else 'unknown ' + ', '.join(unknown)}",
            todo=f"It takes {', '.join(rule.hyper)} and grad_scale.",
        )
    return [float(hyper[name]) for name in rule.hyper] + [float(hyper.get("grad_scale", 1.0))]


def _check(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    absmax: Sequence[Sequence[Tensor]],
    block: int,
) -> None:
    if not len(params) == len(grads) == len(moments) == len(absmax):
        raise FormatError(
            f"{len(params)} parameters, {len(grads)} gradients, moments of {len(moments)}, absmax of {len(absmax)}"
        )
    count = len(rule.moments)
    if rule.name == "sgd" and all(not each for each in moments):
        count = 0  # without momentum
    kinds = {moment.dtype for each in moments for moment in each}
    if len(kinds) > 1:
        raise FormatError(f"moments of several types in one call: {', '.join(map(str, kinds))}")
    eight = kinds == {torch.uint8}
    if kinds and not eight and kinds != {torch.float32}:
        raise FormatError(f"moments are {kinds.pop()}, expected float32 or uint8")
    for i, (p, g, mine, scales) in enumerate(zip(params, grads, moments, absmax, strict=True)):
        fits = (
            p.dtype in reference.FLOATS
            and g.dtype in reference.FLOATS
            and g.shape == p.shape
            and p.is_contiguous()
            and g.is_contiguous()
            and len(mine) == count
            and all(m.shape == p.shape and m.is_contiguous() for m in mine)
            and len(scales) == (count if eight else 0)
            and all(s.dtype == torch.float32 and s.shape == (-(p.numel() // -block),) for s in scales)
        )
        if not fits:
            raise FormatError(
                f"parameter {i} is {p.dtype} {tuple(p.shape)}, its gradient {g.dtype} {tuple(g.shape)}, its moments "
                f"{[tuple(m.shape) for m in mine]}, its absmax {[tuple(s.shape) for s in scales]}: one of them does "
                f"not belong here, or is not contiguous"
            )


# ---- the references ----


def _step(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
    absmax: list[Tensor],
    hyper: list[float],
    block: int,
) -> None:
    row = RULES[rule]
    h = dict(zip((*row.hyper, "grad_scale"), hyper, strict=True))
    count = len(moments) // max(len(params), 1)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        mine, scales = moments[i * count : (i + 1) * count], absmax[i * count : (i + 1) * count]
        signed = [moment.signed for moment in row.moments[:count]]
        wide = mine
        if scales:
            wide = [
                reference.dequantize_dynamic(m, s, dynamic8(sign), block)
                for m, s, sign in zip(mine, scales, signed, strict=True)
            ]
        moved = p.detach().to(torch.float32, copy=True)
        row.update(moved, g.detach().float() * h["grad_scale"], wide, h)
        p.copy_(moved)
        for m, s, w, sign in zip(mine, scales, wide, signed, strict=False):
            codes, new = reference.quantize_dynamic(w.reshape(-1), dynamic8(sign), block)
            m.copy_(codes.view(m.shape))
            s.copy_(new)


def _step_fake(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
    absmax: list[Tensor],
    hyper: list[float],
    block: int,
) -> None:
    return None


def _norms(grads: list[Tensor]) -> Tensor:
    return torch.stack([g.detach().double().square().sum() for g in grads])


def _norms_fake(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty(len(grads), dtype=torch.float64)


# ---- the compiled core ----


def _step_core(
    core: ModuleType,
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
    absmax: list[Tensor],
    hyper: list[float],
    block: int,
) -> None:
    signed, unsigned = arrays(dynamic8(True), dynamic8(False))
    lists = [addresses(tensors) for tensors in (params, grads, moments, absmax)]
    core.optimizer_step(rule, *lists, hyper, signed, unsigned, block, torch.get_num_threads())


def _norms_core(core: ModuleType, grads: list[Tensor]) -> Tensor:
    sums = torch.empty(len(grads), dtype=torch.float64)
    grads = [g.contiguous() for g in grads]
    core.gradient_norms(addresses(grads), *arrays(sums), torch.get_num_threads())
    return sums


def _core_steps(rule: str, params: list[Tensor], grads: list[Tensor], moments: list[Tensor], *others: object) -> bool:
    return bool(moments)  # SGD without momentum is one multiply-add, and torch's is as quick


STEP = dispatch.define(
    "optimizer_step(str rule, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] moments, Tensor(c!)[] absmax,"
    " float[] hyper, int block) -> ()",
    _step,
    _step_fake,
)
NORMS = dispatch.define("gradient_norms(Tensor[] grads) -> Tensor", _norms, _norms_fake)
dispatch.register_core(STEP, _step, _step_core, _core_steps)
dispatch.register_core(NORMS, _norms, _norms_core, lambda grads: all(g.dtype in reference.FLOATS for g in grads))
