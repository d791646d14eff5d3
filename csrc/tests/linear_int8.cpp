// int8 by rows against its definition, number by number: codes and whole-number sums exactly, what is added in float to
// float's rounding.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "nasty.h"
#include "ops/ops.h"

using namespace lilliput;

namespace {

struct Matrix {
  int64_t rows, columns;
  std::vector<int8_t> codes;
  std::vector<float> absmax;

  Matrix(int64_t rows, int64_t columns) : rows(rows), columns(columns), absmax(nasty::make("random", rows)) {
    std::mt19937 random(3);
    for (int64_t i = 0; i < rows * columns; ++i) codes.push_back(static_cast<int8_t>(random() % 255 - 127));
  }

  Rows8 view() const { return {codes.data(), absmax.data(), columns}; }
  double at(int64_t row, int64_t column) const {
    return codes[static_cast<size_t>(row * columns + column)] * static_cast<double>(view().scale_of(row));
  }
};

struct Rounded {
  std::vector<int> codes;
  float scale;
};

std::vector<bool> outliers_of(const std::vector<float>& x, int64_t rows, int64_t columns, float threshold) {
  std::vector<bool> large(static_cast<size_t>(columns), false);
  for (int64_t i = 0; threshold > 0 && i < rows * columns; ++i) {
    const float size = std::fabs(x[static_cast<size_t>(i)]);
    if (size > threshold && std::isfinite(size)) large[static_cast<size_t>(i % columns)] = true;
  }
  return large;
}

Rounded round(const float* x, int64_t columns, const std::vector<bool>& large, float largest) {
  float most = 0;
  bool finite = true;
  for (int64_t k = 0; k < columns; ++k) {
    finite = finite && std::isfinite(x[k]);
    if (!large[static_cast<size_t>(k)]) most = std::max(most, std::fabs(x[k]));
  }
  Rounded row{std::vector<int>(static_cast<size_t>(columns), 0), finite ? most / largest : NAN};
  const float factor = most >= largest * 1e-38f ? 1.0f / most * largest : 0.0f;
  for (int64_t k = 0; finite && k < columns; ++k)
    if (!large[static_cast<size_t>(k)])
      row.codes[static_cast<size_t>(k)] = static_cast<int>(std::nearbyint(x[k] * factor));
  return row;
}

bool close(float got, double want, double magnitude, int64_t terms) {
  if (std::isnan(want)) return std::isnan(got);
  if (magnitude > 3e38 && !std::isfinite(got)) return true;  // a term, or a sum on the way, is no float32
  return std::fabs(got - want) <= 1.2e-7 * static_cast<double>(terms + 4) * (magnitude + 1e-30);
}

void check_forward(const Matrix& w, const std::vector<float>& x, int64_t rows, float threshold, int threads,
                   int64_t rank = 0) {
  const std::vector<float> bias = nasty::make("ramp", w.rows), left = nasty::make("random", rows * rank),
                           right = nasty::make("ramp", w.rows * rank);
  const std::vector<bool> large = outliers_of(x, rows, w.columns, threshold);
  std::vector<float> y(static_cast<size_t>(rows * w.rows), NAN);
  const LowRank update{left.data(), right.data(), rank, 1, rank};
  linear_int8(w.view(), x.data(), rows, w.columns, w.rows, bias.data(), threshold, update, y.data(), threads);
  for (int64_t m = 0; m < rows; ++m) {
    const Rounded row = round(x.data() + m * w.columns, w.columns, large, static_cast<float>(largest_input(w.columns)));
    for (int64_t n = 0; n < w.rows; ++n) {
      int64_t whole = 0;
      double more = 0, magnitude = 0;
      int64_t terms = 0;
      for (int64_t k = 0; k < w.columns; ++k) {
        const auto at = static_cast<size_t>(k);
        whole += int64_t{row.codes[at]} * w.codes[static_cast<size_t>(n * w.columns + k)];
        if (!large[at]) continue;
        const double term = x[static_cast<size_t>(m * w.columns + k)] * w.at(n, k);
        more += term, magnitude += std::fabs(term), ++terms;
      }
      for (int64_t d = 0; d < rank; ++d, ++terms) {
        const double term = left[static_cast<size_t>(m * rank + d)] * double{right[static_cast<size_t>(n * rank + d)]};
        more += term, magnitude += std::fabs(term);
      }
      const volatile float sum = static_cast<float>(whole), scaled = sum * row.scale;
      const volatile float product = scaled * w.view().scale_of(n), exact = product + bias[static_cast<size_t>(n)];
      const float got = y[static_cast<size_t>(m * w.rows + n)];
      if (terms == 0)
        CHECK(got == exact || (std::isnan(got) && std::isnan(exact)));
      else
        CHECK(close(got, exact + more, magnitude + std::fabs(exact), terms));
    }
  }
}

void check_backward(const Matrix& w, int64_t rows, int threads, int64_t rank = 0) {
  const std::vector<float> gy = nasty::make("random", rows * w.rows);
  const std::vector<float> left = nasty::make("random", rows * rank), right = nasty::make("ramp", w.columns * rank);
  std::vector<float> gx(static_cast<size_t>(rows * w.columns), NAN);
  const LowRank update{left.data(), right.data(), rank, w.columns, 1};
  linear_int8_backward(w.view(), gy.data(), rows, w.columns, w.rows, update, gx.data(), threads);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < w.columns; ++k) {
      double want = 0, magnitude = 0;
      const auto term = [&](double of) { want += of, magnitude += std::fabs(of); };
      for (int64_t n = 0; n < w.rows; ++n) term(gy[static_cast<size_t>(m * w.rows + n)] * w.at(n, k));
      for (int64_t d = 0; d < rank; ++d)
        term(left[static_cast<size_t>(m * rank + d)] * double{right[static_cast<size_t>(d * w.columns + k)]});
      CHECK(close(gx[static_cast<size_t>(m * w.columns + k)], want, magnitude, w.rows + rank));
    }
}

