// The parts of a product with a 4-bit matrix, each in one thread: a few rows against the packed codes, and, for many
// rows, packing into panels. Another weight format brings its own packing and shares the rest.
#include "ops/blocks4.simd.h"
#include "ops/kernels_of_isa.h"
#include "ops/tiles.simd.h"

namespace lilliput {
namespace LILLIPUT_ISA {

constexpr int kPair = 2 * kWidth;  // numbers in kWidth bytes of codes
static_assert(kPair == kTileColumns, "a panel's row is two vectors");
#if defined(LILLIPUT_ISA_AVX512)
constexpr int kTogether = 4;  // rows of W at a time for one row of x
#else
constexpr int kTogether = 2;
#endif

// Whether every run of kPair numbers that starts at a multiple of kPair in its row lies in whole bytes of one block.
LILLIPUT_INLINE bool aligned(const Blocks4& w, int64_t columns) {
  return columns % kPair == 0 && w.block % kPair == 0;
}

// `count` numbers of flat storage from any start: the path for rows that begin inside a byte or end inside a block.
static void values_of(const Blocks4& w, int64_t start, int64_t count, float* out) {
  const Table book = table(w.codebook);
  int64_t block = start / w.block, left = (block + 1) * w.block - start;
  for (int64_t i = 0; i < count; ++block, left += w.block) {
    const int64_t end = left < count ? left : count;
    const float scale = w.absmax_of(block);
    const F scales = set1(scale);
    if ((start + i) % 2) out[i] = w.codebook[w.code_of(start + i)] * scale, ++i;
    for (; i + kPair <= end; i += kPair) {
      I earlier, later;
      F low, high;
      load_pairs(w.codes + (start + i) / 2, earlier, later);
      interleave(mul(lookup(book, earlier), scales), mul(lookup(book, later), scales), low, high);
      store(out + i, low);
      store(out + i + kWidth, high);
    }
    for (; i < end; ++i) out[i] = w.codebook[w.code_of(start + i)] * scale;
  }
}

// ---- one row, whose W has whole blocks of 64 in each row ----

// A word of 4 bytes holds 8 codes, and a lookup asks for the low 4 bits of a lane only: so kWidth words are shifted by
// 0, 4, .. 28 bits and looked up as they are. x lies in that order: for each group of 8 kWidth numbers, lane after lane
// the second, first, fourth, third .. number of the lanes' words (the earlier of two codes is a byte's high nibble).
constexpr int kGroup = 8 * kWidth;
// x [columns] in that order, zero-padded to whole groups.
static void split_words(const float* x, int64_t columns, float* out) {
  for (int64_t start = 0; start < columns; start += kGroup)
    for (int j = 0; j < 8; ++j)
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        const int64_t from = start + 8 * lane + (j ^ 1);
        *out++ = from < columns ? x[from] : 0.0f;
      }
}

// The absmax of each lane of group g: a group is two blocks, one, or half of one.
LILLIPUT_INLINE F scales_of(const float* absmax, int64_t g) {
  if (kGroup > kBlock) return halves(absmax[2 * g], absmax[2 * g + 1]);
  return set1(absmax[g * kGroup / kBlock]);
}

LILLIPUT_INLINE I words_of(const uint8_t* codes, int64_t bytes) {
  if (bytes >= 4 * kWidth) return load_words(codes);
  uint8_t room[4 * kWidth] = {0};
  memcpy(room, codes, (size_t)bytes);
  return load_words(room);
}

template <int J>
struct Nibbles {  // nibble 8 - J of each word and those after it
  static LILLIPUT_INLINE void add(Table book, const I* words, const float* x, F (*sums)[2], int rows) {
    const F numbers = load(x + (8 - J) * kWidth);
    for (int row = 0; row < rows; ++row)
      sums[row][J % 2] = fma(lookup(book, shift_right<4 * (8 - J)>(words[row])), numbers, sums[row][J % 2]);
    Nibbles<J - 1>::add(book, words, x, sums, rows);
  }
};
template <>
struct Nibbles<0> {
  static LILLIPUT_INLINE void add(Table, const I*, const float*, F (*)[2], int) {}
};

// Rows n..n + Rows - 1 of W: their sums do not wait for each other. Each sum has the same order for any Rows.
template <int Rows>
static void dot_words(const Blocks4& w, int64_t columns, const float* x, int64_t n, float* absmax, float* y) {
  const Table book = table(w.codebook);
  const int64_t bytes = columns / 2, blocks = columns / kBlock;
  for (int row = 0; row < Rows; ++row) absmax_of_row(w, (n + row) * blocks, blocks, absmax + row * (blocks + 1));
  F total[Rows];
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) total[row] = set1(0.0f);
  for (int64_t g = 0, at = 0; at < bytes; ++g, at += 4 * kWidth) {
    I words[Rows];
    F sums[Rows][2];
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      const uint8_t* codes = w.codes + (n + row) * bytes + at;
      __builtin_prefetch(codes + Rows * bytes);
      words[row] = words_of(codes, bytes - at);
      sums[row][0] = sums[row][1] = set1(0.0f);
    }
    Nibbles<8>::add(book, words, x + g * kGroup, sums, Rows);
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row)
      total[row] = fma(add(sums[row][0], sums[row][1]), scales_of(absmax + row * (blocks + 1), g), total[row]);
  }
  for (int row = 0; row < Rows; ++row) y[row] = sum(total[row]);
}

