// What kernels share that take rows of W with whole blocks of 64: the absmax of a row's blocks.
#pragma once

#include "core/simd.h"

namespace lilliput {
namespace LILLIPUT_ISA {

constexpr int64_t kBlock = 64;

LILLIPUT_INLINE bool whole_blocks(const Blocks4& w, int64_t columns) {
  return w.block == kBlock && columns % kBlock == 0 && w.numel < INT32_MAX;
}

// absmax_of(first..first + count - 1), then a zero; compiled without contraction as that is.
static inline void absmax_of_row(const Blocks4& w, int64_t first, int64_t count, float* out) {
  int64_t i = 0;
  if (w.absmax == nullptr)
    for (; i + kWidth <= count; i += kWidth) {
      const int64_t scale = (first + i) / absmax_block;
      if (scale != (first + i + kWidth - 1) / absmax_block) {
        for (int64_t lane = i; lane < i + kWidth; ++lane) out[lane] = w.absmax_of(first + lane);
        continue;
      }
      const F values = gather(w.absmax_book, load_bytes(w.absmax8 + first + i));
      store(out + i, add(mul(values, set1(w.absmax_scale[scale])), set1(w.absmax_offset)));
    }
  for (; i < count; ++i) out[i] = w.absmax_of(first + i);
  out[count] = 0.0f;
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
