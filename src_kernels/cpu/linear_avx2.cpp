// AVX2: 16 rows are two registers of 8 lanes; products of bytes go through 16 bits.
#include "kernels.h"
#ifdef L4_X86
#include <immintrin.h>

#include "rounding.h"

#define L4_AVX2 __attribute__((target("avx2,fma")))
#define L4_AVX2_INLINE L4_AVX2 static inline __attribute__((always_inline))

namespace l4 {
namespace {

constexpr int kTile = 4;  // tokens of a tile at most: 8 registers of sums of 16

struct Token {
  const int8_t* codes;
  const float* scale;
  const int32_t* minus_sum;
};

L4_AVX2_INLINE __m256i load(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

L4_AVX2_INLINE __m256i word(const void* at) {
  int32_t bits;
  std::memcpy(&bits, at, 4);
  return _mm256_set1_epi32(bits);
}

L4_AVX2_INLINE __m256 scales_at(const uint8_t* at) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// 8 rows times 32 inputs. A pair of products is at most 2 * 15 * 127, and eight of them fit in
// 16 bits: only their sum is widened. `half`: 0 or 32, the rows' place in a word of 64 bytes.
L4_AVX2_INLINE __m256i dot_int4(const uint8_t* codes, const int8_t* x) {
  const __m256i low = _mm256_set1_epi8(0x0f);
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) {
    const __m256i w = load(codes + 64 * i);
    const __m256i w0 = _mm256_and_si256(w, low);
    const __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w0, word(x + 8 * i)));
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w1, word(x + 8 * i + 4)));
  }
  return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

// Codes of 8 bits come back to signed ones, whose signs the inputs take: the pairs then fit.
L4_AVX2_INLINE __m256i dot_int8(const uint8_t* codes, const int8_t* x) {
  const __m256i top = _mm256_set1_epi8(static_cast<char>(0x80)), one = _mm256_set1_epi16(1);
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < 8; i++) {
    const __m256i w = _mm256_xor_si256(load(codes + 64 * i), top);
    const __m256i signed_x = _mm256_sign_epi8(word(x + 4 * i), w);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), signed_x);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, one));
  }
  return sum;
}

// T tokens times 32 inputs, added to the tokens' sums. scales, zeros: null for none.
template <int BITS, int T>
L4_AVX2_INLINE void add_group(const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros,
                              const Token* token, int64_t g, __m256* sum) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    const __m256 scale = scales ? scales_at(scales + 16 * half) : _mm256_set1_ps(1.0f);
    __m256i zero = _mm256_set1_epi32(8);
    if (BITS == 4 && zeros) {
      const void* from = zeros + 8 * half;
      zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const int8_t* x = token[t].codes + g * kGroup;
      __m256i acc;
      if (BITS == 4) {
        const __m256i minus = _mm256_madd_epi16(zero, word(token[t].minus_sum + g));
        acc = _mm256_add_epi32(dot_int4(codes + 32 * half, x), minus);
      } else {
        acc = dot_int8(codes + 32 * half, x);
      }
      const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(token[t].scale[g]));
      __m256& to = sum[2 * t + half];
      to = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), both, to);
    }
  }
}

template <int BITS, int T>
L4_AVX2 void tile_codes(const Weight& weight, const uint8_t* data, const Token* token,
                        int64_t num_groups, __m256* out) {
  constexpr int kBytes = BITS * 64;
  __m256 sum[2 * T];
  for (int t = 0; t < 2 * T; t++) sum[t] = _mm256_setzero_ps();
  if (weight.group == 0) {
    const uint8_t* codes = data + kBlock * 4;
    for (int64_t g = 0; g < num_groups; g++, codes += kBytes) {
      add_group<BITS, T>(codes, nullptr, nullptr, token, g, sum);
    }
    const float* row_scales = reinterpret_cast<const float*>(data);
    for (int t = 0; t < 2 * T; t++) {
      out[t] = _mm256_mul_ps(sum[t], _mm256_loadu_ps(row_scales + t % 2 * 8));
    }
    return;
  }
  const int64_t groups = weight.cols / weight.group, span = weight.group / kGroup;
  for (int64_t first = 0, g = 0; first < groups; first += kSegment) {
    Segment part = segment_at(data, groups - first, weight.has_zero);
    for (int64_t i = 0; i < part.groups; i++) {
      const uint8_t* zeros = weight.has_zero ? part.zeros + 16 * i : nullptr;
      for (int64_t s = 0; s < span; s++, g++, part.codes += kBytes) {
        add_group<BITS, T>(part.codes, part.scales + 32 * i, zeros, token, g, sum);
      }
    }
    data = part.codes;
  }
  for (int t = 0; t < 2 * T; t++) out[t] = sum[t];
}

