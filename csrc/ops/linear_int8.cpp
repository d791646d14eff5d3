// y = x W^T + bias and gx = gy W with W in int8 (LLM.int8(), arXiv 2208.07339). Forward rounds the rows of x to int8
// and sums whole numbers; columns of x with outliers are multiplied in float32 beside it, some more depth, as the
// low-rank update is. Backward is a product of floats whose tiles of W are dequantized.
#include <atomic>
#include <cmath>

#include "ops/product.h"

namespace lilliput {
namespace {

constexpr int64_t kRowsPerTask = 64;  // of a matrix that is quantized or dequantized

// The columns of x that are multiplied in float32.
struct Outliers {
  std::vector<int32_t> keep;     // [k], 0 for them; empty where there are none
  std::vector<int64_t> columns;  // their numbers

  Outliers(const float* x, int64_t rows, int64_t k, float threshold, int threads) {
    if (threshold <= 0.0f || rows == 0) return;
    keep.assign(static_cast<size_t>(k), -1);
    constexpr int64_t kColumns = 256;
    parallel_for((k + kColumns - 1) / kColumns, rows > few_rows_limit ? threads : 1, Team::openmp, [&](int64_t task) {
      kernels().clear_outliers(x, rows, k, threshold, task * kColumns, std::min((task + 1) * kColumns, k), keep.data());
    });
    for (int64_t i = 0; i < k; ++i)
      if (keep[static_cast<size_t>(i)] == 0) columns.push_back(i);
    if (columns.empty()) keep.clear();
  }

  const int32_t* kept() const { return keep.empty() ? nullptr : keep.data(); }
  int64_t count() const { return static_cast<int64_t>(columns.size()); }

  // Those columns of x [rows, k] alone: [rows, count()].
  std::vector<float> of(const float* x, int64_t rows, int64_t k) const {
    std::vector<float> values;
    values.reserve(static_cast<size_t>(rows * count()));
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column : columns) values.push_back(x[row * k + column]);
    return values;
  }
};

std::vector<float> scales_of(const Rows8& w, int64_t n) {
  std::vector<float> scales(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) scales[static_cast<size_t>(i)] = w.scale_of(i);
  return scales;
}

// The rows of x as codes, packed in pairs; and what each row's sums are multiplied by.
class RoundedPanels {
 public:
  RoundedPanels(const Kernels& kernel, const float* x, int64_t rows, int64_t k, const Outliers& outliers, int threads)
      : kernel_(kernel), rows_(rows), k_(k), pairs_((k + 1) / 2), step_(part_of(pairs_, max_depth, 32)) {
    const int64_t tile = kernel.tile.rows;
    const auto largest = static_cast<float>(largest_input(k));
    padded_ = round_up(rows, tile);
    panels_.resize(static_cast<size_t>(padded_ * pairs_));
    scales_.resize(static_cast<size_t>(rows));
    parallel_for(padded_ / tile, threads, Team::openmp, [&](int64_t panel) {
      thread_local std::vector<int32_t> codes;
      codes.resize(std::max(codes.size(), static_cast<size_t>(pairs_)));
      for (int64_t r = 0; r < tile; ++r) {
        const int64_t row = panel * tile + r;
        if (row < rows)
          scales_[static_cast<size_t>(row)] = kernel.round_row(x + row * k, k, outliers.kept(), largest, 2 * pairs_,
                                                               reinterpret_cast<int16_t*>(codes.data()));
        else
          std::fill_n(codes.begin(), pairs_, 0);
        for (int64_t d = 0; d < pairs_; d += step_) {
          const int64_t deep = std::min(step_, pairs_ - d);
          int32_t* to = panels_.data() + d * padded_ + panel * tile * deep + r;
          for (int64_t i = 0; i < deep; ++i) to[i * tile] = codes[static_cast<size_t>(d + i)];
        }
      }
    });
  }

  // c[rows, count] = this . rows column..column+count-1 of W, as floats.
  void multiply(const Rows8& w, int64_t column, int64_t count, const float* column_scales, const float* bias, float* c,
                int64_t c_stride) const {
    auto* right = reinterpret_cast<int32_t*>(right_panels());
    auto* sums = reinterpret_cast<int32_t*>(c);  // until they are finished
    for (int64_t d = 0; d < pairs_; d += step_) {
      const int64_t deep = std::min(step_, pairs_ - d);
      kernel_.pack_pairs(w, column, count, 2 * d, std::min(2 * deep, k_ - 2 * d), right);
      kernel_.multiply_pairs(panels_.data() + d * padded_, right, rows_, count, deep, d > 0, sums, c_stride);
    }
    kernel_.finish_int8(rows_, count, scales_.data(), column_scales + column, bias != nullptr ? bias + column : nullptr,
                        sums, c_stride);
  }

