// Numbers in few bits as they lie in memory, and where their constants are. The layout is the saved one
// (formats/format.py). In blocks of 4 bits: two codes a byte, the earlier number in the high nibble; one absmax per
// `block` numbers of flat storage; rows of a matrix follow each other without padding, so a row may start inside a
// block and, where rows are odd, inside a byte.
#pragma once

#include <cstdint>

// Never a call: this header is compiled for several instruction sets, and the linker must not mix their copies.
#define LILLIPUT_INLINE inline __attribute__((always_inline))
#define LILLIPUT_INLINE_BODY __attribute__((always_inline))  // behind the parameters of a lambda

namespace lilliput {

constexpr int64_t absmax_block = 256;  // formats.DYNAMIC8.block; bindings.cpp checks the number of scales

struct Blocks4 {
  const uint8_t* codes;   // [ceil(numel / 2)]
  const float* codebook;  // [16], in code order
  int64_t numel;
  int64_t block;              // numbers per absmax; even
  const float* absmax;        // [blocks], or null with double quantization:
  const uint8_t* absmax8;     // [blocks] codes of
  const float* absmax_book;   // [256],
  const float* absmax_scale;  // [ceil(blocks / absmax_block)],
  float absmax_offset;        // added back

  // The absmax of one block; compiled without contraction, so that product and sum round as the reference's do.
  LILLIPUT_INLINE float absmax_of(int64_t index) const {
    if (absmax != nullptr) return absmax[index];
    return absmax_book[absmax8[index]] * absmax_scale[(uint64_t)index / absmax_block] + absmax_offset;
  }

  LILLIPUT_INLINE int code_of(int64_t index) const {
    const uint8_t pair = codes[index >> 1];
    return index & 1 ? pair & 15 : pair >> 4;
  }
};

// A matrix in int8: codes [rows, columns], and per row the absmax that 127 stands for.
struct Rows8 {
  const int8_t* codes;
  const float* absmax;
  int64_t columns;

  LILLIPUT_INLINE float scale_of(int64_t row) const { return absmax[row] / 127.0f; }
};

enum class Real { f32, f16, bf16 };

LILLIPUT_INLINE int bytes_of(Real kind) {
  return kind == Real::f32 ? 4 : 2;
}

// A tensor of reals, flat.
struct Reals {
  void* data;
  Real kind;
};

constexpr int64_t run_length = 32;  // formats/packing.py: RUN

// A matrix in 2, 3, 4 or 8 bits by groups of its rows: scale * (code - zero). A row of codes is whole runs of 32, each
// in 4 * bits bytes: byte i holds the codes i, 4 * bits + i, 8 * bits + i, .. from its lowest bit on. Of 3 bits the low
// two lie so in 8 bytes, then the high ones in 4, as codes of one bit.
struct Groups {
  const uint8_t* codes;  // [rows, row_bytes()]
  int bits;
  int64_t columns;
  int64_t group;        // numbers that share scale and zero: a multiple of run_length, so that no run has two
  int64_t groups;       // in a row
  Reals scale;          // [rows, groups]
  const uint8_t* zero;  // [rows, groups], or null: 2^(bits - 1) for all

  LILLIPUT_INLINE int64_t runs() const { return (columns + run_length - 1) / run_length; }
  LILLIPUT_INLINE int64_t run_bytes() const { return 4 * bits; }
  LILLIPUT_INLINE const uint8_t* run_at(int64_t row, int64_t run) const {
    return codes + (row * runs() + run) * run_bytes();
  }
  LILLIPUT_INLINE int zero_of(int64_t row, int64_t index) const {
    return zero != nullptr ? zero[row * groups + index] : 1 << (bits - 1);
  }
};

}  // namespace lilliput
