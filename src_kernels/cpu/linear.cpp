// Which version runs, and the C interface with a parallel region of its own.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace l4 {
namespace {

const Kernels* const kAll[] = {
#ifdef L4_X86
    &kAvx512, &kAvx2,
#endif
    &kPortable};

struct Choice {
  const Kernels* kernels;
  const char* error;
};

const Kernels* find(const char* name) {
  for (const Kernels* kernels : kAll) {
    if (kernels->is_supported() && (!name || !std::strcmp(kernels->name, name))) return kernels;
  }
  return nullptr;
}

Choice choose() {
  const char* name = std::getenv("L4_CPU_ISA");
  if (!name || !*name) return {find(nullptr), nullptr};
  const Kernels* forced = find(name);
  return forced ? Choice{forced, nullptr} : Choice{find(nullptr), name};
}

Choice& choice() {
  static Choice made = choose();
  return made;
}

}  // namespace

void prepare_rows(Rows& rows, int32_t first_row, int32_t last_row) {
  if (rows.forms) choice().kernels->prepare_rows(rows, first_row, last_row);
}

void linear_blocks(const Weight& weight, const Rows& rows, float* y, int64_t ldy,
                   int32_t first_block, int32_t last_block) {
  choice().kernels->linear_blocks(weight, rows, y, ldy, first_block, last_block);
}

}  // namespace l4

using namespace l4;

int32_t l4_layout_version(void) { return L4_LAYOUT_VERSION; }

const char* l4_cpu_isa(void) { return choice().kernels->name; }

const char* l4_cpu_isa_error(void) { return choice().error; }

int32_t l4_cpu_use_isa(const char* name) {
  const Kernels* kernels = find(name);
  if (!kernels) return -1;
  choice().kernels = kernels;
  return 0;
}

int64_t l4_weight_bytes(int32_t kind, int32_t rows, int32_t cols, int32_t group,
                        int32_t has_zero) {
  return weight_bytes(kind, rows, cols, group, has_zero);
}

int64_t l4_rows_bytes(int32_t m, int32_t k, int32_t forms) {
  return static_cast<int64_t>(rows_bytes(m, k, forms));
}

int32_t l4_linear(const L4Weight* weight, const float* x, int64_t ldx, int32_t m, float* y,
                  int64_t ldy, void* scratch, int32_t threads) {
  return l4_linear_at(weight, x, ldx, m, nullptr, m, y, ldy, scratch, threads);
}

int32_t l4_linear_at(const L4Weight* weight, const float* x, int64_t ldx, int32_t num_rows,
                     const int32_t* index, int32_t m, float* y, int64_t ldy, void* scratch,
                     int32_t threads) {
  const Weight& w = *weight;
  if (!weight_bytes(w.kind, w.rows, w.cols, w.group, w.has_zero)) return -1;
  const int64_t count = threads < 1 ? 1 : threads, blocks = num_blocks(w), given = num_rows;
  Rows rows;
  place_rows(rows, x, ldx, num_rows, w.cols, form_of(w.kind), scratch);
  Rows named = rows;
  named.m = m;
  named.index = index;
#pragma omp parallel num_threads(static_cast<int>(count)) if (count > 1)
  {
#pragma omp for schedule(static)
    for (int64_t part = 0; part < count; part++) {
      prepare_rows(rows, given * part / count, given * (part + 1) / count);
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < count; part++) {
      linear_blocks(w, named, y, ldy, blocks * part / count, blocks * (part + 1) / count);
    }
  }
  return 0;
}

uint64_t l4_read(const void* data, int64_t bytes, int32_t threads) {
  const uint64_t* words = static_cast<const uint64_t*>(data);
  const int64_t count = threads < 1 ? 1 : threads, lines = bytes / 64;
  uint64_t sum = 0;
#pragma omp parallel for num_threads(static_cast<int>(count)) if (count > 1) reduction(+ : sum)
  for (int64_t part = 0; part < count; part++) {
    uint64_t lane[8] = {};
    for (int64_t i = lines * part / count; i < lines * (part + 1) / count; i++) {
      for (int j = 0; j < 8; j++) lane[j] += words[8 * i + j];
    }
    for (int j = 0; j < 8; j++) sum += lane[j];
  }
  return sum;
}
