// One row against the packed codes in 16-bit fixed point, where that is quicker than looking floats up: AVX2, whose
// lookups of floats (two permutations and a blend for 8) take four times as long. A block of x has 16-bit whole numbers
// and one scale, the codebook is rounded to 16-bit whole numbers, products of two are summed in 32 bits, all else in
// float. Both roundings are within half a step of 1/32767 of the block's greatest |x|, and of the codebook's.
// Not for several rows: they share the lookups, and float32 is as quick for eight.
#include "ops/blocks4.simd.h"
#include "ops/kernels_of_isa.h"

namespace lilliput {
namespace LILLIPUT_ISA {

#if defined(LILLIPUT_ISA_AVX2)

constexpr float kMost = 32767.0f;

// The codes of a block leave their 32 bytes as the high nibbles (numbers 0, 2, 4 ..), then the low ones (1, 3, ..), and
// unpacking bytes to words works within halves of a register: vector v of 4 holds numbers v / 2 + 2 j of the block for
// these j, by word.
constexpr int kByteOf[2][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
                                {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}};

// x [columns] as 16-bit numbers in that order, with a scale for each block that also holds the codebook's. False where
// a block holds NaN, Inf or numbers whose scale a float could not hold well: those are left to few_rows.
static bool fix_row(const Blocks4& w, const float* x, int64_t columns, int16_t* fixed, float* scales) {
  if (!whole_blocks(w, columns)) return false;
  const float book_scale = greatest_magnitude(w.codebook, 16) / kMost;
  for (int64_t block = 0; block < columns / kBlock; ++block, x += kBlock, fixed += kBlock) {
    const float most = greatest_magnitude(x, kBlock);
    if (most != 0.0f && !(most > 1e-25f && most < 1e25f)) return false;
    const float inverse = most == 0.0f ? 0.0f : kMost / most;
    scales[block] = most / kMost * book_scale;
    alignas(32) int32_t whole[kBlock];
    for (int64_t i = 0; i < kBlock; i += kWidth)
      _mm256_store_si256((__m256i*)(whole + i), _mm256_cvtps_epi32(mul(load(x + i), set1(inverse))));
    for (int v = 0; v < 4; ++v)
      for (int j = 0; j < 16; ++j) fixed[16 * v + j] = (int16_t)whole[v / 2 + 2 * kByteOf[v % 2][j]];
  }
  return true;
}

struct WordTable {  // the codebook as 16-bit numbers: their low and their high bytes, for pshufb
  __m256i low, high;
};

LILLIPUT_INLINE WordTable word_table(const float* codebook) {
  const float most = greatest_magnitude(codebook, 16);
  uint8_t low[16], high[16];
  for (int i = 0; i < 16; ++i) {
    const int word = _mm_cvtss_si32(_mm_set_ss(most == 0.0f ? 0.0f : codebook[i] * (kMost / most)));
    low[i] = (uint8_t)word, high[i] = (uint8_t)(word >> 8);
  }
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)low)),
          _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)high))};
}

LILLIPUT_INLINE F products(I words, const int16_t* x) {  // of a pair of words: below 2^31, as |x|, |w| <= 32767
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(words, _mm256_loadu_si256((const __m256i*)x)));
}

// Rows n..n + Rows - 1 of W: their sums do not wait for each other. Each sum has the same order for any Rows.
template <int Rows>
static void dot_fixed(const Blocks4& w, const WordTable& book, int64_t columns, const int16_t* x, const float* x_scales,
                      int64_t n, float* absmax, float* y) {
  const int64_t blocks = columns / kBlock, bytes = columns / 2;
  F total[Rows];
  for (int row = 0; row < Rows; ++row) {
    absmax_of_row(w, (n + row) * blocks, blocks, absmax + row * (blocks + 1));
    total[row] = set1(0.0f);
  }
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int64_t b = 0; b < blocks; ++b, x += kBlock) {
#pragma GCC unroll 2
    for (int row = 0; row < Rows; ++row) {
      const uint8_t* codes = w.codes + (n + row) * bytes + b * kBlock / 2;
      __builtin_prefetch(codes + Rows * bytes);
      const I both = load_words(codes), even = iand(_mm256_srli_epi16(both, 4), nibble), odd = iand(both, nibble);
      const I even_low = _mm256_shuffle_epi8(book.low, even), even_high = _mm256_shuffle_epi8(book.high, even);
      const I odd_low = _mm256_shuffle_epi8(book.low, odd), odd_high = _mm256_shuffle_epi8(book.high, odd);
      const F sum_even = add(products(_mm256_unpacklo_epi8(even_low, even_high), x),
                             products(_mm256_unpackhi_epi8(even_low, even_high), x + 16));
      const F sum_odd = add(products(_mm256_unpacklo_epi8(odd_low, odd_high), x + 32),
                            products(_mm256_unpackhi_epi8(odd_low, odd_high), x + 48));
      const float scale = absmax[row * (blocks + 1) + b] * x_scales[b];
      total[row] = fma(add(sum_even, sum_odd), set1(scale), total[row]);
    }
  }
  for (int row = 0; row < Rows; ++row) y[row] = sum(total[row]);
}

static void one_row_fixed(const Blocks4& w, int64_t columns, const int16_t* x, const float* x_scales, const float* bias,
                          int64_t first, int64_t last, float* y, float* scratch) {
  const WordTable book = word_table(w.codebook);
  int64_t n = first;
  for (; n + 2 <= last; n += 2) dot_fixed<2>(w, book, columns, x, x_scales, n, scratch, y + n);
  if (n < last) dot_fixed<1>(w, book, columns, x, x_scales, n, scratch, y + n);
  for (n = first; bias != nullptr && n < last; ++n) y[n] += bias[n];
}

void add_linear_4bit_fixed(Kernels& kernels) {
  kernels.fix_row = fix_row;
  kernels.one_row_fixed = one_row_fixed;
}

#else

void add_linear_4bit_fixed(Kernels&) {}

#endif

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
