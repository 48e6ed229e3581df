// Bodies of vector.h's functions for L4_WIDTH floats at once; included once per instruction set, so
// nothing here may come from a library's templates: the linker would share one set's code with all.

typedef float vf __attribute__((vector_size(L4_WIDTH * 4)));
typedef int32_t vi __attribute__((vector_size(L4_WIDTH * 4)));
typedef uint32_t vu __attribute__((vector_size(L4_WIDTH * 4)));
typedef uint16_t vh __attribute__((vector_size(L4_WIDTH * 2)));
typedef uint8_t vb __attribute__((vector_size(L4_WIDTH)));
constexpr int W = L4_WIDTH;

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { vf v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE vf load(const uint16_t *p) {
  vh v;
  __builtin_memcpy(&v, p, sizeof v);
  return (vf)(__builtin_convertvector(v, vu) << 16);
}
INLINE vi load_bytes(const uint8_t *p) {
  vb v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vi);
}
INLINE vf all(float x) { return vf{} + x; }
#if L4_WIDTH == 16
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif L4_WIDTH == 8
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
#endif
#if L4_WIDTH == 16
INLINE float sum_of(vf v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float greatest_of(vf v) { return _mm512_reduce_max_ps((__m512)v); }
INLINE vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#else
INLINE float sum_of(vf v) {
  float total = 0;
  for (int i = 0; i < W; i++) total += v[i];
  return total;
}
INLINE float greatest_of(vf v) {
  float greatest = v[0];
  for (int i = 1; i < W; i++) greatest = v[i] > greatest ? v[i] : greatest;
  return greatest;
}
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
#endif

// e^x for x <= 88, within 2 units of the last place; 0 for what is below -87.
INLINE vf exp_of(vf x) {
  const vf top = all(88.0f), bottom = all(-87.0f);
  const vi is_tiny = x < bottom;
  x = x > top ? top : x;
  x = is_tiny ? bottom : x;
  const vf magic = all(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the rounded quotient
  const vf t = x * 1.44269504088896341f + magic;
  const vf n = t - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p * r, r, r) + 1.0f;
  p = (vf)((vi)p + ((vi)t << 23));
  return is_tiny ? vf{} : p;
}

static float dot(const float *a, const float *b, int64_t n) {
  vf s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    s0 = fma(load(a + i), load(b + i), s0);
    s1 = fma(load(a + i + W), load(b + i + W), s1);
    s2 = fma(load(a + i + 2 * W), load(b + i + 2 * W), s2);
    s3 = fma(load(a + i + 3 * W), load(b + i + 3 * W), s3);
  }
  for (; i + W <= n; i += W) s0 = fma(load(a + i), load(b + i), s0);
  float total = sum_of((s0 + s1) + (s2 + s3));
  for (; i < n; i++) total += a[i] * b[i];
  return total;
}

static void rms_norm(const float *h, const float *weight, float eps, int64_t n, float *x) {
  const float inverse = 1.0f / __builtin_sqrtf(dot(h, h, n) / (float)n + eps);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(x + i, load(h + i) * inverse * load(weight + i));
  for (; i < n; i++) x[i] = h[i] * inverse * weight[i];
}

static void rotate(float *x, const float *turn, int head_dim, bool unit, float eps, float scale) {
  // Turning a pair does not change its length: the norm may be taken before.
  if (unit) scale /= __builtin_sqrtf(dot(x, x, head_dim) / (float)head_dim + eps);
  if (turn == nullptr) {
    for (int i = 0; i < head_dim; i++) x[i] *= scale;
    return;
  }
  for (int i = 0; i < head_dim; i += 2) {
    const float re = x[i], im = x[i + 1], c = turn[i], s = turn[i + 1];
    x[i] = (re * c - im * s) * scale;
    x[i + 1] = (re * s + im * c) * scale;
  }
}

static void swiglu(const float *gate, const float *up, int64_t n, float *out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf g = load(gate + i);
    store(out + i, g / (1.0f + exp_of(-g)) * load(up + i));
  }
  if (i < n) {
    float g[W] = {}, u[W] = {}, y[W];
    for (int64_t j = i; j < n; j++) { g[j - i] = gate[j]; u[j - i] = up[j]; }
    store(y, load(g) / (1.0f + exp_of(-load(g))) * load(u));
    for (int64_t j = i; j < n; j++) out[j] = y[j - i];
  }
}

