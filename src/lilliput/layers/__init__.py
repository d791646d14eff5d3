"""Modules that hold quantized weights, and what a base remembers of where its numbers came from."""

from lilliput.layers.identity import BaseIdentity, IdentitySource, identity_of
from lilliput.layers.linear import QuantizedLinear
from lilliput.layers.replace import default_skip, quantized_layers, replace_linears

__all__ = [
    "BaseIdentity",
    "IdentitySource",
    "QuantizedLinear",
    "default_skip",
    "identity_of",
    "quantized_layers",
    "replace_linears",
]
