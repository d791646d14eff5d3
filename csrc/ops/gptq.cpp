// GPTQ's loops, cut into tasks of some rows: rows of a weight do not wait for each other.
#include <algorithm>

#include "core/threads.h"
#include "ops/ops.h"

namespace lilliput {
namespace {

// `work`: numbers that a row takes, so that a task takes some 20 us or more.
template <typename Body>
void by_rows(int64_t rows, int64_t work, int threads, const Body& body) {
  const int64_t each = std::max<int64_t>(1, numbers_per_task / std::max<int64_t>(work, 1));
  parallel_for((rows + each - 1) / each, threads, Team::openmp,
               [&](int64_t task) { body(task * each, std::min((task + 1) * each, rows)); });
}

}  // namespace

void gptq_block(const GptqGrid& grid, const float* w, int64_t rows, int64_t columns, const float* upper, uint8_t* codes,
                float* errors, int threads) {
  by_rows(rows, columns * columns / 2, threads, [&](int64_t first, int64_t last) {
    kernels().gptq_block(grid, w, columns, upper, first, last, codes, errors);
  });
}

void gptq_descend(const GptqGrid& grid, const float* hessian, int64_t rows, int64_t columns, int sweeps, uint8_t* codes,
                  float* residual, int threads) {
  by_rows(rows, columns * columns / 8, threads, [&](int64_t first, int64_t last) {
    kernels().gptq_descend(grid, hessian, columns, sweeps, first, last, codes, residual);
  });
}

void search_grid(const GridSearch& search, const float* w, const float* importance, int64_t rows, int64_t columns,
                 int64_t group, float* scale, float* zero, int threads) {
  by_rows(rows, columns * search.count, threads, [&](int64_t first, int64_t last) {
    kernels().search_grid(search, w, importance, columns, group, first, last, scale, zero);
  });
}

}  // namespace lilliput
