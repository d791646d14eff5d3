"""How a block of reals becomes a few bits: the formats as data, and their arithmetic in plain torch."""

from lilliput.formats.doors import TENSORS, dequantize, quantize
from lilliput.formats.format import (
    DYNAMIC8,
    FORMATS,
    FP4,
    INT8,
    NF4,
    ROW,
    Format,
    Quantized,
    QuantizedTensor,
    get_format,
    grouped_format,
)
from lilliput.formats.grouped import GroupedTensor

__all__ = [
    "DYNAMIC8",
    "FORMATS",
    "FP4",
    "INT8",
    "NF4",
    "ROW",
    "TENSORS",
    "Format",
    "GroupedTensor",
    "Quantized",
    "QuantizedTensor",
    "dequantize",
    "get_format",
    "grouped_format",
    "quantize",
]
