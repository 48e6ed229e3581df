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

constexpr int kSegment = 4;  // groups whose scales lie together, in front of their codes

// Scales and zero points of `groups` groups, up to where their codes begin.
constexpr int64_t header_bytes(int64_t groups, bool has_zero) {
  return (groups * kBlock * (has_zero ? 3 : 2) + 63) / 64 * 64;
}

// A segment of a block; `next` walks on. Of int8 without groups the block is one segment.
struct Segment {
  const uint8_t* scales;  // [groups][16] bf16; without groups [16] float
  const uint8_t* zeros;   // [groups][16]
  const uint8_t* codes;
  int64_t groups;
};

inline __attribute__((always_inline)) Segment segment_at(const uint8_t* at, int64_t groups_left,
                                                         bool has_zero) {
  const int64_t groups = groups_left < kSegment ? groups_left : kSegment;
  return {at, at + groups * kBlock * 2, at + header_bytes(groups, has_zero), groups};
}

}  // namespace l4