static void one(const Blocks4& w, int64_t columns, const float* words, const float* bias, int64_t first, int64_t last,
                float* y, float* scratch) {
  int64_t n = first;
  for (; n + kTogether <= last; n += kTogether) dot_words<kTogether>(w, columns, words, n, scratch, y + n);
  for (; n < last; ++n) dot_words<1>(w, columns, words, n, scratch, y + n);
  for (n = first; bias != nullptr && n < last; ++n) y[n] += bias[n];
}

// ---- few rows ----

// Each run of kPair numbers becomes its even numbers, then its odd ones: the order in which codes leave their bytes.
// One row has an order of its own.
static void split_pairs(const Blocks4& w, const float* x, int64_t rows, int64_t columns, float* out) {
  if (rows == 1 && whole_blocks(w, columns)) {
    split_words(x, columns, out);
    return;
  }
  for (int64_t i = 0; i + kPair <= rows * columns; i += kPair) {
    F even, odd;
    deinterleave(load(x + i), load(x + i + kWidth), even, odd);
    store(out + i, even);
    store(out + i + kWidth, odd);
  }
}

// One row of W, its codes read once, against R rows of x.
template <int R>
LILLIPUT_INLINE void dot_rows(const Blocks4& w, Table book, int64_t columns, const float* pairs, int64_t n,
                              float* sums) {
  constexpr int kChains = R == 1 || R > 8 * kWidth / 16 ? 1 : 2;  // sums a row: as many as the registers hold
  F total[R][kChains];
  for (int r = 0; r < R; ++r)
    for (int chain = 0; chain < kChains; ++chain) total[r][chain] = set1(0.0f);
  const int64_t start = n * columns;
  int64_t block = start / w.block, left = (block + 1) * w.block - start;
  for (int64_t k = 0; k < columns; ++block, left += w.block) {
    const int64_t end = left < columns ? left : columns;
    const F scale = set1(w.absmax_of(block));
    F even = set1(0.0f), odd = even;  // one row: sum the block first, scale it once
    for (; k < end; k += kPair) {
      I earlier, later;
      load_pairs(w.codes + (start + k) / 2, earlier, later);
      F a = lookup(book, earlier), b = lookup(book, later);
      if (R == 1) {
        even = fma(a, load(pairs + k), even);
        odd = fma(b, load(pairs + k + kWidth), odd);
        continue;
      }
      a = mul(a, scale), b = mul(b, scale);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        total[r][0] = fma(a, load(pairs + r * columns + k), total[r][0]);
        total[r][kChains - 1] = fma(b, load(pairs + r * columns + k + kWidth), total[r][kChains - 1]);
      }
    }
    if (R == 1) total[0][0] = fma(add(even, odd), scale, total[0][0]);
  }
  for (int r = 0; r < R; ++r) sums[r] = sum(kChains == 1 ? total[r][0] : add(total[r][0], total[r][kChains - 1]));
}

template <int R>
static void few(const Blocks4& w, int64_t columns, const float* pairs, const float* bias, int64_t first, int64_t last,
                float* y, int64_t y_stride) {
  const Table book = table(w.codebook);
  for (int64_t n = first; n < last; ++n) {
    float sums[R];
    dot_rows<R>(w, book, columns, pairs, n, sums);
    for (int r = 0; r < R; ++r) y[r * y_stride + n] = sums[r] + (bias != nullptr ? bias[n] : 0.0f);
  }
}

static void few_unaligned(const Blocks4& w, int64_t columns, const float* x, int rows, const float* bias, int64_t first,
                          int64_t last, float* y, int64_t y_stride, float* scratch) {
  for (int64_t n = first; n < last; ++n) {
    values_of(w, n * columns, columns, scratch);
    for (int r = 0; r < rows; ++r) {
      F total = set1(0.0f);
      int64_t k = 0;
      for (; k + kWidth <= columns; k += kWidth) total = fma(load(scratch + k), load(x + r * columns + k), total);
      float dot = sum(total);
      for (; k < columns; ++k) dot += scratch[k] * x[r * columns + k];
      y[r * y_stride + n] = dot + (bias != nullptr ? bias[n] : 0.0f);
    }
  }
}

