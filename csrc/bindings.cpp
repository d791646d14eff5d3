// The only file that knows Python. Tensors arrive as DLPack arrays, so nothing here is compiled against torch; shapes
// and types are checked by the caller (lilliput/kernels), sizes are checked again here because a wrong one would crash.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops/ops.h"

namespace nb = nanobind;
using namespace lilliput;

namespace {

template <typename T>
using Flat = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
using Any = nb::ndarray<nb::c_contig, nb::device::cpu>;
template <typename T>
using Maybe = std::optional<Flat<T>>;

void need(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

int64_t size(const auto& array) {
  return static_cast<int64_t>(array.size());
}

int64_t blocks_in(int64_t numel, int64_t block) {
  return (numel + block - 1) / block;
}

Reals reals(const Any& array) {
  const nb::dlpack::dtype type = array.dtype();
  if (type == nb::dtype<float>()) return {array.data(), Real::f32};
  need(type.bits == 16 && type.lanes == 1, "reals must be float32, float16 or bfloat16");
  if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) return {array.data(), Real::bf16};
  need(type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float), "reals must be float32, float16 or bfloat16");
  return {array.data(), Real::f16};
}

// The constants of the blocks: float32, or uint8 with the list of values, scales and offset of double quantization.
Blocks4 blocks(const Flat<const uint8_t>& codes, const Flat<const float>& codebook, int64_t numel, int64_t block,
               const Any& absmax, const Maybe<const float>& book, const Maybe<const float>& scale,
               const Maybe<const float>& offset) {
  need(block > 0 && block <= max_block && block % 2 == 0, "block must be even and at most 4096");
  need(size(codes) == (numel + 1) / 2, "codes: wrong size");
  need(size(codebook) == 16, "codebook: 16 values");
  need(size(absmax) == blocks_in(numel, block), "absmax: wrong size");
  Blocks4 w{codes.data(), codebook.data(), numel, block, nullptr, nullptr, nullptr, nullptr, 0.0f};
  if (!scale) {
    need(absmax.dtype() == nb::dtype<float>(), "absmax must be float32");
    w.absmax = static_cast<const float*>(absmax.data());
    return w;
  }
  need(absmax.dtype() == nb::dtype<uint8_t>(), "absmax must be uint8 with double quantization");
  need(book && size(*book) == 256 && offset && size(*offset) == 1, "double quantization: values or offset missing");
  need(size(*scale) == blocks_in(size(absmax), absmax_block), "absmax_scale: wrong size");
  w.absmax8 = static_cast<const uint8_t*>(absmax.data());
  w.absmax_book = book->data();
  w.absmax_scale = scale->data();
  w.absmax_offset = *offset->data();
  return w;
}

int64_t py_quantize_4bit(const Any& x, const Flat<const float>& codebook, int64_t block, Flat<uint8_t> codes,
                         Flat<float> absmax, int threads) {
  const int64_t numel = size(x);
  need(block > 0 && block <= max_block && block % 2 == 0, "block must be even and at most 4096");
  need(size(codebook) == 16 && size(codes) == (numel + 1) / 2, "codebook or codes: wrong size");
  need(size(absmax) == blocks_in(numel, block), "absmax: wrong size");
  const Reals from = reals(x);
  nb::gil_scoped_release released;
  return quantize_4bit(from, numel, block, codebook.data(), codes.data(), absmax.data(), threads);
}

void py_dequantize_4bit(const Flat<const uint8_t>& codes, const Flat<const float>& codebook, int64_t block,
                        const Any& absmax, const Maybe<const float>& book, const Maybe<const float>& scale,
                        const Maybe<const float>& offset, const Any& out, int threads) {
  const Blocks4 w = blocks(codes, codebook, size(out), block, absmax, book, scale, offset);
  const Reals to = reals(out);
  nb::gil_scoped_release released;
  dequantize_4bit(w, to, threads);
}

// left [rows, rank] and right, [columns, rank] or, `upright`, [rank, columns].
LowRank low_rank(const Maybe<const float>& left, const Maybe<const float>& right, int64_t rows, int64_t columns,
                 bool upright) {
  if (!left) return {};
  need(right && left->ndim() == 2 && right->ndim() == 2, "update: two matrices");
  const auto rank = static_cast<int64_t>(left->shape(1));
  need(static_cast<int64_t>(left->shape(0)) == rows, "update: wrong number of rows");
  need(static_cast<int64_t>(right->shape(upright ? 0 : 1)) == rank && size(*right) == rank * columns,
       "update: wrong size");
  return {left->data(), right->data(), rank, upright ? columns : 1, upright ? 1 : rank};
}

