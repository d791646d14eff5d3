"""Our number formats in `from_pretrained`, through transformers' own registry of quantizers.

`import lilliput` imports this file, which registers "lilliput" as a quantization method; the layers and kernels are
imported only when a model is loaded. Loading goes tensor by tensor: transformers hands over one weight, `_Quantize`
turns it into codes, and the weight is gone. `load_model` takes the same way, with its own reader below and strict
checks above.
"""

from __future__ import annotations

from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lilliput.errors import CheckpointError, FormatError, LilliputError, UsageError, nearest
from lilliput.formats import get_format, grouped_format
from lilliput.formats.format import GROUP, ROW
from lilliput.formats.grouped import scale_type
from lilliput.formats.rowwise import check_threshold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "lilliput"
# What config.json holds for every format; the format's own options stand beside.
_STORED = ("format", "block", "skip_modules", "weights_sha256")
_OF_QUANTIZE = ("double_quant", "symmetric")  # options that `kernels.quantize` takes
_OPTIONS = ("double_quant", "threshold", "embeddings", "symmetric", "ordered", "scale_dtype")


@register_quantization_config(METHOD)
class LilliputConfig(QuantizationConfigMixin):
    """What `config.json` remembers of a quantized model. Make one with the class of its format.

    An option that is None is the format's own default; one that the format has not is refused when it is asked for.

    Args:
        format: the number format.
        double_quant: quantize the absmax values too (4-bit formats; 0.127 instead of 0.5 bits a parameter).
        skip_modules: modules that stay as they are, by full name or its last parts; None means heads and tied weights.
            After a load it is the full list.
        threshold: input columns with a larger number are multiplied in float32 (int8; 6.0); 0: none.
        embeddings: the token table too, and the head where it is tied to that (int8; False).
        symmetric: the middle code is the zero of all groups (int4, int3, int2, int8g; False).
        ordered: stored columns have an order of their own (the same formats; False, as nothing that quantizes to the
            nearest makes one).
        scale_dtype: type of the stored scales (the same formats; "float16").
        weights_sha256: hash of the checkpoint that was quantized; filled in when the model is saved.
        stored: `quant_method` and `block` as a config.json has them; anything else is refused.
    """

    format: str = ""

    def __init__(
        self,
        format: str | None = None,
        double_quant: bool | None = None,
        skip_modules: list[str] | None = None,
        weights_sha256: str | None = None,
        threshold: float | None = None,
        embeddings: bool | None = None,
        symmetric: bool | None = None,
        ordered: bool | None = None,
        scale_dtype: str | None = None,
        **stored: Any,
    ) -> None:
        if format is not None and type(self).format not in ("", format):
            raise UsageError(f"{type(self).__name__} is for '{type(self).format}', not '{format}'")
        self.quant_method: Any = METHOD  # transformers says an enumeration, its registry takes any string
        self.format = format or type(self).format
        self._check(stored)
        row = get_format(self.format)
        self.double_quant: bool = row.option("double_quant", double_quant)
        self.threshold = check_threshold(row.option("threshold", threshold))
        self.embeddings: bool = row.option("embeddings", embeddings)
        self.symmetric: bool = row.option("symmetric", symmetric)
        self.ordered: bool = row.option("ordered", ordered)
        self.scale_dtype: str | None = row.option("scale_dtype", scale_dtype)
        if self.scale_dtype is not None:
            scale_type(self.scale_dtype)
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.weights_sha256 = weights_sha256
        self.block = row.block
        self.failures: list[LilliputError] = []  # what went wrong inside transformers' loader, which keeps only text

    def _check(self, stored: dict[str, Any]) -> None:
        for key in stored.keys() - {"quant_method", "block"}:
            raise UsageError(f"unknown key '{key}'{nearest(key, _STORED + _OPTIONS)}", where="quantization_config")
        if (block := stored.get("block", own := get_format(self.format).block)) != own:
            raise CheckpointError(f"blocks of {block} values, expected {own}", where="quantization_config")

    @property
    def options(self) -> dict[str, Any]:
        """What holds for each of the format's options."""
        return {name: getattr(self, name) for name in get_format(self.format).options}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of the class that its format belongs to, as transformers calls it."""
        chosen = config_for(**{"format": "", **config_dict})
        return (chosen, kwargs) if return_unused_kwargs else chosen

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json."""
        return {"quant_method": METHOD} | {key: getattr(self, key) for key in _STORED} | self.options


