// The 8-bit dynamic tree (arXiv 2110.02861, section 2) by magnitude: k counts the values from zero on. A decade
// 10^(e-6) holds 2^e of them (twice as many without a sign) at equal steps of 0.9 of it, so that inside a decade k is
// nearly a straight line of the magnitude. `bound` says exactly where the nearest value changes.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/blocks.h"

namespace lilliput {

struct DynamicTree {
  const float* book;  // [256] ascending, formats/codebooks.py
  bool is_signed;
  int zero, last;    // the code of 0, and the greatest k
  float bound[257];  // k is the number of bounds below a magnitude; infinity behind the last
  // For optimizer.simd.cpp: magnitudes lie below the first bound, in one of seven decades, or above the last. With i
  // of the eight bounds between them below a magnitude, q = shift - i; these lie at q mod 8.
  float next[8];                 // the bound behind
  float scale[8];                // 10^(6-e) / 0.9 for decade e = i - 1; both ends share one that is right for both
  int32_t shift, slope, offset;  // i or i - 1 is (a float's high half * slope >> 16) - offset, at least 0

  DynamicTree(const float* values, bool with_sign) : book(values), is_signed(with_sign) {
    zero = with_sign ? 127 : 0;
    last = 255 - zero;
    shift = with_sign ? 24 : 23;
    slope = with_sign ? 168 : 155;
    offset = with_sign ? 34 : 31;
    for (int k = 0; k < 257; ++k) bound[k] = k < last ? (book[zero + k] + book[zero + k + 1]) / 2 : INFINITY;
    int behind = 0;  // the last k that is not above
    for (int i = 0; i < 8; ++i) {
      const int place = (shift - i) % 8;
      if (i > 0) behind += 1 << (i - 1) << (with_sign ? 0 : 1);
      next[place] = bound[behind];
      // Near 0 the line gives 0.89, near 1 just above 1: 0 and 2^(7 or 8) after their shifts.
      scale[place] = i > 0 ? static_cast<float>(std::pow(10.0, 7 - i) / 0.9) : with_sign ? 0.1135f : 0.1125f;
    }
  }

  // The code of a number in shares of its block's absmax; half-way between two values, the one nearer to zero.
  LILLIPUT_INLINE uint8_t code_of(float scaled) const {
    const float magnitude = scaled < 0 ? -scaled : scaled;
    int k = 0;
    for (int step = 128; step > 0; step /= 2)
      if (magnitude > bound[k + step - 1]) k += step;
    if (scaled < 0) k = k > zero ? -zero : -k;  // there is no -1
    return static_cast<uint8_t>(zero + k);
  }
};

}  // namespace lilliput
