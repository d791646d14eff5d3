// Products with a matrix in groups of rows against sums in double, for every number of bits, and shapes that fit no
// tile, no group and no run.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "nasty.h"
#include "ops/ops.h"

using namespace lilliput;

namespace {

// Codes as numbers, one each, and as they are packed; scales in float32, or cut to the numbers of bfloat16 and packed.
struct Matrix {
  int64_t rows, columns;
  int bits;
  int64_t group, groups;
  bool zeros, halves;
  std::vector<uint8_t> plain, codes, zero;
  std::vector<float> scale;
  std::vector<uint16_t> scale16;

  Matrix(int64_t rows, int64_t columns, int bits, int64_t group, bool zeros, bool halves)
      : rows(rows), columns(columns), bits(bits), group(group), zeros(zeros), halves(halves) {
    std::mt19937 random(3);
    const int64_t runs = (columns + 31) / 32;
    if (group == 0) this->group = std::max<int64_t>(runs, 1) * 32;
    groups = group == 0 ? 1 : (columns + group - 1) / group;
    for (int64_t i = 0; i < rows * columns; ++i) plain.push_back(static_cast<uint8_t>(random() % (1u << bits)));
    for (int64_t i = 0; i < rows * groups; ++i) zero.push_back(static_cast<uint8_t>(random() % (1u << bits)));
    scale = nasty::make("random", rows * groups);
    for (float& value : scale) {
      uint32_t word;
      std::memcpy(&word, &value, 4);
      if (halves) word &= 0xffff0000;
      std::memcpy(&value, &word, 4);
      scale16.push_back(static_cast<uint16_t>(word >> 16));
    }
    codes.assign(static_cast<size_t>(rows * runs * 4 * bits), 0);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < columns; ++k) pack(row * runs + k / 32, static_cast<int>(k % 32), code(row, k));
  }

  int code(int64_t row, int64_t k) const { return plain[static_cast<size_t>(row * columns + k)]; }

  void pack(int64_t run, int place, int value) {
    uint8_t* bytes = codes.data() + run * 4 * bits;
    const int part = bits == 3 ? 2 : bits, width = 4 * part;
    bytes[place % width] =
        static_cast<uint8_t>(bytes[place % width] | (value & ((1 << part) - 1)) << part * (place / width));
    if (bits == 3) bytes[8 + place % 4] = static_cast<uint8_t>(bytes[8 + place % 4] | value >> 2 << place / 4);
  }

  Groups view() const {
    void* data = halves ? (void*)scale16.data() : (void*)scale.data();
    return {codes.data(),
            bits,
            columns,
            group,
            groups,
            {data, halves ? Real::bf16 : Real::f32},
            zeros ? zero.data() : nullptr};
  }

  double at(int64_t row, int64_t k) const {
    const auto index = static_cast<size_t>(row * groups + k / group);
    return static_cast<double>(scale[index]) * (code(row, k) - (zeros ? zero[index] : 1 << (bits - 1)));
  }
};

bool close(float got, double want, double magnitude, int64_t terms, double fixed_point = 0) {
  return std::fabs(got - want) <= 1.2e-7 * static_cast<double>(terms + 4) * (magnitude + 1e-30) + fixed_point;
}

// What half a step of 1/32767 of the greatest |x| of its 128 numbers, at most, makes of the only row of x times row n.
double fixed_point(const Matrix& w, const std::vector<float>& x, int64_t rows, int64_t n) {
  if (kernels().fix_row_grouped == nullptr || rows != 1) return 0;
  double sum = 0;
  for (int64_t k = 0; k < w.columns; k += 128) {
    double most = 0, weights = 0;
    for (int64_t i = k; i < std::min(k + 128, w.columns); ++i) {
      most = std::max(most, std::fabs(static_cast<double>(x[static_cast<size_t>(i)])));
      weights += std::fabs(w.at(n, i));
    }
    sum += 0.5 / 32767 * most * weights;
  }
  return 1.001 * sum;
}

void check_forward(const Matrix& w, int64_t rows, int threads, int64_t rank = 0, bool exact = false) {
  const std::vector<float> x = nasty::make("random", rows * w.columns), bias = nasty::make("ramp", w.rows);
  const std::vector<float> left = nasty::make("random", rows * rank), right = nasty::make("ramp", w.rows * rank);
  std::vector<float> y(static_cast<size_t>(rows * w.rows), NAN);
  const LowRank update{left.data(), right.data(), rank, 1, rank};
  linear_grouped(w.view(), x.data(), rows, w.rows, bias.data(), update, y.data(), threads, exact);
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
      const double more = exact ? 0 : fixed_point(w, x, rows, n);
      CHECK(close(y[static_cast<size_t>(m * w.rows + n)], want, magnitude, w.columns + rank, more));
    }
}

