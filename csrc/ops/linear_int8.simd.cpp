// int8 by rows, each part in one thread: quantize and dequantize, round the rows of x, pack W into panels. The rules
// are formats/rowwise.py's, rounding for rounding. Not here: the products themselves (linear_int8_products.simd.cpp).
#include <math.h>

#include "core/reals.h"
#include "ops/kernels_of_isa.h"
#include "ops/tiles.simd.h"

namespace lilliput {
namespace LILLIPUT_ISA {

constexpr float kLargest = 127.0f;
constexpr float kSmallestStep = 1e-38f;        // of a row's largest code: its inverse is no float below it
constexpr int32_t kInfinityBits = 0x7f800000;  // as integers, |NaN| and Inf are at least this, finite numbers below
constexpr int64_t kRun = 1024;                 // numbers of a row at a time, on the stack

// largest / absmax in two roundings, as torch divides a number by a tensor, and so bitsandbytes.
LILLIPUT_INLINE float factor_of(float absmax, float largest) {
  return absmax >= largest * kSmallestStep ? 1.0f / absmax * largest : 0.0f;
}

LILLIPUT_INLINE I magnitude_bits(F x) {
  return iand(bits(x), iset1(0x7fffffff));
}

LILLIPUT_INLINE I load_mask(const int32_t* p) {
  return load_words((const uint8_t*)p);
}

// ---- quantize, dequantize ----

// body(numbers, count, column) for runs of a row as floats; the last one is zero-padded to a whole vector.
template <typename Body>
LILLIPUT_INLINE void runs_of(Reals x, int64_t row, int64_t columns, const Body& body) {
  float run[kRun];
  for (int64_t column = 0; column < columns; column += kRun) {
    const int64_t count = columns - column < kRun ? columns - column : kRun;
    read_reals(x, row * columns + column, count, run);
    for (int64_t i = count; i % kWidth; ++i) run[i] = 0.0f;
    body(run, count, column);
  }
}

LILLIPUT_INLINE void store_codes(int8_t* p, I codes, int64_t count) {
  int32_t lanes[kWidth];
  store_words(lanes, codes);
  for (int64_t lane = 0; lane < kWidth && lane < count; ++lane) p[lane] = (int8_t)lanes[lane];
}

static int64_t quantize_rows(Reals x, int64_t columns, int64_t first, int64_t last, int8_t* codes, float* absmax) {
  for (int64_t row = first; row < last; ++row) {
    I most = iset1(0);
    runs_of(x, row, columns, [&](const float* run, int64_t count, int64_t) {
      for (int64_t i = 0; i < count; i += kWidth) most = imax(most, magnitude_bits(load(run + i)));
    });
    const int32_t most_bits = reduce_max(most);
    if (most_bits >= kInfinityBits) return row;
    absmax[row] = from_bits((uint32_t)most_bits);
    const F factor = set1(factor_of(absmax[row], kLargest));
    runs_of(x, row, columns, [&](const float* run, int64_t count, int64_t column) {
      for (int64_t i = 0; i < count; i += kWidth)
        store_codes(codes + row * columns + column + i, to_integers(mul(load(run + i), factor)), count - i);
    });
  }
  return -1;
}

// values of `count` codes; reads no further.
LILLIPUT_INLINE void values_of_codes(const int8_t* codes, int64_t count, float scale, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, mul(load_int8(codes + i), set1(scale)));
  for (; i < count; ++i) out[i] = (float)codes[i] * scale;
}

static void dequantize_rows(const Rows8& w, int64_t first, int64_t last, Reals out) {
  float room[kRun];
  for (int64_t row = first; row < last; ++row)
    for (int64_t column = 0; column < w.columns; column += kRun) {
      const int64_t count = w.columns - column < kRun ? w.columns - column : kRun, at = row * w.columns + column;
      float* here = place(out, at, room);
      values_of_codes(w.codes + at, count, w.scale_of(row), here);
      write_back(here, at, count, out);
    }
}

// ---- the rows of x ----

// Clears keep[k] where a row has a finite number beyond the threshold in column k. keep [columns] holds -1 or 0.
static void clear_outliers(const float* x, int64_t rows, int64_t columns, float threshold, int64_t first, int64_t last,
                           int32_t* keep) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* here = x + row * columns;
    int64_t k = first;
    for (; k + kWidth <= last; k += kWidth) {
      const I size = magnitude_bits(load(here + k));
      const I beyond = greater(as_floats(size), set1(threshold), -1),
              finite = greater(set1(INFINITY), as_floats(size), -1);
      store_words(keep + k, iandnot(iand(beyond, finite), load_mask(keep + k)));
    }
    for (; k < last; ++k) {
      const float size = from_bits(to_bits(here[k]) & 0x7fffffff);
      if (size > threshold && size < INFINITY) keep[k] = 0;
    }
  }
}

