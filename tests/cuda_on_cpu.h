// Runs a CUDA kernel on the CPU, one thread per CUDA thread and one block at a time, so that its logic can be
// tested without a GPU. Covers what our kernels use: block barriers, static shared memory, warp shuffles by a
// whole block.
#pragma once

#include <barrier>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline thread_local dim3 threadIdx{0}, blockIdx{0}, gridDim{0};
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<int> block_values;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

inline int __shfl_up_sync(unsigned, int value, int delta) {
  block_values[threadIdx.x] = value;
  __syncthreads();
  const int result = static_cast<int>(threadIdx.x) % 32 >= delta ? block_values[threadIdx.x - delta] : value;
  __syncthreads();
  return result;
}

inline float __fdiv_rn(float a, float b) { return a / b; }

inline void launch_on_cpu(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  block_values.assign(threads, 0);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_barrier = std::make_unique<std::barrier<>>(threads);
        std::vector<std::thread> block;
        for (unsigned t = 0; t < threads; ++t) {
          block.emplace_back([&, t] {
            threadIdx = dim3(t), blockIdx = dim3(x, y, z), gridDim = grid;
            kernel();
            block_barrier->arrive_and_drop();
          });
        }
        for (auto& thread : block) thread.join();
      }
    }
  }
}
