// A step of an optimizer for a range of numbers in one thread: dequantize, update, requantize, write, block by block.
// The rules are kernels/optimizer_rules.py's, rounding for rounding (with AVX2 and AVX-512 as torch rounds there).
#include "core/reals.h"
#include "core/simd.h"
#include "ops/kernels_of_isa.h"

namespace lilliput {
namespace LILLIPUT_ISA {

constexpr float kSmallestAbsmax = 1e-38f;
constexpr int64_t kRun = 1024;           // numbers at a time where moments are float32
constexpr int64_t kStride = 4 * kWidth;  // blocks are padded to so many
constexpr int kMostMoments = 3;

LILLIPUT_INLINE F magnitude(F a) {
  return as_floats(iand(bits(a), iset1(0x7fffffff)));
}

// ---- the rules ----
// `remember` updates the moments m; `move` returns the new p from the old one, g and the updated moments. Lion moves
// before it remembers. `measure` is what LAMB and LARS take the norm of.

struct Rule {
  static constexpr bool kTrust = false, kMovesFirst = false;
  F decay, keep, beta1, rest1, beta2, rest2, beta3, rest3, eps, correction, alpha, rate;
  bool nesterov;

  explicit Rule(const Hyper& h)
      : decay(set1(h.decay)),
        keep(set1(h.keep)),
        beta1(set1(h.beta1)),
        rest1(set1(h.rest1)),
        beta2(set1(h.beta2)),
        rest2(set1(h.rest2)),
        beta3(set1(h.beta3)),
        rest3(set1(h.rest3)),
        eps(set1(h.eps)),
        correction(set1(h.correction)),
        alpha(set1(h.alpha)),
        rate(set1(h.rate)),
        nesterov(h.nesterov) {}

  LILLIPUT_INLINE F mean(F g, F m) const { return fma(g, rest1, mul(m, beta1)); }
  LILLIPUT_INLINE F mean_of_squares(F g, F v) const { return fma(mul(rest2, g), g, mul(v, beta2)); }
  LILLIPUT_INLINE F decayed(F p, F g) const { return fma(p, decay, g); }
  LILLIPUT_INLINE F root(F v) const { return add(sqrt(v), eps); }
};

struct Adam : Rule {
  static constexpr int kMoments = 2, kSigned = 1;  // kSigned: how many of the moments, the first ones, are signed
  using Rule::Rule;
  LILLIPUT_INLINE void remember(F&, F g, F* m) const {
    m[0] = mean(g, m[0]);
    m[1] = mean_of_squares(g, m[1]);
  }
  LILLIPUT_INLINE F move(F p, F, const F* m) const { return add(mul(p, keep), div(mul(rate, m[0]), root(m[1]))); }
};

struct AdamL2 : Adam {  // not decoupled
  using Adam::Adam;
  LILLIPUT_INLINE void remember(F& p, F g, F* m) const { Adam::remember(p, decayed(p, g), m); }
};

struct Sgd : Rule {
  static constexpr int kMoments = 1, kSigned = 1;
  using Rule::Rule;
  LILLIPUT_INLINE void remember(F& p, F g, F* m) const { m[0] = mean(decayed(p, g), m[0]); }
  LILLIPUT_INLINE F move(F p, F g, const F* m) const {
    return fma(nesterov ? fma(m[0], alpha, decayed(p, g)) : m[0], rate, p);
  }
};

struct Lion : Rule {
  static constexpr int kMoments = 1, kSigned = 1;
  static constexpr bool kMovesFirst = true;
  using Rule::Rule;
  LILLIPUT_INLINE void remember(F& p, F g, F* m) const {
    const F zero = set1(0.0f), towards = add(mul(m[0], beta1), mul(g, rest1));
    const I plus = greater(towards, zero, 0x3f800000), minus = greater(zero, towards, (int32_t)0xbf800000);
    p = fma(as_floats(ior(plus, minus)), rate, mul(p, keep));
    m[0] = fma(g, rest2, mul(m[0], beta2));
  }
  LILLIPUT_INLINE F move(F p, F, const F*) const { return p; }
};

struct RmsProp : Rule {
  static constexpr int kMoments = 1, kSigned = 0;
  using Rule::Rule;
  LILLIPUT_INLINE void remember(F& p, F g, F* m) const { m[0] = mean_of_squares(decayed(p, g), m[0]); }
  LILLIPUT_INLINE F move(F p, F g, const F* m) const { return add(p, div(mul(rate, decayed(p, g)), root(m[0]))); }
};

struct Adagrad : RmsProp {
  using RmsProp::RmsProp;
  LILLIPUT_INLINE void remember(F& p, F g, F* m) const {
    const F all = decayed(p, g);
    m[0] = fma(all, all, m[0]);
  }
};

struct Lamb : Adam {
  static constexpr bool kTrust = true;
  using Adam::Adam;
  LILLIPUT_INLINE F measure(F p, F, const F* m) const { return fma(p, decay, div(mul(m[0], correction), root(m[1]))); }
  LILLIPUT_INLINE F move(F p, F g, const F* m) const { return fma(measure(p, g, m), rate, p); }
};

struct Lars : Rule {
  static constexpr int kMoments = 1, kSigned = 1;
  static constexpr bool kTrust = true;
  using Rule::Rule;
  LILLIPUT_INLINE void remember(F& p, F g, F* m) const { m[0] = fma(decayed(p, g), rate, mul(m[0], beta1)); }
  LILLIPUT_INLINE F measure(F, F g, const F*) const { return g; }
  LILLIPUT_INLINE F move(F p, F, const F* m) const { return sub(p, m[0]); }
};

struct AdEmaMix : Rule {
  static constexpr int kMoments = 3, kSigned = 2;
  using Rule::Rule;
  LILLIPUT_INLINE void remember(F&, F g, F* m) const {
    m[0] = mean(g, m[0]);
    m[1] = fma(g, rest3, mul(m[1], beta3));
    m[2] = mean_of_squares(g, m[2]);
  }
  LILLIPUT_INLINE F move(F p, F, const F* m) const {
    return fma(div(fma(m[0], correction, mul(alpha, m[1])), root(m[2])), rate, mul(p, keep));
  }
};

// ---- codes ----

#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i)

// How numbers of a block become codes.
template <bool SIGNED>
struct Coder {
  // In units of k / 2^32: k is at most 128 with a sign, 255 without; the arithmetic below is off by less than half of
  // this (tried with every float of 0..1; csrc/tests/optimizer.cpp tries those around each bound).
  static constexpr int32_t kMargin = (int32_t)((SIGNED ? 4e-5 : 8e-5) * 4294967296.0);
  const DynamicTree& tree;
  const float inverse;

