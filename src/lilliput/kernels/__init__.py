"""One operation a file: schema, reference, fake, backward, the compiled core's answer. All in namespace `lilliput`."""

from lilliput.kernels.blockwise import dequantize, quantize
from lilliput.kernels.dispatch import use
from lilliput.kernels.linear_4bit import linear_4bit
from lilliput.kernels.linear_loss import linear_loss
from lilliput.kernels.lora_linear_4bit import lora_linear_4bit
from lilliput.kernels.rms_norm import rms_norm
from lilliput.kernels.swiglu import swiglu

__all__ = ["dequantize", "linear_4bit", "linear_loss", "lora_linear_4bit", "quantize", "rms_norm", "swiglu", "use"]
