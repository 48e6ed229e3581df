// The decoder over packed weights. All threads of a region run the same functions; a phase ends with
// a barrier where others read what it wrote.
#include "engine.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "attend.h"
#include "team.h"

namespace l4 {
namespace {

// Hands out pieces of the caller's memory; with none it only counts.
class Arena {
 public:
  explicit Arena(void *memory) : at_(static_cast<char *>(memory)) {}
  void *bytes(size_t size) {
    void *found = at_ ? at_ + used_ : nullptr;
    used_ += (size + 63) / 64 * 64;
    return found;
  }
  float *floats(int64_t count) { return static_cast<float *>(bytes(4 * (size_t)count)); }
  int64_t used() const { return (int64_t)used_; }

 private:
  char *at_;
  size_t used_ = 0;
};

int32_t forms_of(std::initializer_list<const Weight *> weights) {
  int32_t forms = 0;
  for (const Weight *weight : weights) forms |= form_of(weight->kind);
  return forms;
}

constexpr int32_t kAllForms = L4_AS_BF16 | L4_AS_INT8;

// Where everything between the phases lies, for m tokens and their m * A routed copies. One token's
// rows are prepared by each thread for itself: that is quicker than waiting.
struct Space {
  Barrier *barrier;
  Counter *counters;
  float *x, *routed_x;          // [copies of m, D], [copies of m * A, D]
  float *q, *k, *v, *out;       // of a step; out [copies of m, N * H]
  float *y, *routed_y;          // [m, D], [m * A, D]
  float *gate, *up;             // [m, width]: of a feed-forward
  float *routed_gate, *routed_up;
  char *rows, *out_rows, *inner_rows, *routed_rows, *routed_inner_rows;
  int64_t rows_size, out_rows_size, inner_rows_size, routed_rows_size, routed_inner_rows_size;
  float *logits, *gates;        // [m, E], [m, A]
  int32_t *chosen;              // [copies of m, A]
  int32_t *order, *starts;      // [m * A]: token * A + a, by expert; [E + 1]
  AttendSpace attend;
};

Space place(const L4Model &model, int32_t m, int threads, bool is_step, Arena &arena) {
  Space s = {};
  const int64_t copies = m == 1 ? threads : 1;
  const int64_t d = model.hidden, heads = (int64_t)model.heads * model.head_dim;
  const int64_t kv = (int64_t)model.kv_heads * model.head_dim;
  const int64_t routed = (int64_t)m * model.top_k;
  const int64_t routed_copies = routed == 1 ? threads : 1;
  const int64_t width = model.dense_width > model.width ? model.dense_width : model.width;
  s.barrier = static_cast<Barrier *>(arena.bytes(sizeof(Barrier)));
  s.counters = static_cast<Counter *>(arena.bytes(sizeof(Counter) * (model.num_layers * 8 + 8)));
  if (is_step) {
    s.q = arena.floats(m * heads);
    s.k = arena.floats(m * kv);
    s.v = arena.floats(m * kv);
    s.out = arena.floats(copies * m * heads);
    s.attend = place_attend(m, threads, model.heads, model.kv_heads, model.head_dim, nullptr);
    const int64_t size = s.attend.size;
    void *memory = arena.bytes((size_t)size);
    s.attend =
        place_attend(m, threads, model.heads, model.kv_heads, model.head_dim, (char *)memory);
  }
  s.x = arena.floats(copies * m * d);
  s.y = arena.floats(m * d);
  s.gate = arena.floats(m * width);
  s.up = arena.floats(m * width);
  s.rows_size = (int64_t)rows_bytes(m, (int32_t)d, kAllForms);
  s.out_rows_size = (int64_t)rows_bytes(m, (int32_t)heads, kAllForms);
  s.inner_rows_size = (int64_t)rows_bytes(m, (int32_t)width, kAllForms);
  s.rows = static_cast<char *>(arena.bytes(copies * s.rows_size));
  s.out_rows = static_cast<char *>(arena.bytes(copies * s.out_rows_size));
  s.inner_rows = static_cast<char *>(arena.bytes(copies * s.inner_rows_size));
  s.routed_x = arena.floats(routed_copies * routed * d);
  s.routed_y = arena.floats(routed * d);
  s.routed_gate = arena.floats(routed * model.width);
  s.routed_up = arena.floats(routed * model.width);
  s.routed_rows_size = (int64_t)rows_bytes((int32_t)routed, (int32_t)d, kAllForms);
  s.routed_inner_rows_size = (int64_t)rows_bytes((int32_t)routed, model.width, kAllForms);
  s.routed_rows = static_cast<char *>(arena.bytes(routed_copies * s.routed_rows_size));
  s.routed_inner_rows =
      static_cast<char *>(arena.bytes(routed_copies * s.routed_inner_rows_size));
  s.logits = arena.floats((int64_t)m * model.num_experts);
  s.gates = arena.floats(copies * routed);
  s.chosen = static_cast<int32_t *>(arena.bytes(4 * copies * routed));
  s.order = static_cast<int32_t *>(arena.bytes(4 * routed));
  s.starts = static_cast<int32_t *>(arena.bytes(4 * (model.num_experts + 1)));
  return s;
}

// Give all threads rows [m, k] that `make(row)` has written or can read, ready for products.
template <typename Make>
Rows ready(Team &team, const float *x, int64_t ldx, int32_t m, int32_t k, int32_t forms, char *memory,
           int64_t size, Make make) {
  Rows rows;
  if (m == 1) {
    place_rows(rows, x, ldx, m, k, forms, memory + team.thread * size);
    make(0);
    prepare_rows(rows, 0, 1);
    return rows;
  }
  place_rows(rows, x, ldx, m, k, forms, memory);
  const int64_t first = team.first(m), last = team.last(m);
  for (int64_t i = first; i < last; i++) make((int32_t)i);
  prepare_rows(rows, (int32_t)first, (int32_t)last);
  team.wait();
  return rows;
}

Rows from_row(Rows rows, int32_t first) {
  rows.x += first * rows.ldx;
  rows.m -= first;
  if (rows.codes) {
    rows.codes += first * rows.code_stride;
    rows.scale += first * rows.num_groups;
    rows.minus_sum += first * rows.num_groups;
  }
  if (rows.bf16) rows.bf16 += first * rows.bf16_stride;
  return rows;
}

Rows some_rows(const Rows &rows, int32_t first, int32_t count) {
  Rows some = from_row(rows, first);
  some.m = count;
  return some;
}

struct Product {
  const Weight *weight;
  Rows rows;
  float *y;
  int64_t ldy;
};

// Run several products at once; `after(job, first, last)` gets each stretch of outputs when it is
// there, by the thread that made it.
template <typename After>
void products(Team &team, const Product *jobs, int count, After after) {
  int64_t total = 0;
  for (int i = 0; i < count; i++) total += num_blocks(*jobs[i].weight);
  team.share(total, 4, [&](int64_t first, int64_t last) {
    for (int i = 0; i < count && first < last; i++) {
      const Weight &weight = *jobs[i].weight;
      const int64_t blocks = num_blocks(weight);
      const int64_t end = last < blocks ? last : blocks;
      if (first < blocks) {
        linear_blocks(weight, jobs[i].rows, jobs[i].y, jobs[i].ldy, (int32_t)first, (int32_t)end);
        const int64_t stop = end * kBlock < weight.rows ? end * kBlock : weight.rows;
        after(i, first * kBlock, stop);
        first = end;
      }
      first -= blocks;
      last -= blocks;
    }
  });
}

void nothing(int, int64_t, int64_t) {}

// Queries, keys and values of h [m, D]; queries from `first_query` on.
void project(Team &team, const L4Model &model, const L4Layer &layer, const Space &s, const float *h,
             int32_t m, int32_t first_query, float *q, float *k, float *v) {
  const int64_t d = model.hidden;
  float *x = m == 1 ? s.x + team.thread * d : s.x;
  const VectorKernels &vector = vector_kernels();
  const int32_t forms = forms_of({&layer.q, &layer.k, &layer.v});
  const Rows rows = ready(team, x, d, m, (int32_t)d, forms, s.rows, s.rows_size, [&](int32_t i) {
    vector.rms_norm(h + i * d, layer.input_norm, model.eps, d, x + i * d);
  });
  const int64_t kv = layer.k.rows;
  Product jobs[3] = {{&layer.k, rows, k, kv}, {&layer.v, rows, v, kv}};
  if (first_query < m) jobs[2] = {&layer.q, from_row(rows, first_query), q, layer.q.rows};
  products(team, jobs, first_query < m ? 3 : 2, nothing);
  team.wait();
}

// The score of each expert, the best `top_k` and how much each counts.
void choose(const L4Model &model, const float *logits, int32_t *chosen, float *gates) {
  for (int a = 0; a < model.top_k; a++) {
    int best = -1;
    for (int e = 0; e < model.num_experts; e++) {
      bool is_taken = false;
      for (int b = 0; b < a; b++) is_taken |= chosen[b] == e;
      // A NaN is taken before anything else, as torch does: it must not vanish.
      if (!is_taken && (best < 0 || logits[e] > logits[best] ||
                        (std::isnan(logits[e]) && !std::isnan(logits[best])))) {
        best = e;
      }
    }
    chosen[a] = best;
    gates[a] = 1.0f / (1.0f + std::exp(-logits[best]));
  }
}

void ask_for(const Weight *expert) {
  const uint8_t *first = expert[0].data;
  const uint8_t *end = expert[2].data + num_blocks(expert[2]) * block_bytes(expert[2]);
  const uintptr_t page = 4096, start = (uintptr_t)first / page * page;
  madvise(reinterpret_cast<void *>(start), (uintptr_t)end - start, MADV_WILLNEED);
}

// Sort the routed copies by expert: counting sort, stable.
void sort_by_expert(const L4Model &model, const Space &s, int32_t routed) {
  std::memset(s.starts, 0, 4 * (model.num_experts + 1));
  for (int32_t r = 0; r < routed; r++) s.starts[s.chosen[r] + 1]++;
  for (int e = 0; e < model.num_experts; e++) s.starts[e + 1] += s.starts[e];
  for (int32_t r = 0; r < routed; r++) s.order[s.starts[s.chosen[r]]++] = r;
  for (int e = model.num_experts; e > 0; e--) s.starts[e] = s.starts[e - 1];
  s.starts[0] = 0;
}

// gate and up of rows, block by block of both, then silu(gate) * up into gate.
void gated(Team &team, const Weight &gate_weight, const Weight &up_weight, const Rows &rows,
           float *gate, float *up, int64_t first, int64_t last) {
  (void)team;
  const int64_t width = gate_weight.rows;
  linear_blocks(gate_weight, rows, gate, width, (int32_t)first, (int32_t)last);
  linear_blocks(up_weight, rows, up, width, (int32_t)first, (int32_t)last);
  const int64_t start = first * kBlock, stop = last * kBlock < width ? last * kBlock : width;
  for (int32_t i = 0; i < rows.m; i++) {
    float *g = gate + i * width + start;
    vector_kernels().swiglu(g, up + i * width + start, stop - start, g);
  }
}

// The experts that were chosen, on rows sorted by expert.
template <typename Run>
void each_expert(const L4Model &model, const Space &s, int64_t first, int64_t last, int64_t blocks,
                 Run run) {
  for (int e = 0; e < model.num_experts && last > 0; e++) {
    if (s.starts[e + 1] == s.starts[e]) continue;
    const int64_t end = last < blocks ? last : blocks;
    if (first < end) run(e, first < 0 ? 0 : first, end);
    first -= blocks;
    last -= blocks;
  }
}

int64_t active_experts(const L4Model &model, const Space &s) {
  int64_t count = 0;
  for (int e = 0; e < model.num_experts; e++) count += s.starts[e + 1] > s.starts[e];
  return count;
}

// h [m, D] += o_proj(out) and then += the feed-forward of its norm.
void finish(Team &team, const L4Model &model, const L4Layer &layer, const Space &s, float *h,
            int32_t m, const Rows &out, float *router_logits, int64_t *experts) {
  const VectorKernels &vector = vector_kernels();
  const int64_t d = model.hidden;
  const Product o = {&layer.o, out, s.y, d};
  products(team, &o, 1, [&](int, int64_t first, int64_t last) {
    for (int32_t i = 0; i < m; i++) vector.add(h + i * d + first, s.y + i * d + first, last - first);
  });
  team.wait();
  float *x = m == 1 ? s.x + team.thread * d : s.x;
  const int64_t a = model.top_k, num_experts = model.num_experts;
  int32_t *chosen = m == 1 ? s.chosen + team.thread * a : s.chosen;
  float *gates = m == 1 ? s.gates + team.thread * a : s.gates;
  const bool is_moe = layer.is_moe;
  const int32_t forms = forms_of({&layer.gate, &layer.up});
  const Rows rows = ready(team, x, d, m, (int32_t)d, forms, s.rows, s.rows_size, [&](int32_t i) {
    vector.rms_norm(h + i * d, layer.post_norm, model.eps, d, x + i * d);
    if (!is_moe || m == 1) return;
    float *logits = s.logits + i * num_experts;
    for (int64_t e = 0; e < num_experts; e++) {
      logits[e] = vector.dot(x + i * d, layer.router + e * d, d);
    }
    choose(model, logits, chosen + i * a, gates + i * a);
  });
  if (is_moe && m == 1) {  // the experts' scores are shared out instead
    const int64_t first = team.first(num_experts), last = team.last(num_experts);
    for (int64_t e = first; e < last; e++) s.logits[e] = vector.dot(x, layer.router + e * d, d);
  }
  if (is_moe && m > 1 && team.thread == 0) sort_by_expert(model, s, m * (int32_t)a);
  team.share(num_blocks(layer.gate), 4, [&](int64_t first, int64_t last) {
    gated(team, layer.gate, layer.up, rows, s.gate, s.up, first, last);
  });
  team.wait();
  const int32_t width = layer.gate.rows;
  const Rows inner = ready(team, s.gate, width, m, width, form_of(layer.down.kind), s.inner_rows,
                           s.inner_rows_size, [](int32_t) {});
  const Product down = {&layer.down, inner, s.y, d};
  const auto add_to_h = [&](int, int64_t first, int64_t last) {
    for (int32_t i = 0; i < m; i++) vector.add(h + i * d + first, s.y + i * d + first, last - first);
  };
  if (!is_moe) {
    products(team, &down, 1, add_to_h);
    team.wait();
    return;
  }
  const int32_t routed = m * (int32_t)a;
  if (m == 1) choose(model, s.logits, chosen, gates);
  if (team.thread == 0) {
    if (m == 1) sort_by_expert(model, s, routed);
    if (router_logits) std::memcpy(router_logits, s.logits, 4 * m * num_experts);
    for (int32_t r = 0; experts && r < routed; r++) experts[r] = chosen[r];
    if (model.is_prefetched) {
      for (int e = 0; e < num_experts; e++) {
        if (s.starts[e + 1] > s.starts[e]) ask_for(layer.experts + 3 * e);
      }
    }
  }
  products(team, &down, 1, add_to_h);
  team.wait();
  // The score multiplies the expert's input, not its output.
  float *routed_x = routed == 1 ? s.routed_x + team.thread * d : s.routed_x;
  int32_t routed_forms = 0;
  for (int e = 0; e < num_experts; e++) {
    if (s.starts[e + 1] > s.starts[e]) {
      routed_forms |= forms_of({layer.experts + 3 * e, layer.experts + 3 * e + 1});
    }
  }
  const Rows routed_rows = ready(
      team, routed_x, d, routed, (int32_t)d, routed_forms, s.routed_rows, s.routed_rows_size,
      [&](int32_t r) {
        const int32_t copy = s.order[r];
        vector.scale(x + copy / a * d, gates[copy], d, routed_x + r * d);
      });
  const int64_t active = active_experts(model, s);
  const int64_t wide = (model.width + kBlock - 1) / kBlock, deep = (d + kBlock - 1) / kBlock;
  team.share(active * wide, 4, [&](int64_t first, int64_t last) {
    each_expert(model, s, first, last, wide, [&](int e, int64_t from, int64_t to) {
      const Weight *expert = layer.experts + 3 * e;
      const int64_t start = s.starts[e];
      const Rows own = some_rows(routed_rows, (int32_t)start, s.starts[e + 1] - (int32_t)start);
      gated(team, expert[0], expert[1], own, s.routed_gate + start * model.width,
            s.routed_up + start * model.width, from, to);
    });
  });
  team.wait();
  int32_t down_forms = 0;
  for (int e = 0; e < num_experts; e++) {
    if (s.starts[e + 1] > s.starts[e]) down_forms |= form_of(layer.experts[3 * e + 2].kind);
  }
  const Rows routed_inner =
      ready(team, s.routed_gate, model.width, routed, model.width, down_forms, s.routed_inner_rows,
            s.routed_inner_rows_size, [](int32_t) {});
  team.share(active * deep, 4, [&](int64_t first, int64_t last) {
    each_expert(model, s, first, last, deep, [&](int e, int64_t from, int64_t to) {
      const int64_t start = s.starts[e];
      const Rows own = some_rows(routed_inner, (int32_t)start, s.starts[e + 1] - (int32_t)start);
      linear_blocks(layer.experts[3 * e + 2], own, s.routed_y + start * d, d, (int32_t)from,
                    (int32_t)to);
      if (a > 1) return;  // a token's experts may be several threads'
      const int64_t begin = from * kBlock, end = to * kBlock < d ? to * kBlock : d;
      for (int32_t r = 0; r < own.m; r++) {
        const int64_t row = start + r;
        vector.add(h + s.order[row] * d + begin, s.routed_y + row * d + begin, end - begin);
      }
    });
  });
  team.wait();
  if (a == 1) return;
  for (int64_t row = team.first(d); row < team.last(d); row++) {
    for (int32_t r = 0; r < routed; r++) h[s.order[r] / a * d + row] += s.routed_y[r * d + row];
  }
  team.wait();
}

// A query of a head that does not rotate: what it is multiplied with, besides 1 / sqrt(H).
float query_scale(const L4Layer &layer, int head, const float *temperature, const float *log_length,
                  int64_t row) {
  if (layer.uses_rope) return 1.0f;
  if (layer.softmax_scale) return log_length[row] * layer.softmax_scale[head];
  return temperature[row];
}

void step(Team &team, const L4Model &model, const L4Step &args, const Space &s) {
  const VectorKernels &vector = vector_kernels();
  const int32_t m = args.num_rows;
  const int64_t d = model.hidden, heads = (int64_t)model.heads * model.head_dim;
  int64_t moe = 0;
  for (int32_t l = 0; l < model.num_layers; l++) {
    const L4Layer &layer = model.layers[l];
    project(team, model, layer, s, args.h, m, 0, s.q, s.k, s.v);
    AttendRows rows = {m, model.heads, model.kv_heads, model.head_dim, l, s.q, s.k, s.v, args.pasts};
    // What becomes of a query or key before it is used: turned, normed, scaled.
    const auto finish_head = [&](float *x, int32_t row, int head, bool is_query) {
      const float *turn = layer.uses_rope ? args.turns[2 * row + layer.turn] : nullptr;
      float scale = 1.0f;
      if (is_query) {
        scale = query_scale(layer, head, args.temperature, args.log_length, row) /
                std::sqrt((float)model.head_dim);
      }
      const bool is_unit = layer.uses_rope && layer.unit_norm;
      vector.rotate(x, turn, model.head_dim, is_unit, model.eps, scale);
    };
    attend_past(team, rows, s.attend, finish_head);
    team.wait();
    float *out = m == 1 ? s.out + team.thread * heads : s.out;
    const Rows out_rows =
        ready(team, out, heads, m, (int32_t)heads, form_of(layer.o.kind), s.out_rows,
              s.out_rows_size, [&](int32_t i) { merge(team.thread, rows, s.attend, i, out + i * heads); });
    finish(team, model, layer, s, args.h, m, out_rows,
           layer.is_moe && args.router_logits ? args.router_logits + moe * m * model.num_experts
                                              : nullptr,
           layer.is_moe && args.experts ? args.experts + moe * m * model.top_k : nullptr);
    moe += layer.is_moe;
  }
  for (int64_t i = team.first(m); i < team.last(m); i++) {
    vector.rms_norm(args.h + i * d, model.norm, model.eps, d, args.hidden + i * d);
  }
  team.wait();
  if (team.thread) return;
  for (int32_t i = 0; i < m; i++) {
    for (int32_t l = 0; l < model.num_layers; l++) {
      const L4Past &past = args.pasts[i][l];
      past.parts[past.num_parts - 1].length++;
    }
  }
}

template <typename Run>
void region(int threads, const Space &s, int num_counters, Run run) {
  new (s.barrier) Barrier();
  for (int i = 0; i < num_counters; i++) new (s.counters + i) Counter();
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Team team = {omp_get_thread_num(), omp_get_num_threads(), s.barrier, s.counters};
    run(team);
  }
#else
  Team team = {0, 1, s.barrier, s.counters};
  run(team);
#endif
}

// Write a token's keys and values to where they are kept.
void keep(const L4Model &model, const L4Run &run, int64_t token) {
  const int64_t h = model.head_dim;
  for (int64_t head = 0; head < model.kv_heads; head++) {
    const int64_t from = (token * model.kv_heads + head) * h;
    const int64_t to = (head * run.num_tokens + token) * h;
    if (run.kept_kind == L4_KEPT_FP32) {
      std::memcpy(static_cast<float *>(run.kept_k) + to, run.k + from, 4 * h);
      std::memcpy(static_cast<float *>(run.kept_v) + to, run.v + from, 4 * h);
    } else {
      vector_kernels().to_bf16(run.k + from, h, static_cast<uint16_t *>(run.kept_k) + to);
      vector_kernels().to_bf16(run.v + from, h, static_cast<uint16_t *>(run.kept_v) + to);
    }
  }
}

int counters_of(const L4Model &model) { return model.num_layers * 8 + 8; }

}  // namespace
}  // namespace l4