  Coder(const DynamicTree& tree, float absmax)
      : tree(tree), inverse(1.0f / (absmax < kSmallestAbsmax ? kSmallestAbsmax : absmax)) {}

  // Codes of 4 vectors. By arithmetic: k + 1/2 is a straight line inside a decade; where it comes so near to a whole
  // number that its rounding could matter, the code is looked for by bisection instead. Step by step for all four,
  // since a vector's steps wait for each other.
  LILLIPUT_INLINE void write(const float* x, uint8_t* codes) const {
    const Table8 next = table8(tree.next), scale = table8(tree.scale);
    I scaled[4], positive[4], q[4], rest[4], k[4], near = iset1(0);
    F line[4];
    EACH scaled[i] = bits(mul(load(x + i * kWidth), set1(inverse)));
    EACH positive[i] = SIGNED ? iand(scaled[i], iset1(0x7fffffff)) : scaled[i];
    EACH q[i] = reduced(times_high(shift_right<16>(positive[i]), iset1(tree.slope)), iset1(tree.offset));
    EACH q[i] = isub(iset1(tree.shift), q[i]);
    EACH q[i] = iadd(q[i], greater(as_floats(positive[i]), lookup(next, q[i]), -1));
    // In [1, 2) over a decade, so that its mantissa's first bits, behind the hidden one, count the values; short of 2
    // where the gap to the next decade is.
    EACH line[i] = fma(as_floats(positive[i]), lookup(scale, q[i]), set1((float)(1 - 0.1 / 0.9)));
    EACH rest[i] = isub(bits(at_most(line[i], 1.998f)), iset1(0x3f000000));
    EACH k[i] = shift_right_by(rest[i], q[i]);
    store_codes(codes, k, SIGNED ? scaled : nullptr);
    EACH rest[i] = shift_left_by(rest[i], isub(iset1(32), q[i]));
    EACH rest[i] = isub(iabs(rest[i]), iset1(kMargin));
    EACH near = ior(near, rest[i]);
    if (any_negative(near)) look_for(x, rest, codes);
  }