void py_linear_4bit(const Flat<const float>& x, const Flat<const uint8_t>& codes, const Flat<const float>& codebook,
                    int64_t block, const Any& absmax, const Maybe<const float>& book, const Maybe<const float>& scale,
                    const Maybe<const float>& offset, const Maybe<const float>& bias, const Maybe<const float>& left,
                    const Maybe<const float>& right, Flat<float> y, int threads, bool exact) {
  need(x.ndim() == 2 && y.ndim() == 2 && x.shape(0) == y.shape(0), "x and y must be matrices of as many rows");
  const auto rows = static_cast<int64_t>(x.shape(0)), k = static_cast<int64_t>(x.shape(1));
  const auto n = static_cast<int64_t>(y.shape(1));
  const Blocks4 w = blocks(codes, codebook, n * k, block, absmax, book, scale, offset);
  need(!bias || size(*bias) == n, "bias: wrong size");
  const LowRank update = low_rank(left, right, rows, n, false);
  nb::gil_scoped_release released;
  linear_4bit(w, x.data(), rows, k, n, bias ? bias->data() : nullptr, update, y.data(), threads, exact);
}

void py_linear_4bit_backward(const Flat<const float>& gy, const Flat<const uint8_t>& codes,
                             const Flat<const float>& codebook, int64_t block, const Any& absmax,
                             const Maybe<const float>& book, const Maybe<const float>& scale,
                             const Maybe<const float>& offset, const Maybe<const float>& left,
                             const Maybe<const float>& right, Flat<float> gx, int threads) {
  need(gy.ndim() == 2 && gx.ndim() == 2 && gy.shape(0) == gx.shape(0), "gy and gx must be matrices of as many rows");
  const auto rows = static_cast<int64_t>(gy.shape(0)), n = static_cast<int64_t>(gy.shape(1));
  const auto k = static_cast<int64_t>(gx.shape(1));
  const Blocks4 w = blocks(codes, codebook, n * k, block, absmax, book, scale, offset);
  const LowRank update = low_rank(left, right, rows, k, true);
  nb::gil_scoped_release released;
  linear_4bit_backward(w, gy.data(), rows, k, n, update, gx.data(), threads);
}

// Codes [rows, columns] and as many absmax as rows.
Rows8 rows8(const Flat<const int8_t>& codes, const Flat<const float>& absmax) {
  need(codes.ndim() == 2 && codes.shape(0) == absmax.size(), "codes must be a matrix with an absmax for each row");
  return {codes.data(), absmax.data(), static_cast<int64_t>(codes.shape(1))};
}

int64_t py_quantize_int8(const Any& x, Flat<int8_t> codes, Flat<float> absmax, int threads) {
  need(x.ndim() == 2 && codes.size() == x.size() && absmax.size() == x.shape(0), "x, codes or absmax: wrong size");
  const auto rows = static_cast<int64_t>(x.shape(0)), columns = static_cast<int64_t>(x.shape(1));
  const Reals from = reals(x);
  nb::gil_scoped_release released;
  return quantize_int8(from, rows, columns, codes.data(), absmax.data(), threads);
}

void py_dequantize_int8(const Flat<const int8_t>& codes, const Flat<const float>& absmax, const Any& out, int threads) {
  const Rows8 w = rows8(codes, absmax);
  need(out.size() == codes.size(), "out: wrong size");
  const Reals to = reals(out);
  nb::gil_scoped_release released;
  dequantize_int8(w, size(absmax), to, threads);
}

void py_linear_int8(const Flat<const float>& x, const Flat<const int8_t>& codes, const Flat<const float>& absmax,
                    const Maybe<const float>& bias, double threshold, const Maybe<const float>& left,
                    const Maybe<const float>& right, Flat<float> y, int threads) {
  need(x.ndim() == 2 && y.ndim() == 2 && x.shape(0) == y.shape(0), "x and y must be matrices of as many rows");
  const auto rows = static_cast<int64_t>(x.shape(0)), k = static_cast<int64_t>(x.shape(1));
  const auto n = static_cast<int64_t>(y.shape(1));
  const Rows8 w = rows8(codes, absmax);
  need(w.columns == k && size(absmax) == n, "codes: wrong size");
  need(k < int64_t{1} << 17, "a row has too many numbers for sums of 32 bits");
  need(!bias || size(*bias) == n, "bias: wrong size");
  const LowRank update = low_rank(left, right, rows, n, false);
  nb::gil_scoped_release released;
  linear_int8(w, x.data(), rows, k, n, bias ? bias->data() : nullptr, static_cast<float>(threshold), update, y.data(),
              threads);
}

