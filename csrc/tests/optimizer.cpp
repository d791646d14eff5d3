// Codes of the dynamic tree against bisection around every bound; steps against double; threads, ragged ends.
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "nasty.h"
#include "ops/ops.h"

using namespace lilliput;

namespace {

std::vector<float> book_of(bool with_sign) {
  std::vector<float> values = {0.0f, 1.0f};
  for (int e = 0; e < 7; ++e) {
    const int count = with_sign ? 1 << e : 2 << e;
    for (int j = 0; j < count; ++j) {
      const auto value = static_cast<float>(std::pow(10.0, e - 6) * (0.1 + 0.9 * (j + 0.5) / count));
      values.push_back(value);
      if (with_sign) values.push_back(-value);
    }
  }
  std::sort(values.begin(), values.end());
  return values;
}

const std::vector<float> books[] = {book_of(true), book_of(false)};
const DynamicTree trees[] = {{books[0].data(), true}, {books[1].data(), false}};

void check_codes(std::vector<float> x, const DynamicTree& tree) {
  x.resize((x.size() + 63) / 64 * 64);
  std::vector<uint8_t> codes(64);
  for (size_t start = 0; start < x.size(); start += 64) {
    kernels().dynamic_codes(x.data() + start, 1.0f, tree, codes.data());
    // A kernel with narrower vectors does the first 16 or 32; move on by what all do.
    for (size_t i = 0; i < 16; ++i) CHECK(codes[i] == tree.code_of(x[start + i]));
  }
}

// 16 numbers of every 64 are looked at: see above.
std::vector<float> spread(const std::vector<float>& x) {
  std::vector<float> out;
  for (size_t i = 0; i < x.size(); ++i) {
    out.push_back(x[i]);
    if (i % 16 == 15) out.resize(out.size() + 48);
  }
  return out;
}

struct Tensor {
  std::vector<float> p, g;
  std::vector<std::vector<float>> values;
  std::vector<std::vector<uint8_t>> codes;
  std::vector<std::vector<float>> absmax;

  Tensor(std::vector<float> parameter, std::vector<float> gradient, int moments, int64_t block)
      : p(std::move(parameter)), g(std::move(gradient)) {
    const auto blocks = (p.size() + static_cast<size_t>(block) - 1) / static_cast<size_t>(block);
    for (int j = 0; j < moments; ++j) {
      values.emplace_back(p.size());
      codes.emplace_back(p.size());
      absmax.emplace_back(blocks);
    }
  }

  OptimizerTensor raw(bool eight) {
    OptimizerTensor t{{p.data(), Real::f32}, {g.data(), Real::f32}, static_cast<int64_t>(p.size()), {}, {}};
    for (size_t j = 0; j < values.size(); ++j) {
      t.moments[j] = eight ? static_cast<void*>(codes[j].data()) : static_cast<void*>(values[j].data());
      t.absmax[j] = eight ? absmax[j].data() : nullptr;
    }
    return t;
  }
};

struct Case {
  OptimizerRule rule;
  std::vector<double> values;
  int signed_moments;
};

const double kLr = 0.01;
const std::vector<Case> cases = {
    {OptimizerRule::adam, {kLr, 0.9, 0.999, 1e-8, 0.1, 1, 1, 1}, 1},
    {OptimizerRule::sgd, {kLr, 0.9, 0.1, 1, 0.1, 1, 1}, 1},
    {OptimizerRule::lion, {kLr, 0.9, 0.99, 0.1, 1}, 1},
    {OptimizerRule::rmsprop, {kLr, 0.99, 1e-8, 0.1, 1}, 0},
    {OptimizerRule::adagrad, {kLr, 1e-10, 0.1, 1}, 0},
    {OptimizerRule::lamb, {kLr, 0.9, 0.999, 1e-6, 0.1, 1, 1}, 1},
    {OptimizerRule::lars, {kLr, 0.9, 0.1, 0.001, 1e-8, 1}, 1},
    {OptimizerRule::ademamix, {kLr, 0.9, 0.999, 1e-8, 0.1, 1, 0.9999, 5, 1}, 2},
};

void step(const Case& c, Tensor& t, bool eight, int64_t block, int threads) {
  const OptimizerTensor raw = t.raw(eight);
  optimizer_step(c.rule, c.values.data(), &raw, 1, block, trees, threads);
}

}  // namespace

TEST(codes_around_every_bound) {
  for (const DynamicTree& tree : trees) {
    std::vector<float> x = {0.0f, 1.0f, 1e-45f, 1e-38f, 0x1.fffffep-1f};
    for (int k = 0; k < tree.last; ++k) {
      float up = tree.bound[k], down = up;
      for (int ulp = 0; ulp < 40; ++ulp) {
        x.insert(x.end(), {up, down});
        up = std::nextafter(up, 2.0f);
        down = std::nextafter(down, 0.0f);
      }
    }
    for (int binade = -30; binade <= 0; ++binade)
      for (int part = 0; part < 512; ++part) x.push_back(std::ldexp(0.5f + static_cast<float>(part) / 1024, binade));
    const size_t positive = x.size();
    for (size_t i = 0; tree.is_signed && i < positive; ++i) x.push_back(-x[i]);
    check_codes(spread(x), tree);
  }
}

