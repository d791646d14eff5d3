// Products with a 4-bit matrix against sums in double, for shapes that fit no tile, no block and no byte.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "nasty.h"
#include "ops/ops.h"

using namespace lilliput;

namespace {

struct Matrix {
  int64_t rows, columns;
  std::vector<uint8_t> codes, absmax8;
  std::vector<float> book, absmax, scale, book8;
  bool double_quant;

  Matrix(int64_t rows, int64_t columns, bool double_quant)
      : rows(rows),
        columns(columns),
        book(nasty::make("random", 16)),
        book8(nasty::make("random", 256)),
        double_quant(double_quant) {
    std::mt19937 random(3);
    const int64_t blocks = (rows * columns + 63) / 64;
    for (int64_t i = 0; i < (rows * columns + 1) / 2; ++i) codes.push_back(static_cast<uint8_t>(random()));
    for (int64_t i = 0; i < blocks; ++i) absmax8.push_back(static_cast<uint8_t>(random()));
    absmax = nasty::make("random", blocks);
    scale = nasty::make("random", (blocks + 255) / 256);
  }

  Blocks4 view() const {
    if (double_quant)
      return {codes.data(), book.data(), rows * columns, 64, nullptr, absmax8.data(), book8.data(), scale.data(), 0.5f};
    return {codes.data(), book.data(), rows * columns, 64, absmax.data(), nullptr, nullptr, nullptr, 0};
  }

  double at(int64_t row, int64_t column) const {
    const int64_t i = row * columns + column;
    return static_cast<double>(book[static_cast<size_t>(view().code_of(i))]) * view().absmax_of(i / 64);
  }
};

// The sum must be right to float32's rounding of a sum of its terms' magnitudes, and what fixed point may add.
bool close(float got, double want, double magnitude, int64_t terms, double fixed_point = 0) {
  return std::fabs(got - want) <= 1.2e-7 * static_cast<double>(terms + 4) * (magnitude + 1e-30) + fixed_point;
}

double greatest(const float* x, int64_t count) {
  double most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, std::fabs(static_cast<double>(x[i])));
  return most;
}

// What half a step of 1/32767 in each number of x (of its block's greatest) and of W (of the codebook's greatest) makes
// of the only row of x times row n of W; 0 where the kernels compute in float32.
double fixed_point(const Matrix& w, const std::vector<float>& x, int64_t rows, int64_t n) {
  if (kernels().fix_row == nullptr || rows != 1 || w.columns % 64) return 0;
  const double half_step = 0.5 / 32767, of_book = half_step * greatest(w.book.data(), 16);
  double sum = 0;
  for (int64_t k = 0; k < w.columns; k += 64) {
    const float* block = x.data() + k;
    const double of_x = half_step * greatest(block, 64),
                 absmax = std::fabs(w.view().absmax_of((n * w.columns + k) / 64));
    for (int64_t i = 0; i < 64; ++i)
      sum += of_x * std::fabs(w.at(n, k + i)) + (std::fabs(block[i]) + of_x) * of_book * absmax;
  }
  return sum;
}

void check_forward(const Matrix& w, int64_t rows, int threads, int64_t rank = 0) {
  const std::vector<float> x = nasty::make("random", rows * w.columns), bias = nasty::make("ramp", w.rows);
  const std::vector<float> left = nasty::make("random", rows * rank), right = nasty::make("ramp", w.rows * rank);
  std::vector<float> y(static_cast<size_t>(rows * w.rows), NAN);
  const LowRank update{left.data(), right.data(), rank, 1, rank};
  linear_4bit(w.view(), x.data(), rows, w.columns, w.rows, bias.data(), update, y.data(), threads);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < w.rows; ++n) {
      double want = bias[static_cast<size_t>(n)], magnitude = std::fabs(want);
      for (int64_t k = 0; k < w.columns; ++k) {
        const double term = x[static_cast<size_t>(m * w.columns + k)] * w.at(n, k);
        want += term, magnitude += std::fabs(term);
      }
      for (int64_t d = 0; d < rank; ++d) {
        const double term = left[static_cast<size_t>(m * rank + d)] * double{right[static_cast<size_t>(n * rank + d)]};
        want += term, magnitude += std::fabs(term);
      }
      CHECK(
          close(y[static_cast<size_t>(m * w.rows + n)], want, magnitude, w.columns + rank, fixed_point(w, x, rows, n)));
    }
}

