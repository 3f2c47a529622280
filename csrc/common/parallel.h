// How the work of a CPU kernel is shared out among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace longmem {

// Multiply-adds that take somewhat longer than waking a thread does, ten to twenty microseconds: with less
// for each thread, fewer threads are faster.
constexpr int64_t kWorthAThread = 262144;

// Tasks 0 ... count - 1, each taken by the next thread that is free: they differ in length. `work`: the
// multiply-adds of all of them together, about.
template <typename F>
void run_tasks(int64_t count, int64_t work, const F& task) {
  const int64_t threads =
      std::min({count, work / kWorthAThread, static_cast<int64_t>(torch::stable::get_num_threads())});
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  });
}

}  // namespace longmem
