// Quantize and dequantize against the definition, number by number.
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "nasty.h"
#include "ops/ops.h"

using namespace lilliput;

namespace {

constexpr int64_t kBlock = 64;

// Any 16 values in any order will do, with one of them twice: this is FP4's shape.
const float kBook[16] = {0.0f, 0.005f,  0.7f,  1.0f,  0.3f,  0.5f,  0.2f,  0.25f,
                         0.0f, -0.005f, -0.7f, -1.0f, -0.3f, -0.5f, -0.2f, -0.25f};

struct Packed {
  std::vector<uint8_t> codes;
  std::vector<float> absmax;
  int64_t bad;
};

Packed quantize(const std::vector<float>& x, int threads = 2) {
  const auto count = static_cast<int64_t>(x.size());
  Packed p{std::vector<uint8_t>(static_cast<size_t>((count + 1) / 2)),
           std::vector<float>(static_cast<size_t>((count + kBlock - 1) / kBlock)), 0};
  p.bad = quantize_4bit({const_cast<float*>(x.data()), Real::f32}, count, kBlock, kBook, p.codes.data(),
                        p.absmax.data(), threads);
  return p;
}

Blocks4 blocks(const Packed& p, size_t count) {
  return {p.codes.data(), kBook, static_cast<int64_t>(count), kBlock, p.absmax.data(), nullptr, nullptr, nullptr, 0};
}

// The code whose value is nearest; half-way, the lower value; of two equal values, the one that ascending order has
// there.
int nearest_code(float scaled) {
  int order[16];
  for (int i = 0; i < 16; ++i) order[i] = i;
  std::stable_sort(order, order + 16, [](int a, int b) { return kBook[a] < kBook[b]; });
  int rank = 0;
  while (rank < 15 && scaled > (kBook[order[rank]] + kBook[order[rank + 1]]) / 2) ++rank;
  return order[rank];
}

void check_against_definition(const std::vector<float>& x, const Packed& p) {
  const auto count = static_cast<int64_t>(x.size());
  const Blocks4 w = blocks(p, x.size());
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t last = std::min(first + kBlock, count);
    float most = 0;
    for (int64_t i = first; i < last; ++i) most = std::max(most, std::fabs(x[static_cast<size_t>(i)]));
    const bool ragged = last - first < kBlock;
    const float floored = std::max(most, 1e-38f), inverse = 1.0f / floored;
    CHECK(w.absmax_of(first / kBlock) == (ragged ? floored : most));
    for (int64_t i = first; i < last; ++i) {
      const float v = x[static_cast<size_t>(i)], scaled = ragged ? v / floored : v * inverse;
      CHECK(w.code_of(i) == nearest_code(std::clamp(scaled, -1.0f, 1.0f)));
    }
  }
  if (count % 2) CHECK((p.codes.back() & 15) == nearest_code(0));
}

}  // namespace

TEST(quantize_equals_the_definition_on_nasty_input) {
  for (const std::string& name : nasty::names)
    for (int64_t size : nasty::sizes) {
      const std::vector<float> x = nasty::make(name, size);
      const Packed p = quantize(x);
      CHECK(p.bad == -1);
      check_against_definition(x, p);
    }
}

TEST(quantize_finds_the_first_block_that_is_not_finite) {
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()})
    for (int64_t place : {0, 63, 64, 1000, 1024 * 64 + 70, 1024 * 128}) {
      std::vector<float> x = nasty::make("random", 1024 * 128 + 1);
      x[static_cast<size_t>(place)] = bad;
      x.back() = bad;
      CHECK(quantize(x).bad == place / kBlock);
    }
}

TEST(quantize_does_not_depend_on_threads) {
  const std::vector<float> x = nasty::make("random", 64 * 1024 * 5 + 1);
  const Packed one = quantize(x, 1);
  for (int threads : {2, 3, 8}) {
    const Packed many = quantize(x, threads);
    CHECK(many.codes == one.codes && many.absmax == one.absmax);
  }
}

TEST(dequantize_equals_the_definition) {
  for (int64_t size : nasty::sizes) {
    const std::vector<float> x = nasty::make("random", size);
    const Packed p = quantize(x);
    std::vector<float> out(x.size());
    const Blocks4 w = blocks(p, x.size());
    dequantize_4bit(w, {out.data(), Real::f32}, 2);
    for (int64_t i = 0; i < size; ++i)
      CHECK(out[static_cast<size_t>(i)] == kBook[w.code_of(i)] * p.absmax[static_cast<size_t>(i / kBlock)]);
  }
}

TEST(misaligned_tensors_are_read_where_they_are) {
  const std::vector<float> x = nasty::make("random", 200);
  const std::vector<float> shifted(x.begin() + 1, x.end());
  const Packed whole = quantize(shifted);
  Packed view{std::vector<uint8_t>(whole.codes.size()), std::vector<float>(whole.absmax.size()), 0};
  quantize_4bit({const_cast<float*>(x.data() + 1), Real::f32}, 199, kBlock, kBook, view.codes.data(),
                view.absmax.data(), 1);
  CHECK(view.codes == whole.codes && view.absmax == whole.absmax);
}

TEST(half_reals_round_trip) {
  // Every finite half is exact in float32: quantizing it as a half or as a float must give the same codes.
  for (Real kind : {Real::f16, Real::bf16}) {
    std::vector<uint16_t> half;
    for (int bits = 0; bits < 0x10000; ++bits) {
      const bool finite = kind == Real::f16 ? (bits & 0x7c00) != 0x7c00 : (bits & 0x7f80) != 0x7f80;
      if (finite) half.push_back(static_cast<uint16_t>(bits));
    }
    const auto count = static_cast<int64_t>(half.size());
    std::vector<uint8_t> codes(static_cast<size_t>(count + 1) / 2);
    std::vector<float> absmax(static_cast<size_t>((count + kBlock - 1) / kBlock));
    CHECK(quantize_4bit({half.data(), kind}, count, kBlock, kBook, codes.data(), absmax.data(), 1) == -1);
    std::vector<uint16_t> back(half.size());
    dequantize_4bit({codes.data(), kBook, count, kBlock, absmax.data(), nullptr, nullptr, nullptr, 0},
                    {back.data(), kind}, 1);
    // The number of greatest magnitude of a block has the code of 1 or -1 and so comes back as it was.
    for (int64_t b = 0; b + 1 < static_cast<int64_t>(absmax.size()); ++b) {
      bool found = absmax[static_cast<size_t>(b)] <= 1e-38f;
      for (int64_t i = b * kBlock; i < (b + 1) * kBlock; ++i)
        found = found || (back[static_cast<size_t>(i)] == half[static_cast<size_t>(i)] &&
                          (half[static_cast<size_t>(i)] & 0x7fff));
      CHECK(found);
    }
  }
}
