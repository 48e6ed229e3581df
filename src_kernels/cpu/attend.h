// One new token of each of several sequences attends over what its cache holds. The work is cut by
// key head and stretch of keys; stretches are joined by their log-sum-exp. Sequences that share a
// past read it once. source: flash decoding, as l4cli/inference/attention.py
#pragma once
#include <cmath>
#include <cstring>

#include "engine.h"
#include "team.h"
#include "vector.h"

namespace l4 {
namespace {

constexpr int64_t kStretch = 256;   // keys that are not worth dividing
constexpr int kStretchesOfThread = 4;

struct AttendRows {
  int32_t num_rows, heads, kv_heads, head_dim, layer;
  const float *q, *k, *v;  // of the new tokens, as the products left them
  L4Past *const *pasts;
};

// Keys that one or several rows see: their own, or a part of the past that all of them share.
struct Sequence {
  const int32_t *rows;
  int32_t num_rows;
  const L4Part *parts;
  int32_t num_parts;
  bool is_own;  // the new token is its last
  int64_t tokens, num_stretches, states;  // states: index of its first running softmax
};

struct AttendSpace {
  int64_t size;
  int64_t own_size;     // of each thread's part of `own`
  char *own;            // [threads]: sequences, order of rows, queries, scratch
  float *states;        // [most, 2 + H]: most, sum, acc of each query in each stretch
  int64_t num_states;
};

struct OwnSpace {
  Sequence *sequences;
  int32_t *order;
  float *q, *scratch;
};

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline OwnSpace own_space(const AttendSpace &s, int thread, const AttendRows &rows) {
  char *at = s.own + thread * s.own_size;
  const int64_t m = rows.num_rows;
  OwnSpace own;
  own.sequences = reinterpret_cast<Sequence *>(at);
  at += aligned(2 * m * (int64_t)sizeof(Sequence));
  own.order = reinterpret_cast<int32_t *>(at);
  at += aligned(4 * m);
  own.q = reinterpret_cast<float *>(at);
  at += aligned(4 * m * (rows.heads / rows.kv_heads) * rows.head_dim);
  own.scratch = reinterpret_cast<float *>(at);
  return own;
}

inline AttendSpace place_attend(int64_t m, int threads, int heads, int kv_heads, int head_dim,
                                char *memory) {
  AttendSpace s = {};
  const int64_t group = heads / kv_heads;
  s.own_size = aligned(2 * m * (int64_t)sizeof(Sequence)) + aligned(4 * m) +
               aligned(4 * m * group * head_dim) +
               aligned(4 * attend_scratch((int)(m * group), head_dim));
  s.num_states = (threads * kStretchesOfThread + 3 * kv_heads) * m * group;
  s.own = memory;
  s.states = reinterpret_cast<float *>(memory ? memory + threads * s.own_size : nullptr);
  s.size = threads * s.own_size + aligned(4 * s.num_states * (2 + head_dim));
  return s;
}

// Find out who shares what, and cut keys into stretches. Returns how many sequences there are.
inline int plan(const AttendRows &rows, int num_threads, OwnSpace &own) {
  const int32_t m = rows.num_rows;
  int count = 0;
  int32_t placed = 0;
  for (int32_t i = 0; i < m; i++) {
    const L4Past &past = rows.pasts[i][rows.layer];
    int32_t first = 0;  // the first row with this row's sealed parts
    while (first < i && (past.sealed_id == 0 ||
                         rows.pasts[first][rows.layer].sealed_id != past.sealed_id)) {
      first++;
    }
    if (first < i) continue;
    const int32_t start = placed;
    for (int32_t j = i; j < m; j++) {
      if (j == i || (past.sealed_id && rows.pasts[j][rows.layer].sealed_id == past.sealed_id)) {
        own.order[placed++] = j;
      }
    }
    const int32_t num_rows = placed - start;
    int64_t shared = 0;
    for (int32_t p = 0; p < past.num_sealed; p++) shared += past.parts[p].length;
    if (num_rows > 1) {
      own.sequences[count++] = {own.order + start, num_rows, past.parts, past.num_sealed, false,
                                shared, 0, 0};
    }
    for (int32_t j = start; j < placed; j++) {
      const L4Past &mine = rows.pasts[own.order[j]][rows.layer];
      const int32_t from = num_rows > 1 ? mine.num_sealed : 0;
      int64_t tokens = 1;
      for (int32_t p = from; p < mine.num_parts; p++) tokens += mine.parts[p].length;
      own.sequences[count++] = {own.order + j, 1, mine.parts + from, mine.num_parts - from, true,
                                tokens, 0, 0};
    }
  }
  int64_t total = 0;
  for (int i = 0; i < count; i++) total += own.sequences[i].tokens;
  // Rounded up: `place_attend` has room for so many stretches and no more.
  const int64_t shares = (int64_t)num_threads * kStretchesOfThread;
  int64_t length = (total * rows.kv_heads + shares - 1) / shares;
  length = length < kStretch ? kStretch : aligned(length);
  int64_t states = 0;
  for (int i = 0; i < count; i++) {
    Sequence &sequence = own.sequences[i];
    sequence.num_stretches = (sequence.tokens + length - 1) / length;
    sequence.states = states;
    states += rows.kv_heads * sequence.num_stretches * sequence.num_rows *
              (rows.heads / rows.kv_heads);
  }
  return count;
}

// Write the new token's key and value behind the others of this head.
template <typename FinishHead>
void append(const AttendRows &rows, const Sequence &sequence, int head, FinishHead finish_head,
            float *scratch) {
  const L4Part &tail = sequence.parts[sequence.num_parts - 1];
  const int32_t row = sequence.rows[0];
  const int64_t h = rows.head_dim, from = ((int64_t)row * rows.kv_heads + head) * h;
  const int64_t at = head * tail.head_stride + tail.length * h;
  std::memcpy(scratch, rows.k + from, 4 * h);
  finish_head(scratch, row, head, false);
  if (tail.kind == L4_KEPT_FP32) {
    std::memcpy(static_cast<float *>(tail.keys) + at, scratch, 4 * h);
    std::memcpy(static_cast<float *>(tail.values) + at, rows.v + from, 4 * h);
  } else {
    vector_kernels().to_bf16(scratch, h, static_cast<uint16_t *>(tail.keys) + at);
    vector_kernels().to_bf16(rows.v + from, h, static_cast<uint16_t *>(tail.values) + at);
  }
}

inline Running running(const AttendSpace &s, int64_t first, int64_t n) {
  // most and sum of all states lie before the sums of values.
  return {s.states + first, s.states + s.num_states + first,
          s.states + 2 * s.num_states + first * n};
}

template <typename FinishHead>
void attend_stretch(const AttendRows &rows, const AttendSpace &s, OwnSpace &own,
                    const Sequence &sequence, int head, int64_t stretch, FinishHead finish_head) {
  const int64_t h = rows.head_dim, group = rows.heads / rows.kv_heads;
  const int64_t n = sequence.num_rows * group;
  const int64_t length = (sequence.tokens + sequence.num_stretches - 1) / sequence.num_stretches;
  const int64_t first = stretch * length;
  const int64_t last = first + length < sequence.tokens ? first + length : sequence.tokens;
  for (int64_t i = 0; i < n; i++) {
    const int32_t row = sequence.rows[i / group];
    const int query = (int)(head * group + i % group);
    std::memcpy(own.q + i * h, rows.q + ((int64_t)row * rows.heads + query) * h, 4 * h);
    finish_head(own.q + i * h, row, query, true);
  }
  if (sequence.is_own && last == sequence.tokens) {
    append(rows, sequence, head, finish_head, own.scratch);
  }
  const int64_t state = sequence.states + (head * sequence.num_stretches + stretch) * n;
  const Running running_state = running(s, state, h);
  for (int64_t i = 0; i < n; i++) running_state.most[i] = -INFINITY;
  std::memset(running_state.sum, 0, 4 * n);
  std::memset(running_state.acc, 0, 4 * n * h);
  int64_t start = 0;  // of a part, in the sequence
  for (int32_t p = 0; p < sequence.num_parts && start < last; p++) {
    const L4Part &part = sequence.parts[p];
    const bool is_tail = sequence.is_own && p == sequence.num_parts - 1;
    const int64_t end = start + part.length + is_tail;
    const int64_t from = first > start ? first : start, to = last < end ? last : end;
    if (from < to) {
      vector_kernels().attend(&part, head, (int)h, from - start, to - start, own.q, (int)n,
                              &running_state, own.scratch);
    }
    start = end;
  }
}

// All rows' attention, cut into stretches; `merge` joins them after a barrier.
template <typename FinishHead>
void attend_past(Team &team, const AttendRows &rows, const AttendSpace &s, FinishHead finish_head) {
  OwnSpace own = own_space(s, team.thread, rows);
  const int count = plan(rows, team.num_threads, own);
  int64_t total = 0;
  for (int i = 0; i < count; i++) total += own.sequences[i].num_stretches * rows.kv_heads;
  team.share(total, 1, [&](int64_t first, int64_t last) {
    int64_t start = 0;
    for (int i = 0; i < count; i++) {
      const Sequence &sequence = own.sequences[i];
      const int64_t end = start + sequence.num_stretches * rows.kv_heads;
      for (int64_t at = first > start ? first : start; at < last && at < end; at++) {
        const int64_t item = at - start;
        attend_stretch(rows, s, own, sequence, (int)(item / sequence.num_stretches),
                       item % sequence.num_stretches, finish_head);
      }
      start = end;
    }
  });
}

// Join all that one row's heads saw. shapes: -> out [N, H]
inline void merge(int thread, const AttendRows &rows, const AttendSpace &s, int32_t row,
                  float *out) {
  const OwnSpace own = own_space(s, thread, rows);
  const int64_t h = rows.head_dim, group = rows.heads / rows.kv_heads;
  int count = 0;  // as `plan` left them
  for (int32_t seen = 0; seen < rows.num_rows; count++) seen += own.sequences[count].is_own;
  for (int query = 0; query < rows.heads; query++) {
    const int64_t head = query / group;
    float most = -INFINITY, sum = 0;
    float *acc = out + query * h;
    std::memset(acc, 0, 4 * h);
    for (int pass = 0; pass < 2; pass++) {
      for (int i = 0; i < count; i++) {
        const Sequence &sequence = own.sequences[i];
        int32_t place = 0;
        while (place < sequence.num_rows && sequence.rows[place] != row) place++;
        if (place == sequence.num_rows) continue;
        const int64_t n = sequence.num_rows * group;
        for (int64_t stretch = 0; stretch < sequence.num_stretches; stretch++) {
          const int64_t state = sequence.states + (head * sequence.num_stretches + stretch) * n +
                                place * group + query % group;
          const Running seen = running(s, state, h);
          if (pass == 0) {
            most = *seen.most > most ? *seen.most : most;
          } else {
            const float share = std::exp(*seen.most - most);
            sum += *seen.sum * share;
            for (int64_t c = 0; c < h; c++) acc[c] += seen.acc[c] * share;
          }
        }
      }
    }
    for (int64_t c = 0; c < h; c++) acc[c] /= sum;
  }
}

constexpr int kRunTokens = 32;  // that pass over a tile of keys while it is in the first cache

inline int64_t run_space_bytes(const L4Model &model) {
  const int64_t n = kRunTokens * (int64_t)(model.heads / model.kv_heads), h = model.head_dim;
  return aligned(4 * (2 * n + 2 * n * h + attend_scratch((int)n, (int)h)));
}

// One key head's queries of some tokens: all of the past, then the new keys up to each token.
inline void attend_block(const L4Model &model, const L4Attend &args, int head, int64_t first,
                         int64_t last, char *space) {
  const int64_t h = model.head_dim, group = model.heads / model.kv_heads;
  const int64_t n = (last - first) * group, width = model.heads * h;
  float *most = reinterpret_cast<float *>(space), *sum = most + n, *acc = sum + n;
  float *q = acc + n * h, *scratch = q + n * h;
  const VectorKernels &vector = vector_kernels();
  const float scale = 1.0f / std::sqrt((float)h);
  for (int64_t i = 0; i < n; i++) {
    const float *from = args.q + (first + i / group) * width + (head * group + i % group) * h;
    vector.scale(from, scale, h, q + i * h);
    most[i] = -INFINITY;
    sum[i] = 0;
  }
  std::memset(acc, 0, 4 * n * h);
  const Running all = {most, sum, acc};
  for (int32_t p = 0; p < args.num_parts; p++) {
    const L4Part &part = args.parts[p];
    vector.attend(&part, head, (int)h, 0, part.length, q, (int)n, &all, scratch);
  }
  const int64_t whole = first / kTile * kTile;  // keys that all of these tokens see
  if (whole) vector.attend(&args.fresh, head, (int)h, 0, whole, q, (int)n, &all, scratch);
  for (int64_t token = first; token < last; token++) {
    const int64_t at = (token - first) * group;
    const Running own = {most + at, sum + at, acc + at * h};
    vector.attend(&args.fresh, head, (int)h, whole, token + 1, q + at * h, (int)group, &own,
                  scratch);
  }
  for (int64_t i = 0; i < n; i++) {
    float *to = args.out + (first + i / group) * width + (head * group + i % group) * h;
    vector.scale(acc + i * h, 1.0f / sum[i], h, to);
  }
}

inline void attend_run(Team &team, const L4Model &model, const L4Attend &args, char *space) {
  const int64_t blocks = (args.num_tokens + kRunTokens - 1) / kRunTokens;
  // The last blocks see most: they come first.
  team.share(blocks * model.kv_heads, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      const int64_t first = (blocks - 1 - i / model.kv_heads) * kRunTokens;
      const int64_t last = first + kRunTokens;
      attend_block(model, args, (int)(i % model.kv_heads), first,
                   last < args.num_tokens ? last : args.num_tokens, space);
    }
  });
}

}  // namespace
}  // namespace l4
