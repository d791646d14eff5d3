// Products of many rows, cut into tasks: the left operand is packed once, tiles of the right one are packed by whoever
// knows the weight's format and multiplied from the second-level cache. W is never whole in memory.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "core/threads.h"
#include "ops/ops.h"

namespace lilliput {

// Each task takes at least this many multiply-adds, some 20 us, or handing it out costs more than it saves.
constexpr int64_t task_work = 1 << 19;
constexpr int64_t rows_at_once = 2048;  // of the left operand in scratch memory: 2048 x 4096 floats are 32 MiB

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], AlignedDelete>;

inline Buffer buffer(int64_t floats) {
  return Buffer(new (std::align_val_t{64}) float[static_cast<size_t>(std::max<int64_t>(floats, 1))]);
}

// The tile of the right operand that a thread is working on; kept between calls.
inline float* right_panels() {
  thread_local Buffer panels = buffer(max_depth * max_columns);
  return panels.get();
}

inline int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// Equal parts of at most `most`, each a multiple of `step`.
inline int64_t part_of(int64_t whole, int64_t most, int64_t step) {
  const int64_t parts = (whole + most - 1) / most;
  return parts == 0 ? most : std::min(most, round_up((whole + parts - 1) / parts, step));
}

// A left operand [rows, depth] of floats as panels, in runs of depth that fit a tile.
class LeftPanels {
 public:
  LeftPanels(const Kernels& kernel, const float* left, int64_t rows, int64_t depth, int threads)
      : kernel_(kernel), rows_(rows), depth_(depth), step_(part_of(depth, max_depth, 64)) {
    padded_ = round_up(rows, kernel.tile.rows);
    panels_ = buffer(padded_ * depth);
    parallel_for((depth + step_ - 1) / step_, threads, Team::openmp, [&](int64_t task) {
      const int64_t d = task * step_;
      kernel.pack_left(left + d, depth, rows, std::min(step_, depth - d), panels_.get() + d * padded_);
    });
  }

  // c[rows, count] (+)= this . columns column..column+count-1 of a right operand, of which pack(column, count, d,
  // depth, panels) makes panels; `start` [count] or null is what sums start from when !add.
  template <typename Pack>
  void multiply(const Pack& pack, int64_t column, int64_t count, bool add, const float* start, float* c,
                int64_t c_stride) const {
    float* right = right_panels();
    for (int64_t d = 0; d < depth_; d += step_) {
      const int64_t deep = std::min(step_, depth_ - d);
      pack(column, count, d, deep, right);
      kernel_.multiply(panels_.get() + d * padded_, right, rows_, count, deep, add || d > 0, start, c, c_stride);
    }
  }

 private:
  const Kernels& kernel_;
  int64_t rows_, depth_, step_, padded_;
  Buffer panels_;
};

// body(column, count) for runs of columns, each a task.
template <typename Body>
void column_tasks(const Kernels& kernel, int64_t columns, int threads, const Body& body) {
  const int64_t tile = kernel.tile.columns;
  const int64_t width =
      std::clamp(round_up((columns + 4 * threads - 1) / (4 * threads), tile), tile, max_columns / tile * tile);
  parallel_for((columns + width - 1) / width, threads, Team::openmp,
               [&](int64_t task) { body(task * width, std::min(width, columns - task * width)); });
}

// Panels [panels][deep][tile] of a right operand whose number at depth d, column c is at(d, c).
template <typename At>
void pack_each(int64_t tile, int64_t column, int64_t count, int64_t d, int64_t deep, const At& at, float* panels) {
  for (int64_t first = 0; first < count; first += tile)
    for (int64_t i = d; i < d + deep; ++i)
      for (int64_t k = first; k < first + tile; ++k) *panels++ = k < count ? at(i, column + k) : 0.0f;
}

// A low-rank update of rows row..row+rows-1, ready to be added to a product of many rows.
class UpdatePanels {
 public:
  UpdatePanels(const Kernels& kernel, const LowRank& update, int64_t row, int64_t rows, int threads)
      : tile_(kernel.tile.columns),
        update_(update),
        left_(kernel, update.left + row * update.rank, rows, update.rank, threads) {}

