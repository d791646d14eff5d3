// What kernels share that take matrices in groups of rows: one instance a number of bits, the constants of a row.
#pragma once

#include "core/reals.h"

namespace lilliput {
namespace LILLIPUT_ISA {

template <int N>
struct Bits {
  static constexpr int count = N;
};

// body(Bits<bits>): whatever depends on the number of bits is compiled for each.
template <typename Body>
LILLIPUT_INLINE void by_bits(int bits, const Body& body) {
  switch (bits) {
    case 2:
      return body(Bits<2>{});
    case 3:
      return body(Bits<3>{});
    case 4:
      return body(Bits<4>{});
    default:
      return body(Bits<8>{});
  }
}

LILLIPUT_INLINE float scale_of(const Groups& w, int64_t row, int64_t index) {
  float scale;
  read_reals(w.scale, row * w.groups + index, 1, &scale);
  return scale;
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