TEST(bisection_finds_the_nearest_value) {
  for (const DynamicTree& tree : trees) {
    for (int i = -2000; i <= 2000; ++i) {
      if (i < 0 && !tree.is_signed) continue;
      const float x = static_cast<float>(i) / 2000 * std::fabs(static_cast<float>(i) / 2000);
      double least = 2;
      for (int code = 0; code < 256; ++code) least = std::min(least, std::fabs(double{tree.book[code]} - x));
      // A bound is the middle between two values, rounded to float32.
      CHECK(std::fabs(double{tree.book[tree.code_of(x)]} - x) <= least + 1e-7 * std::fabs(x));
    }
  }
}

TEST(what_is_no_number_gives_some_code) {
  std::vector<float> x(64, std::numeric_limits<float>::quiet_NaN());
  x[1] = std::numeric_limits<float>::infinity();
  std::vector<uint8_t> codes(64);
  for (const DynamicTree& tree : trees) kernels().dynamic_codes(x.data(), 1.0f, tree, codes.data());
}

TEST(a_first_step_of_every_rule_keeps_the_codes_of_its_moments) {
  for (const Case& c : cases) {
    for (const int64_t block : {64, 256, 2048}) {
      for (const int64_t count : {int64_t{1}, int64_t{63}, int64_t{64}, int64_t{300}, int64_t{4096}, int64_t{70001}}) {
        const std::vector<float> p = nasty::make("random", count);
        std::vector<float> g = nasty::make("ramp", count);
        for (float& v : g) v = v / static_cast<float>(count) + 0.001f;
        Tensor wide(p, g, moments_of(c.rule), block), narrow(p, g, moments_of(c.rule), block);
        step(c, wide, false, block, 2);
        step(c, narrow, true, block, 2);
        CHECK(wide.p == narrow.p);  // the parameter moves by the moments before they are rounded
        for (size_t j = 0; j < wide.values.size(); ++j) {
          const DynamicTree& tree = trees[static_cast<int>(j) < c.signed_moments ? 0 : 1];
          for (size_t first = 0; first < p.size(); first += static_cast<size_t>(block)) {
            const size_t last = std::min(p.size(), first + static_cast<size_t>(block));
            float most = 0;
            for (size_t i = first; i < last; ++i) most = std::max(most, std::fabs(wide.values[j][i]));
            CHECK(narrow.absmax[j][first / static_cast<size_t>(block)] == most);
            const float inverse = 1.0f / std::max(most, 1e-38f);
            for (size_t i = first; i < last; ++i)
              CHECK(narrow.codes[j][i] == tree.code_of(wide.values[j][i] * inverse));
          }
        }
      }
    }
  }
}

TEST(adam_is_its_formula) {
  const std::vector<float> p = nasty::make("random", 1000), g = nasty::make("plateaus", 1000);
  Tensor t(p, g, 2, 256);
  Case c = cases[0];
  std::vector<double> want(p.begin(), p.end()), m(1000), v(1000);
  for (int s = 1; s <= 5; ++s) {
    c.values[5] = s;
    step(c, t, false, 256, 2);
    for (size_t i = 0; i < p.size(); ++i) {
      m[i] = 0.9 * m[i] + 0.1 * g[i];
      v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
      want[i] = want[i] * (1 - kLr * 0.1) -
                kLr * m[i] / (1 - std::pow(0.9, s)) / (std::sqrt(v[i] / (1 - std::pow(0.999, s))) + 1e-8);
      CHECK(std::fabs(t.p[i] - want[i]) < 2e-6);
    }
  }
}

TEST(steps_do_not_depend_on_threads) {
  for (const Case& c : cases) {
    for (const bool eight : {false, true}) {
      const std::vector<float> p = nasty::make("random", 150000), g = nasty::make("random", 150000);
      Tensor one(p, g, moments_of(c.rule), 256), four(p, g, moments_of(c.rule), 256);
      for (int s = 0; s < 3; ++s) {
        step(c, one, eight, 256, 1);
        step(c, four, eight, 256, 4);
      }
      CHECK(one.p == four.p);
      CHECK(one.codes == four.codes && one.values == four.values && one.absmax == four.absmax);
    }
  }
}

TEST(gradients_of_zero_leave_zero_moments) {
  for (const Case& c : cases) {
    const std::vector<float> p = nasty::make("random", 300), g(300);
    Tensor t(p, g, moments_of(c.rule), 64);
    step(c, t, true, 64, 1);
    for (const std::vector<float>& absmax : t.absmax)
      for (const float most : absmax)
        CHECK(c.rule == OptimizerRule::sgd || c.rule == OptimizerRule::lars || most == 0 ||
              c.rule == OptimizerRule::rmsprop || c.rule == OptimizerRule::adagrad);
    for (const float value : t.p) CHECK(std::isfinite(value));
  }
}

TEST(norms_of_gradients) {
  std::vector<float> x = nasty::make("random", 100003), none;
  double want = 0;
  for (const float value : x) want += static_cast<double>(value) * value;
  const Reals tensors[] = {{x.data(), Real::f32}, {none.data(), Real::f32}};
  const int64_t numel[] = {static_cast<int64_t>(x.size()), 0};
  double one[2], four[2];
  gradient_norms(tensors, numel, 2, one, 1);
  gradient_norms(tensors, numel, 2, four, 4);
  CHECK(std::fabs(one[0] - want) < 1e-9 * want && one[1] == 0);
  CHECK(one[0] == four[0]);
  x[77777] = std::numeric_limits<float>::infinity();
  gradient_norms(tensors, numel, 2, one, 2);
  CHECK(!std::isfinite(one[0]));
  x[77777] = 3e38f;  // its square is no float32, but a double
  gradient_norms(tensors, numel, 2, one, 2);
  CHECK(std::isfinite(one[0]));
}
