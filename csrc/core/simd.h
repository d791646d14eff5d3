// The vector of the instruction set that this file is being compiled for: F floats, I 32-bit integers, kWidth lanes.
// Included by *.simd.cpp only, which are compiled once per instruction set with LILLIPUT_ISA set to its name;
// everything lives in a namespace of that name, so that no copy can stand in for another. No standard templates here or
// there: the linker would keep one copy of them, compiled for whichever instruction set came first.
#pragma once

#include <stdint.h>
#include <string.h>

#include "core/blocks.h"

#if defined(LILLIPUT_ISA_AVX512) || defined(LILLIPUT_ISA_AVX2)
#include <immintrin.h>
#endif

namespace lilliput {
namespace LILLIPUT_ISA {

#if defined(LILLIPUT_ISA_AVX512)

constexpr int kWidth = 16;
using F = __m512;
using I = __m512i;

LILLIPUT_INLINE F load(const float* p) {
  return _mm512_loadu_ps(p);
}
LILLIPUT_INLINE void store(float* p, F a) {
  _mm512_storeu_ps(p, a);
}
LILLIPUT_INLINE F set1(float a) {
  return _mm512_set1_ps(a);
}
LILLIPUT_INLINE F add(F a, F b) {
  return _mm512_add_ps(a, b);
}
LILLIPUT_INLINE F mul(F a, F b) {
  return _mm512_mul_ps(a, b);
}
LILLIPUT_INLINE F fma(F a, F b, F c) {
  return _mm512_fmadd_ps(a, b, c);
}
LILLIPUT_INLINE F clamp1(F a) {
  return _mm512_min_ps(_mm512_max_ps(a, set1(-1.0f)), set1(1.0f));
}
LILLIPUT_INLINE I bits(F a) {
  return _mm512_castps_si512(a);
}
LILLIPUT_INLINE I iset1(int32_t a) {
  return _mm512_set1_epi32(a);
}
LILLIPUT_INLINE I iand(I a, I b) {
  return _mm512_and_si512(a, b);
}
LILLIPUT_INLINE I iadd(I a, I b) {
  return _mm512_add_epi32(a, b);
}
LILLIPUT_INLINE I imax(I a, I b) {
  return _mm512_max_epi32(a, b);
}
LILLIPUT_INLINE int32_t reduce_max(I a) {
  return _mm512_reduce_max_epi32(a);
}
LILLIPUT_INLINE I greater(F a, F b, int32_t value) {  // value where a > b, else 0
  return _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), value);
}
LILLIPUT_INLINE void store_bytes(uint8_t* p, I a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a));
}
LILLIPUT_INLINE F div(F a, F b) {
  return _mm512_div_ps(a, b);
}
LILLIPUT_INLINE F at_least(F a, float least) {  // NaN stays NaN, here and below
  return _mm512_max_ps(set1(least), a);
}
LILLIPUT_INLINE F at_most(F a, float most) {
  return _mm512_min_ps(set1(most), a);
}
LILLIPUT_INLINE F greater(F a, F b) {  // NaN in a gives b
  return _mm512_max_ps(a, b);
}
LILLIPUT_INLINE F minus_abs(F a) {
  return _mm512_or_ps(a, set1(-0.0f));
}
LILLIPUT_INLINE F where_negative(F test, F a, F b) {  // a where test's sign bit is set, else b
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(test)), b, a);
}
LILLIPUT_INLINE F times_power_of_2(F a, F n) {  // a 2^n, n whole numbers in -150..128; rounded once
  return _mm512_scalef_ps(a, n);
}
LILLIPUT_INLINE I to_integers(F a) {  // to nearest, ties to even
  return _mm512_cvtps_epi32(a);
}
LILLIPUT_INLINE F to_floats(I a) {
  return _mm512_cvtepi32_ps(a);
}
LILLIPUT_INLINE void store_words(int32_t* p, I a) {
  _mm512_storeu_si512(p, a);
}
LILLIPUT_INLINE F load_int8(const int8_t* p) {
  return to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
LILLIPUT_INLINE I load_int8_pairs(const int8_t* p) {  // 2 kWidth of them as 16-bit numbers, two in each lane
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
}
LILLIPUT_INLINE I dot_pairs(I sum, I a, I b) {  // sum + a0 b0 + a1 b1 of the 16-bit numbers in each lane
#if defined(LILLIPUT_VNNI)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return iadd(sum, _mm512_madd_epi16(a, b));
#endif
}

LILLIPUT_INLINE F as_floats(I a) {  // the same bits
  return _mm512_castsi512_ps(a);
}
LILLIPUT_INLINE I iandnot(I a, I b) {  // ~a & b
  return _mm512_andnot_si512(a, b);
}
LILLIPUT_INLINE int32_t reduce_add(I a) {
  return _mm512_reduce_add_epi32(a);
}
LILLIPUT_INLINE void store_shorts(int16_t* p, I a) {  // lanes within 16 bits
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a));
}

