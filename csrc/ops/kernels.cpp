// One row of kernels per instruction set, made at first use.
#include "ops/kernels_of_isa.h"

namespace lilliput {

template <typename... Add>
static Kernels row(Add... add) {
  Kernels kernels{};
  (add(kernels), ...);
  return kernels;
}

#define LILLIPUT_ALL_OF(isa)                                                                               \
  isa::add_blockwise, isa::add_linear_4bit, isa::add_linear_4bit_fixed, isa::add_linear_grouped,           \
      isa::add_linear_grouped_fixed, isa::add_linear_int8, isa::add_linear_int8_products, isa::add_swiglu, \
      isa::add_rms_norm, isa::add_cross_entropy, isa::add_optimizer, isa::add_gptq

const Kernels& kernels_of(Isa isa) {
  static const Kernels rows[] = {
      row(LILLIPUT_ALL_OF(portable)),
#if defined(LILLIPUT_X86)
      row(LILLIPUT_ALL_OF(avx2)),
      row(LILLIPUT_ALL_OF(avx512)),
      row(LILLIPUT_ALL_OF(avx512), avx512vnni::add_linear_int8_products),
#endif
  };
  return rows[static_cast<int>(isa)];
}

const Kernels& kernels() {
  static const Kernels& chosen = kernels_of(chosen_isa());
  return chosen;
}

}  // namespace lilliput