template <int T>
L4_AVX2 void tile_fp32(const uint8_t* data, const void* const* token, int64_t k, __m256* out) {
  __m256 sum[2 * T];
  for (int i = 0; i < 2 * T; i++) sum[i] = _mm256_setzero_ps();
  const float* w = reinterpret_cast<const float*>(data);
  for (int64_t i = 0; i < k; i++, w += kBlock) {
    const __m256 w0 = _mm256_loadu_ps(w), w1 = _mm256_loadu_ps(w + 8);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const __m256 x = _mm256_set1_ps(static_cast<const float*>(token[t])[i]);
      sum[2 * t] = _mm256_fmadd_ps(w0, x, sum[2 * t]);
      sum[2 * t + 1] = _mm256_fmadd_ps(w1, x, sum[2 * t + 1]);
    }
  }
  for (int i = 0; i < 2 * T; i++) out[i] = sum[i];
}

// k counts pairs of inputs here.
template <int T>
L4_AVX2 void tile_bf16(const uint8_t* data, const void* const* token, int64_t k, __m256* out) {
  const __m256i top = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  __m256 sum[2 * T];
  for (int i = 0; i < 2 * T; i++) sum[i] = _mm256_setzero_ps();
  for (int64_t i = 0; i < k; i++, data += 64) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const __m256i w = load(data + 32 * half);
      const __m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
      const __m256 w1 = _mm256_castsi256_ps(_mm256_and_si256(w, top));
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        const __m256i x = word(static_cast<const uint16_t*>(token[t]) + 2 * i);
        __m256& to = sum[2 * t + half];
        to = _mm256_fmadd_ps(w0, _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), to);
        to = _mm256_fmadd_ps(w1, _mm256_castsi256_ps(_mm256_and_si256(x, top)), to);
      }
    }
  }
  for (int i = 0; i < 2 * T; i++) out[i] = sum[i];
}

using TileCodes = void (*)(const Weight&, const uint8_t*, const Token*, int64_t, __m256*);
using TileFloats = void (*)(const uint8_t*, const void* const*, int64_t, __m256*);
constexpr TileCodes kInt4[] = {tile_codes<4, 1>, tile_codes<4, 2>, tile_codes<4, 3>,
                               tile_codes<4, 4>};
constexpr TileCodes kInt8[] = {tile_codes<8, 1>, tile_codes<8, 2>, tile_codes<8, 3>,
                               tile_codes<8, 4>};
constexpr TileFloats kFp32[] = {tile_fp32<1>, tile_fp32<2>, tile_fp32<3>, tile_fp32<4>};
constexpr TileFloats kBf16[] = {tile_bf16<1>, tile_bf16<2>, tile_bf16<3>, tile_bf16<4>};

L4_AVX2 void tile(const Weight& weight, const Rows& rows, int32_t block, int32_t first,
                  int32_t count, __m256* sum) {
  const uint8_t* data = weight.data + block * block_bytes(weight);
  if (weight.kind >= L4_INT8) {
    Token token[kTile];
    for (int32_t t = 0; t < count; t++) {
      const int32_t row = row_of(rows, first + t);
      token[t] = {rows.codes + row * rows.code_stride, rows.scale + row * rows.num_groups,
                  rows.minus_sum + row * rows.num_groups};
    }
    const auto& tiles = weight.kind == L4_INT4 ? kInt4 : kInt8;
    tiles[count - 1](weight, data, token, rows.num_groups, sum);
    return;
  }
  const bool is_fp32 = weight.kind == L4_FP32;
  const void* token[kTile];
  for (int32_t t = 0; t < count; t++) {
    const int64_t row = row_of(rows, first + t);
    token[t] = is_fp32 ? static_cast<const void*>(rows.x + row * rows.ldx)
                       : rows.bf16 + row * rows.bf16_stride;
  }
  (is_fp32 ? kFp32 : kBf16)[count - 1](data, token, is_fp32 ? rows.k : padded(rows.k) / 2, sum);
}

L4_AVX2 void linear(const Weight& weight, const Rows& rows, float* y, int64_t ldy,
                    int32_t first_block, int32_t last_block) {
  const int32_t width = rows.m ? tile_of(rows.m, kTile) : 1;
  for (int32_t block = first_block; block < last_block; block++) {
    const int32_t left = weight.rows - block * kBlock;
    for (int32_t first = 0; first < rows.m; first += width) {
      const int32_t count = rows.m - first < width ? rows.m - first : width;
      alignas(32) float sum[kTile * kBlock];
      tile(weight, rows, block, first, count, reinterpret_cast<__m256*>(sum));
      for (int32_t t = 0; t < count; t++) {
        std::memcpy(y + (first + t) * ldy + block * kBlock, sum + t * kBlock,
                    (left < kBlock ? left : kBlock) * sizeof(float));
      }
    }
  }
}

L4_AVX2 void prepare(Rows& rows, int32_t first_row, int32_t last_row) {
  round_rows(rows, first_row, last_row);
}

bool is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const Kernels kAvx2 = {"avx2", is_supported, prepare, linear};

}  // namespace l4
#endif
