// The kernels of one instruction set as a row of function pointers, and the operations that call them.
// Kernels (*.simd.cpp) are compiled once per instruction set and work on a range in one thread; operations (the other
// .cpp files) are compiled once, cut the work into tasks and own the scratch memory.
#pragma once

#include <cstdint>

#include "core/blocks.h"
#include "core/cpu.h"
#include "ops/dynamic_tree.h"

namespace lilliput {

// The product kernel's tile: `rows` x `columns` sums stay in registers.
struct Tile {
  int rows, columns;
};

// The optimizers of kernels/optimizer_rules.py, which has their equations.
enum class OptimizerRule { adam, sgd, lion, rmsprop, adagrad, lamb, lars, ademamix };

// A rule's hyper-parameters as its arithmetic takes them, rounded once to float; each rule reads some of them.
struct Hyper {
  float grad_scale, decay = 0, keep = 1;  // decay: added to the gradient, times p; keep: what p is multiplied by
  float beta1 = 0, rest1 = 0, beta2 = 0, rest2 = 0, beta3 = 0, rest3 = 0;
  // With c = sqrt(1 - b2^t), which Adam's quotient is multiplied by above and below: eps is c times the equations' in
  // Adam, LAMB and AdEMAMix, correction is c / (1 - b1^t); rate is what the update is multiplied by, with its sign.
  float eps = 0, correction = 1, alpha = 0, rate = 0;
  bool nesterov = false;
};

// A parameter with its gradient and moments, flat: moments are float32, or codes with an absmax per block.
struct OptimizerTensor {
  Reals p, g;
  int64_t numel;
  void* moments[3];
  float* absmax[3];  // null: float32
};

// The grids of a weight's rows, scale * (code - zero) [rows, groups], and the group of each column at hand.
struct GptqGrid {
  const float *scale, *zero;
  int64_t groups;
  const int32_t* group;
  float top;  // the largest code
};

// The shares of a group's range that are tried for its grid.
struct GridSearch {
  const float* shares;
  int64_t count;
  float top;
  bool symmetric;
};

struct Kernels {
  // blockwise.simd.cpp. Blocks first..last-1 of x; returns the first block that holds NaN or Inf, or -1.
  int64_t (*quantize)(Reals x, int64_t numel, int64_t block, const float* bounds, const float* order, int64_t first,
                      int64_t last, uint8_t* codes, float* absmax);
  // Numbers first..last-1 of flat storage to out[0..]; `first` is a multiple of the block.
  void (*dequantize)(const Blocks4& w, int64_t first, int64_t last, Reals out);

  // linear_4bit.simd.cpp. W is [rows of W, columns], columns = the length of x's rows.
  // x [rows, columns] reordered for few_rows; out has rows * columns floats, and few_rows_more.
  void (*split_pairs)(const Blocks4& w, const float* x, int64_t rows, int64_t columns, float* out);
  // y[m, n] = bias[n] + sum_k x[m, k] W[n, k] for n in first..last-1 and m in 0..rows-1, rows <= few_rows_limit.
  void (*few_rows)(const Blocks4& w, int64_t columns, const float* x, const float* pairs, int rows, const float* bias,
                   int64_t first, int64_t last, float* y, int64_t y_stride, float* scratch);
  // linear_4bit_fixed.simd.cpp, or null where few_rows is quicker: one row of x in 16-bit fixed point. fix_row writes
  // `columns` numbers and a scale for each 64 of them, or says false: few_rows must do it.
  bool (*fix_row)(const Blocks4& w, const float* x, int64_t columns, int16_t* fixed, float* scales);
  void (*one_row_fixed)(const Blocks4& w, int64_t columns, const int16_t* x, const float* x_scales, const float* bias,
                        int64_t first, int64_t last, float* y, float* scratch);
  // Panels of the product's left operand: tile.rows rows of x interleaved, [panels][depth][tile.rows], zero-padded.
  void (*pack_left)(const float* x, int64_t x_stride, int64_t rows, int64_t depth, float* panels);
  // Panels of the right operand, [panels][depth][tile.columns], zero-padded: for y = x W^T the columns are rows n of W
  // and the depth runs along k; for gx = gy W the columns are columns k of W and the depth runs along n.
  void (*pack_forward)(const Blocks4& w, int64_t columns, int64_t n, int64_t n_count, int64_t k, int64_t k_count,
                       float* panels);
  void (*pack_backward)(const Blocks4& w, int64_t columns, int64_t k, int64_t k_count, int64_t n, int64_t n_count,
                        float* panels);
  // c[rows, columns] (+)= left panels . right panels; `start` [columns] or null is what the sums start from when !add.
  void (*multiply)(const float* left, const float* right, int64_t rows, int64_t columns, int64_t depth, bool add,
                   const float* start, float* c, int64_t c_stride);
  Tile tile;