static void scale(const float *x, float by, int64_t n, float *out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(x + i) * by);
  for (; i < n; i++) out[i] = x[i] * by;
}

static void add(float *x, const float *y, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(x + i, load(x + i) + load(y + i));
  for (; i < n; i++) x[i] += y[i];
}

static void to_bf16(const float *x, int64_t n, uint16_t *out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vu u = (vu)load(x + i);
    const vu rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    const vu is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    const vh half = __builtin_convertvector(is_nan ? (u >> 16 | 64u) : rounded, vh);
    __builtin_memcpy(out + i, &half, sizeof half);
  }
  for (; i < n; i++) out[i] = float_to_bf16(x[i]);
}

// ---- attention -----------------------------------------------------------------------------------

// W channels of one key or value, from channel c on; codes come as they are.
template <int KIND>
INLINE vf channels(const void *row, int c, int head_dim) {
  if (KIND == L4_KEPT_FP32) return load((const float *)row + c);
  if (KIND == L4_KEPT_BF16) return load((const uint16_t *)row + c);
  if (KIND == L4_KEPT_INT8) {
    return __builtin_convertvector(load_bytes((const uint8_t *)row + c), vf);
  }
  // Two channels a byte, half a head apart.
  const int half = head_dim / 2;
  if (c < half) {
    return __builtin_convertvector(load_bytes((const uint8_t *)row + c) & 15, vf);
  }
  return __builtin_convertvector(load_bytes((const uint8_t *)row + c - half) >> 4, vf);
}

template <int KIND>
INLINE float channel(const void *row, int c, int head_dim) {
  if (KIND == L4_KEPT_FP32) return ((const float *)row)[c];
  if (KIND == L4_KEPT_BF16) return bf16_to_float(((const uint16_t *)row)[c]);
  const uint8_t *codes = (const uint8_t *)row;
  if (KIND == L4_KEPT_INT8) return codes[c];
  return c < head_dim / 2 ? codes[c] & 15 : codes[c - head_dim / 2] >> 4;
}

template <int KIND>
INLINE const void *row_of(const void *base, int64_t index, int head_dim) {
  const int64_t bytes = KIND == L4_KEPT_FP32   ? 4 * head_dim
              : KIND == L4_KEPT_BF16 ? 2 * head_dim
              : KIND == L4_KEPT_INT8 ? head_dim
                         : head_dim / 2;
  return (const char *)base + index * bytes;
}

#if L4_WIDTH == 16
// Sixteen vectors in, the sum of each out. Four rounds: each halves how many there are.
INLINE __m512 sums_of(__m512 *v) {
  for (int i = 0; i < 8; i++) {
    const __m512 a = v[i], b = v[i + 8];
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }  // lanes: a02 a13 b02 b13
  for (int i = 0; i < 4; i++) {
    const __m512 a = v[i], b = v[i + 4];
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }  // lanes: v[i], v[i + 8], v[i + 4], v[i + 12]
  for (int i = 0; i < 2; i++) {
    const __m512 a = v[i], b = v[i + 2];
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }  // in a lane: a b a b
  const __m512 a = v[0], b = v[1];
  const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  // in a lane: i, i + 2, i + 1, i + 3; lanes: 0, 8, 4, 12
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return _mm512_permutexvar_ps(order, s);
}
#endif

