// The versions every processor runs; also the plain meaning of the others.
#include <cstring>

#include "rounding.h"

namespace l4 {
namespace {

void prepare(Rows& rows, int32_t first_row, int32_t last_row) {
  round_rows(rows, first_row, last_row);
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

// One 32-group: its products times the scale of weight and token, added to `sum`.
void add_group(const Weight& weight, const uint8_t* codes, const uint16_t* scales,
               const uint8_t* zeros, const Rows& rows, int32_t row, int64_t g, float* sum) {
  const int8_t* x = rows.codes + row * rows.code_stride + g * kGroup;
  const int32_t minus_sum = rows.minus_sum[row * rows.num_groups + g];
  const float of_token = rows.scale[row * rows.num_groups + g];
  int32_t acc[kBlock];
  for (int r = 0; r < kBlock; r++) {
    acc[r] = (weight.kind == L4_INT8 ? 128 : zeros ? zeros[r] : 8) * minus_sum;
  }
  weight.kind == L4_INT8 ? dot_int8(codes, x, acc) : dot_int4(codes, x, acc);
  for (int r = 0; r < kBlock; r++) {
    const float scale = scales ? from_bf16(scales[r]) * of_token : of_token;
    sum[r] += static_cast<float>(acc[r]) * scale;
  }
}

void block_codes(const Weight& weight, const uint8_t* data, const Rows& rows, int32_t row,
                 float* sum) {
  const int64_t bytes = kBlock * (weight.kind == L4_INT4 ? kGroup / 2 : kGroup);
  if (weight.group == 0) {
    const float* row_scales = reinterpret_cast<const float*>(data);
    const uint8_t* codes = data + kBlock * 4;
    for (int64_t g = 0; g < rows.num_groups; g++, codes += bytes) {
      add_group(weight, codes, nullptr, nullptr, rows, row, g, sum);
    }
    for (int r = 0; r < kBlock; r++) sum[r] *= row_scales[r];
    return;
  }
  const int64_t groups = weight.cols / weight.group;
  for (int64_t first = 0, g = 0; first < groups; first += kSegment) {
    Segment part = segment_at(data, groups - first, weight.has_zero);
    for (int64_t i = 0; i < part.groups; i++) {
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(part.scales) + i * kBlock;
      const uint8_t* zeros = weight.has_zero ? part.zeros + i * kBlock : nullptr;
      for (int32_t s = 0; s < weight.group / kGroup; s++, g++, part.codes += bytes) {
        add_group(weight, part.codes, scales, zeros, rows, row, g, sum);
      }
    }
    data = part.codes;
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
        block_codes(weight, data, rows, row, sum);
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
