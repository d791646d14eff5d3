// y = x W^T + bias and gx = gy W with W in 4 bits. A few rows stream the codes once; many rows cut W into tiles that
// are dequantized into panels that fit the second-level cache and are multiplied there. W is never whole in memory.
// A low-rank update is some more depth: its columns stand behind those of x, its rows behind those of W.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "core/threads.h"
#include "ops/ops.h"

namespace lilliput {
namespace {

// Each task takes at least this many multiply-adds, some 20 us, or handing it out costs more than it saves.
constexpr int64_t kTaskWork = 1 << 19;
constexpr int64_t kRowsAtOnce = 2048;  // of the left operand in scratch memory: 2048 x 4096 floats are 32 MiB

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], AlignedDelete>;

Buffer buffer(int64_t floats) {
  return Buffer(new (std::align_val_t{64}) float[static_cast<size_t>(std::max<int64_t>(floats, 1))]);
}

// The tile of the right operand that a thread is working on; kept between calls.
float* right_panels() {
  thread_local Buffer panels = buffer(max_depth * max_columns);
  return panels.get();
}

int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

// Equal parts of at most `most`, each a multiple of `step`.
int64_t part_of(int64_t whole, int64_t most, int64_t step) {
  const int64_t parts = (whole + most - 1) / most;
  return std::min(most, round_up((whole + parts - 1) / parts, step));
}

using Pack = void (*)(const Blocks4&, int64_t w_columns, int64_t column, int64_t columns, int64_t d, int64_t depth,
                      float*);

// c [rows, columns] = left [rows, depth] . right [depth, columns] + start + update, where pack() fills panels of the
// right operand.
struct Product {
  const Kernels& kernel;
  const Blocks4& w;
  int64_t w_columns;
  Pack pack;
  int64_t columns, depth;
  const float* start;
  const LowRank& update;
  int threads;

  int64_t columns_of_task() const {
    const int64_t tile = kernel.tile.columns;
    return std::clamp(round_up((columns + 4 * threads - 1) / (4 * threads), tile), tile, max_columns / tile * tile);
  }

  void run(const float* left, int64_t rows, float* c) const {
    const int64_t padded = round_up(std::min(rows, kRowsAtOnce), kernel.tile.rows);
    const Buffer panels = buffer(padded * (depth + update.rank));
    for (int64_t row = 0; row < rows; row += kRowsAtOnce)
      some_rows(left + row * depth, update.left + row * update.rank, std::min(kRowsAtOnce, rows - row), panels.get(),
                c + row * columns);
  }

 private:
  void some_rows(const float* left, const float* thin, int64_t rows, float* panels, float* c) const {
    const int64_t step = part_of(depth, max_depth, 64), padded = round_up(rows, kernel.tile.rows);
    const int64_t depths = (depth + step - 1) / step, more = (update.rank + max_depth - 1) / max_depth;
    float* thin_panels = panels + depth * padded;
    parallel_for(depths + more, threads, Team::openmp, [&](int64_t task) {
      if (task < depths) {
        const int64_t d = task * step;
        kernel.pack_left(left + d, depth, rows, std::min(step, depth - d), panels + d * padded);
      } else {
        const int64_t d = (task - depths) * max_depth;
        kernel.pack_left(thin + d, update.rank, rows, std::min(max_depth, update.rank - d), thin_panels + d * padded);
      }
    });
    const int64_t width = columns_of_task();
    parallel_for((columns + width - 1) / width, threads, Team::openmp, [&](int64_t task) {
      const int64_t column = task * width, count = std::min(width, columns - column);
      float* right = right_panels();
      for (int64_t d = 0; d < depth; d += step) {
        const int64_t deep = std::min(step, depth - d);
        pack(w, w_columns, column, count, d, deep, right);
        kernel.multiply(panels + d * padded, right, rows, count, deep, d > 0,
                        start != nullptr ? start + column : nullptr, c + column, columns);
      }
      for (int64_t d = 0; d < update.rank; d += max_depth) {
        const int64_t deep = std::min(max_depth, update.rank - d);
        pack_update(d, deep, column, count, right);
        kernel.multiply(thin_panels + d * padded, right, rows, count, deep, true, nullptr, c + column, columns);
      }
    });
  }

  void pack_update(int64_t d, int64_t deep, int64_t column, int64_t count, float* panels) const {
    const int64_t tile = kernel.tile.columns;
    for (int64_t first = 0; first < count; first += tile)
      for (int64_t i = d; i < d + deep; ++i)
        for (int64_t k = first; k < first + tile; ++k)
          *panels++ = k < count ? update.right[i * update.depth_step + (column + k) * update.column_step] : 0.0f;
  }
};

// body(first, last, scratch) for the rows of W in tasks; scratch holds few_rows_more floats more than a row of x.
template <typename Body>
void rows_of_w(int64_t rows, int64_t k, int64_t n, int threads, const Body& body) {
  const int64_t least = std::max<int64_t>(1, kTaskWork / std::max<int64_t>(1, k * rows));
  const int64_t per_task = std::max(least, (n + 4 * threads - 1) / (4 * threads));
  parallel_for((n + per_task - 1) / per_task, threads, Team::own, [&](int64_t task) {
    thread_local std::vector<float> scratch;
    scratch.resize(std::max(scratch.size(), static_cast<size_t>(k + few_rows_more)));
    body(task * per_task, std::min((task + 1) * per_task, n), scratch.data());
  });
}

void few_rows(const Blocks4& w, const float* x, int64_t rows, int64_t k, int64_t n, const float* bias, float* y,
              int threads) {
  const Kernels& kernel = kernels();
  const Buffer reordered = buffer(rows * k + few_rows_more);
  if (rows == 1 && kernel.fix_row != nullptr) {
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

// The update of a few rows, or of a product without depth.
void add_update(const LowRank& update, int64_t rows, int64_t columns, float* c) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t d = 0; d < update.rank; ++d) {
      const float factor = update.left[row * update.rank + d];
      for (int64_t i = 0; i < columns; ++i)
        c[row * columns + i] += factor * update.right[d * update.depth_step + i * update.column_step];
    }
}

}  // namespace

void linear_4bit(const Blocks4& w, const float* x, int64_t rows, int64_t k, int64_t n, const float* bias,
                 const LowRank& update, float* y, int threads) {
  if (rows == 0 || n == 0) return;
  if (rows > few_rows_limit && k > 0) {
    Product{kernels(), w, k, kernels().pack_forward, n, k, bias, update, threads}.run(x, rows, y);
    return;
  }
  if (rows <= few_rows_limit) {
    few_rows(w, x, rows, k, n, bias, y, threads);
  } else {
    for (int64_t i = 0; i < rows * n; ++i) y[i] = bias != nullptr ? bias[i % n] : 0.0f;
  }
  add_update(update, rows, n, y);
}

void linear_4bit_backward(const Blocks4& w, const float* gy, int64_t rows, int64_t k, int64_t n, const LowRank& update,
                          float* gx, int threads) {
  if (rows == 0 || k == 0) return;
  if (n == 0) {
    std::fill(gx, gx + rows * k, 0.0f);
    add_update(update, rows, k, gx);
  } else {
    Product{kernels(), w, k, kernels().pack_backward, k, n, nullptr, update, threads}.run(gy, rows, gx);
  }
}

}  // namespace lilliput