// Scores of NQ queries with `count` keys. shapes: q [NQ, H] -> scores [NQ, kTile]
template <int KIND, int NQ>
INLINE void score(const void *keys, int64_t first, int count, int head_dim, const float *q,
          float *scores) {
  int k = 0;
  for (; k + 4 <= count; k += 4) {
    vf acc[16];
    for (int i = 0; i < 4 * NQ; i++) acc[i] = vf{};
    const void *row[4];
    for (int j = 0; j < 4; j++) row[j] = row_of<KIND>(keys, first + k + j, head_dim);
    for (int c = 0; c < head_dim; c += W) {
      vf key[4];
      for (int j = 0; j < 4; j++) key[j] = channels<KIND>(row[j], c, head_dim);
      for (int i = 0; i < NQ; i++) {
        const vf query = load(q + i * head_dim + c);
        for (int j = 0; j < 4; j++) acc[i * 4 + j] = fma(query, key[j], acc[i * 4 + j]);
      }
    }
#if L4_WIDTH == 16
    for (int i = 4 * NQ; i < 16; i++) acc[i] = vf{};
    float sums[16];
    _mm512_storeu_ps(sums, sums_of((__m512 *)acc));
    for (int i = 0; i < NQ; i++) __builtin_memcpy(scores + i * kTile + k, sums + i * 4, 16);
#else
    for (int i = 0; i < 4 * NQ; i++) scores[i / 4 * kTile + k + i % 4] = sum_of(acc[i]);
#endif
  }
  for (; k < count; k++) {
    const void *row = row_of<KIND>(keys, first + k, head_dim);
    for (int i = 0; i < NQ; i++) {
      vf acc = {};
      for (int c = 0; c < head_dim; c += W) {
        acc = fma(load(q + i * head_dim + c), channels<KIND>(row, c, head_dim), acc);
      }
      scores[i * kTile + k] = sum_of(acc);
    }
  }
}

// acc += weights @ values. shapes: weights [NQ, kTile], acc [NQ, H] from channel c, NC vectors of them
template <int KIND, int NQ, int NC>
INLINE void gather(const void *values, int64_t first, int count, int head_dim, int c,
           const float *weights, float *acc) {
  vf sums[NQ * NC];
  for (int i = 0; i < NQ; i++) {
    for (int j = 0; j < NC; j++) sums[i * NC + j] = load(acc + i * head_dim + c + j * W);
  }
  for (int k = 0; k < count; k++) {
    const void *row = row_of<KIND>(values, first + k, head_dim);
    vf value[NC];
    for (int j = 0; j < NC; j++) value[j] = channels<KIND>(row, c + j * W, head_dim);
    for (int i = 0; i < NQ; i++) {
      const vf weight = all(weights[i * kTile + k]);
      for (int j = 0; j < NC; j++) sums[i * NC + j] = fma(weight, value[j], sums[i * NC + j]);
    }
  }
  for (int i = 0; i < NQ; i++) {
    for (int j = 0; j < NC; j++) store(acc + i * head_dim + c + j * W, sums[i * NC + j]);
  }
}

// Scores to weights relative to the greatest seen so far; what was summed up before shrinks along.
INLINE void soften(float *scores, int count, float *most, float *sum, float *acc, int head_dim) {
  for (int k = count; k < kTile; k++) scores[k] = -__builtin_inff();
  vf top = load(scores);
  for (int k = W; k < kTile; k += W) top = larger(top, load(scores + k));
  const float greatest = greatest_of(top);
  if (greatest > *most) {
    const float shrink = __builtin_expf(*most - greatest);
    *most = greatest;
    *sum *= shrink;
    scale(acc, shrink, head_dim, acc);
  }
  vf total = {};
  for (int k = 0; k < kTile; k += W) {
    const vf weight = exp_of(load(scores + k) - *most);
    store(scores + k, weight);
    total += weight;
  }
  *sum += sum_of(total);
}

