// Parameters of the ring_write kernels. No torch types, so that nvcc compiles the CUDA kernel in a second.
#pragma once

#include <cstdint>

#include "common/ring_index.h"
#include "common/scalar_type.h"

namespace longmem {

// Symbols as in the Python package: R rings, G heads, M chunks, C tokens per chunk, D head dim, B rows, T
// tokens. The ring's tensors are contiguous; strides are in elements.
struct RingWriteParams {
  void* store;                // [R, G, M, 2, C, D]
  void* centroid;             // [R, G, M, D], of the tail's type
  void* tail;                 // [R, G, 2, C, D], of the store's type, or bf16 if that is e4m3
  float* scale;               // [R, G, M, 2], null unless the store is e4m3
  int64_t* cursor;            // [R], in [0, kMaxCursor)
  const void* key;            // [B, G, T, D]
  const void* value;          // [B, G, T, D]
  const int32_t* ring_index;  // [B], or null: row b writes ring b if R == B, else ring 0
  const bool* mask;           // [B, T], or null: every token is kept
  int64_t R, G, M, C, D, B, T;
  int64_t key_stride[3], value_stride[3], mask_stride[2];
};

// Tokens ever written to a ring stay below this: on CUDA the bits above count blocks.
constexpr int kCursorBits = 48;
constexpr int64_t kMaxCursor = int64_t{1} << kCursorBits;

LONGMEM_HOST_DEVICE static inline int64_t ring_of_row(const RingWriteParams& p, int64_t row) {
  return ring_of_row(p.ring_index, p.R, p.B, row);
}

void ring_write_cpu(const RingWriteParams& p, Scalar input, Scalar storage);

// `stream` is a cudaStream_t. Returns the error text of a failed launch, or null.
const char* ring_write_cuda(const RingWriteParams& p, Scalar input, Scalar storage, void* stream);

}  // namespace longmem
