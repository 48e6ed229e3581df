// Sizes of weights and rows; where the forms of rows lie in the caller's memory.
#include "kernels.h"

namespace l4 {

static int64_t up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t block_bytes(int32_t kind, int32_t cols, int32_t group, int32_t has_zero) {
  const int64_t entries = padded(cols) * kBlock;
  if (kind == L4_FP32) return entries * 4;
  if (kind == L4_BF16) return entries * 2;
  const int64_t codes = kind == L4_INT8 ? entries : entries / 2;
  if (group == 0) return kBlock * 4 + codes;
  const int64_t groups = cols / group, whole = groups / kSegment;
  const int64_t headers = whole * header_bytes(kSegment, has_zero);
  return up(headers + header_bytes(groups % kSegment, has_zero) + codes);
}

int64_t weight_bytes(int32_t kind, int32_t rows, int32_t cols, int32_t group, int32_t has_zero) {
  if (kind < L4_FP32 || kind > L4_INT4 || rows < 1 || cols < 1) return 0;
  const bool is_grouped = group == 32 || group == 64 || group == 128;
  if (kind == L4_INT4 && !is_grouped) return 0;
  if (kind == L4_INT8 && group != 0 && !is_grouped) return 0;
  if (kind >= L4_INT8 && is_grouped && cols % group) return 0;
  if (kind <= L4_BF16 && group != 0) return 0;
  if (kind != L4_INT4 && has_zero) return 0;
  return (rows + kBlock - 1) / kBlock * block_bytes(kind, cols, group, has_zero);
}

// An odd number of cache lines a row: rows a power of two apart would share a few sets of the
// first cache, and a tile of 16 tokens would evict itself.
static int64_t row_stride(int64_t bytes) { return up(bytes) / 64 % 2 ? up(bytes) : up(bytes) + 64; }

size_t rows_bytes(int32_t m, int32_t k, int32_t forms) {
  const int64_t width = padded(k), groups = width / kGroup;
  int64_t bytes = 0;
  if (forms & L4_AS_INT8) bytes += m * row_stride(width) + 2 * up(m * groups * 4);
  if (forms & L4_AS_BF16) bytes += m * row_stride(width * 2);
  return static_cast<size_t>(bytes);
}

void place_rows(Rows& rows, const float* x, int64_t ldx, int32_t m, int32_t k, int32_t forms,
                void* memory) {
  uint8_t* at = static_cast<uint8_t*>(memory);
  rows = Rows{};
  rows.x = x;
  rows.ldx = ldx;
  rows.m = m;
  rows.k = k;
  rows.forms = forms;
  rows.num_groups = padded(k) / kGroup;
  if (forms & L4_AS_INT8) {
    rows.code_stride = row_stride(padded(k));
    rows.codes = reinterpret_cast<int8_t*>(at);
    at += m * rows.code_stride;
    rows.scale = reinterpret_cast<float*>(at);
    at += up(m * rows.num_groups * 4);
    rows.minus_sum = reinterpret_cast<int32_t*>(at);
    at += up(m * rows.num_groups * 4);
  }
  if (forms & L4_AS_BF16) {
    rows.bf16_stride = row_stride(padded(k) * 2) / 2;
    rows.bf16 = reinterpret_cast<uint16_t*>(at);
  }
}

}  // namespace l4