template <int KIND, int NQ>
INLINE void attend_tile(const L4Part *part, int head, int head_dim, int64_t first, int count,
            const float *q, float *most, float *sum, float *acc, float *scratch) {
  constexpr bool kCodes = KIND == L4_KEPT_INT8 || KIND == L4_KEPT_INT4;
  constexpr int kUnit = W * (KIND == L4_KEPT_INT4 ? 2 : 1);
  float *scores = scratch;                  // [NQ, kTile]
  float *weights = scratch + NQ * kTile;    // the same times the values' scales
  float *scaled = weights + NQ * kTile;     // [NQ, H]: queries times the keys' scales
  const int64_t bytes = KIND == L4_KEPT_FP32 ? 4 : KIND == L4_KEPT_BF16 ? 2 : 1;
  const char *keys = (const char *)part->keys + head * part->head_stride * bytes;
  const char *values = (const char *)part->values + head * part->head_stride * bytes;
  float base[NQ] = {};
  if (kCodes) {
    const int64_t at = head * part->key_scale_stride + first / kKeyGroup * head_dim;
    for (int i = 0; i < NQ; i++) {
      float low = 0;
      for (int c = 0; c < head_dim; c++) {
        const float x = q[i * head_dim + c];
        scaled[i * head_dim + c] = x * L4_HALF(part->key_scale[at + c]);
        low += x * L4_HALF(part->key_low[at + c]);
      }
      base[i] = low;
    }
    q = scaled;
  }
  if (head_dim % kUnit == 0) {
    score<KIND, NQ>(keys, first, count, head_dim, q, scores);
  } else {
    for (int i = 0; i < NQ; i++) {
      for (int k = 0; k < count; k++) {
        const void *row = row_of<KIND>(keys, first + k, head_dim);
        float s = 0;
        for (int c = 0; c < head_dim; c++) {
          s += q[i * head_dim + c] * channel<KIND>(row, c, head_dim);
        }
        scores[i * kTile + k] = s;
      }
    }
  }
  for (int i = 0; i < NQ; i++) {
    if (kCodes) for (int k = 0; k < count; k++) scores[i * kTile + k] += base[i];
    soften(scores + i * kTile, count, most + i, sum + i, acc + i * head_dim, head_dim);
  }
  const int groups = kCodes ? part->value_groups : 1, width = head_dim / groups;
  for (int g = 0; g < groups; g++) {
    const float *by = scores;
    if (kCodes) {
      const int64_t at = head * part->value_scale_stride + first * groups + g;
      for (int i = 0; i < NQ; i++) {
        float low = 0;
        for (int k = 0; k < count; k++) {
          const float weight = scores[i * kTile + k];
          weights[i * kTile + k] = weight * L4_HALF(part->value_scale[at + k * groups]);
          low += weight * L4_HALF(part->value_low[at + k * groups]);
        }
        float *sums = acc + i * head_dim + g * width;
        for (int c = 0; c < width; c++) sums[c] += low;
      }
      by = weights;
    }
    int c = g * width;
    const int end = c + width;
    if (head_dim % kUnit == 0 && width % W == 0) {
      for (; c + 4 * W <= end; c += 4 * W) {
        gather<KIND, NQ, 4>(values, first, count, head_dim, c, by, acc);
      }
      for (; c < end; c += W) gather<KIND, NQ, 1>(values, first, count, head_dim, c, by, acc);
    } else {
      for (int k = 0; k < count; k++) {
        const void *row = row_of<KIND>(values, first + k, head_dim);
        for (int i = 0; i < NQ; i++) {
          for (int j = c; j < end; j++) {
            acc[i * head_dim + j] +=
              by[i * kTile + k] * channel<KIND>(row, j, head_dim);
          }
        }
      }
    }
  }
}

#ifdef L4_DOT_BF16
// Keys and values in bf16 against queries and weights in bf16, summed in fp32: half the products.