using namespace l4;

int32_t l4_engine_version(void) { return L4_ENGINE_VERSION; }

const char *l4_vector_isa(void) { return vector_kernels().name; }

int64_t l4_step_bytes(const L4Model *model, int32_t num_rows, int32_t threads) {
  Arena arena(nullptr);
  place(*model, num_rows, threads, true, arena);
  return arena.used();
}

int64_t l4_layer_bytes(const L4Model *model, int32_t num_tokens, int32_t threads) {
  Arena arena(nullptr);
  place(*model, num_tokens, threads, false, arena);
  return arena.used();
}

void l4_step(const L4Model *model, const L4Step *args) {
  Arena arena(args->scratch);
  const Space s = place(*model, args->num_rows, args->threads, true, arena);
  region(args->threads, s, counters_of(*model),
         [&](Team &team) { step(team, *model, *args, s); });
}

void l4_before_attention(const L4Model *model, int32_t layer_idx, const L4Run *run) {
  const L4Layer &layer = model->layers[layer_idx];
  const VectorKernels &vector = vector_kernels();
  Arena arena(run->scratch);
  const int32_t m = run->num_tokens, h = model->head_dim;
  const Space s = place(*model, m, run->threads, false, arena);
  region(run->threads, s, counters_of(*model), [&](Team &team) {
    project(team, *model, layer, s, run->h, m, run->first_query, run->q, run->k, run->v);
    const bool is_unit = layer.uses_rope && layer.unit_norm;
    for (int64_t i = team.first(m); i < team.last(m); i++) {
      const float *turn = layer.uses_rope ? run->turns[layer.turn] + i * h : nullptr;
      for (int head = 0; turn && head < model->kv_heads; head++) {
        vector.rotate(run->k + (i * model->kv_heads + head) * h, turn, h, is_unit, model->eps, 1);
      }
      if (run->kept_k) keep(*model, *run, i);
      const int64_t query = i - run->first_query;
      for (int head = 0; query >= 0 && head < model->heads; head++) {
        vector.rotate(run->q + (query * model->heads + head) * h, turn, h, is_unit, model->eps,
                      query_scale(layer, head, run->temperature, run->log_length, i));
      }
    }
  });
}

