// The versions of each kernel by instruction set; linear.cpp chooses one table of them.
#pragma once

#include "linear.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define L4_X86 1
#endif

namespace l4 {

using PrepareRows = void (*)(Rows&, int32_t, int32_t);
using LinearBlocks = void (*)(const Weight&, const Rows&, float*, int64_t, int32_t, int32_t);

struct Kernels {
  const char* name;
  bool (*is_supported)();
  PrepareRows prepare_rows;
  LinearBlocks linear_blocks;
};

extern const Kernels kPortable;
#ifdef L4_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

inline int32_t row_of(const Rows& rows, int32_t i) { return rows.index ? rows.index[i] : i; }

inline float from_bf16(uint16_t bits) {
  union {
    uint32_t u;
    float f;
  } pun = {static_cast<uint32_t>(bits) << 16};
  return pun.f;
}

// Where the parts of a block of int8 or int4 codes lie.
struct Parts {
  const uint8_t* codes;
  const uint8_t* scales;  // bf16 [cols / group][16], or float [16]
  const uint8_t* zeros;   // null without
  int32_t span;           // 32-groups that share a scale
};

inline Parts parts_of(const Weight& w, int32_t block) {
  const int64_t codes_bytes = padded(w.cols) * kBlock * (w.kind == L4_INT4 ? 4 : 8) / 8;
  const uint8_t* data = w.data + block * block_bytes(w);
  const uint8_t* scales = data + codes_bytes;
  const bool is_zeroed = w.kind == L4_INT4 && w.has_zero;
  const uint8_t* zeros = is_zeroed ? scales + w.cols / w.group * kBlock * 2 : nullptr;
  return {data, scales, zeros, w.group / kGroup};
}

}  // namespace l4
