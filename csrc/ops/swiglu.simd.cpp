// silu(gate) * up and its gradients, for a range of numbers in one thread.
#include "core/reals.h"
#include "core/simd.h"
#include "ops/kernels_of_isa.h"

namespace lilliput {
namespace LILLIPUT_ISA {

constexpr int64_t kChunk = 512;  // 16-bit numbers turned to floats at a time: five such rooms are 10 KiB of stack

// With e = exp(-|g|), which cannot overflow: sigmoid(g) = 1 / (1 + e) for g >= 0, e / (1 + e) below.
LILLIPUT_INLINE F swiglu_of(F gate, F up) {
  const F e = exp(minus_abs(gate));
  const F silu = div(where_negative(gate, mul(gate, e), gate), add(e, set1(1.0f)));
  return mul(silu, up);
}

// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g); 1 - s is sigmoid(-g), made without a difference.
LILLIPUT_INLINE void gradients_of(F grad, F gate, F up, F& to_gate, F& to_up) {
  const F one = set1(1.0f), e = exp(minus_abs(gate)), inverse = div(one, add(e, one));
  const F small = mul(e, inverse);
  const F s = where_negative(gate, small, inverse), rest = where_negative(gate, inverse, small);
  to_up = mul(grad, mul(gate, s));
  to_gate = mul(mul(grad, mul(s, fma(gate, rest, one))), up);  // up last: no overflow on the way to a finite number
}

static void swiglu(Reals gate, Reals up, int64_t first, int64_t last, Reals out) {
  float room[3][kChunk];
  for (int64_t start = first; start < last; start += kChunk) {
    const int64_t count = last - start < kChunk ? last - start : kChunk;
    const float *g = floats(gate, start, count, room[0]), *u = floats(up, start, count, room[1]);
    float* to = place(out, start, room[2]);
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, swiglu_of(load(g + i), load(u + i)));
    const int64_t left = count - i;
    if (left > 0) store_first(to + i, swiglu_of(load_first(g + i, left), load_first(u + i, left)), left);
    write_back(room[2], start, count, out);
  }
}

static void swiglu_backward(Reals grad, Reals gate, Reals up, int64_t first, int64_t last, Reals to_gate, Reals to_up) {
  float room[5][kChunk];
  for (int64_t start = first; start < last; start += kChunk) {
    const int64_t count = last - start < kChunk ? last - start : kChunk;
    const float* y = floats(grad, start, count, room[0]);
    const float *g = floats(gate, start, count, room[1]), *u = floats(up, start, count, room[2]);
    float *of_gate = place(to_gate, start, room[3]), *of_up = place(to_up, start, room[4]);
    F a, b;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      gradients_of(load(y + i), load(g + i), load(u + i), a, b);
      store(of_gate + i, a);
      store(of_up + i, b);
    }
    if (const int64_t left = count - i; left > 0) {
      gradients_of(load_first(y + i, left), load_first(g + i, left), load_first(u + i, left), a, b);
      store_first(of_gate + i, a, left);
      store_first(of_up + i, b, left);
    }
    write_back(room[3], start, count, to_gate);
    write_back(room[4], start, count, to_up);
  }
}

static void exp_of(const float* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, exp(load(x + i)));
  if (i < count) store_first(out + i, exp(load_first(x + i, count - i)), count - i);
}

void add_swiglu(Kernels& kernels) {
  kernels.swiglu = swiglu;
  kernels.swiglu_backward = swiglu_backward;
  kernels.exp = exp_of;
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
