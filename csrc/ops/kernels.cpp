// One row of kernels per instruction set, made at first use.
#include "ops/kernels_of_isa.h"

namespace lilliput {

template <typename... Add>
static Kernels row(Add... add) {
  Kernels kernels{};
  (add(kernels), ...);
  return kernels;
}

const Kernels& kernels_of(Isa isa) {
  static const Kernels rows[] = {
      row(portable::add_blockwise, portable::add_linear_4bit, portable::add_linear_4bit_fixed, portable::add_swiglu,
          portable::add_rms_norm, portable::add_cross_entropy),
#if defined(LILLIPUT_X86)
      row(avx2::add_blockwise, avx2::add_linear_4bit, avx2::add_linear_4bit_fixed, avx2::add_swiglu, avx2::add_rms_norm,
          avx2::add_cross_entropy),
      row(avx512::add_blockwise, avx512::add_linear_4bit, avx512::add_linear_4bit_fixed, avx512::add_swiglu,
          avx512::add_rms_norm, avx512::add_cross_entropy),
#endif
  };
  return rows[static_cast<int>(isa)];
}

const Kernels& kernels() {
  static const Kernels& chosen = kernels_of(chosen_isa());
  return chosen;
}

}  // namespace lilliput
