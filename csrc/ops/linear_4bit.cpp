// y = x W^T + bias and gx = gy W with W in 4 bits. A few rows stream the codes once; many rows cut W into tiles that
// are dequantized into panels (product.h).
// A low-rank update is some more depth: its columns stand behind those of x, its rows behind those of W.
#include "ops/product.h"

namespace lilliput {
namespace {

void few_rows(const Blocks4& w, const float* x, int64_t rows, int64_t k, int64_t n, const float* bias, float* y,
              int threads, bool exact) {
  const Kernels& kernel = kernels();
  const Buffer reordered = buffer(rows * k + few_rows_more);
  if (rows == 1 && !exact && kernel.fix_row != nullptr) {
    auto* fixed = reinterpret_cast<int16_t*>(reordered.get());
    float* scales = reordered.get() + k / 2 + 1;
    if (kernel.fix_row(w, x, k, fixed, scales)) {
      rows_of_w(rows, k, n, threads, [&](int64_t first, int64_t last, float* scratch) {
        kernel.one_row_fixed(w, k, fixed, scales, bias, first, last, y, scratch);
      });
      return;
    }
  }
  kernel.split_pairs(w, x, rows, k, reordered.get());
  rows_of_w(rows, k, n, threads, [&](int64_t first, int64_t last, float* scratch) {
    kernel.few_rows(w, k, x, reordered.get(), static_cast<int>(rows), bias, first, last, y, n, scratch);
  });
}

}  // namespace

void linear_4bit(const Blocks4& w, const float* x, int64_t rows, int64_t k, int64_t n, const float* bias,
                 const LowRank& update, float* y, int threads, bool exact) {
  const auto pack = [&](int64_t column, int64_t count, int64_t d, int64_t deep, float* panels) {
    kernels().pack_forward(w, k, column, count, d, deep, panels);
  };
  const auto few = [&] { few_rows(w, x, rows, k, n, bias, y, threads, exact); };
  product_with_wt(x, rows, k, n, pack, few, bias, update, y, threads);
}

void linear_4bit_backward(const Blocks4& w, const float* gy, int64_t rows, int64_t k, int64_t n, const LowRank& update,
                          float* gx, int threads) {
  const auto pack = [&](int64_t column, int64_t count, int64_t d, int64_t deep, float* panels) {
    kernels().pack_backward(w, k, column, count, d, deep, panels);
  };
  product_with_w(gy, rows, k, n, pack, update, gx, threads);
}

}  // namespace lilliput
