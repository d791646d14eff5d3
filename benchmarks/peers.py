"""The models of the benchmarks: the real small one for Lilliput, and the same as its peers load it.

Not here: measuring (common.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from lilliput.models import load_model, load_tokenizer, save_model

MODEL = "smollm2-135m-instruct"
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def dense_checkpoint(directory: str | Path, model: str = MODEL) -> str:
    """Write `model` and its tokenizer as float32 safetensors into `directory`, which the peers read."""
    save_model(load_model(model, progress=False), directory, load_tokenizer(model))
    return str(directory)


def load_dense(checkpoint: str, **options: Any) -> PreTrainedModel:
    """transformers' own, in float32."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **options)


def load_bitsandbytes(checkpoint: str) -> PreTrainedModel:
    """NF4 with double quantization, computing in float32: the quickest type on a CPU without fast bfloat16."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return load_dense(checkpoint, quantization_config=config)


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
