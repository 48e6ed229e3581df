// vector_body.h compiled for each instruction set, and the choice between them.
#include "vector.h"

#include "linear.h"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 about its own headers
#include <immintrin.h>
#ifndef L4_X86
#define L4_X86 1
#endif
#endif

namespace l4 {
namespace portable {
#define L4_WIDTH 4
#define L4_NAME "portable"
#define L4_HALF(x) half_to_float(x)
#include "vector_body.h"
#undef L4_WIDTH
#undef L4_NAME
#undef L4_HALF
}  // namespace portable

#ifdef L4_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define L4_WIDTH 8
#define L4_NAME "avx2"
#define L4_HALF(x) _cvtsh_ss(x)
#include "vector_body.h"
#undef L4_WIDTH
#undef L4_NAME
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
namespace avx512 {
#define L4_WIDTH 16
#define L4_NAME "avx512"
#include "vector_body.h"
#undef L4_NAME
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
namespace avx512_bf16 {
#define L4_NAME "avx512 with bf16"
#define L4_DOT_BF16
#include "vector_body.h"
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif

int64_t attend_scratch(int n, int head_dim) {
  // Scores and weights of four queries at once, then all queries rounded, or four of them scaled.
  const int64_t rounded = ((int64_t)n * head_dim + 1) / 2, scaled = 4 * (int64_t)head_dim;
  return 8 * kTile + (rounded > scaled ? rounded : scaled);
}

// The same instructions as the linear maps', where this processor has what they need here.
const VectorKernels &vector_kernels() {
#ifdef L4_X86
  const char *isa = l4_cpu_isa();
  if (isa[0] == 'a' && isa[3] == '5') {
    static const bool is_there = __builtin_cpu_supports("avx512f") &&
                                 __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512vl") &&
                                 __builtin_cpu_supports("avx512dq");
    static const bool has_bf16 = is_there && __builtin_cpu_supports("avx512bf16");
    if (has_bf16) return avx512_bf16::table;
    if (is_there) return avx512::table;
  }
  if (isa[0] == 'a') {
    static const bool is_there = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                 __builtin_cpu_supports("f16c");
    if (is_there) return avx2::table;
  }
#endif
  return portable::table;
}

}  // namespace l4
