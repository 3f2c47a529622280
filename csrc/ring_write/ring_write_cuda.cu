// ring_write on the GPU: a plan kernel settles where each token goes and advances the cursors, a write kernel
// moves the data. Both run on the caller's stream; nothing is read back, so the op can be captured into a
// CUDA graph.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ring_write/ring_write.h"

namespace longmem {

namespace {

constexpr int kPlanThreads = 1024;
constexpr int kWriteThreads = 128;
constexpr int kMaxChunkSize = 64;

// Scratch shared by the two kernels.
struct Plan {
  int64_t* begin;      // [R] cursor before the call
  int64_t* row_begin;  // [B] tokens of the row's ring that come before the row, in this call
  int64_t* row_count;  // [B] tokens the row keeps
  int32_t* kept;       // [B, T] the kept tokens of a row, in order; unused without a mask
};

__host__ Plan plan_at(const RingWriteParams& p, void* workspace) {
  Plan plan;
  plan.begin = static_cast<int64_t*>(workspace);
  plan.row_begin = plan.begin + p.R;
  plan.row_count = plan.row_begin + p.B;
  plan.kept = reinterpret_cast<int32_t*>(plan.row_count + p.B);
  return plan;
}

// Sum of `value` over the threads before this one; `*total` is the sum over all.
__device__ int block_exclusive_sum(int value, int* total) {
  __shared__ int warp_sum[kPlanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) warp_sum[warp] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kPlanThreads / 32; ++w) {
    if (w < warp) before += warp_sum[w];
    all += warp_sum[w];
  }
  __syncthreads();
  *total = all;
  return before + inclusive - value;
}

// One block: rows that share a ring depend on each other in order.
__global__ void ring_write_plan_kernel(RingWriteParams p, Plan plan) {
  for (int64_t r = threadIdx.x; r < p.R; r += kPlanThreads) plan.begin[r] = p.cursor[r];
  for (int64_t row = 0; row < p.B; ++row) {
    int64_t count = p.T;
    if (p.mask != nullptr) {
      count = 0;
      for (int64_t t0 = 0; t0 < p.T; t0 += kPlanThreads) {
        const int64_t t = t0 + threadIdx.x;
        const bool keep = t < p.T && p.mask[row * p.mask_stride[0] + t * p.mask_stride[1]];
        int total;
        const int64_t n = count + block_exclusive_sum(keep, &total);
        if (keep) plan.kept[row * p.T + n] = static_cast<int32_t>(t);
        count += total;
      }
    }
    __syncthreads();  // plan.begin is complete, and the previous row has moved its ring's cursor
    if (threadIdx.x == 0) {
      const int64_t ring = ring_of_row(p, row);
      if (ring < 0 || ring >= p.R) {  // nothing can be raised from here: such a row is dropped
        plan.row_count[row] = 0;
        continue;
      }
      plan.row_begin[row] = p.cursor[ring] - plan.begin[ring];
      plan.row_count[row] = count;
      p.cursor[ring] += count;
    }
  }
}

template <typename T>
__device__ float to_float(T x) {
  return static_cast<float>(x);
}

template <typename Input, typename Storage>
struct ChunkWriter {
  const RingWriteParams& p;
  const Plan& plan;
  int64_t ring, head, begin, end;

  // Source of each token of the chunk: a row and token of the input, or the tail (row -1).
  int64_t* row;
  int64_t* token;

  __device__ void locate(int64_t chunk) const {
    for (int c = threadIdx.x; c < p.C; c += kWriteThreads) {
      const int64_t n = chunk * p.C + c - begin;
      row[c] = -1;
      token[c] = c;
      if (n < 0) continue;
      for (int64_t b = 0; b < p.B; ++b) {
        if (ring_of_row(p, b) != ring) continue;
        const int64_t i = n - plan.row_begin[b];
        if (i < 0 || i >= plan.row_count[b]) continue;
        row[c] = b;
        token[c] = p.mask != nullptr ? plan.kept[b * p.T + i] : i;
        break;
      }
    }
    __syncthreads();
  }

  __device__ Storage read(int kv, int64_t c, int64_t d) const {
    if (row[c] < 0) {
      const Storage* tail = static_cast<const Storage*>(p.tail) + (ring * p.G + head) * 2 * p.C * p.D;
      return tail[(kv * p.C + c) * p.D + d];
    }
    const int64_t* stride = kv ? p.value_stride : p.key_stride;
    const Input* from = static_cast<const Input*>(kv ? p.value : p.key);
    return static_cast<Storage>(
        to_float(from[row[c] * stride[0] + head * stride[1] + token[c] * stride[2] + d]));
  }