void check_backward(const Matrix& w, int64_t rows, int threads, int64_t rank = 0) {
  const std::vector<float> gy = nasty::make("random", rows * w.rows);
  const std::vector<float> left = nasty::make("random", rows * rank), right = nasty::make("ramp", w.columns * rank);
  std::vector<float> gx(static_cast<size_t>(rows * w.columns), NAN);
  const LowRank update{left.data(), right.data(), rank, w.columns, 1};
  linear_4bit_backward(w.view(), gy.data(), rows, w.columns, w.rows, update, gx.data(), threads);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < w.columns; ++k) {
      double want = 0, magnitude = 0;
      for (int64_t n = 0; n < w.rows; ++n) {
        const double term = gy[static_cast<size_t>(m * w.rows + n)] * w.at(n, k);
        want += term, magnitude += std::fabs(term);
      }
      for (int64_t d = 0; d < rank; ++d) {
        const size_t at = static_cast<size_t>(d * w.columns + k);
        const double term = left[static_cast<size_t>(m * rank + d)] * double{right[at]};
        want += term, magnitude += std::fabs(term);
      }
      CHECK(close(gx[static_cast<size_t>(m * w.columns + k)], want, magnitude, w.rows + rank));
    }
}

struct Shape {
  int64_t rows, columns;
};
const std::vector<Shape> kShapes = {{40, 64}, {33, 96},  {7, 33}, {31, 130}, {5, 1},
                                    {1, 320}, {70, 288}, {3, 0},  {0, 64}};

}  // namespace

TEST(products_of_a_few_and_of_many_rows) {
  for (const Shape& shape : kShapes)
    for (bool double_quant : {false, true}) {
      const Matrix w(shape.rows, shape.columns, double_quant);
      for (int64_t rows : {0, 1, 2, 5, 8, 9, 15, 29}) check_forward(w, rows, 2);
    }
}

TEST(gradients_to_the_input) {
  for (const Shape& shape : kShapes)
    for (bool double_quant : {false, true}) {
      const Matrix w(shape.rows, shape.columns, double_quant);
      for (int64_t rows : {0, 1, 9, 29}) check_backward(w, rows, 2);
    }
}

TEST(with_a_low_rank_update) {
  for (const Shape& shape : kShapes)
    for (int64_t rank : {1, 5, 16, 300})
      for (int64_t rows : {0, 1, 8, 9, 29}) {
        const Matrix w(shape.rows, shape.columns, true);
        check_forward(w, rows, 2, rank);
        check_backward(w, rows, 2, rank);
      }
}

TEST(deeper_than_a_tile) {
  const Matrix w(24, 640, true);
  check_forward(w, 11, 1);
  check_backward(Matrix(600, 64, true), 11, 1);
}

TEST(more_rows_than_fit_the_scratch_memory) {
  const Matrix w(3, 64, false);
  check_forward(w, 2048 + 5, 2, 4);
  check_backward(w, 2048 + 5, 2, 4);
}

TEST(results_do_not_depend_on_threads) {
  const Matrix w(150, 320, true);
  for (int64_t rows : {1, 4, 30}) {
    const std::vector<float> x = nasty::make("random", rows * w.columns);
    std::vector<float> one(static_cast<size_t>(rows * w.rows)), many = one;
    linear_4bit(w.view(), x.data(), rows, w.columns, w.rows, nullptr, {}, one.data(), 1);
    for (int threads : {2, 3, 7}) {
      linear_4bit(w.view(), x.data(), rows, w.columns, w.rows, nullptr, {}, many.data(), threads);
      CHECK(many == one);
    }
  }
}

TEST(numbers_that_fixed_point_does_not_hold) {
  const Matrix w(40, 128, true);
  for (float odd : {NAN, INFINITY, 1e30f, 1e-42f, 0.0f}) {
    std::vector<float> x(128, 0.0f), y(40);
    x[70] = odd;
    linear_4bit(w.view(), x.data(), 1, 128, 40, nullptr, {}, y.data(), 2);
    for (int64_t n = 0; n < 40; ++n) {
      const double want = odd * w.at(n, 70);
      const float got = y[static_cast<size_t>(n)];
      CHECK(std::isfinite(odd) ? close(got, want, std::fabs(want), 128) : !std::isfinite(got));
    }
  }
}
