// The cross entropy of rows of logits, and its gradient in their place, for a range of rows in one thread. A row is
// read three times, twice from a cache that holds it.
#include <math.h>

#include "core/simd.h"
#include "ops/kernels_of_isa.h"

namespace lilliput {
namespace LILLIPUT_ISA {

constexpr int kChains = 4;  // sums under way

static float greatest_of(const float* z, int64_t count) {
  F most[kChains];
  for (int chain = 0; chain < kChains; ++chain) most[chain] = set1(-INFINITY);
  int64_t i = 0;
  for (; i + kChains * kWidth <= count; i += kChains * kWidth)
    for (int chain = 0; chain < kChains; ++chain) most[chain] = greater(load(z + i + chain * kWidth), most[chain]);
  float result = greatest(greater(greater(most[0], most[1]), greater(most[2], most[3])));
  for (; i < count; ++i) result = z[i] > result ? z[i] : result;
  return result;
}

// z becomes e^(z - most); returns the sum.
static float exponentials(float* z, int64_t count, float most) {
  F totals[kChains];
  for (int chain = 0; chain < kChains; ++chain) totals[chain] = set1(0.0f);
  const F shift = set1(-most);
  int64_t i = 0;
  for (; i + kChains * kWidth <= count; i += kChains * kWidth)
    for (int chain = 0; chain < kChains; ++chain) {
      const F e = exp(add(load(z + i + chain * kWidth), shift));
      store(z + i + chain * kWidth, e);
      totals[chain] = add(totals[chain], e);
    }
  float total = sum(add(add(totals[0], totals[1]), add(totals[2], totals[3])));
  for (; i < count; i += kWidth) {
    const int64_t left = count - i < kWidth ? count - i : kWidth;
    float lanes[kWidth];
    store(lanes, exp(add(left < kWidth ? load_first(z + i, left) : load(z + i), shift)));
    for (int64_t lane = 0; lane < left; ++lane) total += z[i + lane] = lanes[lane];
  }
  return total;
}

static void scale(float* z, int64_t count, float factor) {
  const F by = set1(factor);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(z + i, mul(load(z + i), by));
  for (; i < count; ++i) z[i] *= factor;
}

static void cross_entropy(float* z, int64_t columns, const int64_t* labels, int64_t first, int64_t last, bool gradient,
                          float* losses) {
  for (int64_t row = first; row < last; ++row) {
    float* at = z + row * columns;
    const float most = greatest_of(at, columns), right = at[labels[row]];
    const float total = exponentials(at, columns, most);
    losses[row] = logf(total) + (most - right);
    if (!gradient) continue;
    scale(at, columns, 1.0f / total);
    at[labels[row]] -= 1.0f;
  }
}

void add_cross_entropy(Kernels& kernels) {
  kernels.cross_entropy = cross_entropy;
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
