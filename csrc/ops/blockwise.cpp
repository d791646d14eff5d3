// Quantize and dequantize 4-bit blocks: cut into runs of blocks, one task each.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "core/threads.h"
#include "ops/ops.h"

namespace lilliput {

namespace {

// 1,024 blocks of 64 floats are 256 KiB: small beside the second-level cache, long beside the hand-out of a task.
constexpr int64_t kBlocksPerTask = 1024;

// Bounds between neighbouring values and the code of each value in ascending order, as formats/blockwise.py makes them;
// codes as the bit patterns of floats, because the table that is looked up in registers holds floats.
struct RoundingTable {
  float bounds[16], order[16];

  explicit RoundingTable(const float* codebook) {
    int ranks[16];
    std::iota(ranks, ranks + 16, 0);
    std::stable_sort(ranks, ranks + 16, [codebook](int a, int b) { return codebook[a] < codebook[b]; });
    for (int i = 0; i < 16; ++i) {
      std::memcpy(order + i, ranks + i, sizeof(float));
      bounds[i] = i < 15 ? (codebook[ranks[i]] + codebook[ranks[i + 1]]) / 2 : 0;
    }
  }
};

}  // namespace

int64_t quantize_4bit(Reals x, int64_t numel, int64_t block, const float* codebook, uint8_t* codes, float* absmax,
                      int threads) {
  const Kernels& kernel = kernels();
  const RoundingTable table(codebook);
  const int64_t blocks = (numel + block - 1) / block;
  std::atomic<int64_t> bad{blocks};
  parallel_for((blocks + kBlocksPerTask - 1) / kBlocksPerTask, threads, Team::own, [&](int64_t task) {
    const int64_t first = task * kBlocksPerTask, last = std::min(first + kBlocksPerTask, blocks);
    const int64_t found = kernel.quantize(x, numel, block, table.bounds, table.order, first, last, codes, absmax);
    int64_t known = bad.load();
    while (found >= 0 && found < known && !bad.compare_exchange_weak(known, found)) {
    }
  });
  return bad.load() < blocks ? bad.load() : -1;
}

void dequantize_4bit(const Blocks4& w, Reals out, int threads) {
  const Kernels& kernel = kernels();
  const int64_t run = kBlocksPerTask * w.block;
  parallel_for((w.numel + run - 1) / run, threads, Team::own, [&](int64_t task) {
    const int64_t first = task * run, last = std::min(first + run, w.numel);
    const Reals part{static_cast<char*>(out.data) + first * bytes_of(out.kind), out.kind};
    kernel.dequantize(w, first, last, part);
  });
}

}  // namespace lilliput
