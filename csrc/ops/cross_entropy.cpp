// The cross entropy of rows of logits, one task each few rows.
#include <algorithm>

#include "core/threads.h"
#include "ops/ops.h"

namespace lilliput {

void cross_entropy(float* z, int64_t rows, int64_t columns, const int64_t* labels, bool gradient, float* losses,
                   int threads) {
  const Kernels& kernel = kernels();
  const int64_t rows_per_task = std::max<int64_t>(1, numbers_per_task / columns);
  const int64_t tasks = (rows + rows_per_task - 1) / rows_per_task;
  parallel_for(tasks, threads, team_of(tasks), [&](int64_t task) {
    const int64_t first = task * rows_per_task;
    kernel.cross_entropy(z, columns, labels, first, std::min(first + rows_per_task, rows), gradient, losses);
  });
}

}  // namespace lilliput
