// AVX-512 with VNNI: 16 rows are 16 lanes; four inputs of a row are the four bytes of a lane.
#include "kernels.h"
#ifdef L4_X86
#include <immintrin.h>

#include "rounding.h"

#define L4_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define L4_AVX512_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")))
#define L4_AVX512_INLINE L4_AVX512 static inline __attribute__((always_inline))

namespace l4 {
namespace {

constexpr int kTile = 16;  // tokens of a tile at most: sums and 8 registers of weights fit in 32

struct Token {
  const int8_t* codes;
  const float* scale;
  const int32_t* minus_sum;
};

L4_AVX512_INLINE __m512i word(const void* at) {
  int32_t bits;
  std::memcpy(&bits, at, 4);
  return _mm512_set1_epi32(bits);
}

L4_AVX512_INLINE __m512 scales_at(const uint8_t* at) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

L4_AVX512_INLINE __m512i load(const uint8_t* at) { return _mm512_loadu_si512(at); }

// One token, the weights on their way from memory: the high halves of bytes stay where they are,
// sixteen times their worth, and are brought down once for 32 inputs.
L4_AVX512_INLINE __m512i dot_one(const uint8_t* codes, const int8_t* x, __m512i start) {
  const __m512i low = _mm512_set1_epi8(0x0f), high = _mm512_set1_epi8(static_cast<char>(0xf0));
  __m512i sum = start, sum16 = _mm512_setzero_si512();
  for (int i = 0; i < 4; i++) {
    const __m512i w = load(codes + 64 * i);
    sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(w, low), word(x + 8 * i));
    sum16 = _mm512_dpbusd_epi32(sum16, _mm512_and_si512(w, high), word(x + 8 * i + 4));
  }
  return _mm512_add_epi32(sum, _mm512_srai_epi32(sum16, 4));
}

template <int BITS>
L4_AVX512_INLINE void unpack(const uint8_t* codes, __m512i* w) {
  if (BITS == 8) {
    for (int i = 0; i < 8; i++) w[i] = load(codes + 64 * i);
    return;
  }
  const __m512i low = _mm512_set1_epi8(0x0f);
  for (int i = 0; i < 4; i++) {
    const __m512i both = load(codes + 64 * i);
    w[2 * i] = _mm512_and_si512(both, low);
    w[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
  }
}

// What a weight's offset (8, 128 or zero + 8) takes off the products of 32 inputs.
template <int BITS, bool ZERO>
L4_AVX512_INLINE __m512i start_of(__m512i zero, const int32_t* minus_sum) {
  const __m512i minus = word(minus_sum);
  // The sum of 32 codes fits in 16 bits, so the multiply-add of pairs is one product.
  if (ZERO) return _mm512_dpwssd_epi32(_mm512_setzero_si512(), zero, minus);
  return _mm512_slli_epi32(minus, BITS == 4 ? 3 : 7);
}

// With many tokens the prefetcher falls behind the products of a group, and with a few long ones
// their inputs crowd the first cache: lines are then asked for by hand, from about as far as
// memory answers. Else it is ahead, and asking only costs.
template <int BITS, int T>
L4_AVX512_INLINE bool wants_prefetch(int64_t num_groups) {
  return T > 4 || (BITS == 4 && T > 1 && num_groups * T > 160);
}

template <int BITS, int T>
L4_AVX512_INLINE void prefetch(const uint8_t* codes) {
  constexpr int kAhead = T > 4 ? 2048 : 4096;
#pragma GCC unroll 8
  for (int i = 0; i < BITS * 64; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(codes) + kAhead + i, _MM_HINT_T0);
  }
}

// T tokens times 32 inputs, added to the tokens' sums. SCALED: the group has scales.
template <int BITS, bool SCALED, bool ZERO, int T>
L4_AVX512_INLINE void add_group(const uint8_t* codes, __m512 scale, __m512i zero,
                                const Token* token, int64_t g, __m512* sum) {
  __m512i w[8];
  if (!(T == 1 && BITS == 4)) unpack<BITS>(codes, w);
  // Four tokens side by side: a chain of dependent products is longer than its latency.
  constexpr int kStep = T < 4 ? T : 4;
#pragma GCC unroll 16
  for (int first = 0; first < T; first += kStep) {
    __m512i acc[kStep];
#pragma GCC unroll 4
    for (int t = 0; t < kStep; t++) {
      if (first + t < T) acc[t] = start_of<BITS, ZERO>(zero, token[first + t].minus_sum + g);
    }
    if (T == 1 && BITS == 4) {
      acc[0] = dot_one(codes, token[0].codes + g * kGroup, acc[0]);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
#pragma GCC unroll 4
        for (int t = 0; t < kStep; t++) {
          if (first + t >= T) continue;
          const int8_t* x = token[first + t].codes + g * kGroup + 4 * i;
          acc[t] = _mm512_dpbusd_epi32(acc[t], w[i], word(x));
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kStep; t++) {
      if (first + t >= T) continue;
      const __m512 of_token = _mm512_set1_ps(token[first + t].scale[g]);
      const __m512 both = SCALED ? _mm512_mul_ps(scale, of_token) : of_token;
      sum[first + t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[t]), both, sum[first + t]);
    }
  }
}

// T tokens times a block of codes. SPAN: 32-groups that share a scale; 0: the row's.
template <int BITS, int SPAN, bool ZERO, int T>
L4_AVX512 void tile_codes(const uint8_t* data, const Token* token, int64_t num_groups,
                          __m512* out) {
  constexpr int kBytes = BITS * 64, kSpan = SPAN ? SPAN : 1;
  __m512 sum[T];
  __m512i zero = _mm512_setzero_si512();
  const bool asks = wants_prefetch<BITS, T>(num_groups);
  for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
  if (SPAN == 0) {
    const __m512 scale = _mm512_loadu_ps(data);
    const uint8_t* codes = data + kBlock * 4;
    for (int64_t g = 0; g < num_groups; g++, codes += kBytes) {
      if (asks) prefetch<BITS, T>(codes);
      add_group<BITS, false, ZERO, T>(codes, scale, zero, token, g, sum);
    }
    for (int t = 0; t < T; t++) out[t] = _mm512_mul_ps(sum[t], scale);
    return;
  }
  const int64_t groups = num_groups / kSpan;
  for (int64_t first = 0, g = 0; first < groups; first += kSegment) {
    Segment part = segment_at(data, groups - first, ZERO);
    for (int64_t i = 0; i < part.groups; i++) {
      const __m512 scale = scales_at(part.scales + 32 * i);
      if (ZERO) {
        const uint8_t* at = part.zeros + 16 * i;
        zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
      }
      for (int s = 0; s < kSpan; s++, g++, part.codes += kBytes) {
        if (asks) prefetch<BITS, T>(part.codes);
        add_group<BITS, true, ZERO, T>(part.codes, scale, zero, token, g, sum);
      }
    }
    data = part.codes;
  }
  for (int t = 0; t < T; t++) out[t] = sum[t];
}

using TileCodes = void (*)(const uint8_t*, const Token*, int64_t, __m512*);

// Sizes of tiles; a tile between two takes the larger, with the last token more than once.
constexpr int kSizes[] = {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16};

template <int BITS, int SPAN, bool ZERO>
TileCodes tile_of_size(int32_t size) {
  switch (size) {
    case 1: return tile_codes<BITS, SPAN, ZERO, 1>;
    case 2: return tile_codes<BITS, SPAN, ZERO, 2>;
    case 3: return tile_codes<BITS, SPAN, ZERO, 3>;
    case 4: return tile_codes<BITS, SPAN, ZERO, 4>;
    case 5: return tile_codes<BITS, SPAN, ZERO, 5>;
    case 6: return tile_codes<BITS, SPAN, ZERO, 6>;
    case 7: return tile_codes<BITS, SPAN, ZERO, 7>;
    case 8: return tile_codes<BITS, SPAN, ZERO, 8>;
    case 10: return tile_codes<BITS, SPAN, ZERO, 10>;
    case 12: return tile_codes<BITS, SPAN, ZERO, 12>;
    case 14: return tile_codes<BITS, SPAN, ZERO, 14>;
    default: return tile_codes<BITS, SPAN, ZERO, 16>;
  }
}

TileCodes tile_for(const Weight& w, int32_t size) {
  const int span = w.group / kGroup;
  if (w.kind == L4_INT8) {
    if (span == 0) return tile_of_size<8, 0, false>(size);
    if (span == 1) return tile_of_size<8, 1, false>(size);
    return span == 2 ? tile_of_size<8, 2, false>(size) : tile_of_size<8, 4, false>(size);
  }
  if (w.has_zero) {
    if (span == 1) return tile_of_size<4, 1, true>(size);
    return span == 2 ? tile_of_size<4, 2, true>(size) : tile_of_size<4, 4, true>(size);
  }
  if (span == 1) return tile_of_size<4, 1, false>(size);
  return span == 2 ? tile_of_size<4, 2, false>(size) : tile_of_size<4, 4, false>(size);
}

struct Target {
  float* y;
  int64_t ldy;
  int32_t num_rows;  // of the weight
};

L4_AVX512_INLINE void store(const Target& to, int32_t token, int32_t block, __m512 sum) {
  const int32_t left = to.num_rows - block * kBlock;
  const __mmask16 mask = left < kBlock ? static_cast<__mmask16>((1u << left) - 1) : 0xffff;
  _mm512_mask_storeu_ps(to.y + token * to.ldy + block * kBlock, mask, sum);
}

int32_t size_at_least(int32_t count) {
  for (int size : kSizes) {
    if (size >= count) return size;
  }
  return kTile;
}

// Tokens whose codes stay in the second cache while all blocks pass by.
int32_t tokens_at_once(int64_t bytes_a_token) {
  const int64_t count = (384 << 10) / bytes_a_token / kTile * kTile;
  return count < kTile ? kTile : static_cast<int32_t>(count);
}

L4_AVX512 void linear_codes(const Weight& weight, const Rows& rows, const Target& to,
                            int32_t first_block, int32_t last_block) {
  const int32_t at_once = tokens_at_once(rows.code_stride);
  for (int32_t start = 0; start < rows.m; start += at_once) {
    const int32_t end = rows.m - start < at_once ? rows.m : start + at_once;
    const int32_t width = tile_of(end - start, kTile), size = size_at_least(width);
    const TileCodes tile = tile_for(weight, size);
    for (int32_t block = first_block; block < last_block; block++) {
      const uint8_t* data = weight.data + block * block_bytes(weight);
      for (int32_t first = start; first < end; first += width) {
        const int32_t count = end - first < width ? end - first : width;
        Token token[kTile];
        for (int32_t t = 0; t < size; t++) {
          const int32_t row = row_of(rows, first + (t < count ? t : count - 1));
          token[t] = {rows.codes + row * rows.code_stride, rows.scale + row * rows.num_groups,
                      rows.minus_sum + row * rows.num_groups};
        }
        __m512 sum[kTile];
        tile(data, token, rows.num_groups, sum);
        for (int32_t t = 0; t < count; t++) store(to, first + t, block, sum[t]);
      }
    }
  }
}

L4_AVX512 void prepare(Rows& rows, int32_t first_row, int32_t last_row) {
  round_rows(rows, first_row, last_row);
}

// Floats: T tokens times NB blocks; inputs take turns at two sums, so that the products of one
// token are no single chain. The order in which a result is added up is the same in every tile.
template <int T, int NB>
L4_AVX512 void tile_fp32(const uint8_t* data, int64_t bytes, const void* const* token, int64_t k,
                         __m512* out) {
  __m512 even[T * NB], odd[T * NB];
  for (int i = 0; i < T * NB; i++) even[i] = odd[i] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 1 < k; i += 2, data += 128) {
#pragma GCC unroll 12
    for (int t = 0; t < T; t++) {
      const float* x = static_cast<const float*>(token[t]) + i;
      const __m512 x0 = _mm512_set1_ps(x[0]), x1 = _mm512_set1_ps(x[1]);
#pragma GCC unroll 2
      for (int b = 0; b < NB; b++) {
        const int at = t * NB + b;
        even[at] = _mm512_fmadd_ps(_mm512_loadu_ps(data + b * bytes), x0, even[at]);
        odd[at] = _mm512_fmadd_ps(_mm512_loadu_ps(data + b * bytes + 64), x1, odd[at]);
      }
    }
  }
  for (int at = 0; at < T * NB; at++) {
    if (i < k) {
      const __m512 x = _mm512_set1_ps(static_cast<const float*>(token[at / NB])[i]);
      even[at] = _mm512_fmadd_ps(_mm512_loadu_ps(data + at % NB * bytes), x, even[at]);
    }
    out[at] = _mm512_add_ps(even[at], odd[at]);
  }
}

