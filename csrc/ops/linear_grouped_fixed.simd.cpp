// One row against the packed codes in 16-bit fixed point, where whole numbers are quicker than floats: AVX2, which
// multiplies 16 words and adds pairs of them in one instruction. A span of x has 16-bit whole numbers and one scale;
// sums of products with codes are exact in 32 bits, and so is what the zero takes off them: per lane, zero times the
// sum of that lane's x. The one rounding is within half a step of 1/32767 of the span's greatest |x|.
#include "ops/groups.simd.h"
#include "ops/kernels_of_isa.h"

namespace lilliput {
namespace LILLIPUT_ISA {

#if defined(LILLIPUT_ISA_AVX2)

constexpr float kMost = 32767.0f;

// Numbers of x that share a scale: of one group. 128 products of 16 and of 8 bits fit 32 bits.
LILLIPUT_INLINE int64_t span_of(const Groups& w) {
  return w.group % 128 == 0 ? 128 : w.group % 64 == 0 ? 64 : 32;
}

LILLIPUT_INLINE I load_shorts(const int16_t* p) {
  return _mm256_loadu_si256((const __m256i*)p);
}
LILLIPUT_INLINE I bytes_to_words(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
}

// The codes of a run as words: 0..15 and 16..31.
LILLIPUT_INLINE void words_of(Bits<8>, const uint8_t* run, I& low, I& high) {
  low = bytes_to_words(run), high = bytes_to_words(run + 16);
}
LILLIPUT_INLINE void words_of(Bits<4>, const uint8_t* run, I& low, I& high) {
  const I both = bytes_to_words(run);
  low = _mm256_and_si256(both, _mm256_set1_epi16(15)), high = _mm256_srli_epi16(both, 4);
}
LILLIPUT_INLINE void halves_of(I bytes, I& low, I& high) {
  low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes));
  high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes, 1));
}
LILLIPUT_INLINE I two_bits(const uint8_t* run) {
  int64_t bytes;
  memcpy(&bytes, run, 8);
  const I places = _mm256_srlv_epi64(_mm256_set1_epi64x(bytes), _mm256_setr_epi64x(0, 2, 4, 6));
  return _mm256_and_si256(places, _mm256_set1_epi8(3));
}
LILLIPUT_INLINE void words_of(Bits<2>, const uint8_t* run, I& low, I& high) {
  halves_of(two_bits(run), low, high);
}
LILLIPUT_INLINE void words_of(Bits<3>, const uint8_t* run, I& low, I& high) {
  int32_t bytes;
  memcpy(&bytes, run + 8, 4);
  const I places = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const I top = _mm256_slli_epi32(_mm256_and_si256(places, _mm256_set1_epi8(1)), 2);
  halves_of(_mm256_or_si256(two_bits(run), top), low, high);
}

// 32 numbers of x as words times `inverse`; adds each lane's to `sums`.
LILLIPUT_INLINE void fix_run(const float* x, F inverse, int16_t* fixed, I& sums) {
  for (int64_t i = 0; i < run_length; i += kWidth) store_shorts(fixed + i, to_integers(mul(load(x + i), inverse)));
  const I ones = _mm256_set1_epi16(1);
  sums = dot_pairs(dot_pairs(sums, load_shorts(fixed), ones), load_shorts(fixed + 16), ones);
}

// x [columns] as 16-bit numbers, zero behind the last up to a whole run, with a scale and the sums of the 8 lanes for
// each span. False where a span holds NaN, Inf or numbers whose scale a float could not hold well.
static bool fix_row(const Groups& w, const float* x, int16_t* fixed, float* scales, int32_t* sums) {
  const int64_t span = span_of(w);
  for (int64_t k = 0; k < w.columns; k += span, ++scales, sums += kWidth) {
    const int64_t count = w.columns - k < span ? w.columns - k : span;
    float room[128] = {0};
    memcpy(room, x + k, (size_t)count * sizeof(float));
    const float most = greatest_magnitude(room, span);
    if (most != 0.0f && !(most > 1e-25f && most < 1e25f)) return false;
    *scales = most / kMost;
    const F inverse = set1(most == 0.0f ? 0.0f : kMost / most);
    I lanes = iset1(0);
    for (int64_t i = 0; i < count; i += run_length, fixed += run_length) fix_run(room + i, inverse, fixed, lanes);
    store_words(sums, lanes);
  }
  return true;
}

// Rows n..n + Rows - 1 of W: their sums do not wait for each other. Each sum has the same order for any Rows.
template <int N, int Rows>
static void dot_fixed(const Groups& w, const int16_t* x, const float* x_scales, const int32_t* x_sums, int64_t n,
                      float* scales, float* y) {
  F total[Rows];
  const uint8_t* codes[Rows];
  for (int row = 0; row < Rows; ++row) {
    read_reals(w.scale, (n + row) * w.groups, w.groups, scales + row * w.groups);
    total[row] = set1(0.0f), codes[row] = w.run_at(n + row, 0);
  }
  const int64_t span = span_of(w), runs = w.runs(), next_rows = Rows * runs * w.run_bytes();
  for (int64_t index = 0, k = 0; index < w.groups; ++index) {
    const int64_t group_end = k + w.group < runs * run_length ? k + w.group : runs * run_length;
    for (; k < group_end; ++x_scales, x_sums += kWidth) {
      const int64_t end = k + span < group_end ? k + span : group_end;
      I sums[Rows];
#pragma GCC unroll 2
      for (int row = 0; row < Rows; ++row) {
        const I zero = iset1(w.zero_of(n + row, index));
        sums[row] = isub(iset1(0), _mm256_mullo_epi32(zero, load_words((const uint8_t*)x_sums)));
      }
      for (; k < end; k += run_length) {
        const I first = load_shorts(x + k), second = load_shorts(x + k + 16);
#pragma GCC unroll 2
        for (int row = 0; row < Rows; ++row) {
          __builtin_prefetch(codes[row] + next_rows);
          I low, high;
          words_of(Bits<N>{}, codes[row], low, high);
          sums[row] = dot_pairs(dot_pairs(sums[row], low, first), high, second);
          codes[row] += 4 * N;
        }
      }
#pragma GCC unroll 2
      for (int row = 0; row < Rows; ++row)
        total[row] = fma(to_floats(sums[row]), set1(scales[row * w.groups + index] * *x_scales), total[row]);
    }
  }
  for (int row = 0; row < Rows; ++row) y[row] = sum(total[row]);
}

static void one_row(const Groups& w, const int16_t* x, const float* x_scales, const int32_t* x_sums, const float* bias,
                    int64_t first, int64_t last, float* y, float* scratch) {
  by_bits(w.bits, [&](auto bits) {
    constexpr int N = decltype(bits)::count;
    int64_t n = first;
    for (; n + 2 <= last; n += 2) dot_fixed<N, 2>(w, x, x_scales, x_sums, n, scratch, y + n);
    if (n < last) dot_fixed<N, 1>(w, x, x_scales, x_sums, n, scratch, y + n);
  });
  for (int64_t n = first; bias != nullptr && n < last; ++n) y[n] += bias[n];
}

void add_linear_grouped_fixed(Kernels& kernels) {
  kernels.fix_row_grouped = fix_row;
  kernels.one_row_grouped = one_row;
}

#else

void add_linear_grouped_fixed(Kernels&) {}

#endif

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