struct Shape {
  int64_t rows, columns;
};
const std::vector<Shape> kShapes = {{40, 64}, {33, 96}, {7, 33}, {31, 131}, {5, 1}, {70, 600}, {3, 0}, {0, 64}};

}  // namespace

TEST(int8_products_of_a_few_and_of_many_rows) {
  for (const Shape& shape : kShapes)
    for (int64_t rows : {0, 1, 2, 3, 5, 8, 9, 15, 29})
      for (float threshold : {0.0f, 1.5f, 0.01f}) {
        const Matrix w(shape.rows, shape.columns);
        check_forward(w, nasty::make("random", rows * shape.columns), rows, threshold, 2);
      }
}

TEST(int8_products_of_nasty_rows) {
  const Matrix w(40, 100);
  for (const std::string& name : nasty::names)
    for (int64_t rows : {1, 20})
      for (float threshold : {0.0f, 0.5f}) check_forward(w, nasty::make(name, rows * 100), rows, threshold, 2);
}

TEST(no_sum_saturates) {
  for (int64_t columns : {64, 33, 516, 517, 4096, 131071}) {
    Matrix w(33, columns);
    for (int8_t& code : w.codes) code = 127;
    for (int64_t i = 0; i < columns; ++i) w.codes[static_cast<size_t>(columns + i)] = -127;  // row 1
    CHECK(largest_input(columns) >= 127 && columns * 127 * int64_t{largest_input(columns)} < int64_t{1} << 31);
    for (float sign : {1.0f, -1.0f})
      for (int64_t rows : {1, 8, 30})  // every code of x the largest there is
        check_forward(w, std::vector<float>(static_cast<size_t>(rows * columns), 3.0f * sign), rows, 0.0f, 2);
  }
}

TEST(a_row_that_is_no_number_spoils_itself_only) {
  const Matrix w(20, 70);
  for (float odd : {NAN, INFINITY, -INFINITY})
    for (int64_t rows : {1, 5, 20})
      for (float threshold : {0.0f, 1.5f}) {
        std::vector<float> x = nasty::make("random", rows * 70);
        x[static_cast<size_t>(rows / 2 * 70 + 69)] = odd;
        check_forward(w, x, rows, threshold, 2);
      }
}

TEST(int8_gradients_to_the_input) {
  for (const Shape& shape : kShapes)
    for (int64_t rows : {0, 1, 9, 29})
      for (int64_t rank : {0, 5}) check_backward(Matrix(shape.rows, shape.columns), rows, 2, rank);
}

TEST(int8_with_a_low_rank_update) {
  for (const Shape& shape : kShapes)
    for (int64_t rank : {1, 16, 300})
      for (int64_t rows : {1, 8, 9, 29})
        for (float threshold : {0.0f, 1.5f}) {
          const Matrix w(shape.rows, shape.columns);
          check_forward(w, nasty::make("random", rows * shape.columns), rows, threshold, 2, rank);
        }
}

TEST(more_int8_rows_than_fit_the_scratch_memory) {
  const Matrix w(3, 65);
  check_forward(w, nasty::make("random", (2048 + 5) * 65), 2048 + 5, 2.0f, 2, 4);
  check_backward(w, 2048 + 5, 2, 4);
}

TEST(int8_does_not_depend_on_threads) {
  const Matrix w(150, 321);
  for (int64_t rows : {1, 4, 30}) {
    const std::vector<float> x = nasty::make("random", rows * w.columns);
    std::vector<float> one(static_cast<size_t>(rows * w.rows)), many = one;
    linear_int8(w.view(), x.data(), rows, w.columns, w.rows, nullptr, 2.0f, {}, one.data(), 1);
    for (int threads : {2, 3, 7}) {
      linear_int8(w.view(), x.data(), rows, w.columns, w.rows, nullptr, 2.0f, {}, many.data(), threads);
      CHECK(many == one);
    }
  }
}

TEST(int8_codes_and_values_equal_the_definition) {
  for (const std::string& name : nasty::names)
    for (int64_t columns : {1, 7, 64, 1031}) {
      const int64_t rows = 70;
      std::vector<float> x = nasty::make(name, rows * columns), absmax(rows, NAN), values(x.size(), NAN);
      std::vector<int8_t> codes(x.size());
      CHECK(quantize_int8({x.data(), Real::f32}, rows, columns, codes.data(), absmax.data(), 2) == -1);
      dequantize_int8({codes.data(), absmax.data(), columns}, rows, {values.data(), Real::f32}, 2);
      for (int64_t row = 0; row < rows; ++row) {
        const Rounded want =
            round(x.data() + row * columns, columns, std::vector<bool>(static_cast<size_t>(columns)), 127.0f);
        CHECK(absmax[static_cast<size_t>(row)] / 127.0f == want.scale);
        for (int64_t k = 0; k < columns; ++k) {
          const auto at = static_cast<size_t>(row * columns + k);
          CHECK(codes[at] == want.codes[static_cast<size_t>(k)]);
          CHECK(values[at] == static_cast<float>(codes[at]) * want.scale);
        }
      }
    }
  std::vector<float> x = nasty::make("random", 300 * 10), absmax(300);
  std::vector<int8_t> codes(3000);
  for (int64_t bad : {2999, 1500, 7}) {
    x[static_cast<size_t>(bad)] = bad == 7 ? INFINITY : NAN;
    CHECK(quantize_int8({x.data(), Real::f32}, 300, 10, codes.data(), absmax.data(), 2) == bad / 10);
  }
}
