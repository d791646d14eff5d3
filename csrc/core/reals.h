// Float32, float16 and bfloat16 numbers as floats, and floats rounded back to them. For *.simd.cpp, as simd.h is.
#pragma once

#include "core/simd.h"

namespace lilliput {
namespace LILLIPUT_ISA {

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

static inline void read_reals(Reals x, int64_t first, int64_t count, float* out) {
  if (count == 0) return;  // of an empty tensor, which may lie nowhere
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

static inline void write_reals(const float* values, int64_t first, int64_t count, Reals out) {
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

// Numbers first.. as floats: where they lie, or, if they are 16-bit, in `room`.
LILLIPUT_INLINE const float* floats(Reals x, int64_t first, int64_t count, float* room) {
  if (x.kind == Real::f32) return (const float*)x.data + first;
  read_reals(x, first, count, room);
  return room;
}

// Where to write numbers first.. as floats before write_back: in place, or, if they are 16-bit, in `room`.
LILLIPUT_INLINE float* place(Reals out, int64_t first, float* room) {
  return out.kind == Real::f32 ? (float*)out.data + first : room;
}
LILLIPUT_INLINE void write_back(const float* room, int64_t first, int64_t count, Reals out) {
  if (out.kind != Real::f32) write_reals(room, first, count, out);
}

LILLIPUT_INLINE float rounded(float value, Real kind) {  // to this kind, as a float
  if (kind == Real::f32) return value;
  return kind == Real::bf16 ? from_bits((uint32_t)float_to_bf16(value) << 16) : half_to_float(float_to_half(value));
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
