// Threads of one parallel region: barriers that give the processor away, work taken in pieces.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>

namespace l4 {

struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};

class Barrier {
 public:
  // Spin for some microseconds, then yield: whoever is waited for may need this processor.
  void wait(int num_threads) {
    if (num_threads == 1) return;
    const int64_t now = phase_.value.load(std::memory_order_relaxed);
    if (arrived_.value.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
      arrived_.value.store(0, std::memory_order_relaxed);
      phase_.value.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.value.load(std::memory_order_acquire) == now; spins++) {
      if (spins < kSpins) {
        relax();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 4000;
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  Counter arrived_, phase_;
};

// One thread's view of the region.
struct Team {
  int thread, num_threads;
  Barrier *barrier;
  Counter *counters;  // zero at the region's start, one for each call of `share`
  int phase = 0;

  void wait() { barrier->wait(num_threads); }

  // Split [0, count) evenly; `mine` is given this thread's part.
  int64_t first(int64_t count) const { return count * thread / num_threads; }
  int64_t last(int64_t count) const { return count * (thread + 1) / num_threads; }

  // Take pieces of [0, count) until nothing is left: large ones first, so that threads that lose
  // their processor for a while are waited for as little as possible.
  template <typename Run>
  void share(int64_t count, int64_t least, Run run) {
    if (num_threads == 1) {
      run(int64_t{0}, count);
      return;
    }
    std::atomic<int64_t> &next = counters[phase++].value;
    int64_t at = next.load(std::memory_order_relaxed);
    while (at < count) {
      int64_t size = (count - at) / (2 * num_threads);
      size = size < least ? least : size;
      const int64_t end = at + size < count ? at + size : count;
      if (next.compare_exchange_weak(at, end, std::memory_order_relaxed)) {
        run(at, end);
        at = next.load(std::memory_order_relaxed);
      }
    }
  }
};

}  // namespace l4