  // linear_grouped.simd.cpp. Rows first..last-1 of W to out [last - first, columns].
  void (*dequantize_grouped)(const Groups& w, int64_t first, int64_t last, Reals out);
  // As few_rows; rows of x are `stride` numbers apart, and zero behind their last column up to a whole run.
  void (*few_rows_grouped)(const Groups& w, const float* x, int64_t stride, int rows, const float* bias, int64_t first,
                           int64_t last, float* y, int64_t y_stride, float* scratch);
  // As pack_forward and pack_backward; k is a multiple of run_length in the former.
  void (*pack_forward_grouped)(const Groups& w, int64_t n, int64_t n_count, int64_t k, int64_t k_count, float* panels);
  void (*pack_backward_grouped)(const Groups& w, int64_t k, int64_t k_count, int64_t n, int64_t n_count, float* panels);
  // linear_grouped_fixed.simd.cpp, or null: one row of x in 16-bit fixed point, as fix_row and one_row_fixed. There is
  // a scale, and 8 sums of the fixed numbers, for each span of a group.
  bool (*fix_row_grouped)(const Groups& w, const float* x, int16_t* fixed, float* scales, int32_t* sums);
  void (*one_row_grouped)(const Groups& w, const int16_t* x, const float* x_scales, const int32_t* x_sums,
                          const float* bias, int64_t first, int64_t last, float* y, float* scratch);

  // linear_int8.simd.cpp. Rows first..last-1 of x [rows, columns]; returns the first that holds NaN or Inf, or -1.
  int64_t (*quantize_rows)(Reals x, int64_t columns, int64_t first, int64_t last, int8_t* codes, float* absmax);
  void (*dequantize_rows)(const Rows8& w, int64_t first, int64_t last, Reals out);
  // keep[k] becomes 0 where a row of x [rows, columns] has a finite |number| > threshold in column k, first <= k <
  // last.
  void (*clear_outliers)(const float* x, int64_t rows, int64_t columns, float threshold, int64_t first, int64_t last,
                         int32_t* keep);
  // A row of x as codes up to `largest`, 0 where keep (or null) is 0 and behind the last column; returns its absmax /
  // largest.
  float (*round_row)(const float* x, int64_t columns, const int32_t* keep, float largest, int64_t padded,
                     int16_t* codes);
  // As pack_forward and pack_backward; the former of pairs of 16-bit codes, k an even number.
  void (*pack_pairs)(const Rows8& w, int64_t n, int64_t n_count, int64_t k, int64_t k_count, int32_t* panels);
  void (*pack_backward_int8)(const Rows8& w, int64_t k, int64_t k_count, int64_t n, int64_t n_count, float* panels);

  // linear_int8_products.simd.cpp: sums of products of codes in 32 bits, and what they stand for.
  void (*few_rows_int8)(const Rows8& w, const int16_t* x, int64_t stride, int rows, int64_t first, int64_t last,
                        int32_t* sums, int64_t sums_stride);
  void (*multiply_pairs)(const int32_t* left, const int32_t* right, int64_t rows, int64_t columns, int64_t depth,
                         bool add, int32_t* c, int64_t c_stride);
  void (*finish_int8)(int64_t rows, int64_t columns, const float* scales, const float* column_scales, const float* bias,
                      int32_t* c, int64_t c_stride);

  // swiglu.simd.cpp. Numbers first..last-1, each tensor of its own kind.
  void (*swiglu)(Reals gate, Reals up, int64_t first, int64_t last, Reals out);
  void (*swiglu_backward)(Reals grad, Reals gate, Reals up, int64_t first, int64_t last, Reals to_gate, Reals to_up);
  void (*exp)(const float* x, int64_t count, float* out);  // simd.h's exp, for its test

