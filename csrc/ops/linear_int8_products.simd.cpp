// Products of x's codes of 16 bits and W's of 8, summed in 32 bits, in one thread: exact, since x's codes are as large
// as such sums allow (largest_input). 16 bits and not 8: AVX2's product of bytes saturates its 16-bit sums, and half of
// the additions would be needed again to bring them to 32. Compiled once more than the other kernels, for AVX-512's
// VNNI.
#include "ops/kernels_of_isa.h"
#include "ops/tiles.simd.h"

namespace lilliput {
namespace LILLIPUT_ISA {

// Row n of W against R rows of x's codes [R, stride]; what a vector does not hold goes one by one.
template <int R>
LILLIPUT_INLINE void dot_int8(const int8_t* row, const int16_t* x, int64_t stride, int64_t columns, int32_t* sums) {
  constexpr int kChains = R == 1 ? 4 : R == 2 ? 2 : 1, kStep = 2 * kWidth * kChains;
  I total[R][kChains];
  for (int r = 0; r < R; ++r)
    for (int chain = 0; chain < kChains; ++chain) total[r][chain] = iset1(0);
  int64_t k = 0;
  for (; k + kStep <= columns; k += kStep) {
    __builtin_prefetch(row + k + 1024);
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const int64_t at = k + 2 * kWidth * chain;
      const I codes = load_int8_pairs(row + at);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        total[r][chain] = dot_pairs(total[r][chain], codes, load_words((const uint8_t*)(x + r * stride + at)));
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int chain = 1; chain < kChains; ++chain) total[r][0] = iadd(total[r][0], total[r][chain]);
    sums[r] = reduce_add(total[r][0]);
    for (int64_t i = k; i < columns; ++i) sums[r] += row[i] * x[r * stride + i];
  }
}

template <int R>
static void few(const Rows8& w, const int16_t* x, int64_t stride, int64_t first, int64_t last, int32_t* sums,
                int64_t sums_stride) {
  for (int64_t n = first; n < last; ++n) {
    int32_t each[R];
    dot_int8<R>(w.codes + n * w.columns, x, stride, w.columns, each);
    for (int r = 0; r < R; ++r) sums[r * sums_stride + n] = each[r];
  }
}

// sums[r, n] = codes of row r of x . codes of row n of W, for n in first..last-1.
static void few_rows_int8(const Rows8& w, const int16_t* x, int64_t stride, int rows, int64_t first, int64_t last,
                          int32_t* sums, int64_t sums_stride) {
  using Few = void (*)(const Rows8&, const int16_t*, int64_t, int64_t, int64_t, int32_t*, int64_t);
  static const Few by_rows[] = {few<1>, few<2>, few<3>, few<4>, few<5>, few<6>, few<7>, few<8>};
  static_assert(sizeof(by_rows) / sizeof(by_rows[0]) == few_rows_limit, "one instance per number of rows");
  by_rows[rows - 1](w, x, stride, first, last, sums, sums_stride);
}

static void multiply_pairs(const int32_t* left, const int32_t* right, int64_t rows, int64_t columns, int64_t depth,
                           bool add, int32_t* c, int64_t c_stride) {
  multiply_panels<Pairs>(left, right, rows, columns, depth, add, nullptr, c, c_stride);
}

// In place, sums become (sum * scales[row]) * column_scales[column] + bias[column]; in this order, as the reference.
static void finish_int8(int64_t rows, int64_t columns, const float* scales, const float* column_scales,
                        const float* bias, int32_t* c, int64_t c_stride) {
  for (int64_t row = 0; row < rows; ++row) {
    int32_t* sums = c + row * c_stride;
    const F scale = set1(scales[row]);
    int64_t n = 0;
    for (; n + kWidth <= columns; n += kWidth) {
      const F y = mul(mul(to_floats(load_words((const uint8_t*)(sums + n))), scale), load(column_scales + n));
      store_words(sums + n, bits(bias != nullptr ? add(y, load(bias + n)) : y));
    }
    for (; n < columns; ++n) {
      const float y = (float)sums[n] * scales[row] * column_scales[n] + (bias != nullptr ? bias[n] : 0.0f);
      sums[n] = (int32_t)to_bits(y);
    }
  }
}

void add_linear_int8_products(Kernels& kernels) {
  kernels.few_rows_int8 = few_rows_int8;
  kernels.multiply_pairs = multiply_pairs;
  kernels.finish_int8 = finish_int8;
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