void check_backward(const Matrix& w, int64_t rows, int threads, int64_t rank = 0) {
  const std::vector<float> gy = nasty::make("random", rows * w.rows);
  const std::vector<float> left = nasty::make("random", rows * rank), right = nasty::make("ramp", w.columns * rank);
  std::vector<float> gx(static_cast<size_t>(rows * w.columns), NAN);
  const LowRank update{left.data(), right.data(), rank, w.columns, 1};
  linear_grouped_backward(w.view(), gy.data(), rows, w.rows, update, gx.data(), threads);
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
  int64_t rows, columns, group;  // group 0: a whole row
};
const std::vector<Shape> kShapes = {{40, 64, 32}, {33, 96, 64}, {7, 33, 32},    {31, 130, 128},
                                    {5, 1, 128},  {1, 320, 64}, {70, 288, 128}, {9, 200, 0},
                                    {17, 45, 0},  {3, 0, 128},  {0, 64, 32},    {3, 0, 0}};
const int kBits[] = {2, 3, 4, 8};

}  // namespace

TEST(grouped_products_of_a_few_and_of_many_rows) {
  for (const Shape& shape : kShapes)
    for (int bits : kBits)
      for (bool zeros : {false, true}) {
        const Matrix w(shape.rows, shape.columns, bits, shape.group, zeros, zeros);
        for (int64_t rows : {0, 1, 2, 5, 8, 9, 29}) check_forward(w, rows, 2);
        for (int64_t rows : {1, 3}) check_forward(w, rows, 2, 0, true);
      }
}

TEST(grouped_gradients_to_the_input) {
  for (const Shape& shape : kShapes)
    for (int bits : kBits)
      for (bool zeros : {false, true}) {
        const Matrix w(shape.rows, shape.columns, bits, shape.group, zeros, !zeros);
        for (int64_t rows : {0, 1, 9, 29}) check_backward(w, rows, 2);
      }
}

TEST(grouped_with_a_low_rank_update) {
  for (const Shape& shape : kShapes)
    for (int64_t rank : {1, 16, 300})
      for (int64_t rows : {1, 9}) {
        const Matrix w(shape.rows, shape.columns, 4, shape.group, true, true);
        check_forward(w, rows, 2, rank);
        check_backward(w, rows, 2, rank);
      }
}

TEST(grouped_deeper_than_a_tile) {
  for (int bits : kBits) {
    check_forward(Matrix(24, 650, bits, 128, true, false), 11, 1);
    check_backward(Matrix(600, 70, bits, 32, true, false), 11, 1);
  }
}

TEST(grouped_numbers_come_back) {
  for (const Shape& shape : kShapes)
    for (int bits : kBits) {
      const Matrix w(shape.rows, shape.columns, bits, shape.group, true, false);
      std::vector<float> out(static_cast<size_t>(w.rows * w.columns), NAN);
      dequantize_grouped(w.view(), w.rows, {out.data(), Real::f32}, 2);
      for (int64_t n = 0; n < w.rows; ++n)
        for (int64_t k = 0; k < w.columns; ++k)
          CHECK(out[static_cast<size_t>(n * w.columns + k)] == static_cast<float>(w.at(n, k)));
    }
}

TEST(grouped_results_do_not_depend_on_threads) {
  const Matrix w(150, 330, 4, 64, true, false);
  for (int64_t rows : {1, 4, 30}) {
    const std::vector<float> x = nasty::make("random", rows * w.columns);
    std::vector<float> one(static_cast<size_t>(rows * w.rows)), many = one;
    linear_grouped(w.view(), x.data(), rows, w.rows, nullptr, {}, one.data(), 1);
    for (int threads : {2, 3, 7}) {
      linear_grouped(w.view(), x.data(), rows, w.rows, nullptr, {}, many.data(), threads);
      CHECK(many == one);
    }
  }
}

TEST(grouped_numbers_that_fixed_point_does_not_hold) {
  const Matrix w(40, 130, 4, 32, true, false);
  for (float odd : {NAN, INFINITY, 1e30f, 1e-42f, 0.0f}) {
    std::vector<float> x(130, 0.0f), y(40);
    x[70] = odd;
    linear_grouped(w.view(), x.data(), 1, 40, nullptr, {}, y.data(), 2);
    for (int64_t n = 0; n < 40; ++n) {
      const double want = odd * w.at(n, 70);
      const float got = y[static_cast<size_t>(n)];
      CHECK(std::isfinite(odd) ? close(got, want, std::fabs(want), 130) : !std::isfinite(got));
    }
  }
}