void py_linear_int8_backward(const Flat<const float>& gy, const Flat<const int8_t>& codes,
                             const Flat<const float>& absmax, const Maybe<const float>& left,
                             const Maybe<const float>& right, Flat<float> gx, int threads) {
  need(gy.ndim() == 2 && gx.ndim() == 2 && gy.shape(0) == gx.shape(0), "gy and gx must be matrices of as many rows");
  const auto rows = static_cast<int64_t>(gy.shape(0)), n = static_cast<int64_t>(gy.shape(1));
  const auto k = static_cast<int64_t>(gx.shape(1));
  const Rows8 w = rows8(codes, absmax);
  need(w.columns == k && size(absmax) == n, "codes: wrong size");
  const LowRank update = low_rank(left, right, rows, k, true);
  nb::gil_scoped_release released;
  linear_int8_backward(w, gy.data(), rows, k, n, update, gx.data(), threads);
}

// Codes of [rows, columns] in groups of `group` numbers (0: a whole row), with a scale and, maybe, a zero each.
Groups groups(const Flat<const uint8_t>& codes, int bits, int64_t group, const Any& scale,
              const Maybe<const uint8_t>& zero, int64_t rows, int64_t columns) {
  need(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits: 2, 3, 4 or 8");
  need(group >= 0 && group % run_length == 0, "group must be a multiple of 32");
  const int64_t count = group == 0 ? 1 : blocks_in(columns, group), runs = blocks_in(columns, run_length);
  need(size(codes) == rows * runs * 4 * bits, "codes: wrong size");
  need(size(scale) == rows * count, "scale: wrong size");
  need(!zero || size(*zero) == rows * count, "zero: wrong size");
  const int64_t whole = std::max<int64_t>(runs, 1) * run_length;
  return {codes.data(), bits, columns, group == 0 ? whole : group, count, reals(scale), zero ? zero->data() : nullptr};
}

void py_dequantize_grouped(const Flat<const uint8_t>& codes, int bits, int64_t group, const Any& scale,
                           const Maybe<const uint8_t>& zero, const Any& out, int threads) {
  need(out.ndim() == 2, "out must be a matrix");
  const auto rows = static_cast<int64_t>(out.shape(0)), columns = static_cast<int64_t>(out.shape(1));
  const Groups w = groups(codes, bits, group, scale, zero, rows, columns);
  const Reals to = reals(out);
  nb::gil_scoped_release released;
  dequantize_grouped(w, rows, to, threads);
}

void py_linear_grouped(const Flat<const float>& x, const Flat<const uint8_t>& codes, int bits, int64_t group,
                       const Any& scale, const Maybe<const uint8_t>& zero, const Maybe<const float>& bias,
                       const Maybe<const float>& left, const Maybe<const float>& right, Flat<float> y, int threads,
                       bool exact) {
  need(x.ndim() == 2 && y.ndim() == 2 && x.shape(0) == y.shape(0), "x and y must be matrices of as many rows");
  const auto rows = static_cast<int64_t>(x.shape(0)), k = static_cast<int64_t>(x.shape(1));
  const auto n = static_cast<int64_t>(y.shape(1));
  const Groups w = groups(codes, bits, group, scale, zero, n, k);
  need(!bias || size(*bias) == n, "bias: wrong size");
  const LowRank update = low_rank(left, right, rows, n, false);
  nb::gil_scoped_release released;
  linear_grouped(w, x.data(), rows, n, bias ? bias->data() : nullptr, update, y.data(), threads, exact);
}

void py_linear_grouped_backward(const Flat<const float>& gy, const Flat<const uint8_t>& codes, int bits, int64_t group,
                                const Any& scale, const Maybe<const uint8_t>& zero, const Maybe<const float>& left,
                                const Maybe<const float>& right, Flat<float> gx, int threads) {
  need(gy.ndim() == 2 && gx.ndim() == 2 && gy.shape(0) == gx.shape(0), "gy and gx must be matrices of as many rows");
  const auto rows = static_cast<int64_t>(gy.shape(0)), n = static_cast<int64_t>(gy.shape(1));
  const auto k = static_cast<int64_t>(gx.shape(1));
  const Groups w = groups(codes, bits, group, scale, zero, n, k);
  const LowRank update = low_rank(left, right, rows, k, true);
  nb::gil_scoped_release released;
  linear_grouped_backward(w, gy.data(), rows, n, update, gx.data(), threads);
}

void py_swiglu(const Any& gate, const Any& up, const Any& out, int threads) {
  const int64_t numel = size(gate);
  need(size(up) == numel && size(out) == numel, "gate, up and out must be of one size");
  const Reals g = reals(gate), u = reals(up), to = reals(out);
  nb::gil_scoped_release released;
  swiglu(g, u, numel, to, threads);
}

void py_swiglu_backward(const Any& grad, const Any& gate, const Any& up, const Any& to_gate, const Any& to_up,
                        int threads) {
  const int64_t numel = size(grad);
  need(size(gate) == numel && size(up) == numel, "grad, gate and up must be of one size");
  need(size(to_gate) == numel && size(to_up) == numel, "grad, to_gate and to_up must be of one size");
  const Reals y = reals(grad), g = reals(gate), u = reals(up), of_gate = reals(to_gate), of_up = reals(to_up);
  nb::gil_scoped_release released;
  swiglu_backward(y, g, u, numel, of_gate, of_up, threads);
}

// Of [..., columns].
int64_t rows_of(const Any& x, int64_t columns) {
  need(x.ndim() >= 1 && static_cast<int64_t>(x.shape(x.ndim() - 1)) == columns, "x and weight must be of one width");
  return columns == 0 ? 0 : size(x) / columns;
}

void py_rms_norm(const Any& x, const Flat<const float>& weight, double eps, const Any& y, int threads) {
  const int64_t columns = size(weight), rows = rows_of(x, columns);
  need(size(y) == size(x), "x and y must be of one size");
  const Reals from = reals(x), to = reals(y);
  nb::gil_scoped_release released;
  rms_norm(from, weight.data(), static_cast<float>(eps), rows, columns, to, threads);
}

void py_rms_norm_backward(const Any& grad, const Any& x, const Flat<const float>& weight, double eps, const Any& to_x,
                          Maybe<float> to_weight, int threads) {
  const int64_t columns = size(weight), rows = rows_of(x, columns);
  need(size(grad) == size(x) && size(to_x) == size(x), "grad, x and to_x must be of one size");
  need(!to_weight || size(*to_weight) == columns, "to_weight: wrong size");
  const Reals y = reals(grad), from = reals(x), to = reals(to_x);
  nb::gil_scoped_release released;
  rms_norm_backward(y, from, weight.data(), static_cast<float>(eps), rows, columns, to,
                    to_weight ? to_weight->data() : nullptr, threads);
}

void py_cross_entropy(Flat<float> z, const Flat<const int64_t>& labels, bool gradient, Flat<float> losses,
                      int threads) {
  need(z.ndim() == 2 && z.shape(1) > 0, "z must be a matrix with columns");
  const auto rows = static_cast<int64_t>(z.shape(0)), columns = static_cast<int64_t>(z.shape(1));
  need(size(labels) == rows && size(losses) == rows, "labels or losses: wrong size");
  for (int64_t row = 0; row < rows; ++row)
    need(labels.data()[row] >= 0 && labels.data()[row] < columns, "labels: out of range");
  nb::gil_scoped_release released;
  cross_entropy(z.data(), rows, columns, labels.data(), gradient, losses.data(), threads);
}

OptimizerRule optimizer_rule(const std::string& name) {
  static const char* const names[] = {"adam", "sgd", "lion", "rmsprop", "adagrad", "lamb", "lars", "ademamix"};
  for (int i = 0; i < 8; ++i)
    if (name == names[i]) return static_cast<OptimizerRule>(i);
  throw std::invalid_argument("unknown optimizer rule");
}

// Long lists of tensors come as numbers, three a tensor: address, size and type (0 float32, 1 float16, 2 bfloat16, 3
// uint8). A DLPack array takes 3 us to cross, and a model's adapters have 420 tensors with five more each. The caller
// keeps the tensors alive and has them contiguous.
constexpr int64_t kBytes = 3;

struct Addressed {
  const std::vector<int64_t>& numbers;

  explicit Addressed(const std::vector<int64_t>& numbers) : numbers(numbers) {
    need(numbers.size() % 3 == 0, "a list of tensors has three numbers a tensor");
    for (size_t i = 0; i < count(); ++i) {
      need(size(i) >= 0 && (numbers[3 * i] != 0 || size(i) == 0), "a tensor without memory");
      need(type(i) >= 0 && type(i) <= kBytes, "a tensor of an unknown type");
    }
  }
  size_t count() const { return numbers.size() / 3; }
  void* data(size_t i) const { return reinterpret_cast<void*>(numbers[3 * i]); }
  int64_t size(size_t i) const { return numbers[3 * i + 1]; }
  int64_t type(size_t i) const { return numbers[3 * i + 2]; }
  Reals reals(size_t i) const {
    need(type(i) != kBytes, "reals must be float32, float16 or bfloat16");
    constexpr Real kinds[] = {Real::f32, Real::f16, Real::bf16};
    return {data(i), kinds[type(i)]};
  }
};

// moments and absmax are flat: those of the first parameter, then those of the next; absmax is empty for float32
// moments.
void py_optimizer_step(const std::string& name, const std::vector<int64_t>& param_list,
                       const std::vector<int64_t>& grad_list, const std::vector<int64_t>& moment_list,
                       const std::vector<int64_t>& absmax_list, const std::vector<double>& values,
                       const Flat<const float>& signed_book, const Flat<const float>& unsigned_book, int64_t block,
                       int threads) {
  const Addressed params(param_list), grads(grad_list), moments(moment_list), absmax(absmax_list);
  const OptimizerRule rule = optimizer_rule(name);
  const auto each = static_cast<size_t>(moments_of(rule));
  const bool eight = absmax.count() > 0;
  need(block >= 64 && block <= max_block && block % 64 == 0, "block: a multiple of 64, at most 4096");
  need(static_cast<int>(values.size()) == values_of(rule), "hyper-parameters: wrong number");
  need(size(signed_book) == 256 && size(unsigned_book) == 256, "books: 256 values");
  need(grads.count() == params.count() && moments.count() == each * params.count(), "lists: wrong lengths");
  need(!eight || absmax.count() == moments.count(), "absmax: wrong length");
  std::vector<OptimizerTensor> tensors;
  for (size_t i = 0; i < params.count(); ++i) {
    const int64_t numel = params.size(i);
    need(grads.size(i) == numel, "a gradient has another size than its parameter");
    OptimizerTensor tensor{params.reals(i), grads.reals(i), numel, {}, {}};
    for (size_t j = 0; j < each; ++j) {
      const size_t at = i * each + j;
      need(moments.size(at) == numel, "a moment has another size than its parameter");
      need(moments.type(at) == (eight ? kBytes : 0), "moments: wrong type");
      tensor.moments[j] = moments.data(at);
      if (!eight) continue;
      need(absmax.type(at) == 0 && absmax.size(at) == blocks_in(numel, block), "absmax: wrong");
      tensor.absmax[j] = static_cast<float*>(absmax.data(at));
    }
    if (numel > 0) tensors.push_back(tensor);
  }
  nb::gil_scoped_release released;
  const DynamicTree trees[] = {{signed_book.data(), true}, {unsigned_book.data(), false}};
  optimizer_step(rule, values.data(), tensors.data(), static_cast<int64_t>(tensors.size()), block, trees, threads);
}

void py_gradient_norms(const std::vector<int64_t>& grad_list, Flat<double> sums, int threads) {
  const Addressed grads(grad_list);
  need(sums.size() == grads.count(), "sums: wrong size");
  std::vector<Reals> tensors;
  std::vector<int64_t> numel;
  for (size_t i = 0; i < grads.count(); ++i) {
    tensors.push_back(grads.reals(i));
    numel.push_back(grads.size(i));
  }
  nb::gil_scoped_release released;
  gradient_norms(tensors.data(), numel.data(), static_cast<int64_t>(numel.size()), sums.data(), threads);
}

GptqGrid gptq_grid(const Flat<const float>& scale, const Flat<const float>& zero, const Flat<const int32_t>& group,
                   int64_t rows, int64_t columns, int bits) {
  need(scale.ndim() == 2 && size(scale) == size(zero), "scale and zero: matrices of one shape");
  need(static_cast<int64_t>(scale.shape(0)) == rows && size(group) == columns, "scale or group: wrong size");
  need(bits >= 1 && bits <= 8, "bits: 1 to 8");
  const auto groups = static_cast<int64_t>(scale.shape(1));
  for (int64_t i = 0; i < columns; ++i) need(group.data()[i] >= 0 && group.data()[i] < groups, "group: none such");
  return {scale.data(), zero.data(), groups, group.data(), static_cast<float>((1 << bits) - 1)};
}

void py_gptq_block(const Flat<const float>& w, const Flat<const float>& upper, const Flat<const float>& scale,
                   const Flat<const float>& zero, const Flat<const int32_t>& group, int bits, Flat<uint8_t> codes,
                   Flat<float> errors, int threads) {
  need(w.ndim() == 2, "w: a matrix");
  const auto rows = static_cast<int64_t>(w.shape(0)), columns = static_cast<int64_t>(w.shape(1));
  need(columns <= max_gptq_block && size(upper) == columns * columns, "too many columns, or upper: wrong size");
  need(size(codes) == size(w) && size(errors) == size(w), "codes or errors: wrong size");
  const GptqGrid grid = gptq_grid(scale, zero, group, rows, columns, bits);
  nb::gil_scoped_release released;
  gptq_block(grid, w.data(), rows, columns, upper.data(), codes.data(), errors.data(), threads);
}

void py_gptq_descend(const Flat<const float>& hessian, const Flat<const float>& scale, const Flat<const float>& zero,
                     const Flat<const int32_t>& group, int bits, int sweeps, Flat<uint8_t> codes, Flat<float> residual,
                     int threads) {
  need(codes.ndim() == 2 && size(residual) == size(codes), "codes and residual: matrices of one shape");
  const auto rows = static_cast<int64_t>(codes.shape(0)), columns = static_cast<int64_t>(codes.shape(1));
  need(size(hessian) == columns * columns, "hessian: wrong size");
  const GptqGrid grid = gptq_grid(scale, zero, group, rows, columns, bits);
  nb::gil_scoped_release released;
  gptq_descend(grid, hessian.data(), rows, columns, sweeps, codes.data(), residual.data(), threads);
}

void py_search_grid(const Flat<const float>& w, const Flat<const float>& importance, int64_t group, int bits,
                    bool symmetric, const std::vector<float>& shares, Flat<float> scale, Flat<float> zero,
                    int threads) {
  need(w.ndim() == 2 && group > 0 && bits >= 1 && bits <= 8, "w: a matrix; group: positive; bits: 1 to 8");
  const auto rows = static_cast<int64_t>(w.shape(0)), columns = static_cast<int64_t>(w.shape(1));
  need(size(importance) == columns, "importance: wrong size");
  need(size(scale) == rows * blocks_in(columns, group) && size(zero) == size(scale), "scale or zero: wrong size");
  const GridSearch search{shares.data(), static_cast<int64_t>(shares.size()), static_cast<float>((1 << bits) - 1),
                          symmetric};
  nb::gil_scoped_release released;
  search_grid(search, w.data(), importance.data(), rows, columns, group, scale.data(), zero.data(), threads);
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Lilliput's compiled core; called by lilliput.kernels only.";
  m.def("instruction_set", [] { return isa_name(chosen_isa()); });
  m.def("supported_instruction_set", [] { return isa_name(supported_isa()); });
  m.def("quantize_4bit", &py_quantize_4bit);
  m.def("dequantize_4bit", &py_dequantize_4bit, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg());
  m.def("linear_4bit", &py_linear_4bit, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg());
  m.def("linear_4bit_backward", &py_linear_4bit_backward, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg());
  m.def("quantize_int8", &py_quantize_int8);
  m.def("dequantize_int8", &py_dequantize_int8);
  m.def("linear_int8", &py_linear_int8, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none(),
        nb::arg().none(), nb::arg(), nb::arg());
  m.def("linear_int8_backward", &py_linear_int8_backward, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg().none(), nb::arg(), nb::arg());
  m.def("dequantize_grouped", &py_dequantize_grouped, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg(), nb::arg());
  m.def("linear_grouped", &py_linear_grouped, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg());
  m.def("linear_grouped_backward", &py_linear_grouped_backward, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg());
  m.def("swiglu", &py_swiglu);
  m.def("swiglu_backward", &py_swiglu_backward);
  m.def("rms_norm", &py_rms_norm);
  m.def("cross_entropy", &py_cross_entropy);
  m.def("optimizer_step", &py_optimizer_step);
  m.def("gradient_norms", &py_gradient_norms);
  m.def("gptq_block", &py_gptq_block);
  m.def("gptq_descend", &py_gptq_descend);
  m.def("search_grid", &py_search_grid);
  m.def("rms_norm_backward", &py_rms_norm_backward, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg());
}
