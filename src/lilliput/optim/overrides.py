"""Which parameter is kept how: names, patterns over them, and what keeps 32-bit state whatever the rest does.

An optimizer sees tensors. Give it `model.named_parameters()` and it sees their names as well: then embeddings keep
32-bit state by their names, `overrides` can speak of parameters, and errors can name them.

Source of the exceptions: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861: embeddings keep 32 bits
(section 2.3: their gradients differ most in size from token to token), and so do tensors of fewer than 4096 numbers
(appendix A, bitsandbytes' `min_8bit_size`: nothing to save there).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lilliput.errors import UsageError, nearest

# How embeddings are called in the models of transformers and in people's own.
EMBEDDINGS = ("*embed*", "*wte*", "*wpe*", "emb.*", "*.emb.*", "*_emb.*")
_MARK = "optimizer_bits"  # attribute of a parameter that asks for so many bits itself
# A table of embeddings has many rows and few columns; without names that is all there is to go by, for a hint.
_TABLE_ROWS, _TABLE_SHAPE = 8192, 4


def keep_in_32_bits(model: nn.Module) -> list[str]:
    """Mark the weights of all `nn.Embedding`s in `model` (also tied ones) to keep 32-bit state; returns their names.

    Call it before making an optimizer from parameters without names. The mark is the attribute `optimizer_bits` of the
    parameter, which any module may set on its own weights (StableEmbedding does); copies of the model lose it.
    """
    found = [
        (f"{name}.weight" if name else "weight", module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    for _, module in found:
        setattr(module.weight, _MARK, 32)
    return [name for name, _ in found]


def bits_of(parameter: Tensor, name: str | None, asked: int | None, group: Mapping[str, Any]) -> int:
    """Bits of a parameter's moments, 8 or 32.

    The first of these that speaks: what an override asks for; the parameter's own mark; the group's 32; fewer numbers
    than the group's `min_8bit_size`; an embedding's name; the group's 8.
    """
    if asked is not None:
        return asked
    marked = getattr(parameter, _MARK, None)
    if marked is not None:
        return int(marked)
    if parameter.numel() < group["min_8bit_size"] or is_embedding(name):
        return 32
    return int(group["bits"])


def is_embedding(name: str | None) -> bool:
    """Whether a parameter's name is one of an embedding."""
    return name is not None and any(fnmatchcase(name, pattern) for pattern in EMBEDDINGS)


def looks_like_a_table(parameter: Tensor) -> bool:
    """Whether a parameter without name or mark has the shape of a token table. A guess, good for a hint only."""
    if parameter.dim() != 2 or hasattr(parameter, _MARK):
        return False
    rows, columns = parameter.shape
    return rows >= _TABLE_ROWS and rows >= _TABLE_SHAPE * columns


def tensors_and_names(params: Any) -> tuple[list[Any], list[str] | None]:
    """The tensors of a group and their names, which are None where it holds tensors alone.

    Raises UsageError where some have names and others have not.
    """
    entries = [params] if isinstance(params, Tensor) else list(params)
    pairs = [entry for entry in entries if isinstance(entry, tuple)]
    if pairs and len(pairs) < len(entries):
        raise UsageError("some parameters come with a name and some without", todo="Give model.named_parameters().")
    return ([tensor for _, tensor in pairs], [name for name, _ in pairs]) if pairs else (entries, None)


class Overrides:
    """Settings by name pattern: `{"*.lm_head.*": {"bits": 32, "lr": 1e-5}}`; of several that match, later ones win.

    Args:
        patterns: fnmatch patterns over whole names (`*` matches dots too), each with group options.
        known: names of the options that the optimizer has.

    Raises UsageError for an option that it has not.
    """

    def __init__(self, patterns: Mapping[str, Mapping[str, Any]], known: Iterable[str]) -> None:
        self.patterns = {pattern: dict(settings) for pattern, settings in patterns.items()}
        self.unused, self.seen = set(self.patterns), list[str]()
        for pattern, settings in self.patterns.items():
            for key in settings:
                if key not in known:
                    raise UsageError(f"no option '{key}'{nearest(key, known)}", where=f"overrides['{pattern}']")

    def of(self, name: str) -> dict[str, Any]:
        """What is set for the parameter of this name."""
        self.seen.append(name)
        settings: dict[str, Any] = {}
        for pattern, values in self.patterns.items():
            if fnmatchcase(name, pattern):
                self.unused.discard(pattern)
                settings.update(values)
        return settings

    def require_used(self) -> None:
        """Raise UsageError for a pattern that no parameter has matched."""
        for pattern in self.patterns:
            if pattern in self.unused:
                meant = nearest(pattern.replace("*", "").strip("."), self.seen)
                raise UsageError(f"no parameter matches '{pattern}'{meant}", where="overrides")

    def split(self, group: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], list[int | None]]]:
        """A group as the groups it becomes: first what keeps its options, then one for each other set of options.

        Yields: groups, and for each of their parameters the bits that an override asks for, or None.
        """
        tensors, names = tensors_and_names(group["params"])
        if names is None and self.patterns:
            raise UsageError(
                "overrides go by name, and the parameters have none",
                where="overrides",
                todo="Give model.named_parameters() instead of model.parameters().",
            )
        parts: dict[str, dict[str, Any]] = {"": {"settings": {}, "params": [], "asked": []}}
        for place, tensor in enumerate(tensors):
            settings = self.of(names[place]) if names else {}
            asked = settings.pop("bits", None)
            key = repr(sorted(settings.items())) if settings else ""
            part = parts.setdefault(key, {"settings": settings, "params": [], "asked": []})
            part["params"].append((names[place], tensor) if names else tensor)
            part["asked"].append(asked)
        if not parts[""]["params"] and len(parts) > 1:
            del parts[""]  # all of them have options of their own
        for part in parts.values():
            yield {**group, **part["settings"], "params": part["params"]}, part["asked"]