  // rms_norm.simd.cpp. Rows first..last-1 of [rows, columns], columns > 0.
  void (*rms_norm)(Reals x, const float* weight, float eps, int64_t columns, int64_t first, int64_t last, Reals y);
  // Adds these rows' part to to_weight [columns], unless it is null.
  void (*rms_norm_backward)(Reals grad, Reals x, const float* weight, float eps, int64_t columns, int64_t first,
                            int64_t last, Reals to_x, float* to_weight);

  // optimizer.simd.cpp. Numbers first..last-1, `first` a multiple of the block; trees: signed, unsigned. Where `norms`
  // is given nothing is written but the sums of squares of p and of what LAMB or LARS measure beside it.
  void (*optimizer_step)(OptimizerRule rule, const Hyper& hyper, const OptimizerTensor& tensor, int64_t block,
                         const DynamicTree* trees, int64_t first, int64_t last, double* norms);
  // 4 vectors of numbers (64 are enough) in shares of absmax, for its test.
  void (*dynamic_codes)(const float* x, float absmax, const DynamicTree& tree, uint8_t* codes);
  double (*sum_of_squares)(Reals x, int64_t first, int64_t last);  // NaN or Inf where a number is not finite

  // gptq.simd.cpp. Rows first..last-1; arguments as in the operations below.
  void (*gptq_block)(const GptqGrid& grid, const float* w, int64_t columns, const float* upper, int64_t first,
                     int64_t last, uint8_t* codes, float* errors);
  void (*gptq_descend)(const GptqGrid& grid, const float* hessian, int64_t columns, int sweeps, int64_t first,
                       int64_t last, uint8_t* codes, float* residual);
  void (*search_grid)(const GridSearch& search, const float* w, const float* importance, int64_t columns, int64_t group,
                      int64_t first, int64_t last, float* scale, float* zero);

