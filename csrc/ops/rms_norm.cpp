// RMS normalization and its gradients: cut into runs of rows, one task each. The gradient to the weight is summed a run
// at a time, then over the runs; runs do not depend on the number of threads, so neither does the sum.
#include <algorithm>
#include <vector>

#include "core/threads.h"
#include "ops/ops.h"

namespace lilliput {
namespace {

constexpr int64_t kRuns = 64;  // at most, for each has a sum of its own; enough to share out evenly

struct Runs {
  int64_t rows, each, count;

  Runs(int64_t rows, int64_t columns) : rows(rows) {
    each = std::max({int64_t{1}, numbers_per_task / columns, (rows + kRuns - 1) / kRuns});
    count = (rows + each - 1) / each;
  }
  int64_t first(int64_t run) const { return run * each; }
  int64_t last(int64_t run) const { return std::min(rows, (run + 1) * each); }
};

}  // namespace

void rms_norm(Reals x, const float* weight, float eps, int64_t rows, int64_t columns, Reals y, int threads) {
  if (rows == 0 || columns == 0) return;
  const Kernels& kernel = kernels();
  const Runs runs(rows, columns);
  parallel_for(runs.count, threads, team_of(runs.count),
               [&](int64_t run) { kernel.rms_norm(x, weight, eps, columns, runs.first(run), runs.last(run), y); });
}

void rms_norm_backward(Reals grad, Reals x, const float* weight, float eps, int64_t rows, int64_t columns, Reals to_x,
                       float* to_weight, int threads) {
  if (to_weight != nullptr) std::fill(to_weight, to_weight + columns, 0.0f);
  if (rows == 0 || columns == 0) return;
  const Kernels& kernel = kernels();
  const Runs runs(rows, columns);
  std::vector<float> sums(to_weight != nullptr ? static_cast<size_t>(runs.count * columns) : 0);
  parallel_for(runs.count, threads, team_of(runs.count), [&](int64_t run) {
    float* own = to_weight != nullptr ? sums.data() + run * columns : nullptr;
    kernel.rms_norm_backward(grad, x, weight, eps, columns, runs.first(run), runs.last(run), to_x, own);
  });
  for (int64_t run = 0; to_weight != nullptr && run < runs.count; ++run)
    for (int64_t k = 0; k < columns; ++k) to_weight[k] += sums[static_cast<size_t>(run * columns + k)];
}

}  // namespace lilliput
