// The versions every processor runs; also the plain meaning of the others.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace l4 {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 32 inputs (fewer at the row's end): codes, scale, minus their sum.
void round_group(const float* x, int32_t count, int8_t* codes, float* scale, int32_t* minus_sum) {
  uint32_t largest = 0;  // of the bits: a NaN is larger than infinity, which is larger than all
  for (int32_t i = 0; i < count; i++) {
    const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float amax;
  std::memcpy(&amax, &largest, 4);
  std::memset(codes, 0, kGroup);
  *minus_sum = 0;
  if (!(amax >= 1e-30f && largest < 0x7f800000)) {
    *scale = largest < 0x7f800000 ? 0.0f : NAN;
    return;
  }
  const float inverse = 127.0f / amax;
  int32_t sum = 0;
  for (int32_t i = 0; i < count; i++) {
    codes[i] = static_cast<int8_t>(nearbyintf(x[i] * inverse));
    sum += codes[i];
  }
  *scale = amax / 127.0f;
  *minus_sum = -sum;
}

void prepare(Rows& rows, int32_t first_row, int32_t last_row) {
  for (int32_t row = first_row; row < last_row; row++) {
    const float* x = rows.x + row * rows.ldx;
    if (rows.forms & L4_AS_INT8) {
      const int64_t at = row * rows.num_groups;
      for (int64_t g = 0; g < rows.num_groups; g++) {
        const int32_t left = rows.k - static_cast<int32_t>(g) * kGroup;
        round_group(x + g * kGroup, left < kGroup ? left : kGroup,
                    rows.codes + row * rows.code_stride + g * kGroup, rows.scale + at + g,
                    rows.minus_sum + at + g);
      }
    }
    if (rows.forms & L4_AS_BF16) {
      uint16_t* out = rows.bf16 + row * rows.bf16_stride;
      for (int32_t i = 0; i < rows.k; i++) out[i] = to_bf16(x[i]);
      for (int64_t i = rows.k; i < padded(rows.k); i++) out[i] = 0;
    }
  }
}

void block_fp32(const float* w, const float* x, int32_t k, float* sum) {
  for (int32_t i = 0; i < k; i++, w += kBlock) {
    for (int r = 0; r < kBlock; r++) sum[r] += w[r] * x[i];
  }
}

void block_bf16(const uint16_t* w, const uint16_t* x, int64_t k, float* sum) {
  for (int64_t i = 0; i < k; i += 2, w += 2 * kBlock) {
    const float x0 = from_bf16(x[i]), x1 = from_bf16(x[i + 1]);
    for (int r = 0; r < kBlock; r++) {
      sum[r] += from_bf16(w[2 * r]) * x0 + from_bf16(w[2 * r + 1]) * x1;
    }
  }
}

// The integer products of 32 inputs with 16 rows, zero points not yet taken off.
void dot_int8(const uint8_t* w, const int8_t* x, int32_t* acc) {
  for (int i = 0; i < kGroup; i += 4, w += 4 * kBlock) {
    for (int r = 0; r < kBlock; r++) {
      const uint8_t* c = w + 4 * r;
      acc[r] += c[0] * x[i] + c[1] * x[i + 1] + c[2] * x[i + 2] + c[3] * x[i + 3];
    }
  }
}

void dot_int4(const uint8_t* w, const int8_t* x, int32_t* acc) {
  for (int i = 0; i < kGroup; i += 8, w += 4 * kBlock) {
    for (int r = 0; r < kBlock; r++) {
      const uint8_t* c = w + 4 * r;
      for (int j = 0; j < 4; j++) acc[r] += (c[j] & 15) * x[i + j] + (c[j] >> 4) * x[i + 4 + j];
    }
  }
}

void block_codes(const Weight& weight, const Parts& parts, const Rows& rows, int32_t row,
                 float* sum) {
  const int8_t* x = rows.codes + row * rows.code_stride;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(parts.scales);
  const bool is_int4 = weight.kind == L4_INT4;
  const int64_t bytes = kBlock * (is_int4 ? kGroup / 2 : kGroup);
  for (int64_t g = 0; g < rows.num_groups; g++) {
    const int64_t at = row * rows.num_groups + g, of = parts.span ? g / parts.span * kBlock : 0;
    int32_t acc[kBlock];
    for (int r = 0; r < kBlock; r++) {
      const int32_t offset = !is_int4 ? 128 : parts.zeros ? parts.zeros[of + r] : 8;
      acc[r] = offset * rows.minus_sum[at];
    }
    is_int4 ? dot_int4(parts.codes + g * bytes, x + g * kGroup, acc)
            : dot_int8(parts.codes + g * bytes, x + g * kGroup, acc);
    for (int r = 0; r < kBlock; r++) {
      const float scale = parts.span ? from_bf16(scales[of + r]) * rows.scale[at] : rows.scale[at];
      sum[r] += static_cast<float>(acc[r]) * scale;
    }
  }
  if (!parts.span) {
    const float* row_scales = reinterpret_cast<const float*>(parts.scales);
    for (int r = 0; r < kBlock; r++) sum[r] *= row_scales[r];
  }
}

void linear(const Weight& weight, const Rows& rows, float* y, int64_t ldy, int32_t first_block,
            int32_t last_block) {
  for (int32_t block = first_block; block < last_block; block++) {
    const uint8_t* data = weight.data + block * block_bytes(weight);
    const int32_t left = weight.rows - block * kBlock;
    for (int32_t i = 0; i < rows.m; i++) {
      const int32_t row = row_of(rows, i);
      float sum[kBlock] = {};
      if (weight.kind == L4_FP32) {
        block_fp32(reinterpret_cast<const float*>(data), rows.x + row * rows.ldx, rows.k, sum);
      } else if (weight.kind == L4_BF16) {
        block_bf16(reinterpret_cast<const uint16_t*>(data), rows.bf16 + row * rows.bf16_stride,
                   padded(rows.k), sum);
      } else {
        block_codes(weight, parts_of(weight, block), rows, row, sum);
      }
      const int count = left < kBlock ? left : kBlock;
      std::memcpy(y + i * ldy + block * kBlock, sum, count * sizeof(float));
    }
  }
}

bool is_supported() { return true; }

}  // namespace

const Kernels kPortable = {"portable", is_supported, prepare, linear};

}  // namespace l4
