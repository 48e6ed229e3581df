// A whole decoder: one call reads a token of each of several sequences; or, a layer at a time, what
// lies before and after attention for a run of tokens. source: l4cli/model/text.py
#pragma once
#include <cstdint>

#include "linear.h"
#include "vector.h"

extern "C" {

enum { L4_ENGINE_VERSION = 1 };

typedef struct {
  L4Weight q, k, v, o;
  const float *input_norm, *post_norm;  // [D]
  const float *softmax_scale;           // [N], or null
  int32_t uses_rope, unit_norm, turn;   // turn: 0 as local layers, 1 as full ones
  int32_t is_moe;
  L4Weight gate, up, down;  // the dense feed-forward, or the shared expert
  const float *router;      // [E, D]
  const L4Weight *experts;  // [E][3]: gate, up, down
} L4Layer;

typedef struct {
  int32_t hidden, heads, kv_heads, head_dim, num_layers;
  int32_t num_experts, top_k, width, dense_width;  // width: of an expert and of the shared one
  float eps;
  int32_t is_prefetched;  // the file may not be in memory: ask for an expert once it is known
  const L4Layer *layers;
  const float *norm;  // [D]
} L4Model;

// What one layer holds of one sequence, in order of position. The last part is the tail, which has
// room for the new token; its length does not count it yet.
typedef struct {
  L4Part *parts;
  int32_t num_parts, num_sealed;
  int64_t sealed_id;  // sequences with the same one share the sealed parts; 0: with nobody
} L4Past;

typedef struct {
  int32_t num_rows, threads;
  float *h;                   // [R, D]: embeddings; used up
  const float *const *turns;  // [R][2]: complex [H / 2] of the row's position
  const float *temperature;   // [R]: of NoPE layers' queries
  const float *log_length;    // [R]: for scalable softmax
  L4Past *const *pasts;       // [R] of [L]
  float *hidden;              // out: [R, D], normed
  float *router_logits;       // out: [MoE layers][R][E], or null
  int64_t *experts;           // out: [MoE layers][R][A], or null
  void *scratch;              // l4_step_bytes
} L4Step;

typedef struct {
  int32_t num_tokens, threads;
  int32_t first_query;  // tokens before it are asked for keys and values only
  float *h;             // [T, D]: read by `before`, from first_query on changed by `after`
  const float *turns[2];     // complex [T, H / 2]
  const float *temperature;  // [T]
  const float *log_length;   // [T]
  float *q, *k, *v;  // out of `before`: [T - first_query, N, H], [T, K, H] twice
  void *kept_k, *kept_v;  // the same by head, [K, T, H], as they are kept; or null
  int32_t kept_kind;      // fp32 or bf16
  const float *out;          // into `after`: attention's [T - first_query, N, H]
  float *router_logits;      // out of `after`: [T - first_query, E], or null
  int64_t *experts;          // out of `after`: [T - first_query, A], or null
  void *scratch;             // l4_layer_bytes
} L4Run;

// A run of new tokens of one sequence: each sees all of the past and the new ones up to itself.
typedef struct {
  int32_t num_tokens, threads, num_parts;
  const L4Part *parts;  // the past
  L4Part fresh;         // the new tokens' keys and values
  const float *q;       // [T, N, H]
  float *out;           // [T, N, H]
  void *scratch;        // l4_attend_bytes
} L4Attend;

int32_t l4_engine_version(void);
int64_t l4_attend_bytes(const L4Model *model, int32_t threads);
void l4_attend(const L4Model *model, const L4Attend *args);
int64_t l4_step_bytes(const L4Model *model, int32_t num_rows, int32_t threads);
int64_t l4_layer_bytes(const L4Model *model, int32_t num_tokens, int32_t threads);
void l4_step(const L4Model *model, const L4Step *step);
void l4_before_attention(const L4Model *model, int32_t layer, const L4Run *run);
void l4_after_attention(const L4Model *model, int32_t layer, const L4Run *run);
// The final norm: h [T, D] -> out [T, D].
void l4_final_norm(const L4Model *model, const float *h, int64_t num_tokens, float *out);
// The name of the instructions that norms and attention use.
const char *l4_vector_isa(void);
}
