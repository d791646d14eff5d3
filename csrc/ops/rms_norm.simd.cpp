// RMS normalization and its gradients, for a range of rows in one thread. A row is read twice, the second time from
// the first-level cache.
#include <math.h>

#include "core/reals.h"
#include "core/simd.h"
#include "ops/kernels_of_isa.h"

namespace lilliput {
namespace LILLIPUT_ISA {

constexpr int64_t kChunk = 512;  // numbers of a row at a time; 16-bit ones are turned to floats in rooms of this size
constexpr int kChains = 4;       // sums under way: a multiply-add takes 4 cycles, and each needs two loads
static_assert(kChunk % (kChains * kWidth) == 0, "a whole chunk goes through the unrolled loops");

struct Chains {
  F sums[kChains];
};

LILLIPUT_INLINE Chains zeros() {
  Chains chains;
  for (int chain = 0; chain < kChains; ++chain) chains.sums[chain] = set1(0.0f);
  return chains;
}
LILLIPUT_INLINE float sum(const Chains& chains) {
  return sum(add(add(chains.sums[0], chains.sums[1]), add(chains.sums[2], chains.sums[3])));
}

LILLIPUT_INLINE void add_squares(const float* x, int64_t count, Chains& squares) {
  int64_t i = 0;
  for (; i + kChains * kWidth <= count; i += kChains * kWidth) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const F a = load(x + i + chain * kWidth);
      squares.sums[chain] = fma(a, a, squares.sums[chain]);
    }
  }
  for (; i < count; i += kWidth) {
    const F a = i + kWidth <= count ? load(x + i) : load_first(x + i, count - i);
    squares.sums[0] = fma(a, a, squares.sums[0]);
  }
}

// squares of x, and products of x, weight and grad.
LILLIPUT_INLINE void add_products(const float* x, const float* weight, const float* grad, int64_t count,
                                  Chains& squares, Chains& products) {
  int64_t i = 0;
  for (; i + kChains * kWidth <= count; i += kChains * kWidth) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const int64_t at = i + chain * kWidth;
      const F a = load(x + at);
      squares.sums[chain] = fma(a, a, squares.sums[chain]);
      products.sums[chain] = fma(mul(load(grad + at), load(weight + at)), a, products.sums[chain]);
    }
  }
  for (; i < count; i += kWidth) {
    const bool whole = i + kWidth <= count;
    const int64_t left = count - i;
    const F a = whole ? load(x + i) : load_first(x + i, left);
    const F b = whole ? load(grad + i) : load_first(grad + i, left);
    const F c = whole ? load(weight + i) : load_first(weight + i, left);
    squares.sums[0] = fma(a, a, squares.sums[0]);
    products.sums[0] = fma(mul(b, c), a, products.sums[0]);
  }
}

LILLIPUT_INLINE float inverse_rms(const Chains& squares, int64_t columns, float eps) {
  return 1.0f / sqrtf(sum(squares) / (float)columns + eps);
}

LILLIPUT_INLINE int64_t chunk_from(int64_t start, int64_t columns) {
  return columns - start < kChunk ? columns - start : kChunk;
}

// out = weight * (x * factor)
LILLIPUT_INLINE void scale(const float* x, float factor, const float* weight, int64_t count, float* out) {
  const F factors = set1(factor);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, mul(load(weight + i), mul(load(x + i), factors)));
  for (; i < count; ++i) out[i] = weight[i] * (x[i] * factor);
}

static void rms_norm(Reals x, const float* weight, float eps, int64_t columns, int64_t first, int64_t last, Reals y) {
  float room[2][kChunk];
  for (int64_t row = first; row < last; ++row) {
    Chains squares = zeros();
    for (int64_t k = 0; k < columns; k += kChunk) {
      const int64_t count = chunk_from(k, columns);
      add_squares(floats(x, row * columns + k, count, room[0]), count, squares);
    }
    const float factor = inverse_rms(squares, columns, eps);
    for (int64_t k = 0; k < columns; k += kChunk) {
      const int64_t count = chunk_from(k, columns), start = row * columns + k;
      const float* from = floats(x, start, count, room[0]);
      float* to = place(y, start, room[1]);
      if (x.kind == Real::f32) {
        scale(from, factor, weight + k, count, to);
      } else {  // the normed number is rounded to x's type before it meets the weight
        for (int64_t i = 0; i < count; ++i) room[0][i] = rounded(room[0][i] * factor, x.kind);
        scale(room[0], 1.0f, weight + k, count, to);
      }
      write_back(room[1], start, count, y);
    }
  }
}

// to_x = factor * (weight grad) - shift x
LILLIPUT_INLINE void gradient_to_x(const float* x, const float* weight, const float* grad, float factor, float shift,
                                   int64_t count, float* to_x) {
  const F factors = set1(factor), shifts = set1(-shift);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const F scaled = mul(mul(load(grad + i), load(weight + i)), factors);
    store(to_x + i, fma(load(x + i), shifts, scaled));
  }
  if (const int64_t left = count - i; left > 0) {
    const F scaled = mul(mul(load_first(grad + i, left), load_first(weight + i, left)), factors);
    store_first(to_x + i, fma(load_first(x + i, left), shifts, scaled), left);
  }
}

LILLIPUT_INLINE void add_to_weight(const float* x, const float* grad, float factor, int64_t count, float* to_weight) {
  const F factors = set1(factor);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    store(to_weight + i, fma(load(grad + i), mul(load(x + i), factors), load(to_weight + i)));
  for (; i < count; ++i) to_weight[i] += grad[i] * (x[i] * factor);
}

static void rms_norm_backward(Reals grad, Reals x, const float* weight, float eps, int64_t columns, int64_t first,
                              int64_t last, Reals to_x, float* to_weight) {
  float room[3][kChunk];
  for (int64_t row = first; row < last; ++row) {
    Chains squares = zeros(), products = zeros();
    for (int64_t k = 0; k < columns; k += kChunk) {
      const int64_t count = chunk_from(k, columns), start = row * columns + k;
      add_products(floats(x, start, count, room[0]), weight + k, floats(grad, start, count, room[1]), count, squares,
                   products);
    }
    const float factor = inverse_rms(squares, columns, eps);
    // factor first: the cube of a small or great row's factor alone is no float
    const float shift = factor * (factor * (factor * (sum(products) / (float)columns)));
    for (int64_t k = 0; k < columns; k += kChunk) {
      const int64_t count = chunk_from(k, columns), start = row * columns + k;
      const float *from = floats(x, start, count, room[0]), *y = floats(grad, start, count, room[1]);
      gradient_to_x(from, weight + k, y, factor, shift, count, place(to_x, start, room[2]));
      write_back(room[2], start, count, to_x);
      if (to_weight != nullptr) add_to_weight(from, y, factor, count, to_weight + k);
    }
  }
}

void add_rms_norm(Kernels& kernels) {
  kernels.rms_norm = rms_norm;
  kernels.rms_norm_backward = rms_norm_backward;
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
