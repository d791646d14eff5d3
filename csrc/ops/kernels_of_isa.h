// What each instruction set's copy of a kernel file adds to its row of pointers.
#pragma once

#include "ops/ops.h"

namespace lilliput {
namespace portable {
void add_blockwise(Kernels& kernels);
void add_linear_4bit(Kernels& kernels);
void add_linear_4bit_fixed(Kernels& kernels);
void add_linear_grouped(Kernels& kernels);
void add_linear_grouped_fixed(Kernels& kernels);
void add_linear_int8(Kernels& kernels);
void add_linear_int8_products(Kernels& kernels);
void add_swiglu(Kernels& kernels);
void add_rms_norm(Kernels& kernels);
void add_cross_entropy(Kernels& kernels);
void add_optimizer(Kernels& kernels);
void add_gptq(Kernels& kernels);
}  // namespace portable
namespace avx2 {
void add_blockwise(Kernels& kernels);
void add_linear_4bit(Kernels& kernels);
void add_linear_4bit_fixed(Kernels& kernels);
void add_linear_grouped(Kernels& kernels);
void add_linear_grouped_fixed(Kernels& kernels);
void add_linear_int8(Kernels& kernels);
void add_linear_int8_products(Kernels& kernels);
void add_swiglu(Kernels& kernels);
void add_rms_norm(Kernels& kernels);
void add_cross_entropy(Kernels& kernels);
void add_optimizer(Kernels& kernels);
void add_gptq(Kernels& kernels);
}  // namespace avx2
namespace avx512 {
void add_blockwise(Kernels& kernels);
void add_linear_4bit(Kernels& kernels);
void add_linear_4bit_fixed(Kernels& kernels);
void add_linear_grouped(Kernels& kernels);
void add_linear_grouped_fixed(Kernels& kernels);
void add_linear_int8(Kernels& kernels);
void add_linear_int8_products(Kernels& kernels);
void add_swiglu(Kernels& kernels);
void add_rms_norm(Kernels& kernels);
void add_cross_entropy(Kernels& kernels);
void add_optimizer(Kernels& kernels);
void add_gptq(Kernels& kernels);
}  // namespace avx512
namespace avx512vnni {  // the rest is avx512's
void add_linear_int8_products(Kernels& kernels);
}  // namespace avx512vnni
}  // namespace lilliput
