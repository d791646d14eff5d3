// A step of an optimizer over a list of tensors: cut into runs of blocks, one task each. LAMB and LARS go over the
// numbers twice: the first time for the norms that decide how far a tensor moves.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/threads.h"
#include "ops/ops.h"

namespace lilliput {

namespace {

struct Run {
  int64_t tensor, first, last;
};

template <typename Numel>
std::vector<Run> runs_of(int64_t count, int64_t each, const Numel& numel) {
  std::vector<Run> runs;
  for (int64_t tensor = 0; tensor < count; ++tensor)
    for (int64_t first = 0, all = numel(tensor); first < all; first += each)
      runs.push_back({tensor, first, std::min(first + each, all)});
  return runs;
}

void set_betas(Hyper& h, double beta1, double beta2) {
  h.beta1 = static_cast<float>(beta1);
  h.rest1 = static_cast<float>(1.0 - beta1);
  h.beta2 = static_cast<float>(beta2);
  h.rest2 = static_cast<float>(1.0 - beta2);
}

// v: lr beta1 beta2 eps weight_decay step, as Adam, LAMB and AdEMAMix begin; returns sqrt(1 - b2^t).
double set_adam(Hyper& h, const double* v) {
  const double c = std::sqrt(1.0 - std::pow(v[2], v[5]));
  set_betas(h, v[1], v[2]);
  h.correction = static_cast<float>(c / (1.0 - std::pow(v[1], v[5])));
  h.eps = static_cast<float>(v[3] * c);
  return c;
}

Hyper prepared(OptimizerRule rule, const double* v) {
  Hyper h{static_cast<float>(v[values_of(rule) - 1])};
  const double lr = v[0];
  h.rate = static_cast<float>(-lr);
  switch (rule) {
    case OptimizerRule::adam:  // lr beta1 beta2 eps weight_decay step decoupled
      (v[6] != 0 ? h.keep : h.decay) = static_cast<float>(v[6] != 0 ? 1.0 - lr * v[4] : v[4]);
      h.rate = static_cast<float>(-lr * set_adam(h, v) / (1.0 - std::pow(v[1], v[5])));
      break;
    case OptimizerRule::sgd: {  // lr momentum dampening nesterov weight_decay step
      const bool fresh = v[5] == 1;
      h.beta1 = fresh ? 0.0f : static_cast<float>(v[1]);
      h.rest1 = fresh ? 1.0f : static_cast<float>(1.0 - v[2]);
      h.alpha = static_cast<float>(v[1]);
      h.nesterov = v[3] != 0;
      h.decay = static_cast<float>(v[4]);
      break;
    }
    case OptimizerRule::lion:  // lr beta1 beta2 weight_decay
      set_betas(h, v[1], v[2]);
      h.keep = static_cast<float>(1.0 - lr * v[3]);
      break;
    case OptimizerRule::rmsprop:  // lr alpha eps weight_decay
      h.beta2 = static_cast<float>(v[1]);
      h.rest2 = static_cast<float>(1.0 - v[1]);
      h.eps = static_cast<float>(v[2]);
      h.decay = static_cast<float>(v[3]);
      break;
    case OptimizerRule::adagrad:  // lr eps weight_decay
      h.eps = static_cast<float>(v[1]);
      h.decay = static_cast<float>(v[2]);
      break;
    case OptimizerRule::lamb:  // lr beta1 beta2 eps weight_decay step
      set_adam(h, v);
      h.decay = static_cast<float>(v[4]);
      break;
    case OptimizerRule::lars:  // lr momentum weight_decay trust_coefficient eps
      h.beta1 = static_cast<float>(v[1]);
      h.decay = static_cast<float>(v[2]);
      break;
    case OptimizerRule::ademamix:  // lr beta1 beta2 eps weight_decay step beta3 alpha
      h.keep = static_cast<float>(1.0 - lr * v[4]);
      h.beta3 = static_cast<float>(v[6]);
      h.rest3 = static_cast<float>(1.0 - v[6]);
      h.alpha = static_cast<float>(v[7] * set_adam(h, v));
      break;
  }
  return h;
}

// The learning rate of a tensor under LAMB or LARS, with its sign, as optimizer_rules.py's `trust` has it.
float trusted_rate(OptimizerRule rule, const double* v, double of_parameter, double of_update) {
  const double p = std::sqrt(of_parameter), u = std::sqrt(of_update);
  const bool lamb = rule == OptimizerRule::lamb;
  double trust = 1;
  if (p != 0 && u != 0) trust = lamb ? p / u : v[3] * p / (u + v[2] * p + v[4]);
  return static_cast<float>((lamb ? -v[0] : v[0]) * trust);
}

}  // namespace

int moments_of(OptimizerRule rule) {
  switch (rule) {
    case OptimizerRule::adam:
    case OptimizerRule::lamb:
      return 2;
    case OptimizerRule::ademamix:
      return 3;
    default:
      return 1;
  }
}

int values_of(OptimizerRule rule) {
  constexpr int counts[] = {8, 7, 5, 5, 4, 7, 6, 9};
  return counts[static_cast<int>(rule)];
}

void optimizer_step(OptimizerRule rule, const double* values, const OptimizerTensor* tensors, int64_t count,
                    int64_t block, const DynamicTree* trees, int threads) {
  const Kernels& kernel = kernels();
  const Hyper hyper = prepared(rule, values);
  const int64_t each = std::max(numbers_per_task / block, int64_t{1}) * block;
  const std::vector<Run> runs = runs_of(count, each, [&](int64_t i) { return tensors[i].numel; });
  const auto tasks = static_cast<int64_t>(runs.size());
  std::vector<float> rates(static_cast<size_t>(count), hyper.rate);
  if (rule == OptimizerRule::lamb || rule == OptimizerRule::lars) {
    std::vector<double> norms(static_cast<size_t>(2 * tasks)), sums(static_cast<size_t>(2 * count));
    parallel_for(tasks, threads, team_of(tasks), [&](int64_t task) {
      const Run& run = runs[static_cast<size_t>(task)];
      kernel.optimizer_step(rule, hyper, tensors[run.tensor], block, trees, run.first, run.last,
                            norms.data() + 2 * task);
    });
    for (size_t i = 0; i < norms.size(); ++i) sums[static_cast<size_t>(2 * runs[i / 2].tensor) + i % 2] += norms[i];
    for (size_t i = 0; i < rates.size(); ++i) rates[i] = trusted_rate(rule, values, sums[2 * i], sums[2 * i + 1]);
  }
  parallel_for(tasks, threads, team_of(tasks), [&](int64_t task) {
    const Run& run = runs[static_cast<size_t>(task)];
    Hyper own = hyper;
    own.rate = rates[static_cast<size_t>(run.tensor)];
    kernel.optimizer_step(rule, own, tensors[run.tensor], block, trees, run.first, run.last, nullptr);
  });
}

void gradient_norms(const Reals* tensors, const int64_t* numel, int64_t count, double* sums, int threads) {
  const Kernels& kernel = kernels();
  const std::vector<Run> runs = runs_of(count, numbers_per_task, [&](int64_t i) { return numel[i]; });
  const auto tasks = static_cast<int64_t>(runs.size());
  std::vector<double> parts(runs.size());
  parallel_for(tasks, threads, team_of(tasks), [&](int64_t task) {
    const Run& run = runs[static_cast<size_t>(task)];
    parts[static_cast<size_t>(task)] = kernel.sum_of_squares(tensors[run.tensor], run.first, run.last);
  });
  std::fill(sums, sums + count, 0.0);
  for (size_t i = 0; i < parts.size(); ++i) sums[runs[i].tensor] += parts[i];
}

}  // namespace lilliput
