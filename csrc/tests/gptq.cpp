// GPTQ's loops against plain ones of the same roundings, and the grid search against trying every grid in double.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "core/cpu.h"
#include "nasty.h"
#include "ops/ops.h"

using namespace lilliput;

namespace {

struct Case {
  int64_t rows, columns, groups;
  std::vector<float> w, scale, zero, upper, hessian;
  std::vector<int32_t> group;

  GptqGrid grid() const { return {scale.data(), zero.data(), groups, group.data(), 15.0f}; }
};

Case make_case(int64_t rows, int64_t columns) {
  Case c{rows, columns, (columns + 15) / 16, nasty::make("random", rows * columns), {}, {}, {}, {}, {}};
  for (int64_t i = 0; i < rows * c.groups; ++i) {
    c.scale.push_back(0.2f + 0.01f * static_cast<float>(i % 7));
    c.zero.push_back(static_cast<float>(6 + i % 4));
  }
  const std::vector<float> noise = nasty::make("random", columns * columns);
  for (int64_t i = 0; i < columns; ++i) c.group.push_back(static_cast<int32_t>(i / 16));
  for (int64_t i = 0; i < columns * columns; ++i) {
    const int64_t row = i / columns, column = i % columns;
    const float small = 0.02f * noise[static_cast<size_t>(std::min(row, column) * columns + std::max(row, column))];
    c.hessian.push_back(row == column ? 2.0f : small);
    c.upper.push_back(row == column ? 1.5f : row < column ? small : 0.0f);
  }
  return c;
}

float value_of(const Case& c, int64_t row, int64_t j, float code) {
  const auto at = static_cast<size_t>(row * c.groups + c.group[static_cast<size_t>(j)]);
  return c.scale[at] * (code - c.zero[at]);
}

float code_of(const Case& c, int64_t row, int64_t j, float w) {
  const auto at = static_cast<size_t>(row * c.groups + c.group[static_cast<size_t>(j)]);
  return std::clamp(std::nearbyint(w / c.scale[at]) + c.zero[at], 0.0f, 15.0f);
}

}  // namespace

TEST(codes_of_a_block_are_those_of_the_plain_loop) {
  for (int64_t columns : {1, 3, 16, 33, 128})
    for (int64_t rows : {0, 1, 9}) {
      const Case c = make_case(rows, columns);
      std::vector<uint8_t> codes(c.w.size());
      std::vector<float> errors(c.w.size());
      gptq_block(c.grid(), c.w.data(), rows, columns, c.upper.data(), codes.data(), errors.data(), 2);
      for (int64_t row = 0; row < rows; ++row) {
        std::vector<float> left(c.w.begin() + row * columns, c.w.begin() + (row + 1) * columns);
        for (int64_t i = 0; i < columns; ++i) {
          const float code = code_of(c, row, i, left[static_cast<size_t>(i)]);
          const float error = (left[static_cast<size_t>(i)] - value_of(c, row, i, code)) /
                              c.upper[static_cast<size_t>(i * columns + i)];
          for (int64_t j = i + 1; j < columns; ++j)
            left[static_cast<size_t>(j)] -= error * c.upper[static_cast<size_t>(i * columns + j)];
          CHECK(codes[static_cast<size_t>(row * columns + i)] == static_cast<uint8_t>(code));
          CHECK(errors[static_cast<size_t>(row * columns + i)] == error);
        }
      }
    }
}

