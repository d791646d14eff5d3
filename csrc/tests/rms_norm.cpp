// RMS normalization and its gradients against double, for widths that fit no vector and no chunk.
#include <cmath>
#include <cstring>

#include "check.h"
#include "nasty.h"
#include "ops/ops.h"

using namespace lilliput;

namespace {

constexpr float kEps = 1e-5f;
const std::vector<int64_t> widths = {1, 7, 63, 65, 511, 513, 1536};

Reals reals(const std::vector<float>& x) {
  return {const_cast<float*>(x.data()), Real::f32};
}

bool close(float got, double want, double magnitude, double ulps) {
  return std::fabs(got - want) <= ulps * (1.2e-7 * magnitude + 1e-44);
}

struct Result {
  std::vector<float> y, to_x, to_weight;
  bool operator==(const Result&) const = default;
};

Result run(const std::vector<float>& x, const std::vector<float>& weight, const std::vector<float>& grad, int64_t rows,
           int threads) {
  const auto columns = static_cast<int64_t>(weight.size());
  Result r{std::vector<float>(x.size()), std::vector<float>(x.size()), std::vector<float>(weight.size(), NAN)};
  rms_norm(reals(x), weight.data(), kEps, rows, columns, reals(r.y), threads);
  rms_norm_backward(reals(grad), reals(x), weight.data(), kEps, rows, columns, reals(r.to_x), r.to_weight.data(),
                    threads);
  return r;
}

void check_against_formula(const std::string& name, int64_t rows, int64_t columns) {
  const std::vector<float> x = nasty::make(name, rows * columns), grad = nasty::make("random", rows * columns),
                           weight = nasty::make("random", columns);
  const Result got = run(x, weight, grad, rows, 2);
  std::vector<double> to_weight(weight.size()), magnitude(weight.size());
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0, products = 0, sizes = 0;
    for (int64_t k = 0; k < columns; ++k) {
      const auto i = static_cast<size_t>(row * columns + k), c = static_cast<size_t>(k);
      const double term = static_cast<double>(grad[i]) * weight[c] * x[i];
      squares += static_cast<double>(x[i]) * x[i], products += term, sizes += std::fabs(term);
    }
    const double n = static_cast<double>(columns), r = 1 / std::sqrt(squares / n + kEps);
    const double shift = r * r * r * products / n, most = r * r * r * sizes / n, ulps = 8 + std::log2(n) + n / 32;
    for (int64_t k = 0; k < columns; ++k) {
      const auto i = static_cast<size_t>(row * columns + k), c = static_cast<size_t>(k);
      const double y = weight[c] * (x[i] * r), first = r * weight[c] * grad[i];
      CHECK(close(got.y[i], y, std::fabs(y), ulps));
      CHECK(close(got.to_x[i], first - shift * x[i], std::fabs(first) + most * std::fabs(x[i]), ulps));
      to_weight[c] += grad[i] * (x[i] * r), magnitude[c] += std::fabs(grad[i] * (x[i] * r));
    }
  }
  for (size_t c = 0; c < weight.size(); ++c)
    CHECK(close(got.to_weight[c], to_weight[c], magnitude[c], static_cast<double>(rows) + 60));
}

}  // namespace

TEST(rms_norm_and_its_gradients_equal_the_formula) {
  for (const std::string& name : nasty::names) {
    if (name == "one_huge_value") continue;  // its square is no float32: the next test
    for (int64_t columns : widths)
      for (int64_t rows : {1, 3, 40}) check_against_formula(name, rows, columns);
  }
  check_against_formula("random", 1500, 65);
}

TEST(rms_norm_of_a_row_whose_squares_overflow_is_zero) {
  const std::vector<float> x = nasty::make("one_huge_value", 65), weight = nasty::make("random", 65);
  std::vector<float> y(65, NAN);
  rms_norm(reals(x), weight.data(), kEps, 1, 65, reals(y), 1);
  for (float value : y) CHECK(value == 0.0f);
}

TEST(rms_norm_does_not_depend_on_threads) {
  const int64_t rows = 700, columns = 1531;
  const std::vector<float> x = nasty::make("random", rows * columns), weight = nasty::make("random", columns),
                           grad = nasty::make("plateaus", rows * columns);
  const Result one = run(x, weight, grad, rows, 1);
  for (int threads : {2, 3, 8}) CHECK(run(x, weight, grad, rows, threads) == one);
}

TEST(rms_norm_of_nothing) {
  std::vector<float> none, weight = nasty::make("random", 5), to_weight(5, NAN);
  rms_norm(reals(none), weight.data(), kEps, 0, 5, reals(none), 2);
  rms_norm_backward(reals(none), reals(none), weight.data(), kEps, 0, 5, reals(none), to_weight.data(), 2);
  CHECK(to_weight == std::vector<float>(5));
  rms_norm(reals(none), none.data(), kEps, 3, 0, reals(none), 2);
  rms_norm_backward(reals(none), reals(none), none.data(), kEps, 3, 0, reals(none), nullptr, 2);
}

TEST(rms_norm_rounds_halves_before_the_weight) {
  // Every finite bfloat16 of one exponent in a row, and a weight that is no power of two.
  std::vector<uint16_t> x;
  for (uint16_t bits = 0x3f80; bits < 0x4000; ++bits) x.push_back(bits);
  const auto count = static_cast<int64_t>(x.size());
  std::vector<uint16_t> y(x.size()), normed(x.size());
  std::vector<float> ones(x.size(), 1.0f), weight(x.size(), 1.7f), wide(x.size());
  rms_norm({x.data(), Real::bf16}, ones.data(), kEps, 1, count, {normed.data(), Real::bf16}, 1);
  rms_norm({x.data(), Real::bf16}, weight.data(), kEps, 1, count, reals(wide), 1);
  for (size_t i = 0; i < x.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(normed[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    CHECK(wide[i] == 1.7f * value);
  }
}
