// The parts of a product with a matrix in groups of rows, each in one thread: a few rows against the packed codes, and,
// for many rows, packing into panels; and back to reals.
#include "ops/groups.simd.h"
#include "ops/kernels_of_isa.h"
#include "ops/tiles.simd.h"

namespace lilliput {
namespace LILLIPUT_ISA {

static_assert(run_length % kWidth == 0, "a run is whole vectors");

// ---- the codes of a run, a vector of them in their order at a time ----

template <int N>
struct Codes {
  static constexpr int kPart = N == 3 ? 2 : N;  // bits that are packed together first
  static constexpr int kBytes = 4 * kPart;      // that hold them
  const uint8_t* bytes;
  I high;  // of 3 bits: all 32 high bits in each lane

  LILLIPUT_INLINE explicit Codes(const uint8_t* run) : bytes(run), high(iset1(0)) {
    if constexpr (N == 3) {
      int32_t word;
      memcpy(&word, run + kBytes, 4);
      high = iset1(word);
    }
  }

  // Codes first..first + kWidth - 1.
  template <int first>
  LILLIPUT_INLINE I at() const {
    I codes;
    if constexpr (kWidth <= kBytes) {
      codes = shift_right<first / kBytes * kPart>(load_bytes(bytes + first % kBytes));
    } else {
      codes = shift_right_by(load_8_bytes(bytes), load_words((const uint8_t*)kShifts[first / kWidth]));
    }
    if constexpr (N < 8) codes = iand(codes, iset1((1 << kPart) - 1));
    if constexpr (N == 3) {
      const I bit = iand(shift_right_by(high, load_words((const uint8_t*)(kHighBits + first))), iset1(1));
      codes = ior(codes, shift_left_by(bit, iset1(2)));
    }
    return codes;
  }

