// The nasty inputs by name (tests/nasty.py has the same list), in heap memory of exactly their size, so that the
// address sanitizer sees one number too many.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace nasty {

inline std::vector<float> make(const std::string& name, int64_t count) {
  std::vector<float> x(static_cast<size_t>(count));
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) {
    float& v = x[static_cast<size_t>(i)];
    v = normal(random);
    if (name == "flat") v = 0.37f;
    if (name == "ramp") v = static_cast<float>(i) - static_cast<float>(count) / 2;
    if (name == "plateaus") v = static_cast<float>(i / 7 % 5 - 2);
    if (name == "one_huge_value" && i == count / 2) v = 3e38f;
    if (name == "all_zero") v = 0;
    if (name == "subnormal") v *= 1e-42f;
    if (name == "negative_zero") v = -0.0f;
  }
  return x;
}

const std::vector<std::string> names = {"random",         "flat",     "ramp",      "plateaus",
                                        "one_huge_value", "all_zero", "subnormal", "negative_zero"};

// A multiple of a block, ragged, odd, shorter than a block, one, none; more than one task.
const std::vector<int64_t> sizes = {64, 128, 100, 97, 63, 2, 1, 0, 64 * 1024 * 2 + 33};

}  // namespace nasty
