"""How a block of reals becomes a few bits: the formats as data, and their arithmetic in plain torch."""

from lilliput.formats.doors import dequantize, quantize
from lilliput.formats.format import DYNAMIC8, FORMATS, FP4, INT8, NF4, ROW, Format, QuantizedTensor, get_format

__all__ = [
    "DYNAMIC8",
    "FORMATS",
    "FP4",
    "INT8",
    "NF4",
    "ROW",
    "Format",
    "QuantizedTensor",
    "dequantize",
    "get_format",
    "quantize",
]