  void add(int64_t column, int64_t count, float* c, int64_t c_stride) const {
    const auto pack = [&](int64_t column, int64_t count, int64_t d, int64_t deep, float* panels) {
      pack_each(
          tile_, column, count, d, deep,
          [&](int64_t i, int64_t k) { return update_.right[i * update_.depth_step + k * update_.column_step]; },
          panels);
    };
    left_.multiply(pack, column, count, true, nullptr, c, c_stride);
  }

 private:
  int64_t tile_;
  const LowRank& update_;
  LeftPanels left_;
};

// c [rows, columns] = left [rows, depth] . right [depth, columns] + start + update, depth > 0.
template <typename Pack>
void product(const float* left, int64_t rows, int64_t columns, int64_t depth, const Pack& pack, const float* start,
             const LowRank& update, float* c, int threads) {
  const Kernels& kernel = kernels();
  for (int64_t row = 0; row < rows; row += rows_at_once) {
    const int64_t here = std::min(rows_at_once, rows - row);
    const LeftPanels base(kernel, left + row * depth, here, depth, threads);
    const UpdatePanels more(kernel, update, row, here, threads);
    column_tasks(kernel, columns, threads, [&](int64_t column, int64_t count) {
      float* tile = c + row * columns + column;
      base.multiply(pack, column, count, false, start != nullptr ? start + column : nullptr, tile, columns);
      more.add(column, count, tile, columns);
    });
  }
}

// body(first, last, scratch) for rows of W in tasks, where a few `rows` of x meet each of its n rows of k numbers;
// scratch holds few_rows_more floats more than a row of x.
template <typename Body>
void rows_of_w(int64_t rows, int64_t k, int64_t n, int threads, const Body& body) {
  const int64_t least = std::max<int64_t>(1, task_work / std::max<int64_t>(1, k * rows));
  const int64_t per_task = std::max(least, (n + 4 * threads - 1) / (4 * threads));
  parallel_for((n + per_task - 1) / per_task, threads, Team::own, [&](int64_t task) {
    thread_local std::vector<float> scratch;
    scratch.resize(std::max(scratch.size(), static_cast<size_t>(k + few_rows_more)));
    body(task * per_task, std::min((task + 1) * per_task, n), scratch.data());
  });
}

// The update of a few rows, or of a product without depth.
inline void add_update(const LowRank& update, int64_t rows, int64_t columns, float* c) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t d = 0; d < update.rank; ++d) {
      const float factor = update.left[row * update.rank + d];
      for (int64_t i = 0; i < columns; ++i)
        c[row * columns + i] += factor * update.right[d * update.depth_step + i * update.column_step];
    }
}

// y [rows, n] = x [rows, k] W^T + bias + update: many rows by tiles of W, a few by `few_rows()`, which adds the bias.
template <typename Pack, typename FewRows>
void product_with_wt(const float* x, int64_t rows, int64_t k, int64_t n, const Pack& pack, const FewRows& few_rows,
                     const float* bias, const LowRank& update, float* y, int threads) {
  if (rows == 0 || n == 0) return;
  if (rows > few_rows_limit && k > 0) {
    product(x, rows, n, k, pack, bias, update, y, threads);
    return;
  }
  if (rows <= few_rows_limit) {
    few_rows();
  } else {
    for (int64_t i = 0; i < rows * n; ++i) y[i] = bias != nullptr ? bias[i % n] : 0.0f;
  }
  add_update(update, rows, n, y);
}

// gx [rows, k] = gy [rows, n] W + update: the depth is n, and may be nothing.
template <typename Pack>
void product_with_w(const float* gy, int64_t rows, int64_t k, int64_t n, const Pack& pack, const LowRank& update,
                    float* gx, int threads) {
  if (rows == 0 || k == 0) return;
  if (n > 0) {
    product(gy, rows, k, n, pack, nullptr, update, gx, threads);
    return;
  }
  std::fill(gx, gx + rows * k, 0.0f);
  add_update(update, rows, k, gx);
}

}  // namespace lilliput