static void few_rows(const Blocks4& w, int64_t columns, const float* x, const float* pairs, int rows, const float* bias,
                     int64_t first, int64_t last, float* y, int64_t y_stride, float* scratch) {
  if (!aligned(w, columns)) {
    few_unaligned(w, columns, x, rows, bias, first, last, y, y_stride, scratch);
    return;
  }
  if (rows == 1 && whole_blocks(w, columns)) {
    one(w, columns, pairs, bias, first, last, y, scratch);
    return;
  }
  using Few = void (*)(const Blocks4&, int64_t, const float*, const float*, int64_t, int64_t, float*, int64_t);
  static const Few by_rows[] = {few<1>, few<2>, few<3>, few<4>, few<5>, few<6>, few<7>, few<8>};
  static_assert(sizeof(by_rows) / sizeof(by_rows[0]) == few_rows_limit, "one instance per number of rows");
  by_rows[rows - 1](w, columns, pairs, bias, first, last, y, y_stride);
}

// ---- many rows: packing ----

static void pack_left(const float* x, int64_t x_stride, int64_t rows, int64_t depth, float* panels) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t count = rows - row < kTileRows ? rows - row : kTileRows;
    for (int64_t d = 0; d < depth; ++d, panels += kTileRows)
      for (int64_t r = 0; r < kTileRows; ++r) panels[r] = r < count ? x[(row + r) * x_stride + d] : 0.0f;
  }
}

// kWidth rows of W by kPair columns from k, times their absmax, into column `lane0..` of a panel's rows.
LILLIPUT_INLINE void transpose_codes(const Blocks4& w, Table book, int64_t columns, const int64_t* rows, int64_t k,
                                     F scales, float* panel) {
  uint8_t bytes[kWidth][kWidth];  // [byte along k][row]
  for (int r = 0; r < kWidth; ++r) {
    const uint8_t* from = w.codes + (rows[r] * columns + k) / 2;
    for (int j = 0; j < kWidth; ++j) bytes[j][r] = from[j];
  }
  for (int j = 0; j < kWidth; ++j) {
    I earlier, later;
    load_pairs(bytes[j], earlier, later);
    store(panel + (2 * j) * kTileColumns, mul(lookup(book, earlier), scales));
    store(panel + (2 * j + 1) * kTileColumns, mul(lookup(book, later), scales));
  }
}

// Half a panel (kWidth rows of W from n, of which `valid` exist) over k..k+k_count.
static void pack_half_panel(const Blocks4& w, int64_t columns, int64_t n, int64_t valid, int64_t k, int64_t k_count,
                            float* panel) {
  const Table book = table(w.codebook);
  int64_t rows[kWidth];
  for (int r = 0; r < kWidth; ++r) rows[r] = n + (r < valid ? r : 0);
  float scales[kWidth];
  for (int64_t d = 0; d < k_count; d += kPair) {
    const bool new_block = columns % w.block != 0 || (k + d) % w.block == 0 || d == 0;
    for (int r = 0; new_block && r < kWidth; ++r)
      scales[r] = r < valid ? w.absmax_of((rows[r] * columns + k + d) / w.block) : 0.0f;
    transpose_codes(w, book, columns, rows, k + d, load(scales), panel + d * kTileColumns);
  }
}

static void pack_forward_unaligned(const Blocks4& w, int64_t columns, int64_t n, int64_t n_count, int64_t k,
                                   int64_t k_count, float* panels) {
  float values[max_depth];
  for (int64_t first = 0; first < n_count; first += kTileColumns, panels += k_count * kTileColumns) {
    for (int64_t c = 0; c < kTileColumns; ++c) {
      if (first + c < n_count) values_of(w, (n + first + c) * columns + k, k_count, values);
      for (int64_t d = 0; d < k_count; ++d) panels[d * kTileColumns + c] = first + c < n_count ? values[d] : 0.0f;
    }
  }
}

static void pack_forward(const Blocks4& w, int64_t columns, int64_t n, int64_t n_count, int64_t k, int64_t k_count,
                         float* panels) {
  if (!aligned(w, columns) || k % kPair || k_count % kPair) {
    pack_forward_unaligned(w, columns, n, n_count, k, k_count, panels);
    return;
  }
  for (int64_t first = 0; first < n_count; first += kTileColumns, panels += k_count * kTileColumns) {
    const int64_t here = n_count - first;
    pack_half_panel(w, columns, n + first, here < kWidth ? here : kWidth, k, k_count, panels);
    const int64_t rest = here - kWidth;  // a half without rows is packed from the first row, times zero
    pack_half_panel(w, columns, rest > 0 ? n + first + kWidth : n + first,
                    rest < 0        ? 0
                    : rest < kWidth ? rest
                                    : kWidth,
                    k, k_count, panels + kWidth);
  }
}

static void pack_backward(const Blocks4& w, int64_t columns, int64_t k, int64_t k_count, int64_t n, int64_t n_count,
                          float* panels) {
  pack_by_rows(
      k_count, n_count, [&](int64_t d, float* values) { values_of(w, (n + d) * columns + k, k_count, values); },
      panels);
}

void add_linear_4bit(Kernels& kernels) {
  kernels.split_pairs = split_pairs;
  kernels.few_rows = few_rows;
  kernels.pack_left = pack_left;
  kernels.pack_forward = pack_forward;
  kernels.pack_backward = pack_backward;
  kernels.multiply = multiply_panels<Floats>;
  kernels.tile = {kTileRows, kTileColumns};
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