// Four keys side by side, a lane each. shapes: q [NQ, H] bf16 -> scores [NQ, kTile]
template <int NQ>
INLINE void score_bf16(const uint16_t *keys, int count, int head_dim, const uint16_t *q,
                       float *scores) {
  const __m512i by_query =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int k = 0; k < count; k += 4) {
    const uint16_t *row[4];
    for (int j = 0; j < 4; j++) {
      const int at = k + j < count ? k + j : count - 1;  // what is behind the last is not ours
      row[j] = keys + (int64_t)at * head_dim;
    }
    __m512 even[4], odd[4];
    for (int i = 0; i < 4; i++) even[i] = odd[i] = _mm512_setzero_ps();
    for (int c = 0; c < head_dim; c += 32) {
      __m512i r[4];
      for (int j = 0; j < 4; j++) r[j] = _mm512_loadu_si512(row[j] + c);
      const __m512i a = _mm512_shuffle_i32x4(r[0], r[1], 0x44);
      const __m512i b = _mm512_shuffle_i32x4(r[2], r[3], 0x44);
      const __m512i d = _mm512_shuffle_i32x4(r[0], r[1], 0xee);
      const __m512i e = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
      const __m512i lanes[4] = {
          _mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd),
          _mm512_shuffle_i32x4(d, e, 0x88), _mm512_shuffle_i32x4(d, e, 0xdd)};
      for (int i = 0; i < NQ; i++) {
        const uint16_t *query = q + i * head_dim + c;
        for (int j = 0; j < 4; j++) {
          const __m512i eight =
              _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(query + 8 * j)));
          __m512 &sum = j % 2 ? odd[i] : even[i];
          sum = _mm512_dpbf16_ps(sum, (__m512bh)lanes[j], (__m512bh)eight);
        }
      }
    }
    for (int i = 0; i < NQ; i++) even[i] = _mm512_add_ps(even[i], odd[i]);
    const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(even[0], even[1]),
                                   _mm512_unpackhi_ps(even[0], even[1]));
    const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(even[2], even[3]),
                                   _mm512_unpackhi_ps(even[2], even[3]));
    __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
    sums = _mm512_permutexvar_ps(by_query, sums);
    _mm_storeu_ps(scores + k, _mm512_castps512_ps128(sums));
    if (NQ > 1) _mm_storeu_ps(scores + kTile + k, _mm512_extractf32x4_ps(sums, 1));
    if (NQ > 2) {
      _mm_storeu_ps(scores + 2 * kTile + k, _mm512_extractf32x4_ps(sums, 2));
      _mm_storeu_ps(scores + 3 * kTile + k, _mm512_extractf32x4_ps(sums, 3));
    }
  }
}

// acc += weights @ values, two keys at once. shapes: weights [NQ, kTile] bf16; NC times 32 channels
template <int NQ, int NC>
INLINE void gather_bf16(const uint16_t *values, int count, int head_dim, int c,
                        const uint16_t *weights, float *acc) {
  __m512 low[NQ * NC], high[NQ * NC];  // channels 0-3, 8-11, ... and 4-7, 12-15, ...
  for (int i = 0; i < NQ * NC; i++) {
    const float *from = acc + i / NC * head_dim + c + i % NC * 32;
    const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
    low[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    high[i] = _mm512_shuffle_f32x4(a, b, 0xdd);
  }
  for (int k = 0; k < count; k += 2) {
    const uint16_t *one = values + (int64_t)k * head_dim + c;
    const uint16_t *two = k + 1 < count ? one + head_dim : one;
    __m512i v[2 * NC];
    for (int j = 0; j < NC; j++) {
      const __m512i a = _mm512_loadu_si512(one + 32 * j), b = _mm512_loadu_si512(two + 32 * j);
      v[2 * j] = _mm512_unpacklo_epi16(a, b);
      v[2 * j + 1] = _mm512_unpackhi_epi16(a, b);
    }
    for (int i = 0; i < NQ; i++) {
      int32_t both;
      __builtin_memcpy(&both, weights + i * kTile + k, 4);
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
      for (int j = 0; j < NC; j++) {
        low[i * NC + j] = _mm512_dpbf16_ps(low[i * NC + j], (__m512bh)v[2 * j], weight);
        high[i * NC + j] = _mm512_dpbf16_ps(high[i * NC + j], (__m512bh)v[2 * j + 1], weight);
      }
    }
  }
  for (int i = 0; i < NQ * NC; i++) {
    float *to = acc + i / NC * head_dim + c + i % NC * 32;
    const __m512 a = _mm512_shuffle_f32x4(low[i], high[i], 0x44);
    const __m512 b = _mm512_shuffle_f32x4(low[i], high[i], 0xee);
    _mm512_storeu_ps(to, _mm512_shuffle_f32x4(a, a, 0xd8));
    _mm512_storeu_ps(to + 16, _mm512_shuffle_f32x4(b, b, 0xd8));
  }
}

template <int NQ>
INLINE void attend_tile_bf16(const uint16_t *keys, const uint16_t *values, int count, int head_dim,
                             const uint16_t *q, float *most, float *sum, float *acc,
                             float *scratch) {
  float *scores = scratch;
  uint16_t *weights = (uint16_t *)(scratch + 4 * kTile);
  score_bf16<NQ>(keys, count, head_dim, q, scores);
  for (int i = 0; i < NQ; i++) {
    soften(scores + i * kTile, count, most + i, sum + i, acc + i * head_dim, head_dim);
    for (int k = 0; k < kTile; k += 16) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(scores + i * kTile + k));
      _mm256_storeu_si256((__m256i *)(weights + i * kTile + k), (__m256i)rounded);
    }
  }
  int c = 0;
  for (; c + 64 <= head_dim; c += 64) {
    gather_bf16<NQ, 2>(values, count, head_dim, c, weights, acc);
  }
  for (; c < head_dim; c += 32) gather_bf16<NQ, 1>(values, count, head_dim, c, weights, acc);
}