struct Table {
  F values;
};
LILLIPUT_INLINE Table table(const float* p) {
  return {load(p)};
}
LILLIPUT_INLINE F lookup(Table t, I index) {
  return _mm512_permutexvar_ps(index, t.values);
}  // low 4 bits count

// kWidth packed bytes: the earlier (high) and the later (low) code of each.
LILLIPUT_INLINE void load_pairs(const uint8_t* p, I& earlier, I& later) {
  later = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  earlier = _mm512_srli_epi32(later, 4);
}
LILLIPUT_INLINE I load_words(const uint8_t* p) {  // 4 bytes a lane
  return _mm512_loadu_si512(p);
}
LILLIPUT_INLINE I load_bytes(const uint8_t* p) {  // a byte a lane
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}
template <int N>
LILLIPUT_INLINE I shift_right(I a) {  // what comes in from the left is not told
  return _mm512_srli_epi32(a, N);
}
LILLIPUT_INLINE F gather(const float* p, I index) {
  return _mm512_i32gather_ps(index, p, 4);
}
LILLIPUT_INLINE F halves(float low, float high) {
  return _mm512_mask_blend_ps(0xff00, set1(low), set1(high));
}
// a0 a1 .. and b0 b1 .. to a0 b0 a1 b1 ..
LILLIPUT_INLINE void interleave(F a, F b, F& low, F& high) {
  const I first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  low = _mm512_permutex2var_ps(a, first, b);
  high = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
}
LILLIPUT_INLINE void deinterleave(F low, F high, F& even, F& odd) {
  const I first = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  even = _mm512_permutex2var_ps(low, first, high);
  odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(1)), high);
}