// Without bf16 instructions: a word of two inputs is taken apart. k counts words, an even number.
template <int T, int NB>
L4_AVX512 void tile_wide(const uint8_t* data, int64_t bytes, const void* const* token, int64_t k,
                         __m512* out) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  __m512 even[T * NB], odd[T * NB];
  for (int i = 0; i < T * NB; i++) even[i] = odd[i] = _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i++, data += 64) {
    __m512 w0[NB], w1[NB];
#pragma GCC unroll 2
    for (int b = 0; b < NB; b++) {
      const __m512i w = load(data + b * bytes);
      w0[b] = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
      w1[b] = _mm512_castsi512_ps(_mm512_and_si512(w, top));
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; t++) {
      const __m512i x = word(static_cast<const uint16_t*>(token[t]) + 2 * i);
      const __m512 x0 = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
      const __m512 x1 = _mm512_castsi512_ps(_mm512_and_si512(x, top));
#pragma GCC unroll 2
      for (int b = 0; b < NB; b++) {
        even[t * NB + b] = _mm512_fmadd_ps(w0[b], x0, even[t * NB + b]);
        odd[t * NB + b] = _mm512_fmadd_ps(w1[b], x1, odd[t * NB + b]);
      }
    }
  }
  for (int i = 0; i < T * NB; i++) out[i] = _mm512_add_ps(even[i], odd[i]);
}