void l4_after_attention(const L4Model *model, int32_t layer_idx, const L4Run *run) {
  const L4Layer &layer = model->layers[layer_idx];
  Arena arena(run->scratch);
  const int32_t m = run->num_tokens - run->first_query;
  if (m == 0) return;
  const Space s = place(*model, m, run->threads, false, arena);
  const int32_t heads = model->heads * model->head_dim;
  region(run->threads, s, counters_of(*model), [&](Team &team) {
    const Rows out = ready(team, run->out, heads, m, heads, form_of(layer.o.kind), s.out_rows,
                           s.out_rows_size, [](int32_t) {});
    finish(team, *model, layer, s, run->h + (int64_t)run->first_query * model->hidden, m, out,
           run->router_logits, run->experts);
  });
}

int64_t l4_attend_bytes(const L4Model *model, int32_t threads) {
  return 2 * sizeof(Counter) + threads * run_space_bytes(*model) + sizeof(Barrier);
}

void l4_attend(const L4Model *model, const L4Attend *args) {
  Space s = {};
  char *memory = static_cast<char *>(args->scratch);
  s.barrier = reinterpret_cast<Barrier *>(memory);
  s.counters = reinterpret_cast<Counter *>(memory + sizeof(Barrier));
  char *spaces = memory + sizeof(Barrier) + 2 * sizeof(Counter);
  region(args->threads, s, 2, [&](Team &team) {
    attend_run(team, *model, *args, spaces + team.thread * run_space_bytes(*model));
  });
}

void l4_final_norm(const L4Model *model, const float *h, int64_t num_tokens, float *out) {
  for (int64_t i = 0; i < num_tokens; i++) {
    vector_kernels().rms_norm(h + i * model->hidden, model->norm, model->eps, model->hidden,
                              out + i * model->hidden);
  }
}