 private:
  const Kernels& kernel_;
  int64_t rows_, k_, pairs_, step_, padded_;
  std::vector<int32_t> panels_;
  std::vector<float> scales_;
};

void many_rows(const Rows8& w, const float* x, int64_t rows, int64_t k, int64_t n, const float* bias,
               const Outliers& outliers, const LowRank& update, float* y, int threads) {
  const Kernels& kernel = kernels();
  const std::vector<float> scales = scales_of(w, n);
  const auto pack_outliers = [&](int64_t column, int64_t count, int64_t d, int64_t deep, float* panels) {
    pack_each(
        kernel.tile.columns, column, count, d, deep,
        [&](int64_t i, int64_t row) {
          const int64_t at = row * k + outliers.columns[static_cast<size_t>(i)];
          return static_cast<float>(w.codes[at]) * scales[static_cast<size_t>(row)];
        },
        panels);
  };
  for (int64_t row = 0; row < rows; row += rows_at_once) {
    const int64_t here = std::min(rows_at_once, rows - row);
    const RoundedPanels base(kernel, x + row * k, here, k, outliers, threads);
    const LeftPanels large(kernel, outliers.of(x + row * k, here, k).data(), here, outliers.count(), threads);
    const UpdatePanels more(kernel, update, row, here, threads);
    column_tasks(kernel, n, threads, [&](int64_t column, int64_t count) {
      float* tile = y + row * n + column;
      base.multiply(w, column, count, scales.data(), bias, tile, n);
      large.multiply(pack_outliers, column, count, true, nullptr, tile, n);
      more.add(column, count, tile, n);
    });
  }
}

void few_rows(const Rows8& w, const float* x, int64_t rows, int64_t k, int64_t n, const float* bias,
              const Outliers& outliers, float* y, int threads) {
  const Kernels& kernel = kernels();
  const int64_t stride = round_up(k, 2);
  const auto largest = static_cast<float>(largest_input(k));
  std::vector<int16_t> codes(static_cast<size_t>(rows * stride));
  std::vector<float> row_scales(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row)
    row_scales[static_cast<size_t>(row)] =
        kernel.round_row(x + row * k, k, outliers.kept(), largest, stride, codes.data() + row * stride);
  const std::vector<float> large = outliers.of(x, rows, k);
  auto* sums = reinterpret_cast<int32_t*>(y);
  rows_of_w(rows, k, n, threads, [&](int64_t first, int64_t last, float*) {
    kernel.few_rows_int8(w, codes.data(), stride, static_cast<int>(rows), first, last, sums, n);
    for (int64_t i = first; i < last; ++i) {
      const float scale = w.scale_of(i);
      kernel.finish_int8(rows, 1, row_scales.data(), &scale, bias != nullptr ? bias + i : nullptr, sums + i, n);
      for (int64_t j = 0; j < outliers.count(); ++j) {
        const float weight = static_cast<float>(w.codes[i * k + outliers.columns[static_cast<size_t>(j)]]) * scale;
        for (int64_t row = 0; row < rows; ++row)
          y[row * n + i] += large[static_cast<size_t>(row * outliers.count() + j)] * weight;
      }
    }
  });
}

}  // namespace

int32_t largest_input(int64_t k) {
  const int64_t fits = INT32_MAX / (127 * std::max<int64_t>(k, 1));
  return static_cast<int32_t>(std::clamp<int64_t>(fits, 127, INT16_MAX));
}

int64_t quantize_int8(Reals x, int64_t rows, int64_t columns, int8_t* codes, float* absmax, int threads) {
  std::atomic<int64_t> bad{rows};
  parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, threads, Team::own, [&](int64_t task) {
    const int64_t first = task * kRowsPerTask, last = std::min(first + kRowsPerTask, rows);
    const int64_t found = kernels().quantize_rows(x, columns, first, last, codes, absmax);
    int64_t known = bad.load();
    while (found >= 0 && found < known && !bad.compare_exchange_weak(known, found)) {
    }
  });
  return bad.load() < rows ? bad.load() : -1;
}

void dequantize_int8(const Rows8& w, int64_t rows, Reals out, int threads) {
  parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, threads, Team::own, [&](int64_t task) {
    kernels().dequantize_rows(w, task * kRowsPerTask, std::min((task + 1) * kRowsPerTask, rows), out);
  });
}

void linear_int8(const Rows8& w, const float* x, int64_t rows, int64_t k, int64_t n, const float* bias, float threshold,
                 const LowRank& update, float* y, int threads) {
  if (rows == 0 || n == 0) return;
  const Outliers outliers(x, rows, k, threshold, threads);
  if (rows > few_rows_limit) {
    many_rows(w, x, rows, k, n, bias, outliers, update, y, threads);
    return;
  }
  few_rows(w, x, rows, k, n, bias, outliers, y, threads);
  add_update(update, rows, n, y);
}

void linear_int8_backward(const Rows8& w, const float* gy, int64_t rows, int64_t k, int64_t n, const LowRank& update,
                          float* gx, int threads) {
  const auto pack = [&](int64_t column, int64_t count, int64_t d, int64_t deep, float* panels) {
    kernels().pack_backward_int8(w, column, count, d, deep, panels);
  };
  product_with_w(gy, rows, k, n, pack, update, gx, threads);
}

}  // namespace lilliput
