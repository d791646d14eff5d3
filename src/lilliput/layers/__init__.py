"""Modules that hold quantized weights, and what a base remembers of where its numbers came from."""

from lilliput.layers.embedding import QuantizedEmbedding
from lilliput.layers.identity import BaseIdentity, IdentitySource, identity_of
from lilliput.layers.linear import QuantizedLinear, unrounded
from lilliput.layers.replace import default_skip, quantized_layers, replace_linears
from lilliput.layers.stable_embedding import StableEmbedding
from lilliput.layers.weight import QuantizedWeight

__all__ = [
    "BaseIdentity",
    "IdentitySource",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedWeight",
    "StableEmbedding",
    "default_skip",
    "identity_of",
    "quantized_layers",
    "replace_linears",
    "unrounded",
]
