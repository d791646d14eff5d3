// y = x W^T + bias and gx = gy W with W in groups of rows, 2, 3, 4 or 8 bits; and back to reals. A few rows stream the
// codes once; many rows cut W into tiles that are dequantized into panels (product.h).
#include "ops/product.h"

namespace lilliput {
namespace {

// Rows of x as few_rows_grouped wants them: as they are, or, where they end inside a run, with zeros behind them.
class PaddedRows {
 public:
  PaddedRows(const float* x, int64_t rows, int64_t columns) : x_(x), stride_(round_up(columns, run_length)) {
    if (stride_ == columns) return;
    room_ = buffer(rows * stride_);
    std::fill(room_.get(), room_.get() + rows * stride_, 0.0f);
    for (int64_t row = 0; row < rows; ++row)
      std::copy(x + row * columns, x + (row + 1) * columns, room_.get() + row * stride_);
    x_ = room_.get();
  }
  const float* data() const { return x_; }
  int64_t stride() const { return stride_; }

 private:
  const float* x_;
  int64_t stride_;
  Buffer room_;
};

// One row in 16-bit fixed point; false where it does not hold x.
bool fixed_row(const Groups& w, const float* x, int64_t n, const float* bias, float* y, int threads) {
  const Kernels& kernel = kernels();
  const int64_t spans = w.runs();  // as many as there can be
  const Buffer room = buffer(w.runs() * run_length / 2 + spans + 8 * spans);
  auto* fixed = reinterpret_cast<int16_t*>(room.get());
  auto* sums = reinterpret_cast<int32_t*>(room.get() + w.runs() * run_length / 2);
  float* scales = room.get() + w.runs() * run_length / 2 + 8 * spans;
  if (!kernel.fix_row_grouped(w, x, fixed, scales, sums)) return false;
  rows_of_w(1, w.columns, n, threads, [&](int64_t first, int64_t last, float* scratch) {
    kernel.one_row_grouped(w, fixed, scales, sums, bias, first, last, y, scratch);
  });
  return true;
}

void few_rows(const Groups& w, const float* x, int64_t rows, int64_t n, const float* bias, float* y, int threads,
              bool exact) {
  const Kernels& kernel = kernels();
  if (rows == 1 && !exact && kernel.fix_row_grouped != nullptr && fixed_row(w, x, n, bias, y, threads)) return;
  const PaddedRows padded(x, rows, w.columns);
  rows_of_w(rows, w.columns, n, threads, [&](int64_t first, int64_t last, float* scratch) {
    kernel.few_rows_grouped(w, padded.data(), padded.stride(), static_cast<int>(rows), bias, first, last, y, n,
                            scratch);
  });
}

}  // namespace

void linear_grouped(const Groups& w, const float* x, int64_t rows, int64_t n, const float* bias, const LowRank& update,
                    float* y, int threads, bool exact) {
  const auto pack = [&](int64_t column, int64_t count, int64_t d, int64_t deep, float* panels) {
    kernels().pack_forward_grouped(w, column, count, d, deep, panels);
  };
  const auto few = [&] { few_rows(w, x, rows, n, bias, y, threads, exact); };
  product_with_wt(x, rows, w.columns, n, pack, few, bias, update, y, threads);
}

void linear_grouped_backward(const Groups& w, const float* gy, int64_t rows, int64_t n, const LowRank& update,
                             float* gx, int threads) {
  const auto pack = [&](int64_t column, int64_t count, int64_t d, int64_t deep, float* panels) {
    kernels().pack_backward_grouped(w, column, count, d, deep, panels);
  };
  product_with_w(gy, rows, w.columns, n, pack, update, gx, threads);
}

void dequantize_grouped(const Groups& w, int64_t rows, Reals out, int threads) {
  const int64_t per_task = std::max<int64_t>(1, task_work / 4 / std::max<int64_t>(1, w.columns));
  parallel_for((rows + per_task - 1) / per_task, threads, Team::own, [&](int64_t task) {
    const int64_t first = task * per_task, last = std::min(first + per_task, rows);
    kernels().dequantize_grouped(w, first, last,
                                 {static_cast<char*>(out.data) + first * w.columns * bytes_of(out.kind), out.kind});
  });
}

}  // namespace lilliput
