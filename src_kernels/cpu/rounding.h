// How inputs are rounded: plain loops, inlined into functions of each instruction set.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

#define L4_INLINE static inline __attribute__((always_inline))

namespace l4 {

L4_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

L4_INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// 32 inputs: codes, their scale, minus their sum.
L4_INLINE void round_group(const float* x, int8_t* codes, float* scale, int32_t* minus_sum) {
  int32_t largest = 0;  // of the bits: a NaN is larger than infinity, which is larger than all
  for (int i = 0; i < kGroup; i++) {
    const int32_t bits = static_cast<int32_t>(bits_of(x[i]) & 0x7fffffff);
    largest = bits > largest ? bits : largest;
  }
  float amax;
  std::memcpy(&amax, &largest, 4);
  *minus_sum = 0;
  if (!(amax >= 1e-30f && largest < 0x7f800000)) {
    std::memset(codes, 0, kGroup);
    *scale = largest < 0x7f800000 ? 0.0f : NAN;
    return;
  }
  const float inverse = 127.0f / amax;
  // Adding 1.5 * 2^23 rounds to nearest even, and leaves the integer in the lowest bits.
  const float magic = 12582912.0f;
  int32_t rounded[kGroup], sum = 0;
  for (int i = 0; i < kGroup; i++) {
    rounded[i] = static_cast<int32_t>(bits_of(x[i] * inverse + magic)) - 0x4b400000;
    sum += rounded[i];
  }
  for (int i = 0; i < kGroup; i++) codes[i] = static_cast<int8_t>(rounded[i]);
  *scale = amax / 127.0f;
  *minus_sum = -sum;
}

L4_INLINE void round_rows(Rows& rows, int32_t first_row, int32_t last_row) {
  for (int32_t row = first_row; row < last_row; row++) {
    const float* x = rows.x + row * rows.ldx;
    if (rows.forms & L4_AS_INT8) {
      int8_t* codes = rows.codes + row * rows.code_stride;
      const int64_t at = row * rows.num_groups, whole = rows.k / kGroup;
      for (int64_t g = 0; g < whole; g++) {
        round_group(x + g * kGroup, codes + g * kGroup, rows.scale + at + g,
                    rows.minus_sum + at + g);
      }
      if (whole < rows.num_groups) {
        float last[kGroup] = {};
        std::memcpy(last, x + whole * kGroup, (rows.k - whole * kGroup) * sizeof(float));
        round_group(last, codes + whole * kGroup, rows.scale + at + whole,
                    rows.minus_sum + at + whole);
      }
    }
    if (rows.forms & L4_AS_BF16) {
      uint16_t* out = rows.bf16 + row * rows.bf16_stride;
      for (int32_t i = 0; i < rows.k; i++) out[i] = to_bf16(x[i]);
      for (int64_t i = rows.k; i < padded(rows.k); i++) out[i] = 0;
    }
  }
}

// Tokens [first, last) of a product in tiles of at most `largest`, as even as can be.
inline int32_t tile_of(int32_t num_tokens, int32_t largest) {
  const int32_t num_tiles = (num_tokens + largest - 1) / largest;
  return (num_tokens + num_tiles - 1) / num_tiles;
}

}  // namespace l4