LILLIPUT_INLINE F sub(F a, F b) {
  return _mm512_sub_ps(a, b);
}
LILLIPUT_INLINE F sqrt(F a) {
  return _mm512_sqrt_ps(a);
}
LILLIPUT_INLINE I isub(I a, I b) {
  return _mm512_sub_epi32(a, b);
}
LILLIPUT_INLINE I ior(I a, I b) {
  return _mm512_or_si512(a, b);
}
LILLIPUT_INLINE I iabs(I a) {
  return _mm512_abs_epi32(a);
}
LILLIPUT_INLINE I times_high(I a, I b) {  // a b / 2^16, rounded down; a and b in 0..65535
  return _mm512_mulhi_epu16(a, b);
}
LILLIPUT_INLINE I shift_right_by(I a, I n) {  // a >= 0, n in 0..31
  return _mm512_srlv_epi32(a, n);
}
LILLIPUT_INLINE I shift_left_by(I a, I n) {
  return _mm512_sllv_epi32(a, n);
}
LILLIPUT_INLINE I reduced(I a, I b) {  // a - b, at least 0; a and b in 0..65535
  return _mm512_subs_epu16(a, b);
}
LILLIPUT_INLINE bool any_negative(I a) {
  return _mm512_movepi32_mask(a) != 0;
}
// 4 vectors of small numbers to bytes, at least 0. With signs: 127 plus the number (0..128), minus it where its `sign`
// is below 0. Without (null): the number (0..256) less 1. Others give any byte.
LILLIPUT_INLINE void store_codes(uint8_t* p, const I* a, const I* sign) {
  for (int i = 0; i < 4; ++i) {
    I lane = _mm512_sub_epi32(a[i], iset1(1));
    if (sign != nullptr) {
      lane = _mm512_mask_sub_epi32(a[i], _mm512_movepi32_mask(sign[i]), _mm512_setzero_si512(), a[i]);
      lane = iadd(lane, iset1(127));
    }
    _mm_storeu_si128((__m128i*)(p + i * kWidth), _mm512_cvtepi32_epi8(imax(lane, iset1(0))));
  }
}
LILLIPUT_INLINE F values_of(const float* book, const uint8_t* p) {  // of kWidth codes; book [256]
  return gather(book, load_bytes(p));
}
struct Table8 {  // of 8 entries; the low 3 bits of an index count
  F values;
};
LILLIPUT_INLINE Table8 table8(const float* p) {
  return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))};
}
LILLIPUT_INLINE F lookup(Table8 t, I index) {
  return _mm512_permutexvar_ps(index, t.values);
}
struct Squares {  // their sum in double
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  LILLIPUT_INLINE void add(F a) {
    const __m512d x = _mm512_cvtps_pd(_mm512_castps512_ps256(a)), y = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
    low = _mm512_fmadd_pd(x, x, low);
    high = _mm512_fmadd_pd(y, y, high);
  }
  LILLIPUT_INLINE double sum() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

#elif defined(LILLIPUT_ISA_AVX2)

constexpr int kWidth = 8;
using F = __m256;
using I = __m256i;

LILLIPUT_INLINE F load(const float* p) {
  return _mm256_loadu_ps(p);
}
LILLIPUT_INLINE void store(float* p, F a) {
  _mm256_storeu_ps(p, a);
}
LILLIPUT_INLINE F set1(float a) {
  return _mm256_set1_ps(a);
}
LILLIPUT_INLINE F add(F a, F b) {
  return _mm256_add_ps(a, b);
}
LILLIPUT_INLINE F mul(F a, F b) {
  return _mm256_mul_ps(a, b);
}
LILLIPUT_INLINE F fma(F a, F b, F c) {
  return _mm256_fmadd_ps(a, b, c);
}
LILLIPUT_INLINE F clamp1(F a) {
  return _mm256_min_ps(_mm256_max_ps(a, set1(-1.0f)), set1(1.0f));
}
LILLIPUT_INLINE I bits(F a) {
  return _mm256_castps_si256(a);
}
LILLIPUT_INLINE I iset1(int32_t a) {
  return _mm256_set1_epi32(a);
}
LILLIPUT_INLINE I iand(I a, I b) {
  return _mm256_and_si256(a, b);
}
LILLIPUT_INLINE I iadd(I a, I b) {
  return _mm256_add_epi32(a, b);
}
LILLIPUT_INLINE I imax(I a, I b) {
  return _mm256_max_epi32(a, b);
}
LILLIPUT_INLINE int32_t reduce_max(I a) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
  return _mm_cvtsi128_si32(m);
}
LILLIPUT_INLINE I greater(F a, F b, int32_t value) {
  return _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)), iset1(value));
}
LILLIPUT_INLINE void store_bytes(uint8_t* p, I a) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}
LILLIPUT_INLINE F div(F a, F b) {
  return _mm256_div_ps(a, b);
}
LILLIPUT_INLINE F at_least(F a, float least) {
  return _mm256_max_ps(set1(least), a);
}
LILLIPUT_INLINE F at_most(F a, float most) {
  return _mm256_min_ps(set1(most), a);
}
LILLIPUT_INLINE F greater(F a, F b) {
  return _mm256_max_ps(a, b);
}
LILLIPUT_INLINE F minus_abs(F a) {
  return _mm256_or_ps(a, set1(-0.0f));
}
LILLIPUT_INLINE F where_negative(F test, F a, F b) {
  return _mm256_blendv_ps(b, a, test);
}
LILLIPUT_INLINE F times_power_of_2(F a, F n) {  // in two steps of normal powers: only the second may round
  const I whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = iset1(127);
  const I rest = _mm256_sub_epi32(whole, half);
  const F first = _mm256_castsi256_ps(_mm256_slli_epi32(iadd(half, bias), 23));
  const F second = _mm256_castsi256_ps(_mm256_slli_epi32(iadd(rest, bias), 23));
  return mul(mul(a, first), second);
}
LILLIPUT_INLINE I to_integers(F a) {
  return _mm256_cvtps_epi32(a);
}
LILLIPUT_INLINE F to_floats(I a) {
  return _mm256_cvtepi32_ps(a);
}
LILLIPUT_INLINE void store_words(int32_t* p, I a) {
  _mm256_storeu_si256((__m256i*)p, a);
}
LILLIPUT_INLINE F load_int8(const int8_t* p) {
  return to_floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
LILLIPUT_INLINE I load_int8_pairs(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
}
LILLIPUT_INLINE I dot_pairs(I sum, I a, I b) {
  return iadd(sum, _mm256_madd_epi16(a, b));
}

LILLIPUT_INLINE F as_floats(I a) {
  return _mm256_castsi256_ps(a);
}
LILLIPUT_INLINE I iandnot(I a, I b) {
  return _mm256_andnot_si256(a, b);
}
LILLIPUT_INLINE int32_t reduce_add(I a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
  return _mm_cvtsi128_si32(s);
}
LILLIPUT_INLINE void store_shorts(int16_t* p, I a) {  // lanes within 16 bits
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}

struct Table {
  F low, high;
};
LILLIPUT_INLINE Table table(const float* p) {
  return {load(p), load(p + 8)};
}
LILLIPUT_INLINE F lookup(Table t, I index) {  // low 4 bits count: three choose the lane, the fourth the half
  const F half = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), half);
}
LILLIPUT_INLINE void load_pairs(const uint8_t* p, I& earlier, I& later) {
  later = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  earlier = _mm256_srli_epi32(later, 4);
}
LILLIPUT_INLINE I load_words(const uint8_t* p) {
  return _mm256_loadu_si256((const __m256i*)p);
}
LILLIPUT_INLINE I load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
template <int N>
LILLIPUT_INLINE I shift_right(I a) {
  return _mm256_srli_epi32(a, N);
}
LILLIPUT_INLINE F gather(const float* p, I index) {
  return _mm256_i32gather_ps(p, index, 4);
}
LILLIPUT_INLINE F halves(float low, float high) {
  return _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low));
}
LILLIPUT_INLINE void interleave(F a, F b, F& low, F& high) {
  const F x = _mm256_unpacklo_ps(a, b), y = _mm256_unpackhi_ps(a, b);
  low = _mm256_permute2f128_ps(x, y, 0x20);
  high = _mm256_permute2f128_ps(x, y, 0x31);
}
LILLIPUT_INLINE void deinterleave(F low, F high, F& even, F& odd) {
  const F x = _mm256_permute2f128_ps(low, high, 0x20), y = _mm256_permute2f128_ps(low, high, 0x31);
  even = _mm256_shuffle_ps(x, y, 0x88);
  odd = _mm256_shuffle_ps(x, y, 0xDD);
}

