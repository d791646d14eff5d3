// GPTQ's loops over the columns of a weight, a row after the other: the codes of a block of columns (arXiv 2210.17323,
// algorithm 1), codes improved one at a time, and the search of a group's grid. Products and sums round as the
// references' do (kernels/gptq.py): no fma where codes come from.
#include "core/reals.h"
#include "ops/kernels_of_isa.h"

namespace lilliput {
namespace LILLIPUT_ISA {

// The nearest whole number, ties to even, of a number below 2^22.
LILLIPUT_INLINE float nearest_whole(float a) {
  const float to_integer = 0x1.8p23f;  // 2^23 + 2^22: its last bit is worth 1
  return (a + to_integer) - to_integer;
}

// The code of a number on a grid: round(w / scale) + zero, within 0..top.
LILLIPUT_INLINE float code_on(float w, float scale, float zero, float top) {
  const float steps = w / scale;
  return nearest_whole(steps < -zero ? -zero : steps > top - zero ? top - zero : steps) + zero;
}

// to[i] -= factor * row[i]
LILLIPUT_INLINE void subtract(float* to, const float* row, float factor, int64_t count) {
  const F by = set1(factor);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, sub(load(to + i), mul(by, load(row + i))));
  for (; i < count; ++i) to[i] -= factor * row[i];
}

static void gptq_block(const GptqGrid& grid, const float* w, int64_t columns, const float* upper, int64_t first,
                       int64_t last, uint8_t* codes, float* errors) {
  float left[max_gptq_block];
  for (int64_t row = first; row < last; ++row) {
    memcpy(left, w + row * columns, (size_t)columns * sizeof(float));
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t at = row * grid.groups + grid.group[i];
      const float code = code_on(left[i], grid.scale[at], grid.zero[at], grid.top);
      const float error = (left[i] - grid.scale[at] * (code - grid.zero[at])) / upper[i * columns + i];
      subtract(left + i + 1, upper + i * columns + i + 1, error, columns - i - 1);
      codes[row * columns + i] = (uint8_t)code;
      errors[row * columns + i] = error;
    }
  }
}

static void gptq_descend(const GptqGrid& grid, const float* hessian, int64_t columns, int sweeps, int64_t first,
                         int64_t last, uint8_t* codes, float* residual) {
  for (int64_t row = first; row < last; ++row) {
    float* slope = residual + row * columns;
    bool changed = true;
    for (int sweep = 0; sweep < sweeps && changed; ++sweep) {
      changed = false;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = row * grid.groups + grid.group[j];
        const float scale = grid.scale[at], zero = grid.zero[at], curve = hessian[j * columns + j];
        const float now = scale * ((float)codes[row * columns + j] - zero);
        const float code = code_on(now + slope[j] / curve, scale, zero, grid.top);
        const float step = scale * (code - zero) - now;
        if (!(step * (slope[j] - 0.5f * step * curve) > 0.0f)) continue;
        codes[row * columns + j] = (uint8_t)code;
        subtract(slope, hessian + j * columns, step, columns);
        changed = true;
      }
    }
  }
}

// sum importance (w - q)^2 over a group, q the nearest numbers of the grid.
LILLIPUT_INLINE float error_on(const float* w, const float* importance, int64_t count, float scale, float zero,
                               float top) {
  const F inverse = set1(1.0f / scale), step = set1(-scale);
  F total = set1(0.0f);
  const auto add_to = [&](F some, F weight) __attribute__((always_inline)) {
    const F whole = to_floats(to_integers(at_most(at_least(mul(some, inverse), -zero), top - zero)));
    const F rest = fma(whole, step, some);
    total = fma(mul(weight, rest), rest, total);
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) add_to(load(w + i), load(importance + i));
  if (i < count) add_to(load_first(w + i, count - i), load_first(importance + i, count - i));
  return sum(total);
}

// The best of the grids that formats/grids.py tries, in its order.
static void search_group(const GridSearch& search, const float* w, const float* importance, int64_t count, float* scale,
                         float* zero) {
  float least = 0.0f, greatest = 0.0f, best = from_bits(0x7f800000);  // Inf
  for (int64_t i = 0; i < count; ++i) {
    least = w[i] < least ? w[i] : least;
    greatest = w[i] > greatest ? w[i] : greatest;
  }
  if (least == greatest) least = -1.0f, greatest = 1.0f;
  *scale = 1.0f, *zero = 1.0f;  // where no error is finite
  const float width = search.symmetric ? 2 * (-least > greatest ? -least : greatest) : greatest - least;
  for (int64_t s = 0; s < search.count; ++s) {
    const float share = search.shares[s], exact = half_to_float(float_to_half(share * width / search.top));
    const float some = exact < 0x1p-24f ? 0x1p-24f : exact;
    const float rounded = search.symmetric ? (search.top + 1) / 2 : nearest_whole(-share * least / some);
    for (int shift = search.symmetric ? 0 : -1; shift <= (search.symmetric ? 0 : 1); ++shift) {
      const float within = rounded < 1 ? 1 : rounded > search.top ? search.top : rounded, moved = within + (float)shift;
      const float z = moved < 1 ? 1 : moved > search.top ? search.top : moved;
      const float error = error_on(w, importance, count, some, z, search.top);
      if (error < best) best = error, *scale = some, *zero = z;
    }
  }
}

static void search_grid(const GridSearch& search, const float* w, const float* importance, int64_t columns,
                        int64_t group, int64_t first, int64_t last, float* scale, float* zero) {
  const int64_t groups = (columns + group - 1) / group;
  for (int64_t row = first; row < last; ++row)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = g * group, count = from + group < columns ? group : columns - from;
      search_group(search, w + row * columns + from, importance + from, count, scale + row * groups + g,
                   zero + row * groups + g);
    }
}

void add_gptq(Kernels& kernels) {
  kernels.gptq_block = gptq_block;
  kernels.gptq_descend = gptq_descend;
  kernels.search_grid = search_grid;
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
