// What is not a linear map: norms, rotations, SwiGLU, attention over a cache. One table of functions
// per instruction set, chosen at run time.
#pragma once
#include <cstdint>

extern "C" {

enum L4Kept { L4_KEPT_FP32 = 0, L4_KEPT_BF16 = 1, L4_KEPT_INT8 = 2, L4_KEPT_INT4 = 3 };

// Keys and values of a run of tokens, [K, S, H] with a stride between heads; the codes of 8 or 4 bits
// are l4cli/inference/kept.py's: key scales by channel and group of tokens, value scales by token.
struct L4Part {
  int32_t kind;
  int32_t value_groups;  // scales of a token's values
  int64_t length;        // tokens
  int64_t head_stride;   // elements of a head's keys, and of its values
  int64_t key_scale_stride, value_scale_stride;
  void *keys, *values;
  const uint16_t *key_scale, *key_low, *value_scale, *value_low;  // halves
};

}  // extern "C"

namespace l4 {

constexpr int kTile = 64;       // keys at once; a divisor of kKeyGroup
constexpr int kKeyGroup = 128;  // tokens that share a channel's key scale

// A softmax on its way, of one query: out = acc / sum.
struct Running {
  float *most, *sum, *acc;  // [n], [n], [n, H]
};

struct VectorKernels {
  const char *name;
  // x = h * rsqrt(mean(h^2) + eps) * weight
  void (*rms_norm)(const float *h, const float *weight, float eps, int64_t n, float *x);
  // Turn interleaved pairs, then divide by their root mean square if `unit`, then multiply.
  void (*rotate)(float *x, const float *turn, int head_dim, bool unit, float eps, float scale);
  void (*swiglu)(const float *gate, const float *up, int64_t n, float *out);
  float (*dot)(const float *a, const float *b, int64_t n);
  void (*scale)(const float *x, float by, int64_t n, float *out);
  void (*add)(float *x, const float *y, int64_t n);
  void (*to_bf16)(const float *x, int64_t n, uint16_t *out);
  // Let n queries (scaled, [n, H]) see keys [first, last) of one head; `first` at a tile's start.
  // scratch: attend_scratch(n, head_dim) floats
  void (*attend)(const L4Part *part, int head, int head_dim, int64_t first, int64_t last,
           const float *q, int n, const Running *state, float *scratch);
};

int64_t attend_scratch(int n, int head_dim);
const VectorKernels &vector_kernels();

static inline float bf16_to_float(uint16_t x) {
  union { uint32_t u; float f; } bits;
  bits.u = (uint32_t)x << 16;
  return bits.f;
}

static inline uint16_t float_to_bf16(float x) {
  union { float f; uint32_t u; } bits;
  bits.f = x;
  if ((bits.u & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits.u >> 16 | 64);  // NaN stays one
  return (uint16_t)((bits.u + 0x7fff + (bits.u >> 16 & 1)) >> 16);
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  union { uint32_t u; float f; } bits;
  if (exponent == 0) {  // subnormal: exact in fp32
    bits.f = (float)mantissa * 5.9604644775390625e-8f;
    bits.u |= sign;
  } else {
    bits.u = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
  }
  return bits.f;
}

}  // namespace l4
