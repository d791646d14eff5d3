// The cross entropy of rows of logits, and its gradient, against double.
#include <cmath>

#include "check.h"
#include "nasty.h"
#include "ops/ops.h"

using namespace lilliput;

namespace {

struct Expected {
  double loss;
  std::vector<double> gradient;
};

Expected expected(const float* z, int64_t columns, int64_t label) {
  double most = -INFINITY, total = 0;
  for (int64_t i = 0; i < columns; ++i) most = std::max(most, static_cast<double>(z[i]));
  for (int64_t i = 0; i < columns; ++i) total += std::exp(z[i] - most);
  Expected result{std::log(total) + most - z[label], {}};
  for (int64_t i = 0; i < columns; ++i) result.gradient.push_back(std::exp(z[i] - most) / total - (i == label));
  return result;
}

void check_rows(const std::vector<float>& z, int64_t rows, int64_t columns, int threads) {
  std::vector<int64_t> labels;
  for (int64_t row = 0; row < rows; ++row) labels.push_back(row * 7 % columns);
  std::vector<float> out = z, losses(static_cast<size_t>(rows), NAN), only = losses, scratch = z;
  cross_entropy(out.data(), rows, columns, labels.data(), true, losses.data(), threads);
  cross_entropy(scratch.data(), rows, columns, labels.data(), false, only.data(), threads);
  CHECK(only == losses);
  for (int64_t row = 0; row < rows; ++row) {
    const auto first = static_cast<size_t>(row * columns), at = static_cast<size_t>(row);
    const Expected want = expected(z.data() + first, columns, labels[at]);
    CHECK(std::fabs(losses[at] - want.loss) <= 1e-6 * (1 + std::fabs(want.loss)));
    for (size_t i = 0; i < static_cast<size_t>(columns); ++i) {
      // at the label a probability near 1 was rounded before 1 was taken off
      const double rounded = static_cast<int64_t>(i) == labels[at] ? 1.2e-7 : 0;
      CHECK(std::fabs(out[first + i] - want.gradient[i]) <= 1e-6 * (1e-3 + std::fabs(want.gradient[i])) + rounded);
    }
  }
}

}  // namespace

TEST(cross_entropy_and_its_gradient) {
  for (int64_t columns : {1, 2, 7, 16, 63, 64, 65, 129, 1000})
    for (int64_t rows : {0, 1, 5, 33}) check_rows(nasty::make("random", rows * columns), rows, columns, 2);
}

TEST(logits_that_are_far_apart) {
  for (float scale : {1e-30f, 30.0f, 1e4f}) {
    std::vector<float> z = nasty::make("random", 3 * 100);
    for (float& value : z) value *= scale;
    check_rows(z, 3, 100, 1);
  }
  std::vector<float> z(200, -INFINITY);  // what may not be chosen
  for (size_t i = 0; i < 200; i += 7) z[i] = static_cast<float>(i);
  z[0] = z[107] = 1.0f;
  check_rows(z, 2, 100, 1);
}

TEST(the_number_of_threads_changes_no_bit) {
  const std::vector<float> z = nasty::make("random", 40 * 3000);
  const std::vector<int64_t> labels(40, 11);
  std::vector<float> one = z, many = z, losses(40), others(40);
  cross_entropy(one.data(), 40, 3000, labels.data(), true, losses.data(), 1);
  cross_entropy(many.data(), 40, 3000, labels.data(), true, others.data(), 3);
  CHECK(one == many && losses == others);
}