TEST(descending_lessens_the_error_and_keeps_the_residual) {
  for (int64_t columns : {1, 5, 32, 70}) {
    const Case c = make_case(6, columns);
    std::vector<uint8_t> codes(c.w.size(), 8);
    const auto residual_of = [&] {
      std::vector<float> residual(c.w.size());
      for (int64_t row = 0; row < 6; ++row)
        for (int64_t i = 0; i < columns; ++i)
          for (int64_t j = 0; j < columns; ++j) {
            const auto at = static_cast<size_t>(row * columns + j);
            residual[static_cast<size_t>(row * columns + i)] +=
                (c.w[at] - value_of(c, row, j, codes[at])) * c.hessian[static_cast<size_t>(j * columns + i)];
          }
      return residual;
    };
    const auto error_of = [&] {
      const std::vector<float> residual = residual_of();
      double total = 0;
      for (size_t i = 0; i < residual.size(); ++i) {
        const auto column = static_cast<int64_t>(i) % columns;
        total += residual[i] * (c.w[i] - value_of(c, static_cast<int64_t>(i) / columns, column, codes[i]));
      }
      return total;
    };
    const double before = error_of();
    std::vector<float> residual = residual_of();
    gptq_descend(c.grid(), c.hessian.data(), 6, columns, 4, codes.data(), residual.data(), 2);
    CHECK(error_of() < before);
    const std::vector<float> fresh = residual_of();
    for (size_t i = 0; i < fresh.size(); ++i) CHECK(std::fabs(fresh[i] - residual[i]) < 1e-4);
  }
}

TEST(a_searched_grid_is_no_worse_than_that_of_the_whole_range) {
  std::vector<float> shares;
  for (int i = 0; i < 30; ++i) shares.push_back(0.5f + 0.02f * static_cast<float>(i));
  for (const std::string& name : nasty::names) {
    if (name == "one_huge_value") continue;  // float16 has no such scale; the callers refuse it
    for (int64_t columns : {1, 7, 32, 45}) {
      const std::vector<float> w = nasty::make(name, 3 * columns), importance(static_cast<size_t>(columns), 1.0f);
      const int64_t groups = (columns + 31) / 32;
      std::vector<float> scale(static_cast<size_t>(3 * groups)), zero = scale;
      const GridSearch search{shares.data(), static_cast<int64_t>(shares.size()), 15.0f, false};
      search_grid(search, w.data(), importance.data(), 3, columns, 32, scale.data(), zero.data(), 2);
      for (size_t i = 0; i < scale.size(); ++i) {
        CHECK(scale[i] > 0 && zero[i] >= 1 && zero[i] <= 15 && zero[i] == std::nearbyint(zero[i]));
        const auto row = static_cast<int64_t>(i) / groups, from = static_cast<int64_t>(i) % groups * 32;
        const auto error = [&](double s, double z) {
          double total = 0;
          for (int64_t j = from; j < std::min<int64_t>(from + 32, columns); ++j) {
            const double x = w[static_cast<size_t>(row * columns + j)];
            const double q = s * std::clamp(std::nearbyint(x / s), -z, 15 - z);
            total += (x - q) * (x - q);
          }
          return total;
        };
        double least = 0, greatest = 0;  // of the whole range, which is one of those that are tried
        for (int64_t j = from; j < std::min<int64_t>(from + 32, columns); ++j) {
          least = std::min<double>(least, w[static_cast<size_t>(row * columns + j)]);
          greatest = std::max<double>(greatest, w[static_cast<size_t>(row * columns + j)]);
        }
        const double whole = least == greatest ? 2.0 / 15 : (greatest - least) / 15;
        const double middle = std::clamp(std::nearbyint(-least / whole), 1.0, 15.0);
        const double step = std::max(whole, 6e-8);  // float16 has no smaller one
        const double rounding = 15 * step / 2048;   // of the scale, to float16, in the outermost number
        CHECK(error(scale[i], zero[i]) <= error(step, middle) * 1.02 + 32 * rounding * rounding + 1e-12);
      }
    }
  }
}

TEST(one_and_several_threads_give_the_same_codes) {
  const Case c = make_case(300, 64);
  std::vector<uint8_t> one(c.w.size()), many(c.w.size());
  std::vector<float> errors(c.w.size());
  gptq_block(c.grid(), c.w.data(), 300, 64, c.upper.data(), one.data(), errors.data(), 1);
  gptq_block(c.grid(), c.w.data(), 300, 64, c.upper.data(), many.data(), errors.data(), 4);
  CHECK(one == many);
}