  __attribute__((noinline)) void look_for(const float* x, const I* rest, uint8_t* codes) const {
    int32_t lanes[kStride];
    for (int i = 0; i < 4; ++i) store_words(lanes + i * kWidth, rest[i]);
    for (int64_t lane = 0; lane < kStride; ++lane)
      if (lanes[lane] < 0) codes[lane] = tree.code_of(x[lane] * inverse);
  }
};

// ---- blocks ----

// One block in memory that is padded to kStride.
struct Block {
  float* p;
  const float* g;
  uint8_t* codes[kMostMoments];
  float* values[kMostMoments];  // moments in float32; of codes, room for them
  float* absmax[kMostMoments];
};

template <typename R>
LILLIPUT_INLINE void open_codes(const Block& b, int64_t padded, const DynamicTree* trees) {
  for (int j = 0; j < R::kMoments; ++j) {
    const float* book = trees[j < R::kSigned ? 0 : 1].book;
    const F absmax = set1(*b.absmax[j]);
    for (int64_t i = 0; i < padded; i += kWidth) store(b.values[j] + i, mul(values_of(book, b.codes[j] + i), absmax));
  }
}

template <typename R>
LILLIPUT_INLINE void load_moments(const Block& b, int64_t i, F* m) {
  for (int j = 0; j < R::kMoments; ++j) m[j] = load(b.values[j] + i);
}

// Moments in float32.
template <typename R>
LILLIPUT_INLINE void step_wide(const R& rule, F grad_scale, const Block& b, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kWidth) {
    F m[R::kMoments], p = load(b.p + i);
    const F g = mul(load(b.g + i), grad_scale);
    load_moments<R>(b, i, m);
    rule.remember(p, g, m);
    store(b.p + i, rule.move(p, g, m));
    for (int j = 0; j < R::kMoments; ++j) store(b.values[j] + i, m[j]);
  }
}

// Moments in codes: opened and updated, then rounded again. Roots and quotients are left for the last, where the
// arithmetic of codes hides the time that they take.
template <typename R>
LILLIPUT_INLINE void step_codes(const R& rule, F grad_scale, const Block& b, int64_t padded, const DynamicTree* trees) {
  open_codes<R>(b, padded, trees);
  F most[R::kMoments];
  for (int j = 0; j < R::kMoments; ++j) most[j] = set1(0.0f);
  for (int64_t i = 0; i < padded; i += kWidth) {
    F m[R::kMoments], p = load(b.p + i);
    load_moments<R>(b, i, m);
    rule.remember(p, mul(load(b.g + i), grad_scale), m);
    if (R::kMovesFirst) store(b.p + i, p);
    for (int j = 0; j < R::kMoments; ++j) {
      store(b.values[j] + i, m[j]);
      most[j] = greater(j < R::kSigned ? magnitude(m[j]) : m[j], most[j]);
    }
  }
  for (int j = 0; j < R::kMoments; ++j) *b.absmax[j] = greatest(most[j]);
  const Coder<true> with_sign[] = {{trees[0], *b.absmax[0]}, {trees[0], *b.absmax[R::kSigned > 1 ? 1 : 0]}};
  const Coder<false> without(trees[1], *b.absmax[R::kMoments - 1]);
  for (int64_t start = 0; start < padded; start += kStride) {
    if (!R::kMovesFirst) {
      for (int64_t i = start; i < start + kStride; i += kWidth) {
        F m[R::kMoments];
        load_moments<R>(b, i, m);
        store(b.p + i, rule.move(load(b.p + i), mul(load(b.g + i), grad_scale), m));
      }
    }
    for (int j = 0; j < R::kSigned; ++j) with_sign[j].write(b.values[j] + start, b.codes[j] + start);
    constexpr int last = R::kMoments - 1;
    if (R::kSigned <= last) without.write(b.values[last] + start, b.codes[last] + start);
  }
}

// What LAMB and LARS need to know first; nothing is written.
template <typename R>
LILLIPUT_INLINE void measure(const R& rule, F grad_scale, const Block& b, int64_t padded, bool eight,
                             const DynamicTree* trees, Squares* squares) {
  if (eight) open_codes<R>(b, padded, trees);
  for (int64_t i = 0; i < padded; i += kWidth) {
    F m[R::kMoments], p = load(b.p + i);
    const F g = mul(load(b.g + i), grad_scale);
    load_moments<R>(b, i, m);
    rule.remember(p, g, m);
    squares[0].add(p);
    squares[1].add(rule.measure(p, g, m));
  }
}

// Ask for memory that will be needed soon; it need not exist.
LILLIPUT_INLINE void fetch(const void* data, int64_t first, int64_t bytes) {
  const char* from = (const char*)((uintptr_t)data + (uintptr_t)first);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

LILLIPUT_INLINE void read_padded(Reals x, int64_t start, int64_t count, int64_t padded, float* out) {
  read_reals(x, start, count, out);
  for (int64_t i = count; i < padded; ++i) out[i] = 0;
}

template <typename R>
static void run(const Hyper& hyper, const OptimizerTensor& t, int64_t block, const DynamicTree* trees, int64_t first,
                int64_t last, double* norms) {
  alignas(64) float rooms[(2 + R::kMoments) * max_block];  // side by side: those of 256 numbers are together
  uint8_t code_rooms[R::kMoments][max_block];
  const R rule(hyper);
  const F grad_scale = set1(hyper.grad_scale);
  Squares squares[2];
  const bool eight = t.absmax[0] != nullptr;
  const int64_t size = eight ? block : kRun, room = (size + kStride - 1) / kStride * kStride;
  const int64_t bytes = eight ? 1 : 4;
  for (int64_t start = first; start < last; start += size) {
    const int64_t count = last - start < size ? last - start : size;
    const int64_t padded = (count + kStride - 1) / kStride * kStride;
    const bool ragged = count != padded;
    fetch(t.p.data, (start + size) * bytes_of(t.p.kind), size * bytes_of(t.p.kind));
    fetch(t.g.data, (start + size) * bytes_of(t.g.kind), size * bytes_of(t.g.kind));
    for (int j = 0; j < R::kMoments; ++j) fetch(t.moments[j], (start + size) * bytes, size * bytes);
    Block b;
    b.p = t.p.kind == Real::f32 && !ragged ? (float*)t.p.data + start : rooms;
    b.g = t.g.kind == Real::f32 && !ragged ? (const float*)t.g.data + start : rooms + room;
    if (b.p == rooms) read_padded(t.p, start, count, padded, rooms);
    if (b.g == rooms + room) read_padded(t.g, start, count, padded, rooms + room);
    for (int j = 0; j < R::kMoments; ++j) {
      float* values = rooms + (2 + j) * room;
      uint8_t* codes = (uint8_t*)t.moments[j] + start;
      if (eight) {
        b.absmax[j] = t.absmax[j] + start / block;
        b.values[j] = values;
        b.codes[j] = ragged ? code_rooms[j] : codes;
        if (!ragged) continue;
        memcpy(code_rooms[j], codes, (size_t)count);
        memset(code_rooms[j] + count, trees[j < R::kSigned ? 0 : 1].zero, (size_t)(padded - count));
      } else {
        b.values[j] = ragged ? values : (float*)t.moments[j] + start;
        if (ragged) read_padded({t.moments[j], Real::f32}, start, count, padded, values);
      }
    }
    if constexpr (R::kTrust) {
      if (norms != nullptr) {
        measure(rule, grad_scale, b, padded, eight, trees, squares);
        continue;
      }
    }
    if (eight)
      step_codes(rule, grad_scale, b, padded, trees);
    else
      step_wide(rule, grad_scale, b, padded);
    if (b.p == rooms) write_reals(rooms, start, count, t.p);
    for (int j = 0; ragged && j < R::kMoments; ++j) {
      if (eight)
        memcpy((uint8_t*)t.moments[j] + start, code_rooms[j], (size_t)count);
      else
        memcpy((float*)t.moments[j] + start, b.values[j], (size_t)count * sizeof(float));
    }
  }
  for (int i = 0; norms != nullptr && i < 2; ++i) norms[i] = squares[i].sum();
}

static void optimizer_step(OptimizerRule rule, const Hyper& hyper, const OptimizerTensor& t, int64_t block,
                           const DynamicTree* trees, int64_t first, int64_t last, double* norms) {
#define RUN(R) return run<R>(hyper, t, block, trees, first, last, norms)
  switch (rule) {
    case OptimizerRule::adam:
      if (hyper.decay != 0) RUN(AdamL2);
      RUN(Adam);
    case OptimizerRule::sgd:
      RUN(Sgd);
    case OptimizerRule::lion:
      RUN(Lion);
    case OptimizerRule::rmsprop:
      RUN(RmsProp);
    case OptimizerRule::adagrad:
      RUN(Adagrad);
    case OptimizerRule::lamb:
      RUN(Lamb);
    case OptimizerRule::lars:
      RUN(Lars);
    case OptimizerRule::ademamix:
      RUN(AdEmaMix);
  }
#undef RUN
}

static void dynamic_codes(const float* x, float absmax, const DynamicTree& tree, uint8_t* codes) {
  tree.is_signed ? Coder<true>(tree, absmax).write(x, codes) : Coder<false>(tree, absmax).write(x, codes);
}

static double sum_of_squares(Reals x, int64_t first, int64_t last) {
  alignas(64) float values[kRun];
  Squares squares[4];  // sums that do not wait for each other
  for (int64_t start = first; start < last; start += kRun) {
    const int64_t count = last - start < kRun ? last - start : kRun;
    const float* v = floats(x, start, count, values);
    fetch(x.data, (start + kRun) * bytes_of(x.kind), kRun * bytes_of(x.kind));
    int64_t i = 0;
    for (; i + kStride <= count; i += kStride)
      for (int part = 0; part < 4; ++part) squares[part].add(load(v + i + part * kWidth));
    for (; i < count; i += kWidth) squares[0].add(load_first(v + i, count - i < kWidth ? count - i : kWidth));
  }
  return (squares[0].sum() + squares[1].sum()) + (squares[2].sum() + squares[3].sum());
}

void add_optimizer(Kernels& kernels) {
  kernels.optimizer_step = optimizer_step;
  kernels.dynamic_codes = dynamic_codes;
  kernels.sum_of_squares = sum_of_squares;
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
