"""Rotary positions of Llama 3 in GGUF: the file holds the factors themselves, the model's config how they are computed.

Source: Llama 3.1's scaling of rotary frequencies (Meta's reference code; arXiv 2407.21783, section 3.4.1) and what
llama.cpp's converter makes of it (`rope_freqs.weight`). Not here: YaRN and linear scaling, which are refused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lilliput.errors import CheckpointError
from lilliput.models.gguf import GgufFile

FACTORS = "rope_freqs.weight"
# every Llama 3.1, 3.2 and 3.3 has these; only `factor` differs (8 or 32), and it is the largest of the factors
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_factors(
    theta: float,
    dim: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Tensor:
    """What each rotary frequency is divided by, float32 [dim / 2].

    Waves shorter than original / high stay, those longer than original / low are slowed by `factor`, and between them
    the frequency goes over smoothly.
    """
    inverse = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = original_max_position_embeddings * inverse / (2 * math.pi)  # of a wave within the original context
    smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def take_over_factors(file: GgufFile, config: PreTrainedConfig) -> None:
    """Write into `config` what the factors in `file` stand for.

    Raises CheckpointError when they are not Llama 3's, or when the metadata ask for another scaling: transformers drops
    these when it converts, and the model would answer, but wrongly at long range.
    """
    scaling = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if FACTORS in file.tensors and scaling == "none":
        factors = file.read(FACTORS).float()
        theta, dim = config.rope_parameters["rope_theta"], 2 * factors.numel()
        guess = {"factor": float(factors.max()), **_LLAMA3}
        if torch.allclose(factors, llama3_factors(theta, dim, **guess), rtol=1e-5):
            config.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, **guess}
            return
        scaling = "factors of its own"
    if scaling != "none":
        raise CheckpointError(
            f"scales its rotary positions ({scaling}), which cannot be taken over from GGUF",
            where=str(file.path),
            todo="Use the model's safetensors instead.",
        )
