// Quantize and dequantize 4-bit blocks in one thread. The rules are formats/blockwise.py's, rounding for rounding.
#include "core/reals.h"
#include "core/simd.h"
#include "ops/kernels_of_isa.h"

namespace lilliput {
namespace LILLIPUT_ISA {

constexpr int64_t kMaxBlock = max_block;
constexpr float kSmallestAbsmax = 1e-38f;
constexpr int32_t kInfinityBits = 0x7f800000;  // as integers, |NaN| and Inf are at least this, finite numbers below

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