template <int T, int NB>
L4_AVX512_BF16 void tile_bf16(const uint8_t* data, int64_t bytes, const void* const* token,
                              int64_t k, __m512* out) {
  __m512 even[T * NB], odd[T * NB];
  for (int i = 0; i < T * NB; i++) even[i] = odd[i] = _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i += 2, data += 128) {
    __m512bh w0[NB], w1[NB];
#pragma GCC unroll 2
    for (int b = 0; b < NB; b++) {
      w0[b] = (__m512bh)_mm512_loadu_si512(data + b * bytes);
      w1[b] = (__m512bh)_mm512_loadu_si512(data + b * bytes + 64);
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; t++) {
      int32_t x[2];
      std::memcpy(x, static_cast<const uint16_t*>(token[t]) + 2 * i, 8);
      const __m512bh x0 = (__m512bh)_mm512_set1_epi32(x[0]);
      const __m512bh x1 = (__m512bh)_mm512_set1_epi32(x[1]);
#pragma GCC unroll 2
      for (int b = 0; b < NB; b++) {
        even[t * NB + b] = _mm512_dpbf16_ps(even[t * NB + b], w0[b], x0);
        odd[t * NB + b] = _mm512_dpbf16_ps(odd[t * NB + b], w1[b], x1);
      }
    }
  }
  for (int i = 0; i < T * NB; i++) out[i] = _mm512_add_ps(even[i], odd[i]);
}

