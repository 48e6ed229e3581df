// Linear maps y = x @ W^T whose weight lies in blocks of 16 rows: fp32, bf16, int8 and int4.
//
// Everything in namespace l4 works inside somebody else's parallel region: it allocates nothing,
// takes no lock and touches only the rows or blocks it is given. `l4_linear` at the end has a
// region of its own.
//
// Layout 1. A weight [rows, cols] is ceil(rows / 16) blocks of 16 rows, one after the other, each
// `block_bytes` long (a multiple of 64; start the first at a multiple of 64, or of a page). cols
// are filled up to `padded(cols)` = a multiple of 32, rows to 16. Inside a block, r = 0..15:
//   fp32  [cols][16]        float
//   bf16  [cols / 2][16][2] bfloat16
//   int8 without groups: [16] float, a scale a row; then codes
//   int8, int4 in groups: segments of 4 groups (the last may have fewer), each its scales
//         [groups][16] bfloat16, then if has_zero (int4 only) [groups][16] bytes, zero + 8, filled
//         up with zeros to a multiple of 64; then codes. The block is filled up to 64 as well.
//   codes of int8: [cols / 4][16][4] bytes, code + 128
//   codes of int4: [cols / 8][16][4] bytes, code(k + j) + 8 | (code(k + 4 + j) + 8) << 4, j = 0..3
// A weight is (code - zero) * scale. Filled up entries are zero: code = zero = 0, scale = 0.
// All is read once from front to back: one stream is what a core's prefetcher follows best (scales
// in a place of their own halved the speed).
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

enum { L4_LAYOUT_VERSION = 1 };
enum { L4_FP32 = 0, L4_BF16 = 1, L4_INT8 = 2, L4_INT4 = 3 };  // kinds of weights
enum { L4_AS_FP32 = 0, L4_AS_BF16 = 1, L4_AS_INT8 = 2 };      // forms of rows, to be or-ed

typedef struct {
  const uint8_t* data;
  int32_t kind;
  int32_t rows, cols;  // as the model has them, not filled up
  int32_t group;       // 32, 64 or 128 inputs share a scale; 0: all of a row (int8)
  int32_t has_zero;
} L4Weight;
}

namespace l4 {

constexpr int kBlock = 16;  // rows of a block
constexpr int kGroup = 32;  // inputs of a token that share a scale

using Weight = L4Weight;

// Activations of m tokens [m, k], prepared once for all the weights that read them. A row's
// result does not depend on how many rows there are: decoding and verifying agree to the bit.
struct Rows {
  const float* x;  // [m, ldx]; read by fp32 weights, and by prepare_rows
  int64_t ldx;
  int32_t m, k, forms;
  int8_t* codes;  // [m, code_stride], -127..127; value = code * scale
  int64_t code_stride;
  float* scale;       // [m, num_groups]: largest / 127 of 32 inputs; not finite: NaN, codes zero
  int32_t* minus_sum;  // [m, num_groups]: minus the sum of the codes
  int64_t num_groups;
  uint16_t* bf16;  // [m, bf16_stride], rounded to nearest even
  int64_t bf16_stride;
  // Null, or [m]: token i of a product reads prepared row index[i] (of fp32 weights: x's row).
  // Set it, with another m, on a copy of the struct: the tokens of one expert.
  const int32_t* index;
};

inline int64_t padded(int64_t cols) { return (cols + 31) / 32 * 32; }
inline int32_t num_blocks(const Weight& w) { return (w.rows + kBlock - 1) / kBlock; }
// The form of rows a kind reads: L4_AS_*.
inline int32_t form_of(int32_t kind) {
  return kind == L4_FP32 ? L4_AS_FP32 : kind == L4_BF16 ? L4_AS_BF16 : L4_AS_INT8;
}

int64_t block_bytes(int32_t kind, int32_t cols, int32_t group, int32_t has_zero);
// 0 if there is no such weight: kind unknown, group not among 0, 32, 64, 128 or not dividing cols.
int64_t weight_bytes(int32_t kind, int32_t rows, int32_t cols, int32_t group, int32_t has_zero);

// Memory for `m` rows, at a multiple of 64. forms: the kinds' forms or-ed; 0 for fp32 only.
size_t rows_bytes(int32_t m, int32_t k, int32_t forms);
void place_rows(Rows& rows, const float* x, int64_t ldx, int32_t m, int32_t k, int32_t forms,
                void* memory);
// Round rows [first, last). All of them must be done before a product reads them (a barrier).
void prepare_rows(Rows& rows, int32_t first_row, int32_t last_row);

// y[i, 16 * first_block ..] of all m tokens, blocks [first_block, last_block); y [m, ldy].
void linear_blocks(const Weight& weight, const Rows& rows, float* y, int64_t ldy,
                   int32_t first_block, int32_t last_block);

// What the product of 16 rows costs against others, for dividing work: bytes of a block.
inline int64_t block_bytes(const Weight& w) {
  return block_bytes(w.kind, w.cols, w.group, w.has_zero);
}

}  // namespace l4

extern "C" {
int32_t l4_layout_version(void);
// The instructions in use: "avx512", "avx2" or "portable"; L4_CPU_ISA in the environment forces
// a lower one. An unknown or unsupported word leaves the best; l4_cpu_isa_error then says so.
const char* l4_cpu_isa(void);
const char* l4_cpu_isa_error(void);
// For tests, while nothing computes: 0, or -1 if this machine cannot.
int32_t l4_cpu_use_isa(const char* name);
int64_t l4_weight_bytes(int32_t kind, int32_t rows, int32_t cols, int32_t group,
                        int32_t has_zero);
int64_t l4_rows_bytes(int32_t m, int32_t k, int32_t forms);
// y [m, ldy] = x [m, ldx] @ weight^T, in `threads` threads; scratch: l4_rows_bytes at a multiple
// of 64, of the weight's form. 0, or -1 for a weight that cannot be.
int32_t l4_linear(const L4Weight* weight, const float* x, int64_t ldx, int32_t m, float* y,
                  int64_t ldy, void* scratch, int32_t threads);
// The same for the `m` rows that `index` names among x's `num_rows`: the tokens of one expert.
int32_t l4_linear_at(const L4Weight* weight, const float* x, int64_t ldx, int32_t num_rows,
                     const int32_t* index, int32_t m, float* y, int64_t ldy, void* scratch,
                     int32_t threads);
// Read memory from front to back, each thread its share: the ceiling of what a weight can do.
uint64_t l4_read(const void* data, int64_t bytes, int32_t threads);
}