  // cross_entropy.simd.cpp. Rows first..last-1 of [rows, columns], labels in 0..columns-1.
  void (*cross_entropy)(float* z, int64_t columns, const int64_t* labels, int64_t first, int64_t last, bool gradient,
                        float* losses);
};

constexpr int64_t max_gptq_block = 512;  // columns
constexpr int few_rows_limit = 8;
constexpr int64_t few_rows_more = 128;  // floats: scratch memory and reordered rows are padded by so many
constexpr int64_t max_block = 4096;     // numbers; kernels keep a block on the stack
// A tile of the right operand in a product of many rows: 144 KiB of floats. Two threads may share a core and its 512
// KiB of second-level cache, as two virtual processors often do.
constexpr int64_t max_depth = 192, max_columns = 192;

const Kernels& kernels();  // of chosen_isa()
const Kernels& kernels_of(Isa isa);

// Operations. All pointers are to contiguous memory. `threads` is a maximum.

// Returns the first block with NaN or Inf (codes and absmax are then incomplete), or -1.
int64_t quantize_4bit(Reals x, int64_t numel, int64_t block, const float* codebook, uint8_t* codes, float* absmax,
                      int threads);
void dequantize_4bit(const Blocks4& w, Reals out, int threads);
// A product of two thin matrices that is added to another: left [rows, rank] times right, whose number at depth d and
// column c lies at right[d * depth_step + c * column_step]. Rank 0: nothing.
struct LowRank {
  const float* left = nullptr;
  const float* right = nullptr;
  int64_t rank = 0, depth_step = 0, column_step = 0;
};
// y [rows, n] = x [rows, k] W^T + bias + update, W [n, k]; bias may be null. `exact`: one row in float32 too.
void linear_4bit(const Blocks4& w, const float* x, int64_t rows, int64_t k, int64_t n, const float* bias,
                 const LowRank& update, float* y, int threads, bool exact = false);
// gx [rows, k] = gy [rows, n] W + update.
void linear_4bit_backward(const Blocks4& w, const float* gy, int64_t rows, int64_t k, int64_t n, const LowRank& update,
                          float* gx, int threads);
void dequantize_grouped(const Groups& w, int64_t rows, Reals out, int threads);
// As linear_4bit; the columns of x are in the order of W's stored ones.
void linear_grouped(const Groups& w, const float* x, int64_t rows, int64_t n, const float* bias, const LowRank& update,
                    float* y, int threads, bool exact = false);
void linear_grouped_backward(const Groups& w, const float* gy, int64_t rows, int64_t n, const LowRank& update,
                             float* gx, int threads);
// Codes int8 [rows, columns] and absmax [rows] of x; returns the first row with NaN or Inf, or -1.
int64_t quantize_int8(Reals x, int64_t rows, int64_t columns, int8_t* codes, float* absmax, int threads);
void dequantize_int8(const Rows8& w, int64_t rows, Reals out, int threads);
// The largest code for numbers of x, of which a row has k: columns * 127 * this is below 2^31, so that no sum
// overflows.
int32_t largest_input(int64_t k);
// y [rows, n] = x [rows, k] W^T + bias + update, W [n, k] in int8: x is rounded to whole numbers by rows, but for its
// columns with a number beyond the threshold (0: none), which are multiplied in float32.
void linear_int8(const Rows8& w, const float* x, int64_t rows, int64_t k, int64_t n, const float* bias, float threshold,
                 const LowRank& update, float* y, int threads);
// gx [rows, k] = gy [rows, n] W + update, in float32.
void linear_int8_backward(const Rows8& w, const float* gy, int64_t rows, int64_t k, int64_t n, const LowRank& update,
                          float* gx, int threads);
// out = silu(gate) * up; computed in float32, each number rounded once to its tensor's kind.
void swiglu(Reals gate, Reals up, int64_t numel, Reals out, int threads);
void swiglu_backward(Reals grad, Reals gate, Reals up, int64_t numel, Reals to_gate, Reals to_up, int threads);
// y [rows, columns] = weight * (x / sqrt(mean of a row's squares + eps)), weight [columns]; the normed x is rounded to
// x's kind before it is multiplied.
void rms_norm(Reals x, const float* weight, float eps, int64_t rows, int64_t columns, Reals y, int threads);
// to_weight [columns] may be null.
void rms_norm_backward(Reals grad, Reals x, const float* weight, float eps, int64_t rows, int64_t columns, Reals to_x,
                       float* to_weight, int threads);
// losses[row] = logsumexp(z[row]) - z[row, labels[row]] for logits z [rows, columns], columns > 0. z is overwritten, by
// softmax(z) - onehot(labels) where the gradient is wanted.
void cross_entropy(float* z, int64_t rows, int64_t columns, const int64_t* labels, bool gradient, float* losses,
                   int threads);

// Numbers that share an absmax are `block`: a multiple of 64, at most max_block. `values` are the rule's
// hyper-parameters in the order of kernels/optimizer_rules.py, then grad_scale.
int moments_of(OptimizerRule rule);
int values_of(OptimizerRule rule);
void optimizer_step(OptimizerRule rule, const double* values, const OptimizerTensor* tensors, int64_t count,
                    int64_t block, const DynamicTree* trees, int threads);
// sums[i] = the sum of squares of a tensor; NaN or Inf where one of its numbers is not finite.
void gradient_norms(const Reals* tensors, const int64_t* numel, int64_t count, double* sums, int threads);

// Codes and errors [rows, columns] of a block of columns w, in their order, each column's error spread over those
// behind it by the factor `upper` [columns, columns] of the inverse Hessian; at most max_gptq_block columns.
void gptq_block(const GptqGrid& grid, const float* w, int64_t rows, int64_t columns, const float* upper, uint8_t* codes,
                float* errors, int threads);
// Changes codes [rows, columns] one after the other where that lessens a row's error, in at most so many sweeps.
// residual [rows, columns] = (w - what codes stand for) hessian; it follows the codes.
void gptq_descend(const GptqGrid& grid, const float* hessian, int64_t rows, int64_t columns, int sweeps, uint8_t* codes,
                  float* residual, int threads);
// scale and zero [rows, groups] with the least sum of importance [columns] times the squared error.
void search_grid(const GridSearch& search, const float* w, const float* importance, int64_t rows, int64_t columns,
                 int64_t group, float* scale, float* zero, int threads);

}  // namespace lilliput