class NF4Config(LilliputConfig):
    """Quantize linear layers to 4-bit NormalFloat: `from_pretrained(..., quantization_config=NF4Config())`."""

    format = "nf4"


class FP4Config(LilliputConfig):
    """The same with 4-bit floats."""

    format = "fp4"


class Int8Config(LilliputConfig):
    """Quantize linear layers to int8 by rows, and their inputs while they are multiplied: LLM.int8().

    `from_pretrained(..., quantization_config=Int8Config(threshold=6.0, embeddings=True))`.
    """

    format = "int8"

    def __init__(
        self,
        threshold: float | None = None,
        skip_modules: list[str] | None = None,
        embeddings: bool | None = None,
        **others: Any,
    ) -> None:
        super().__init__(threshold=threshold, skip_modules=skip_modules, embeddings=embeddings, **others)


class GroupedConfig(LilliputConfig):
    """Quantize linear layers to whole numbers with a scale and a zero for each group of a row, to the nearest.

    `from_pretrained(..., quantization_config=GroupedConfig(bits=4, group_size=128))`. For codes that make up for each
    other's errors, quantize with GPTQ (`lilliput quantize --format gptq`); what that makes loads with this config too.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: numbers of a row that share scale and zero, a multiple of 32; -1: a whole row.
        symmetric: the middle code is the zero of all groups.
    """

    def __init__(
        self,
        bits: int | None = None,
        group_size: int | None = None,
        symmetric: bool | None = None,
        skip_modules: list[str] | None = None,
        format: str | None = None,
        **others: Any,
    ) -> None:
        if format is None:
            group = GROUP if group_size is None else group_size
            format = grouped_format(4 if bits is None else bits, ROW if group == -1 else group).name
        elif (bits, group_size) != (None, None):
            raise UsageError(f"format '{format}' says bits and group already", where=type(self).__name__)
        if get_format(format).kind != "groups":
            raise UsageError(f"{type(self).__name__} is for groups, not '{format}'")
        super().__init__(format, symmetric=symmetric, skip_modules=skip_modules, **others)


_CONFIGS: dict[str, type[LilliputConfig]] = {"nf4": NF4Config, "fp4": FP4Config, "int8": Int8Config}


def config_for(format: str, **arguments: Any) -> LilliputConfig:
    """The config for a number format by name. Raises UsageError with the nearest name when there is none."""
    return _CONFIGS.get(get_format(format).name, GroupedConfig)(format=format, **arguments)