static void attend_bf16(const L4Part *part, int head, int head_dim, int64_t first, int64_t last,
                        const float *q, int n, const Running *state, float *scratch) {
  uint16_t *rounded = (uint16_t *)(scratch + 8 * kTile);  // [n, H]
  to_bf16(q, (int64_t)n * head_dim, rounded);
  const uint16_t *keys = (const uint16_t *)part->keys + head * part->head_stride;
  const uint16_t *values = (const uint16_t *)part->values + head * part->head_stride;
  for (; first < last; first += kTile) {
    const int count = (int)(last - first < kTile ? last - first : kTile);
    const uint16_t *k = keys + first * head_dim, *v = values + first * head_dim;
    int i = 0;
    for (; i + 4 <= n; i += 4) {
      attend_tile_bf16<4>(k, v, count, head_dim, rounded + i * head_dim, state->most + i,
                          state->sum + i, state->acc + (int64_t)i * head_dim, scratch);
    }
    for (; i < n; i++) {
      attend_tile_bf16<1>(k, v, count, head_dim, rounded + i * head_dim, state->most + i,
                          state->sum + i, state->acc + (int64_t)i * head_dim, scratch);
    }
  }
}
#endif

template <int KIND>
static void attend_kind(const L4Part *part, int head, int head_dim, int64_t first, int64_t last,
            const float *q, int n, const Running *state, float *scratch) {
  while (first < last) {
    const int64_t left = kTile - first % kTile;  // a tile lies in one group of scales
    const int count = (int)(last - first < left ? last - first : left);
    int i = 0;
    for (; i + 4 <= n; i += 4) {
      attend_tile<KIND, 4>(part, head, head_dim, first, count, q + i * head_dim,
                 state->most + i, state->sum + i, state->acc + i * head_dim,
                 scratch);
    }
    for (; i + 2 <= n; i += 2) {
      attend_tile<KIND, 2>(part, head, head_dim, first, count, q + i * head_dim,
                 state->most + i, state->sum + i, state->acc + i * head_dim,
                 scratch);
    }
    for (; i < n; i++) {
      attend_tile<KIND, 1>(part, head, head_dim, first, count, q + i * head_dim,
                 state->most + i, state->sum + i, state->acc + i * head_dim,
                 scratch);
    }
    first += count;
  }
}

static void attend(const L4Part *part, int head, int head_dim, int64_t first, int64_t last,
           const float *q, int n, const Running *state, float *scratch) {
#ifdef L4_DOT_BF16
  if (part->kind == L4_KEPT_BF16 && head_dim % 32 == 0) {
    attend_bf16(part, head, head_dim, first, last, q, n, state, scratch);
    return;
  }
#endif
  auto run = part->kind == L4_KEPT_FP32   ? attend_kind<L4_KEPT_FP32>
         : part->kind == L4_KEPT_BF16 ? attend_kind<L4_KEPT_BF16>
         : part->kind == L4_KEPT_INT8 ? attend_kind<L4_KEPT_INT8>
                      : attend_kind<L4_KEPT_INT4>;
  run(part, head, head_dim, first, last, q, n, state, scratch);
}

const VectorKernels table = {L4_NAME, rms_norm, rotate, swiglu, dot, scale, add, to_bf16, attend};

#undef INLINE