using TileFloats = void (*)(const uint8_t*, int64_t, const void* const*, int64_t, __m512*);

// One block at a time is one stream from memory; two side by side use a token's input twice.
#define L4_TILES(tile)                                                                         \
  {                                                                                            \
    {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>}, {                \
      tile<1, 2>, tile<2, 2>, tile<3, 2>, tile<4, 2>, tile<5, 2>, tile<6, 2>                   \
    }                                                                                          \
  }
constexpr int kFloatTile = 6, kPairsFrom = 4;
constexpr TileFloats kFp32[2][6] = L4_TILES(tile_fp32), kWide[2][6] = L4_TILES(tile_wide),
                     kBf16[2][6] = L4_TILES(tile_bf16);

bool has_bf16() {
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
}

L4_AVX512 void linear_floats(const Weight& weight, const Rows& rows, const Target& to,
                             int32_t first_block, int32_t last_block) {
  const bool is_fp32 = weight.kind == L4_FP32;
  const auto& tiles = is_fp32 ? kFp32 : has_bf16() ? kBf16 : kWide;
  const int64_t bytes = block_bytes(weight), k = is_fp32 ? rows.k : padded(rows.k) / 2;
  const int32_t at_once = tokens_at_once(k * 4);
  for (int32_t start = 0; start < rows.m; start += at_once) {
    const int32_t end = rows.m - start < at_once ? rows.m : start + at_once;
    const int32_t width = tile_of(end - start, kFloatTile);
    int32_t step;
    for (int32_t block = first_block; block < last_block; block += step) {
      step = width >= kPairsFrom && block + 1 < last_block ? 2 : 1;
      const uint8_t* data = weight.data + block * bytes;
      for (int32_t first = start; first < end; first += width) {
        const int32_t count = end - first < width ? end - first : width;
        const void* token[kFloatTile];
        for (int32_t t = 0; t < count; t++) {
          const int64_t row = row_of(rows, first + t);
          token[t] = is_fp32 ? static_cast<const void*>(rows.x + row * rows.ldx)
                             : rows.bf16 + row * rows.bf16_stride;
        }
        __m512 sum[2 * kFloatTile];
        tiles[step - 1][count - 1](data, bytes, token, k, sum);
        for (int32_t i = 0; i < count * step; i++) {
          store(to, first + i / step, block + i % step, sum[i]);
        }
      }
    }
  }
}

void linear(const Weight& weight, const Rows& rows, float* y, int64_t ldy, int32_t first_block,
            int32_t last_block) {
  const Target to = {y, ldy, weight.rows};
  if (weight.kind <= L4_BF16) {
    linear_floats(weight, rows, to, first_block, last_block);
  } else {
    linear_codes(weight, rows, to, first_block, last_block);
  }
}

bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Kernels kAvx512 = {"avx512", is_supported, prepare, linear};

}  // namespace l4
#endif