@register_quantizer(METHOD)
class LilliputQuantizer(HfQuantizer):
    """Puts quantized layers into an empty model, and fills them as transformers reads the checkpoint."""

    quantization_config: LilliputConfig
    transposed: set[str]  # weights of Conv1D, stored as [in, out]

    def __init__(self, quantization_config: LilliputConfig, **kwargs: Any) -> None:
        # a copy, since what is skipped is written into it and the user may load another model with theirs
        super().__init__(copy(quantization_config), **kwargs)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise UsageError for weights that would be kept on disk."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UsageError("quantized layers cannot be kept on disk", where="device_map")

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        from lilliput.layers import QuantizedWeight

        module, _, name = param_name.rpartition(".")
        return not self.pre_quantized and name == "weight" and isinstance(model.get_submodule(module), QuantizedWeight)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from transformers.pytorch_utils import Conv1D

        from lilliput.layers.replace import linear_names, replace_linears

        config = self.quantization_config
        self.transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        for name in replace_linears(model, config.format, skip=config.skip_modules, **config.options):
            # so that transformers draws no random numbers into codes; that they are filled is checked below
            setattr(model.get_submodule(name), "_is_hf_initialized", True)  # noqa: B010
        config.skip_modules = linear_names(model)
        if checkpoint_files:
            _attach_identity(model, config, [Path(file) for file in checkpoint_files])

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from lilliput.layers import quantized_layers

        for name, layer in quantized_layers(model):
            for parameter_name, parameter in layer.named_parameters():
                parameter.requires_grad_(False)
                if not getattr(parameter, "_is_hf_initialized", False):
                    raise CheckpointError(
                        f"there is no tensor for '{name}.{parameter_name}'",
                        where=str(model.name_or_path or "checkpoint"),
                    )
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Called when a model is about to be saved: the moment to say which checkpoint it came from, and which layers
        are dense now (a merged adapter makes some so).
        """
        from lilliput.layers import identity_of
        from lilliput.layers.replace import linear_names

        self.quantization_config.skip_modules = linear_names(model)
        self.quantization_config.weights_sha256 = identity_of(model).weights_sha256
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True, so that `Trainer` accepts adapters that are not PEFT's; the codes themselves never get a gradient."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """One weight becomes codes and constants, held by its layer."""

    def __init__(self, quantizer: LilliputQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """{name of a weight: [the weight]} to {names of the layer's codes and constants: those}."""
        filled: dict[str, Any] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            try:
                filled |= self._fill(kwargs["model"], name, weight)
            except FormatError as error:
                failure = FormatError(error.what, where=name, todo=error.todo)
                self.quantizer.quantization_config.failures.append(failure)
                raise failure from error
        return filled

    def _fill(self, model: nn.Module, name: str, weight: Tensor) -> dict[str, Tensor]:
        from lilliput import kernels
        from lilliput.layers import QuantizedWeight

        path = name.rpartition(".")[0]
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantizedWeight)
        if name in self.quantizer.transposed:
            weight = weight.t().contiguous()
        if tuple(weight.shape) != layer.weight_shape:
            expected = list(layer.weight_shape)
            raise FormatError(f"shape {list(weight.shape)} in the checkpoint, {expected} in the model")
        chosen = {name: value for name, value in layer.quantized.options.items() if name in _OF_QUANTIZE}
        quantized = kernels.quantize(weight, layer.format_name, **chosen)
        if layer.weight.device != weight.device:
            _make_room(model, weight.device)
        layer.fill(quantized)
        return {f"{path}.{part}": p for part, p in layer.named_parameters() if part != "bias"}


def _make_room(model: nn.Module, device: torch.device) -> None:
    """Allocate all codes and constants at once, before more weights pass through.

    Allocated one by one, they would lie in the holes that the far larger weights have left in malloc's heap, and the
    next weight would find no hole of its size: 270 MB of bfloat16, in tensors that take 16 MB in float32, then peaked
    at 340 MB above the imports instead of 110 MB.
    """
    from lilliput.layers import quantized_layers

    for _, layer in quantized_layers(model):
        if layer.weight.device.type == "meta":
            layer.make_room(device)


def _attach_identity(model: PreTrainedModel, config: LilliputConfig, files: list[Path]) -> None:
    """Let `identity_of` find the checkpoint again: by the hash it remembers, or by its files."""
    from lilliput.layers.identity import ATTRIBUTE, IdentitySource, Stamp

    stamps = [Stamp.of(file) for file in files]
    name = str(model.config.name_or_path or files[0].parent)
    setattr(model, ATTRIBUTE, IdentitySource(name, partial(_checkpoint_hash, config.weights_sha256, stamps)))


def _checkpoint_hash(remembered: str | None, stamps: list[Any]) -> str:
    from lilliput.layers.identity import hash_files

    if remembered:
        return remembered
    for stamp in stamps:
        stamp.check()
    return hash_files([stamp.path for stamp in stamps])


__all__ = ["FP4Config", "GroupedConfig", "Int8Config", "LilliputConfig", "LilliputQuantizer", "NF4Config", "config_for"]