  // Writes the first `tokens` tokens of the located chunk to `to` [2, C, D].
  __device__ void copy(Storage* to, int64_t tokens) const {
    for (int64_t i = threadIdx.x; i < 2 * tokens * p.D; i += kWriteThreads) {
      const int kv = static_cast<int>(i / (tokens * p.D));
      const int64_t c = i / p.D % tokens, d = i % p.D;
      to[(kv * p.C + c) * p.D + d] = read(kv, c, d);
    }
  }

  __device__ void close(int64_t chunk) const {
    const int64_t base = (ring * p.G + head) * p.M + chunk % p.M;
    copy(static_cast<Storage*>(p.store) + base * 2 * p.C * p.D, p.C);
    Storage* mean = static_cast<Storage*>(p.centroid) + base * p.D;
    for (int64_t d = threadIdx.x; d < p.D; d += kWriteThreads) {
      float total = 0.0f;
      for (int64_t c = 0; c < p.C; ++c) total += to_float(read(0, c, d));
      mean[d] = static_cast<Storage>(__fdiv_rn(total, static_cast<float>(p.C)));
    }
  }
};

// Block (r * blocks + w, g) closes the w-th chunk that this call completes in ring r; block w = 0 also writes
// the open tail, after it has read the old one.
template <typename Input, typename Storage>
__global__ void __launch_bounds__(kWriteThreads) ring_write_kernel(RingWriteParams p, Plan plan) {
  __shared__ int64_t row[kMaxChunkSize], token[kMaxChunkSize];
  const unsigned blocks = gridDim.x / static_cast<unsigned>(p.R);  // of each ring
  const unsigned block = blockIdx.x % blocks;
  const int64_t ring = blockIdx.x / blocks, head = blockIdx.y;
  const int64_t begin = plan.begin[ring], end = p.cursor[ring];
  if (begin == end) return;
  const ChunkWriter<Input, Storage> writer{p, plan, ring, head, begin, end, row, token};
  const int64_t closed = end / p.C;
  const int64_t chunk = max_i64(begin / p.C, closed - p.M) + block;
  if (chunk < closed) {
    writer.locate(chunk);
    writer.close(chunk);
  }
  if (block != 0 || end % p.C == 0) return;
  __syncthreads();
  writer.locate(closed);
  // Tokens that were in the tail already stay where they are: read and written by the same thread.
  writer.copy(static_cast<Storage*>(p.tail) + (ring * p.G + head) * 2 * p.C * p.D, end % p.C);
}

// The most chunks that this call can close in one ring.
int64_t chunks_per_ring(const RingWriteParams& p) {
  const bool owned = p.ring_index == nullptr && p.R == p.B;
  const int64_t chunks = (owned ? p.T : p.B * p.T) / p.C + 1;
  return chunks < p.M ? chunks : p.M;
}

template <typename Input, typename Storage>
void launch(const RingWriteParams& p, const Plan& plan, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.R * chunks_per_ring(p)), static_cast<unsigned>(p.G));
  ring_write_kernel<Input, Storage><<<grid, kWriteThreads, 0, stream>>>(p, plan);
}

template <typename Input>
void launch(const RingWriteParams& p, Scalar storage, const Plan& plan, cudaStream_t stream) {
  switch (storage) {
    case Scalar::f32:
      return launch<Input, float>(p, plan, stream);
    case Scalar::bf16:
      return launch<Input, __nv_bfloat16>(p, plan, stream);
    case Scalar::f16:
      return launch<Input, __half>(p, plan, stream);
  }
}

}  // namespace

int64_t ring_write_cuda_workspace(const RingWriteParams& p) {
  return 8 * (p.R + 2 * p.B) + (p.mask != nullptr ? 4 * p.B * p.T : 0);
}

const char* ring_write_cuda(const RingWriteParams& p, Scalar input, Scalar storage, void* workspace,
                            void* stream) {
  // Said before anything has changed.
  if (p.R * chunks_per_ring(p) > INT32_MAX || p.G > 65535)
    return "too many rings, chunks or heads for one launch";
  const Plan plan = plan_at(p, workspace);
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  ring_write_plan_kernel<<<1, kPlanThreads, 0, cuda_stream>>>(p, plan);
  switch (input) {
    case Scalar::f32:
      launch<float>(p, storage, plan, cuda_stream);
      break;
    case Scalar::bf16:
      launch<__nv_bfloat16>(p, storage, plan, cuda_stream);
      break;
    case Scalar::f16:
      launch<__half>(p, storage, plan, cuda_stream);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace longmem
