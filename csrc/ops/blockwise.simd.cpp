// Quantize and dequantize 4-bit blocks in one thread. The rules are formats/blockwise.py's, rounding for rounding.
#include "core/simd.h"
#include "ops/kernels_of_isa.h"

namespace lilliput {
namespace LILLIPUT_ISA {

constexpr int64_t kMaxBlock = max_block;
constexpr float kSmallestAbsmax = 1e-38f;
constexpr int32_t kInfinityBits = 0x7f800000;  // as integers, |NaN| and Inf are at least this, finite numbers below

// ---- 16-bit reals ----

#if defined(LILLIPUT_ISA_AVX512) || defined(LILLIPUT_ISA_AVX2)
LILLIPUT_INLINE float half_to_float(uint16_t h) {
  return _cvtsh_ss(h);
}
LILLIPUT_INLINE uint16_t float_to_half(float f) {
  return (uint16_t)_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
}
#else
LILLIPUT_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | rest << 13);  // Inf, NaN
  // Put the bits where float's exponent is, then move the bias from 15 to 127 by a product, exact for subnormals too.
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}
LILLIPUT_INLINE uint16_t float_to_half(float f) {  // to nearest, ties to even
  const uint32_t all = to_bits(f), sign = all >> 16 & 0x8000, rest = all & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  // Subnormal halves: adding 0.5 lines the last bit of a half (2^-24) up with the last bit of a float at 0.5.
  if (rest < 0x38800000) return (uint16_t)(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000));
  const uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);
  return (uint16_t)(sign | (rounded - 0x38000000) >> 13);
}
#endif

LILLIPUT_INLINE uint16_t float_to_bf16(float f) {  // to nearest, ties to even; NaN stays one
  const uint32_t all = to_bits(f);
  if ((all & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((all + 0x7fff + (all >> 16 & 1)) >> 16);
}

static void read_reals(Reals x, int64_t first, int64_t count, float* out) {
  if (x.kind == Real::f32) {
    memcpy(out, (const float*)x.data + first, (size_t)count * 4);
    return;
  }
  const uint16_t* half = (const uint16_t*)x.data + first;
  if (x.kind == Real::bf16)
    for (int64_t i = 0; i < count; ++i) out[i] = from_bits((uint32_t)half[i] << 16);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(half[i]);
}

static void write_reals(const float* values, int64_t first, int64_t count, Reals out) {
  if (out.kind == Real::f32) {
    memcpy((float*)out.data + first, values, (size_t)count * 4);
    return;
  }
  uint16_t* half = (uint16_t*)out.data + first;
  if (out.kind == Real::bf16)
    for (int64_t i = 0; i < count; ++i) half[i] = float_to_bf16(values[i]);
  else
    for (int64_t i = 0; i < count; ++i) half[i] = float_to_half(values[i]);
}

// ---- quantize ----

// The greatest |x|; as an integer compare it needs no case for NaN, which comes out as kInfinityBits or more.
LILLIPUT_INLINE int32_t absmax_bits(const float* x, int64_t padded) {
  I most = iset1(0);
  for (int64_t i = 0; i < padded; i += kWidth) most = imax(most, iand(bits(load(x + i)), iset1(0x7fffffff)));
  return reduce_max(most);
}

// How many of the 15 ascending bounds lie below each number, by bisection; bounds holds a 16th entry that is not read.
LILLIPUT_INLINE I rank(F x, Table bounds, float middle) {
  I found = greater(x, set1(middle), 8);
  found = iadd(found, greater(x, lookup(bounds, iadd(found, iset1(3))), 4));
  found = iadd(found, greater(x, lookup(bounds, iadd(found, iset1(1))), 2));
  return iadd(found, greater(x, lookup(bounds, found), 1));
}

// `x` holds the block, zero-padded to a multiple of 2 * kWidth.
LILLIPUT_INLINE void write_codes(const float* x, int64_t count, float factor, bool divide, const float* bounds,
                                 const float* order, uint8_t* codes) {
  uint8_t each[kMaxBlock];
  const Table bounds_table = table(bounds), order_table = table(order);
  const int64_t padded = (count + kWidth - 1) / kWidth * kWidth;
  for (int64_t i = 0; i < padded; i += kWidth) {
    F scaled;
    if (divide) {
      float lanes[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = x[i + lane] / factor;
      scaled = load(lanes);
    } else {
      scaled = mul(load(x + i), set1(factor));
    }
    store_bytes(each + i, bits(lookup(order_table, rank(clamp1(scaled), bounds_table, bounds[7]))));
  }
  for (int64_t i = 0; i < count / 2; ++i) codes[i] = (uint8_t)(each[2 * i] << 4 | each[2 * i + 1]);
  if (count % 2) {  // the last byte's low nibble is the code of zero
    const float zero[kWidth] = {0};
    uint8_t filler[kWidth];
    store_bytes(filler, bits(lookup(order_table, rank(load(zero), bounds_table, bounds[7]))));
    codes[count / 2] = (uint8_t)(each[count - 1] << 4 | filler[0]);
  }
}

static int64_t quantize(Reals x, int64_t numel, int64_t block, const float* bounds, const float* order, int64_t first,
                        int64_t last, uint8_t* codes, float* absmax) {
  alignas(64) float values[kMaxBlock];
  for (int64_t b = first; b < last; ++b) {
    const int64_t start = b * block, count = numel - start < block ? numel - start : block;
    read_reals(x, start, count, values);
    for (int64_t i = count; i < block || i % kWidth; ++i) values[i] = 0;
    const int32_t most_bits = absmax_bits(values, (block + kWidth - 1) / kWidth * kWidth);
    if (most_bits >= kInfinityBits) return b;
    const float most = from_bits((uint32_t)most_bits);
    const float floored = most < kSmallestAbsmax ? kSmallestAbsmax : most;
    const bool ragged = count < block;
    absmax[b] = ragged ? floored : most;
    write_codes(values, count, ragged ? floored : 1.0f / floored, ragged, bounds, order, codes + start / 2);
  }
  return -1;
}

// ---- dequantize ----

static void dequantize(const Blocks4& w, int64_t first, int64_t last, Reals out) {
  alignas(64) float values[kMaxBlock];
  const Table book = table(w.codebook);
  for (int64_t start = first; start < last; start += w.block) {
    const int64_t count = last - start < w.block ? last - start : w.block;
    const float scale = w.absmax_of(start / w.block);
    float* here = out.kind == Real::f32 ? (float*)out.data + (start - first) : values;
    const F scales = set1(scale);
    int64_t i = 0;
    for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
      I earlier, later;
      F low, high;
      load_pairs(w.codes + (start + i) / 2, earlier, later);
      interleave(mul(lookup(book, earlier), scales), mul(lookup(book, later), scales), low, high);
      store(here + i, low);
      store(here + i + kWidth, high);
    }
    for (; i < count; ++i) here[i] = w.codebook[w.code_of(start + i)] * scale;
    if (out.kind != Real::f32) write_reals(values, start - first, count, out);
  }
}

void add_blockwise(Kernels& kernels) {
  kernels.quantize = quantize;
  kernels.dequantize = dequantize;
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