  static constexpr int32_t kShifts[2][16] = {{0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2},
                                             {4, 4, 4, 4, 4, 4, 4, 4, 6, 6, 6, 6, 6, 6, 6, 6}};
  // Bit t of byte i of the 4 bytes belongs to code 4 t + i.
  static constexpr int32_t kHighBits[32] = {0, 8,  16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                            4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};
};

// body(place, codes) for the vectors of a run.
template <int First = 0, int N, typename Body>
LILLIPUT_INLINE void each_vector(const Codes<N>& codes, const Body& body) {
  if constexpr (First < run_length) {
    body(First, codes.template at<First>());
    each_vector<First + kWidth>(codes, body);
  }
}

// The 32 numbers of a run.
template <int N>
LILLIPUT_INLINE void run_values(const uint8_t* run, float scale, int zero, float* out) {
  const F scales = set1(scale);
  const I zeros = iset1(zero);
  each_vector(Codes<N>(run),
              [&](int place, I codes) { store(out + place, mul(to_floats(isub(codes, zeros)), scales)); });
}

// Numbers k..k + count - 1 of a row, from any k.
template <int N>
static void row_values(const Groups& w, int64_t row, int64_t k, int64_t count, float* out) {
  const int64_t end = k + count;
  while (k < end) {
    const int64_t run = k / run_length, inside = k % run_length, index = k / w.group;
    const int64_t here = run_length - inside < end - k ? run_length - inside : end - k;
    float room[run_length];
    float* to = here == run_length ? out : room;
    run_values<N>(w.run_at(row, run), scale_of(w, row, index), w.zero_of(row, index), to);
    if (to == room) memcpy(out, room + inside, (size_t)here * sizeof(float));
    k += here, out += here;
  }
}

static void dequantize_grouped(const Groups& w, int64_t first, int64_t last, Reals out) {
  by_bits(w.bits, [&](auto bits) {
    float room[8 * run_length];
    for (int64_t row = first; row < last; ++row)
      for (int64_t k = 0; k < w.columns; k += 8 * run_length) {
        const int64_t count = w.columns - k < 8 * run_length ? w.columns - k : 8 * run_length;
        row_values<decltype(bits)::count>(w, row, k, count, room);
        write_reals(room, (row - first) * w.columns + k, count, out);
      }
  });
}

// ---- few rows ----

// One row of W, its codes read once, against R rows of x.
template <int N, int R>
static void dot_groups(const Groups& w, const float* x, int64_t stride, int64_t n, const float* scales, float* sums) {
  // One or two rows sum a group first and scale it once; more have as many sums a row as the registers hold.
  constexpr bool kScaleLast = R <= 2;
  constexpr int kChains = R <= 4 ? 2 : 1;
  F total[R][kChains];
  for (int r = 0; r < R; ++r)
    for (int chain = 0; chain < kChains; ++chain) total[r][chain] = set1(0.0f);
  const int64_t runs = w.runs(), runs_of_group = w.group / run_length;
  const uint8_t* codes = w.run_at(n, 0);
  for (int64_t index = 0, run = 0; index < w.groups; ++index) {
    const F scale = set1(scales[index]);
    const I zero = iset1(w.zero_of(n, index));
    F part[R][kChains];
    for (int r = 0; r < R; ++r)
      for (int chain = 0; chain < kChains; ++chain) part[r][chain] = kScaleLast ? set1(0.0f) : total[r][chain];
    for (const int64_t end = run + runs_of_group; run < end && run < runs; ++run, codes += 4 * N)
      each_vector(Codes<N>(codes), [&](int place, I vector) LILLIPUT_INLINE_BODY {
        F values = to_floats(isub(vector, zero));
        if (!kScaleLast) values = mul(values, scale);
        const int chain = place / kWidth % kChains;
        for (int r = 0; r < R; ++r)
          part[r][chain] = fma(values, load(x + r * stride + run * run_length + place), part[r][chain]);
      });
    for (int r = 0; r < R; ++r)
      for (int chain = 0; chain < kChains; ++chain)
        total[r][chain] = kScaleLast ? fma(part[r][chain], scale, total[r][chain]) : part[r][chain];
  }
  for (int r = 0; r < R; ++r) sums[r] = sum(kChains == 2 ? add(total[r][0], total[r][kChains - 1]) : total[r][0]);
}

template <int N, int R>
static void few_groups(const Groups& w, const float* x, int64_t stride, const float* bias, int64_t first, int64_t last,
                       float* y, int64_t y_stride, float* scales) {
  for (int64_t n = first; n < last; ++n) {
    float sums[R];
    read_reals(w.scale, n * w.groups, w.groups, scales);
    dot_groups<N, R>(w, x, stride, n, scales, sums);
    for (int r = 0; r < R; ++r) y[r * y_stride + n] = sums[r] + (bias != nullptr ? bias[n] : 0.0f);
  }
}

static void few_rows_grouped(const Groups& w, const float* x, int64_t stride, int rows, const float* bias,
                             int64_t first, int64_t last, float* y, int64_t y_stride, float* scratch) {
  using Few = void (*)(const Groups&, const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, float*);
  by_bits(w.bits, [&](auto bits) {
    constexpr int N = decltype(bits)::count;
    static const Few by_rows[] = {few_groups<N, 1>, few_groups<N, 2>, few_groups<N, 3>, few_groups<N, 4>,
                                  few_groups<N, 5>, few_groups<N, 6>, few_groups<N, 7>, few_groups<N, 8>};
    static_assert(sizeof(by_rows) / sizeof(by_rows[0]) == few_rows_limit, "one instance per number of rows");
    by_rows[rows - 1](w, x, stride, bias, first, last, y, y_stride, scratch);
  });
}

// ---- many rows: packing ----

// The same run of kWidth rows of W, lanes being rows: words of 4 bytes are put side by side, and codes leave them from
// the lowest bits on. Number d of the run goes to panel[d * kTileColumns ..].
template <int N>
LILLIPUT_INLINE void transpose_run(const uint8_t* const* rows, F scales, I zeros, float* panel) {
  constexpr int kPart = Codes<N>::kPart, kWords = kPart, kPerByte = 8 / kPart;
  int32_t words[kWords + 1][kWidth];
  for (int r = 0; r < kWidth; ++r)
    for (int word = 0; word < (N == 3 ? kWords + 1 : kWords); ++word) memcpy(&words[word][r], rows[r] + 4 * word, 4);
  for (int word = 0; word < kWords; ++word) {
    I left = load_words((const uint8_t*)words[word]), left_high = iset1(0);
    // The high bits of codes 8 t + 4 word + byte are at 8 byte + 2 t + word: in the order of their low ones.
    if constexpr (N == 3) left_high = shift_right_by(load_words((const uint8_t*)words[kWords]), iset1(word));
    for (int byte = 0; byte < 4; ++byte)
      for (int t = 0; t < kPerByte; ++t) {
        I codes = iand(left, iset1((1 << kPart) - 1));
        left = shift_right<kPart>(left);
        if constexpr (N == 3) {
          codes = ior(codes, shift_left_by(iand(left_high, iset1(1)), iset1(2)));
          left_high = shift_right<2>(left_high);
        }
        const int number = t * Codes<N>::kBytes + 4 * word + byte;
        store(panel + number * kTileColumns, mul(to_floats(isub(codes, zeros)), scales));
      }
  }
}

// Half a panel (kWidth rows of W from n, of which `valid` exist) over k..k + k_count.
template <int N>
static void pack_half_panel(const Groups& w, int64_t n, int64_t valid, int64_t k, int64_t k_count, float* panel) {
  float scales[kWidth] = {0};  // of rows that do not exist: they are packed from the first row, times zero
  int32_t zeros[kWidth] = {0};
  const uint8_t* rows[kWidth];
  for (int64_t d = 0; d < k_count; d += run_length) {
    const int64_t run = (k + d) / run_length, index = (k + d) / w.group;
    const bool new_group = d == 0 || (k + d) % w.group == 0;
    for (int r = 0; r < kWidth; ++r) {
      rows[r] = w.run_at(n + (r < valid ? r : 0), run);
      if (new_group && r < valid) scales[r] = scale_of(w, n + r, index), zeros[r] = w.zero_of(n + r, index);
    }
    const I zero = load_words((const uint8_t*)zeros);
    if (k_count - d >= run_length) {
      transpose_run<N>(rows, load(scales), zero, panel + d * kTileColumns);
      continue;
    }
    float room[run_length * kTileColumns];  // the end of a row, inside a run
    transpose_run<N>(rows, load(scales), zero, room);
    for (int64_t i = 0; i < k_count - d; ++i) store(panel + (d + i) * kTileColumns, load(room + i * kTileColumns));
  }
}

static void pack_forward_grouped(const Groups& w, int64_t n, int64_t n_count, int64_t k, int64_t k_count,
                                 float* panels) {
  by_bits(w.bits, [&](auto bits) {
    constexpr int N = decltype(bits)::count;
    for (int64_t first = 0; first < n_count; first += kTileColumns, panels += k_count * kTileColumns)
      for (int64_t half = 0; half < kTileColumns; half += kWidth) {
        const int64_t rest = n_count - first - half, valid = rest < 0 ? 0 : rest < kWidth ? rest : kWidth;
        pack_half_panel<N>(w, valid > 0 ? n + first + half : n, valid, k, k_count, panels + half);
      }
  });
}

static void pack_backward_grouped(const Groups& w, int64_t k, int64_t k_count, int64_t n, int64_t n_count,
                                  float* panels) {
  by_bits(w.bits, [&](auto bits) {
    pack_by_rows(
        k_count, n_count,
        [&](int64_t d, float* values) { row_values<decltype(bits)::count>(w, n + d, k, k_count, values); }, panels);
  });
}

void add_linear_grouped(Kernels& kernels) {
  kernels.dequantize_grouped = dequantize_grouped;
  kernels.few_rows_grouped = few_rows_grouped;
  kernels.pack_forward_grouped = pack_forward_grouped;
  kernels.pack_backward_grouped = pack_backward_grouped;
}

}  // namespace LILLIPUT_ISA
}  // namespace lilliput
