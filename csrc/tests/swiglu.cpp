// exp, silu(gate) * up and its gradients against double, on every kind of number.
#include <cmath>
#include <cstring>
#include <limits>

#include "check.h"
#include "core/threads.h"
#include "nasty.h"
#include "ops/ops.h"

using namespace lilliput;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<float> exp_of(const std::vector<float>& x) {
  std::vector<float> out(x.size());
  kernels().exp(x.data(), static_cast<int64_t>(x.size()), out.data());
  return out;
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

double ulp_at(double value) {
  return std::fabs(value) < 0x1p-126 ? 0x1p-149 : std::ldexp(1.0, std::ilogb(value) - 23);
}

double sigmoid(double g) {
  return 1.0 / (1.0 + std::exp(-g));
}

// Within `ulps` of float32 at this magnitude and `more`, or equal where neither is a finite number.
bool close(float got, double want, double magnitude, double ulps, double more = 0) {
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got);
  if (std::isinf(static_cast<float>(want))) return got == static_cast<float>(want);
  return std::fabs(got - want) <= ulps * ulp_at(magnitude) + more;
}

Reals reals(const std::vector<float>& x) {
  return {const_cast<float*>(x.data()), Real::f32};
}

// Gates of every size, sign and kind (but those of 1e4 and more, whose product with 3e38 is of no interest).
std::vector<float> gates(int64_t count) {
  std::vector<float> g = nasty::make("random", count);
  const float odd[] = {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-38f, 88.8f, -88.8f, -95.0f, -104.0f, -1e4f, 1e4f, -1.2784645f};
  for (size_t i = 0; i < g.size(); ++i) {
    if (i % 3 == 1) g[i] *= 30.0f;
    if (i % 3 == 2) g[i] = odd[i / 3 % 12];
  }
  return g;
}

}  // namespace

TEST(exp_is_within_two_ulp_of_double) {
  std::vector<float> x;
  for (uint32_t sign : {0u, 0x80000000u})
    for (uint32_t bits = 0; bits < 0x43000000u; bits += 5003) x.push_back(from_bits(sign | bits));
  for (float edge : {88.722839f, 88.72284f, -87.33655f, -103.27893f, -103.97208f, -103.97209f, -104.0f})
    for (int step = -50; step <= 50; ++step) x.push_back(from_bits(to_bits(edge) + static_cast<uint32_t>(step)));
  const std::vector<float> got = exp_of(x);
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = std::exp(static_cast<double>(x[i]));
    CHECK(close(got[i], want, want, 2.0));
  }
}

TEST(exp_has_exact_limits) {
  const std::vector<float> got =
      exp_of({-kInf, kInf, 0.0f, -0.0f, 1e38f, -1e38f, 89.0f, 200.0f, -105.0f, kNaN, -kNaN, 1e-45f, -1e-45f});
  const float want[] = {0, kInf, 1, 1, kInf, 0, kInf, kInf, 0};
  for (size_t i = 0; i < 9; ++i) CHECK(got[i] == want[i] && !std::signbit(got[i]));
  CHECK(std::isnan(got[9]) && std::isnan(got[10]));
  CHECK(got[11] == 1.0f && got[12] == 1.0f);
}

TEST(swiglu_and_its_gradients_equal_the_formula) {
  for (int64_t size : nasty::sizes)
    for (const std::string& name : nasty::names) {
      const std::vector<float> g = gates(size), u = nasty::make(name, size), y = nasty::make("random", size);
      std::vector<float> out(g.size()), to_gate(g.size()), to_up(g.size());
      swiglu(reals(g), reals(u), size, reals(out), 2);
      swiglu_backward(reals(y), reals(g), reals(u), size, reals(to_gate), reals(to_up), 2);
      for (size_t i = 0; i < g.size(); ++i) {
        const double gate = g[i], up = u[i], grad = y[i], s = sigmoid(gate), silu = gate * s;
        // e^-|g| and silu may be subnormal: an error of 2^-149 that is multiplied by all that follows
        const double more = 0x1p-149 * (1 + std::fabs(gate)) * (1 + std::fabs(up)) * (1 + std::fabs(grad));
        CHECK(close(out[i], silu * up, silu * up, 6, more));
        CHECK(close(to_up[i], grad * silu, grad * silu, 8, more));
        const double slope = s * (1 + gate * sigmoid(-gate)), terms = s * (1 + std::fabs(gate) * sigmoid(-gate));
        CHECK(close(to_gate[i], grad * up * slope, grad * up * terms, 8, more));
      }
    }
}

TEST(swiglu_of_what_is_no_number) {
  const std::vector<float> g = {kInf, -kInf, kNaN, 1.0f, 0.0f, -1e38f}, u = {2.0f, 2.0f, 2.0f, kNaN, kInf, 1.0f};
  std::vector<float> out(g.size());
  swiglu(reals(g), reals(u), 6, reals(out), 1);
  CHECK(out[0] == kInf && out[5] == 0.0f);
  for (size_t i = 1; i < 5; ++i) CHECK(std::isnan(out[i]));
}

TEST(swiglu_does_not_depend_on_threads) {
  const int64_t size = numbers_per_task * 12 + 7;
  const std::vector<float> g = gates(size), u = nasty::make("random", size), y = nasty::make("ramp", size);
  std::vector<float> first[3];
  for (int threads : {1, 2, 5}) {
    std::vector<float> out(g.size()), to_gate(g.size()), to_up(g.size());
    swiglu(reals(g), reals(u), size, reals(out), threads);
    swiglu_backward(reals(y), reals(g), reals(u), size, reals(to_gate), reals(to_up), threads);
    if (threads == 1) first[0] = out, first[1] = to_gate, first[2] = to_up;
    CHECK(out == first[0] && to_gate == first[1] && to_up == first[2]);
  }
}

TEST(swiglu_of_halves_is_that_of_floats_rounded_once) {
  // bfloat16 by its definition: the upper half of a float, to nearest, ties to even.
  for (int64_t size : {1, 511, 512, 513, 1300}) {
    const std::vector<float> wide = gates(size), wide_up = nasty::make("random", size);
    std::vector<uint16_t> g, u, out(wide.size());
    std::vector<float> cut_g, cut_u, exact(wide.size());
    for (size_t i = 0; i < wide.size(); ++i) {
      g.push_back(static_cast<uint16_t>(to_bits(wide[i]) >> 16));
      u.push_back(static_cast<uint16_t>(to_bits(wide_up[i]) >> 16));
      cut_g.push_back(from_bits(to_bits(wide[i]) & 0xffff0000u));
      cut_u.push_back(from_bits(to_bits(wide_up[i]) & 0xffff0000u));
    }
    swiglu({g.data(), Real::bf16}, {u.data(), Real::bf16}, size, {out.data(), Real::bf16}, 1);
    swiglu(reals(cut_g), reals(cut_u), size, reals(exact), 1);
    for (size_t i = 0; i < out.size(); ++i) {
      const uint32_t bits = to_bits(exact[i]);
      CHECK(out[i] == static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
    }
  }
}
