"""One operation a file: schema, reference, fake, backward, the compiled core's answer. All in namespace `lilliput`."""

from lilliput.kernels.dispatch import exact, use
from lilliput.kernels.doors import dequantize, linear, quantize
from lilliput.kernels.linear_4bit import linear_4bit
from lilliput.kernels.linear_grouped import linear_grouped
from lilliput.kernels.linear_int8 import linear_int8
from lilliput.kernels.linear_loss import linear_loss
from lilliput.kernels.lora_linear import lora_linear
from lilliput.kernels.optimizer_step import gradient_norms, optimizer_step
from lilliput.kernels.rms_norm import rms_norm
from lilliput.kernels.swiglu import swiglu

__all__ = [
    "dequantize",
    "exact",
    "gradient_norms",
    "linear",
    "linear_4bit",
    "linear_grouped",
    "linear_int8",
    "linear_loss",
    "lora_linear",
    "optimizer_step",
    "quantize",
    "rms_norm",
    "swiglu",
    "use",
]
