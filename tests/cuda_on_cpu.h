// Runs a CUDA kernel on the CPU, so that its logic can be tested without a GPU. Covers what our kernels use:
// block barriers, static shared memory, warp shuffles, 64-bit atomics, 16-bit floats.
//
// The threads of a block are fibers that take turns at barriers and shuffles; blocks follow each other. In
// which order is chosen by `cuda_on_cpu_backwards`: a result that depends on it lacks a barrier.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline dim3 threadIdx{0}, blockIdx{0}, gridDim{0}, blockDim{0};
inline bool cuda_on_cpu_backwards = false;
inline int64_t cuda_on_cpu_launches = 0;

using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  const unsigned long long before = *to;
  *to += value;
  return before;
}

// A 16-bit float: its bits, converted by the functions that CPU kernels use.
template <uint16_t (*narrow)(float), float (*widen)(uint16_t)>
struct Float16 {
  uint16_t bits;
  Float16() = default;
  explicit Float16(float x) : bits(narrow(x)) {}
  explicit operator float() const { return widen(bits); }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  int64_t shuffles = 0;
  uint64_t shuffled[2];  // what this thread shows in its last two shuffles
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int waiting, barriers;  // threads at the barrier, and barriers that have opened
inline int64_t progress;       // changes whenever a thread gets on
inline const std::function<void()>* fiber_kernel;

inline void yield() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

inline void open_barrier_if_complete() {
  int alive = 0;
  for (const Fiber& fiber : fibers) alive += !fiber.done;
  if (waiting > 0 && waiting == alive) waiting = 0, ++barriers, ++progress;
}

inline void __syncthreads() {
  const int opened = barriers;
  ++waiting, ++progress;
  open_barrier_if_complete();
  while (barriers == opened) yield();
}

// What thread `from` of this thread's warp shows, once all threads in `mask` show something.
template <typename T>
T shuffle(unsigned mask, T value, int from) {
  Fiber& mine = fibers[threadIdx.x];
  const int warp = threadIdx.x / 32 * 32;
  const int64_t turn = mine.shuffles++;
  mine.shuffled[turn % 2] = 0;
  std::memcpy(&mine.shuffled[turn % 2], &value, sizeof value);
  ++progress;
  for (int lane = 0; lane < 32; ++lane) {
    while (mask >> lane & 1 && fibers[warp + lane].shuffles <= turn) yield();
  }
  T result;
  std::memcpy(&result, &fibers[warp + from].shuffled[turn % 2], sizeof result);
  return result;
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  const int lane = threadIdx.x % 32;
  return shuffle(mask, value, lane >= delta ? lane - delta : lane);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  return shuffle(mask, value, static_cast<int>(threadIdx.x % 32) ^ step);
}

inline void run_fiber() {
  (*fiber_kernel)();
  fibers[threadIdx.x].done = true;
  ++progress;
  open_barrier_if_complete();
  yield();
}

inline void run_block(unsigned threads) {
  constexpr size_t kStack = 256 * 1024;
  waiting = 0;
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    fiber.done = false, fiber.shuffles = 0;
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool alive = true; alive;) {
    const int64_t before = progress;
    alive = false;
    for (unsigned i = 0; i < threads; ++i) {
      threadIdx.x = cuda_on_cpu_backwards ? threads - 1 - i : i;
      if (fibers[threadIdx.x].done) continue;
      swapcontext(&scheduler, &fibers[threadIdx.x].context);
      alive |= !fibers[threadIdx.x].done;
    }
    if (alive && progress == before) {
      std::fprintf(stderr, "cuda_on_cpu: threads wait for others that never come\n");
      std::abort();
    }
  }
}

inline void launch_on_cpu(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  fiber_kernel = &kernel;
  gridDim = grid, blockDim = dim3(threads);
  ++cuda_on_cpu_launches;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = cuda_on_cpu_backwards ? blocks - 1 - i : i;
    blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    run_block(threads);
  }
}
