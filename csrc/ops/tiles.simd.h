// The product of packed panels, once for all weight formats: rows x columns sums stay in registers over the whole
// depth. The numbers are floats, or pairs of 16-bit whole numbers in 32 bits whose products are summed in 32 bits.
#pragma once

#include "core/simd.h"
#include "ops/ops.h"

namespace lilliput {
namespace LILLIPUT_ISA {

constexpr int kTileColumns = 2 * kWidth;  // two vectors of sums a row
// Rows x 2 vectors of sums, 2 of the right operand, 1 broadcast: 31 of 32, 15 of 16, 11 of 16 registers. A
// multiply-add takes 4 cycles and two start in each, so at least 8 sums must be under way: 28, 12 and 8 are.
#if defined(LILLIPUT_ISA_AVX512)
constexpr int kTileRows = 14;
#elif defined(LILLIPUT_ISA_AVX2)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif

// So many rows meet a panel of the right operand (12 KiB with AVX2) while the first-level cache holds it.
constexpr int64_t kRowsTogether = 8 * kTileRows;

struct Floats {
  using Number = float;
  using Vector = F;
  static LILLIPUT_INLINE F read(const float* p) { return load(p); }
  static LILLIPUT_INLINE void write(float* p, F a) { store(p, a); }
  static LILLIPUT_INLINE F each(float a) { return set1(a); }
  static LILLIPUT_INLINE F multiply_add(F a, F b, F sum) { return fma(a, b, sum); }
};

struct Pairs {
  using Number = int32_t;
  using Vector = I;
  static LILLIPUT_INLINE I read(const int32_t* p) { return load_words((const uint8_t*)p); }
  static LILLIPUT_INLINE void write(int32_t* p, I a) { store_words(p, a); }
  static LILLIPUT_INLINE I each(int32_t a) { return iset1(a); }
  static LILLIPUT_INLINE I multiply_add(I a, I b, I sum) { return dot_pairs(sum, a, b); }
};

// R x kTileColumns sums, from those at c_from (null: from zero) to c.
template <typename Of, int R>
static void tile_product(const typename Of::Number* left, const typename Of::Number* right, int64_t depth,
                         const typename Of::Number* c_from, int64_t from_stride, typename Of::Number* c,
                         int64_t c_stride) {
  typename Of::Vector sums[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
    sums[r][0] = c_from != nullptr ? Of::read(c_from + r * from_stride) : Of::each(0);
    sums[r][1] = c_from != nullptr ? Of::read(c_from + r * from_stride + kWidth) : Of::each(0);
  }
  for (int64_t d = 0; d < depth; ++d, left += kTileRows, right += kTileColumns) {
    const typename Of::Vector b0 = Of::read(right), b1 = Of::read(right + kWidth);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const typename Of::Vector a = Of::each(left[r]);
      sums[r][0] = Of::multiply_add(a, b0, sums[r][0]);
      sums[r][1] = Of::multiply_add(a, b1, sums[r][1]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
    Of::write(c + r * c_stride, sums[r][0]);
    Of::write(c + r * c_stride + kWidth, sums[r][1]);
  }
}

template <typename Number>
using TileProduct = void (*)(const Number*, const Number*, int64_t, const Number*, int64_t, Number*, int64_t);

template <typename Of, int R>
struct TileProducts {  // entry r - 1 is the product of r rows
  static void fill(TileProduct<typename Of::Number>* table) {
    table[R - 1] = tile_product<Of, R>;
    TileProducts<Of, R - 1>::fill(table);
  }
};
template <typename Of>
struct TileProducts<Of, 0> {
  static void fill(TileProduct<typename Of::Number>*) {}
};

// The last columns of c, fewer than a tile's: through a full tile on the stack.
template <typename Number>
static void edge_product(TileProduct<Number> product, const Number* left, const Number* right, int64_t rows,
                         int64_t columns, int64_t depth, const Number* c_from, int64_t from_stride, Number* c,
                         int64_t c_stride) {
  Number whole[kTileRows * kTileColumns] = {0};
  if (c_from != nullptr)
    for (int64_t r = 0; r < rows; ++r)
      memcpy(whole + r * kTileColumns, c_from + r * from_stride, (size_t)columns * sizeof(Number));
  product(left, right, depth, whole, kTileColumns, whole, kTileColumns);
  for (int64_t r = 0; r < rows; ++r)
    memcpy(c + r * c_stride, whole + r * kTileColumns, (size_t)columns * sizeof(Number));
}

// c[rows, columns] (+)= left panels . right panels; `start` [columns] or null is what the sums start from when !add.
template <typename Of>
static void multiply_panels(const typename Of::Number* left, const typename Of::Number* right, int64_t rows,
                            int64_t columns, int64_t depth, bool add, const typename Of::Number* start,
                            typename Of::Number* c, int64_t c_stride) {
  using Number = typename Of::Number;
  TileProduct<Number> products[kTileRows];
  TileProducts<Of, kTileRows>::fill(products);
  for (int64_t first = 0; first < rows; first += kRowsTogether)
    for (int64_t column = 0; column < columns; column += kTileColumns) {
      const Number* panel = right + column * depth;
      const bool edge = columns - column < kTileColumns;
      for (int64_t row = first; row < rows && row < first + kRowsTogether; row += kTileRows) {
        const int64_t tile_rows = rows - row < kTileRows ? rows - row : kTileRows;
        const TileProduct<Number> product = products[tile_rows - 1];
        Number* here = c + row * c_stride + column;
        const Number* from = add ? here : start != nullptr ? start + column : nullptr;
        const int64_t from_stride = add ? c_stride : 0;
        if (edge)
          edge_product(product, left + row * depth, panel, tile_rows, columns - column, depth, from, from_stride, here,
                       c_stride);
        else
          product(left + row * depth, panel, depth, from, from_stride, here, c_stride);
      }
    }
}

// Panels of a right operand whose depth runs along the rows of W: values_of(d, out) writes `columns` numbers of its row
// d, for d in 0..depth-1. What is behind the last column is zero.
template <typename ValuesOf>
LILLIPUT_INLINE void pack_by_rows(int64_t columns, int64_t depth, const ValuesOf& values_of, float* panels) {
  float values[max_columns + kTileColumns];
  const int64_t padded = (columns + kTileColumns - 1) / kTileColumns * kTileColumns;
  for (int64_t i = columns; i < padded; ++i) values[i] = 0.0f;
  for (int64_t d = 0; d < depth; ++d) {
    values_of(d, values);
    for (int64_t c = 0; c < padded; c += kTileColumns) {
      float* row = panels + c * depth + d * kTileColumns;
      store(row, load(values + c));
      store(row + kWidth, load(values + c + kWidth));
    }
  }
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