// One row of x as codes up to `largest`, those of the columns that are not kept 0, and its absmax / largest: NaN where
// the row holds NaN or Inf, and then its codes are 0. `codes` has room for `padded` >= columns, an even number; keep
// may be null.
static float round_row(const float* x, int64_t columns, const int32_t* keep, float largest, int64_t padded,
                       int16_t* codes) {
  const int64_t whole = columns / kWidth * kWidth;
  I most = iset1(0), most_kept = most;
  const auto look = [&](F numbers, I kept) {
    const I size = magnitude_bits(numbers);
    most = imax(most, size), most_kept = imax(most_kept, iand(size, kept));
  };
  for (int64_t k = 0; k < whole; k += kWidth) look(load(x + k), keep != nullptr ? load_mask(keep + k) : iset1(-1));
  float rest[kWidth] = {0};
  int32_t rest_kept[kWidth] = {0};
  for (int64_t k = whole; k < columns; ++k)
    rest[k - whole] = x[k], rest_kept[k - whole] = keep != nullptr ? keep[k] : -1;
  look(load(rest), load_mask(rest_kept));
  const bool finite = reduce_max(most) < kInfinityBits;
  const float absmax = from_bits((uint32_t)reduce_max(most_kept)), factor = finite ? factor_of(absmax, largest) : 0.0f;
  if (!finite) {
    memset(codes, 0, (size_t)padded * sizeof(int16_t));
    return NAN;
  }
  const auto code = [&](F numbers, I kept) {
    return to_integers(mul(as_floats(iand(bits(numbers), kept)), set1(factor)));
  };
  int64_t k = 0;
  for (; k < whole; k += kWidth)
    store_shorts(codes + k, code(load(x + k), keep != nullptr ? load_mask(keep + k) : iset1(-1)));
  int16_t last[kWidth];
  store_shorts(last, code(load(rest), load_mask(rest_kept)));
  for (; k < padded; ++k) codes[k] = k < columns ? last[k - whole] : (int16_t)0;
  return absmax / largest;
}

// ---- panels of W ----

// For y = x W^T: columns are rows n of W, the depth runs along pairs of numbers k. [panels][pairs][kTileColumns]; an
// odd last number has a zero beside it.
static void pack_pairs(const Rows8& w, int64_t n, int64_t n_count, int64_t k, int64_t k_count, int32_t* panels) {
  const int64_t pairs = (k_count + 1) / 2;
  for (int64_t first = 0; first < n_count; first += kTileColumns, panels += pairs * kTileColumns) {
    for (int64_t c = 0; c < kTileColumns; ++c) {
      const int8_t* row = first + c < n_count ? w.codes + (n + first + c) * w.columns + k : nullptr;
      int32_t* to = panels + c;
      int64_t d = 0;
      for (; row != nullptr && d + kWidth <= k_count / 2; d += kWidth) {
        int32_t each[kWidth];
        store_words(each, load_int8_pairs(row + 2 * d));
        for (int64_t i = 0; i < kWidth; ++i) to[(d + i) * kTileColumns] = each[i];
      }
      for (; d < pairs; ++d) {
        const int16_t one = row != nullptr ? row[2 * d] : (int16_t)0;
        const int16_t other = row != nullptr && 2 * d + 1 < k_count ? row[2 * d + 1] : (int16_t)0;
        to[d * kTileColumns] = (int32_t)((uint32_t)(uint16_t)one | (uint32_t)(uint16_t)other << 16);
      }
    }
  }
}

// For gx = gy W: columns are columns k of W, the depth runs along its rows n; floats.
static void pack_backward_int8(const Rows8& w, int64_t k, int64_t k_count, int64_t n, int64_t n_count, float* panels) {
  pack_by_rows(
      k_count, n_count,
      [&](int64_t d, float* values) {
        values_of_codes(w.codes + (n + d) * w.columns + k, k_count, w.scale_of(n + d), values);
      },
      panels);
}

void add_linear_int8(Kernels& kernels) {
  kernels.quantize_rows = quantize_rows;
  kernels.dequantize_rows = dequantize_rows;
  kernels.clear_outliers = clear_outliers;
  kernels.round_row = round_row;
  kernels.pack_pairs = pack_pairs;
  kernels.pack_backward_int8 = pack_backward_int8;
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
