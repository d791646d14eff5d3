// silu(gate) * up and its gradients: cut into runs of numbers, one task each.
#include <algorithm>

#include "core/threads.h"
#include "ops/ops.h"

namespace lilliput {

void swiglu(Reals gate, Reals up, int64_t numel, Reals out, int threads) {
  const Kernels& kernel = kernels();
  const int64_t tasks = (numel + numbers_per_task - 1) / numbers_per_task;
  parallel_for(tasks, threads, team_of(tasks), [&](int64_t task) {
    const int64_t first = task * numbers_per_task;
    kernel.swiglu(gate, up, first, std::min(first + numbers_per_task, numel), out);
  });
}

void swiglu_backward(Reals grad, Reals gate, Reals up, int64_t numel, Reals to_gate, Reals to_up, int threads) {
  const Kernels& kernel = kernels();
  const int64_t tasks = (numel + numbers_per_task - 1) / numbers_per_task;
  parallel_for(tasks, threads, team_of(tasks), [&](int64_t task) {
    const int64_t first = task * numbers_per_task;
    kernel.swiglu_backward(grad, gate, up, first, std::min(first + numbers_per_task, numel), to_gate, to_up);
  });
}

}  // namespace lilliput