LILLIPUT_INLINE F sub(F a, F b) {
  return _mm256_sub_ps(a, b);
}
LILLIPUT_INLINE F sqrt(F a) {
  return _mm256_sqrt_ps(a);
}
LILLIPUT_INLINE I isub(I a, I b) {
  return _mm256_sub_epi32(a, b);
}
LILLIPUT_INLINE I ior(I a, I b) {
  return _mm256_or_si256(a, b);
}
LILLIPUT_INLINE I iabs(I a) {
  return _mm256_abs_epi32(a);
}
LILLIPUT_INLINE I times_high(I a, I b) {
  return _mm256_mulhi_epu16(a, b);
}
LILLIPUT_INLINE I shift_right_by(I a, I n) {
  return _mm256_srlv_epi32(a, n);
}
LILLIPUT_INLINE I shift_left_by(I a, I n) {
  return _mm256_sllv_epi32(a, n);
}
LILLIPUT_INLINE I reduced(I a, I b) {
  return _mm256_subs_epu16(a, b);
}
LILLIPUT_INLINE bool any_negative(I a) {
  return _mm256_movemask_ps(_mm256_castsi256_ps(a)) != 0;
}
LILLIPUT_INLINE void store_codes(uint8_t* p, const I* a, const I* sign) {
  I bytes;
  if (sign == nullptr) {  // 256 less 1 before it is packed to 255; 0 stays 0
    const I low = _mm256_packs_epi32(a[0], a[1]), high = _mm256_packs_epi32(a[2], a[3]), one = _mm256_set1_epi16(1);
    bytes = _mm256_packus_epi16(_mm256_sub_epi16(low, one), _mm256_sub_epi16(high, one));
  } else {  // packed, a number below 0 stays below 0
    const I low = _mm256_packs_epi32(sign[0], sign[1]), high = _mm256_packs_epi32(sign[2], sign[3]);
    const I below = _mm256_cmpgt_epi8(_mm256_setzero_si256(), _mm256_packs_epi16(low, high));
    bytes = _mm256_packus_epi16(_mm256_packs_epi32(a[0], a[1]), _mm256_packs_epi32(a[2], a[3]));
    const I up = _mm256_add_epi8(_mm256_andnot_si256(below, bytes), _mm256_set1_epi8(127));
    bytes = _mm256_subs_epu8(up, _mm256_and_si256(below, bytes));
  }
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
LILLIPUT_INLINE F values_of(const float* book, const uint8_t* p) {  // eight loads take 8 cycles, a gather 12
  return _mm256_setr_ps(book[p[0]], book[p[1]], book[p[2]], book[p[3]], book[p[4]], book[p[5]], book[p[6]], book[p[7]]);
}
struct Table8 {
  F values;
};
LILLIPUT_INLINE Table8 table8(const float* p) {
  return {load(p)};
}
LILLIPUT_INLINE F lookup(Table8 t, I index) {
  return _mm256_permutevar8x32_ps(t.values, index);
}
struct Squares {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  LILLIPUT_INLINE void add(F a) {
    const __m256d x = _mm256_cvtps_pd(_mm256_castps256_ps128(a)), y = _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
    low = _mm256_fmadd_pd(x, x, low);
    high = _mm256_fmadd_pd(y, y, high);
  }
  LILLIPUT_INLINE double sum() const {
    const __m256d both = _mm256_add_pd(low, high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(both), _mm256_extractf128_pd(both, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

#else  // portable: gcc's and clang's own vectors, which become SSE2 or NEON registers

constexpr int kWidth = 4;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

LILLIPUT_INLINE F load(const float* p) {
  F a;
  memcpy(&a, p, sizeof a);
  return a;
}
LILLIPUT_INLINE void store(float* p, F a) {
  memcpy(p, &a, sizeof a);
}
LILLIPUT_INLINE F set1(float a) {
  return F{a, a, a, a};
}
LILLIPUT_INLINE F add(F a, F b) {
  return a + b;
}
LILLIPUT_INLINE F mul(F a, F b) {
  return a * b;
}
LILLIPUT_INLINE F fma(F a, F b, F c) {
  return a * b + c;
}  // two roundings
LILLIPUT_INLINE I bits(F a) {
  return (I)a;
}
LILLIPUT_INLINE I iset1(int32_t a) {
  return I{a, a, a, a};
}
LILLIPUT_INLINE I iand(I a, I b) {
  return a & b;
}
LILLIPUT_INLINE I iadd(I a, I b) {
  return a + b;
}
LILLIPUT_INLINE I imax(I a, I b) {
  const I more = a > b;
  return (a & more) | (b & ~more);
}
LILLIPUT_INLINE F clamp1(F a) {
  for (int i = 0; i < kWidth; ++i) a[i] = a[i] < -1.0f ? -1.0f : a[i] > 1.0f ? 1.0f : a[i];
  return a;
}
LILLIPUT_INLINE int32_t reduce_max(I a) {
  int32_t most = a[0];
  for (int i = 1; i < kWidth; ++i) most = a[i] > most ? a[i] : most;
  return most;
}
LILLIPUT_INLINE I greater(F a, F b, int32_t value) {
  return (a > b) & iset1(value);
}
LILLIPUT_INLINE void store_bytes(uint8_t* p, I a) {
  for (int i = 0; i < kWidth; ++i) p[i] = (uint8_t)a[i];
}
LILLIPUT_INLINE F div(F a, F b) {
  return a / b;
}
LILLIPUT_INLINE F where(I mask, F a, F b) {
  return (F)(((I)a & mask) | ((I)b & ~mask));
}
LILLIPUT_INLINE F at_least(F a, float least) {
  return where(a < set1(least), set1(least), a);
}
LILLIPUT_INLINE F at_most(F a, float most) {
  return where(a > set1(most), set1(most), a);
}
LILLIPUT_INLINE F greater(F a, F b) {
  return where(a > b, a, b);
}
LILLIPUT_INLINE F minus_abs(F a) {
  return (F)((I)a | (I)set1(-0.0f));
}
LILLIPUT_INLINE F where_negative(F test, F a, F b) {
  return where((I)test < iset1(0), a, b);
}
LILLIPUT_INLINE F times_power_of_2(F a, F n) {  // in two steps of normal powers: only the second may round
  const F to_integer = set1(0x1.8p23f);         // 2^23 + 2^22: its last bit is worth 1
  const I whole = (I)(n + to_integer) - (I)to_integer, half = whole >> 1;
  return a * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
}
LILLIPUT_INLINE I to_integers(F a) {  // |a| < 2^22
  const F to_integer = set1(0x1.8p23f);
  return (I)(a + to_integer) - (I)to_integer;
}
LILLIPUT_INLINE F to_floats(I a) {
  return __builtin_convertvector(a, F);
}
LILLIPUT_INLINE void store_words(int32_t* p, I a) {
  memcpy(p, &a, sizeof a);
}
LILLIPUT_INLINE F load_int8(const int8_t* p) {
  return F{(float)p[0], (float)p[1], (float)p[2], (float)p[3]};
}
LILLIPUT_INLINE int32_t pair_of(int16_t first, int16_t second) {
  return (int32_t)((uint32_t)(uint16_t)first | (uint32_t)(uint16_t)second << 16);
}
LILLIPUT_INLINE I load_int8_pairs(const int8_t* p) {
  return I{pair_of(p[0], p[1]), pair_of(p[2], p[3]), pair_of(p[4], p[5]), pair_of(p[6], p[7])};
}
LILLIPUT_INLINE I low_of(I a) {
  typedef uint32_t U __attribute__((vector_size(16)));
  return (I)((U)a << 16) >> 16;
}
LILLIPUT_INLINE I dot_pairs(I sum, I a, I b) {
  return sum + low_of(a) * low_of(b) + (a >> 16) * (b >> 16);
}

LILLIPUT_INLINE F as_floats(I a) {
  return (F)a;
}
LILLIPUT_INLINE I iandnot(I a, I b) {
  return ~a & b;
}
LILLIPUT_INLINE int32_t reduce_add(I a) {
  return a[0] + a[1] + a[2] + a[3];
}
LILLIPUT_INLINE void store_shorts(int16_t* p, I a) {
  for (int i = 0; i < kWidth; ++i) p[i] = (int16_t)a[i];
}

struct Table {
  const float* values;
};
LILLIPUT_INLINE Table table(const float* p) {
  return {p};
}
LILLIPUT_INLINE F lookup(Table t, I index) {
  return F{t.values[index[0] & 15], t.values[index[1] & 15], t.values[index[2] & 15], t.values[index[3] & 15]};
}
LILLIPUT_INLINE void load_pairs(const uint8_t* p, I& earlier, I& later) {
  later = I{p[0], p[1], p[2], p[3]};
  earlier = later >> 4;
}
LILLIPUT_INLINE I load_words(const uint8_t* p) {
  I a;
  memcpy(&a, p, sizeof a);
  return a;
}
LILLIPUT_INLINE I load_bytes(const uint8_t* p) {
  return I{p[0], p[1], p[2], p[3]};
}
template <int N>
LILLIPUT_INLINE I shift_right(I a) {
  return a >> N;
}
LILLIPUT_INLINE F gather(const float* p, I index) {
  return F{p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
}
LILLIPUT_INLINE F halves(float low, float high) {
  return F{low, low, high, high};
}
LILLIPUT_INLINE void interleave(F a, F b, F& low, F& high) {
  low = F{a[0], b[0], a[1], b[1]};
  high = F{a[2], b[2], a[3], b[3]};
}
LILLIPUT_INLINE void deinterleave(F low, F high, F& even, F& odd) {
  even = F{low[0], low[2], high[0], high[2]};
  odd = F{low[1], low[3], high[1], high[3]};
}

LILLIPUT_INLINE F sub(F a, F b) {
  return a - b;
}
LILLIPUT_INLINE F sqrt(F a) {
  return F{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
LILLIPUT_INLINE I isub(I a, I b) {  // wraps around
  typedef uint32_t U __attribute__((vector_size(16)));
  return (I)((U)a - (U)b);
}
LILLIPUT_INLINE I ior(I a, I b) {
  return a | b;
}
LILLIPUT_INLINE I iabs(I a) {
  return isub(a ^ a >> 31, a >> 31);
}
LILLIPUT_INLINE I times_high(I a, I b) {
  typedef uint32_t U __attribute__((vector_size(16)));
  return (I)((U)a * (U)b >> 16);
}
LILLIPUT_INLINE I shift_right_by(I a, I n) {
  return a >> n;
}
LILLIPUT_INLINE I shift_left_by(I a, I n) {
  typedef uint32_t U __attribute__((vector_size(16)));
  return (I)((U)a << (U)n);
}
LILLIPUT_INLINE I reduced(I a, I b) {
  return imax(a - b, iset1(0));
}
LILLIPUT_INLINE bool any_negative(I a) {
  return (a[0] | a[1] | a[2] | a[3]) < 0;
}
LILLIPUT_INLINE void store_codes(uint8_t* p, const I* a, const I* sign) {
  for (int i = 0; i < 4 * kWidth; ++i) {
    const int32_t lane = a[i / kWidth][i % kWidth];
    int32_t code = lane - 1;
    if (sign != nullptr) code = 127 + (sign[i / kWidth][i % kWidth] < 0 ? -lane : lane);
    p[i] = (uint8_t)(code < 0 ? 0 : code);
  }
}
LILLIPUT_INLINE F values_of(const float* book, const uint8_t* p) {
  return gather(book, load_bytes(p));
}
struct Table8 {
  const float* values;
};
LILLIPUT_INLINE Table8 table8(const float* p) {
  return {p};
}
LILLIPUT_INLINE F lookup(Table8 t, I index) {
  return F{t.values[index[0] & 7], t.values[index[1] & 7], t.values[index[2] & 7], t.values[index[3] & 7]};
}
struct Squares {
  double lanes[kWidth] = {0};
  LILLIPUT_INLINE void add(F a) {
    for (int i = 0; i < kWidth; ++i) lanes[i] += (double)a[i] * a[i];
  }
  LILLIPUT_INLINE double sum() const { return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]); }
};

#endif

// Lanes summed in a fixed order.
LILLIPUT_INLINE float sum(F a) {
  float lanes[kWidth];
  store(lanes, a);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

LILLIPUT_INLINE float greatest(F a) {
  float lanes[kWidth];
  store(lanes, a);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// The first `count` < kWidth of a vector; the rest is zero, or is not written.
LILLIPUT_INLINE F load_first(const float* p, int64_t count) {
  float lanes[kWidth] = {0};
  memcpy(lanes, p, (size_t)count * sizeof(float));
  return load(lanes);
}
LILLIPUT_INLINE void store_first(float* p, F a, int64_t count) {
  float lanes[kWidth];
  store(lanes, a);
  memcpy(p, lanes, (size_t)count * sizeof(float));
}

// e^x within 1.01 ulp (every float in -128..128 beside double's exp), subnormal results too;
// 0 for -Inf, Inf from 88.7228394 on, NaN for NaN.
// x = n ln 2 + r with whole n, |r| <= 0.3475; e^x = 2^n (1 + r + r^2 q(r)). q is the polynomial of degree 4 with the
// least relative error of e^r (2^-28), fitted by reweighted least squares.
LILLIPUT_INLINE F exp(F x) {
  x = at_most(at_least(x, -104.0f), 89.0f);  // e^-104 rounds to 0, e^89 is above the greatest float
  const float to_integer = 0x1.8p23f;        // 2^23 + 2^22: its last bit is worth 1
  const F n = add(fma(x, set1(0x1.715476p0f), set1(to_integer)), set1(-to_integer));
  F r = fma(n, set1(-0x1.63p-1f), x);    // ln 2 to 9 bits: the product with n is exact,
  r = fma(n, set1(0x1.bd0106p-13f), r);  // and what those 9 bits are too much
  F q = fma(set1(0x1.6a21acp-10f), r, set1(0x1.123b6ap-7f));
  q = fma(q, r, set1(0x1.5558fap-5f));
  q = fma(q, r, set1(0x1.55549p-3f));
  q = fma(q, r, set1(0x1.fffffcp-2f));
  return times_power_of_2(add(fma(q, mul(r, r), r), set1(1.0f)), n);
}

LILLIPUT_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
LILLIPUT_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// 8 bytes, one a lane, from the first on again where there are more lanes; kWidth of them where there are fewer.
LILLIPUT_INLINE I load_8_bytes(const uint8_t* p) {
#if defined(LILLIPUT_ISA_AVX512)
  int64_t bytes;
  memcpy(&bytes, p, 8);
  return _mm512_cvtepu8_epi32(_mm_set1_epi64x(bytes));
#else
  return load_bytes(p);
#endif
}

// The greatest magnitude of `count` numbers, a multiple of kWidth; NaN and Inf give NaN or Inf.
LILLIPUT_INLINE float greatest_magnitude(const float* x, int64_t count) {
  I most = iset1(0);  // magnitudes compare as their bits do, and NaN's are above all
  for (int64_t i = 0; i < count; i += kWidth) most = imax(most, iand(bits(load(x + i)), iset1(0x7fffffff)));
  return from_bits((uint32_t)reduce_max(most));
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
