"""The models of the benchmarks: the real small one for Lilliput, and the same as its peers load it.

Not here: measuring (common.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from common import not_installed
from lilliput.models import load_model, load_tokenizer, save_model

MODEL = "smollm2-135m-instruct"
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def dense_checkpoint(directory: str | Path, model: str = MODEL) -> str:
    """Write `model` and its tokenizer as float32 safetensors into `directory`, which the peers read."""
    save_model(load_model(model, progress=False), directory, load_tokenizer(model))
    return str(directory)


def load_dense(checkpoint: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """transformers' own, in float32 unless told otherwise."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **options)


def load_bitsandbytes(checkpoint: str) -> PreTrainedModel:
    """NF4 with double quantization, computing in float32: the quickest type on a CPU without fast bfloat16."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return load_dense(checkpoint, quantization_config=config)


def load_bitsandbytes_int8(
    checkpoint: str, threshold: float = 6.0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """LLM.int8() as transformers has it, its layers between others of `dtype`.

    In evaluation mode a layer rounds its input to float16 and then to int8, and multiplies in whole numbers where the
    processor has AVX-512, in floats elsewhere. In training mode it dequantizes its weight to the input's type and
    multiplies that, without rounding the input: there the threshold has no meaning.
    """
    quiet()
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    return load_dense(checkpoint, dtype, quantization_config=config)


def quiet() -> None:
    """Keep bitsandbytes' int8 layers from a line on standard error at each product of other than float16, which would
    be measured too."""
    getLogger("bitsandbytes.autograd._functions").setLevel(ERROR)


def bitsandbytes_linear(weight: torch.Tensor, *, inference: bool) -> nn.Module:
    """bitsandbytes' 4-bit linear layer of a weight [out, in]: NF4, double quantization, computing in float32.

    Args:
        inference: in evaluation mode. On a processor with AVX512-BF16 the layer then repacks its weight at the first
            call without gradients, and computes in bfloat16 whatever it was told; elsewhere the mode changes nothing.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu").train(not inference)


def bitsandbytes_int8_linear(weight: torch.Tensor, threshold: float, *, inference: bool) -> nn.Module:
    """bitsandbytes' int8 linear layer of a weight [out, in]; its two ways are those of `load_bitsandbytes_int8`."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    quiet()
    layer = Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = Int8Params(weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").train(not inference)


# ---- stacks that are compared where a model is only used --------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """A model as one of the stacks loads it, for use without gradients.

    Attributes:
        name: in the tables.
        load: from the folder of the dense checkpoint; ours read the model that it was made of.
        training: in training mode, which here means other kernels of bitsandbytes and nothing else.
        ours: others are compared with it.
    """

    name: str
    load: Callable[[str], PreTrainedModel]
    training: bool = False
    ours: bool = False


def _ours(name: str, **options: Any) -> Stack:
    return Stack(name, lambda _: load_model(MODEL, progress=False, **options), ours=True)


_int8 = load_bitsandbytes_int8
INFERENCE = {
    "lilliput-nf4": _ours("Lilliput, NF4", format="nf4"),
    "lilliput-int8": _ours("Lilliput, int8", format="int8"),
    "lilliput-int8-0": _ours("Lilliput, int8, threshold 0", format="int8", threshold=0.0),
    "bnb-nf4": Stack("bitsandbytes NF4, evaluation mode", load_bitsandbytes),
    "bnb-nf4-training": Stack("bitsandbytes NF4, training mode", load_bitsandbytes, training=True),
    "bnb-int8": Stack("bitsandbytes int8, evaluation mode", _int8),
    "bnb-int8-0": Stack("bitsandbytes int8, threshold 0", partial(_int8, threshold=0.0)),
    "bnb-int8-bf16": Stack("bitsandbytes int8, bfloat16", partial(_int8, dtype=torch.bfloat16)),
    "bnb-int8-training": Stack("bitsandbytes int8, training mode", _int8, training=True),
    "transformers": Stack("transformers float32", load_dense),
}


def add_stacks(parser: argparse.ArgumentParser) -> None:
    """The option that chooses among them."""
    parser.add_argument("--stacks", nargs="+", choices=INFERENCE, default=list(INFERENCE))


def inference_models(stacks: Sequence[str], checkpoint: str) -> dict[str, PreTrainedModel | str]:
    """The chosen models by their names in the tables; a text where a stack is not installed."""
    lacking = not_installed("bitsandbytes")
    models: dict[str, PreTrainedModel | str] = {}
    for stack in (INFERENCE[name] for name in stacks):
        absent = lacking if stack.name.startswith("bitsandbytes") else ""
        models[stack.name] = absent or stack.load(checkpoint).train(stack.training)
    return models


def our_names(stacks: Sequence[str]) -> tuple[str, ...]:
    """Those that the others are compared with."""
    return tuple(INFERENCE[name].name for name in stacks if INFERENCE[name].ours)
