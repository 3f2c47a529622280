// memory_attention on the CPU: what the kernels are told.
#pragma once

#include <cstdint>

#include "common/ring_index.h"
#include "common/scalar_type.h"

namespace longmem {

// Symbols as in the Python package: B rows, H query heads, G key/value heads, T queries, S local keys, D head
// dim, R rings, M chunks, C tokens per chunk, K chunks per query. Strides are in elements; last axes are
// contiguous.
struct MemoryAttentionParams {
  const void *query, *memory_query;       // [B, H, T, D]
  const void *key, *value;                // [B, G, S, D]
  const void *memory_key, *memory_value;  // [R, G, M, C, D]
  const int32_t* ids;                     // [B, H, T, K]
  const int32_t* ring_index;              // [B], or null: row b reads ring b if R == B, else ring 0
  const float* gate;                      // [H] logits, or null: one joint softmax
  const float* slopes;                    // [H], or null
  int64_t B, H, G, T, S, D, R, M, C, K;
  int64_t query_stride[3], memory_query_stride[3], key_stride[3], value_stride[3];
  int64_t memory_key_stride[4], memory_value_stride[4], ids_stride[3];
  int64_t window;  // 0: none
  float scale;
  bool causal;
  Scalar type, memory_type;

  // Forward results, contiguous. Both parts are normalised on their own; a part without tokens is 0 with lse
  // -inf.
  void* out;                      // [B, H, T, D] of `type`
  float *local_out, *memory_out;  // [B, H, T, D]: the gate's gradient is the difference of two sums over them
  float *local_lse, *memory_lse;  // [B, H, T]

  // Backward: the gradient of `out`, and the results, contiguous.
  const void* grad;  // [B, H, T, D] of `type`
  int64_t grad_stride[3];
  void *dquery, *dmemory_query;  // [B, H, T, D] of `type`
  void *dkey, *dvalue;           // [B, G, S, D] of `type`
  float* dgate;                  // [B, H, T]: each query's part
};

// One task at one instruction set; the right one is chosen at run time.
#define LONGMEM_MEMORY_ATTENTION_TASKS(simd)                                                          \
  namespace simd {                                                                                    \
  /* Queries per block. */                                                                            \
  int64_t memory_attention_block();                                                                   \
  /* Everything forward for block `task` of the ceil(T / block) blocks of each of B * H heads. */     \
  void memory_attention_forward(const MemoryAttentionParams& p, int64_t task);                        \
  /* dmemory_query and dgate for such a block. */                                                     \
  void memory_attention_backward_memory(const MemoryAttentionParams& p, int64_t task);                \
  /* dquery, dkey and dvalue for key/value head `task` of B * G: one task, so sums have one order. */ \
  void memory_attention_backward_local(const MemoryAttentionParams& p, int64_t task);                 \
  }
LONGMEM_MEMORY_ATTENTION_TASKS(baseline)
LONGMEM_MEMORY_ATTENTION_TASKS(avx2)
LONGMEM_MEMORY_ATTENTION_TASKS(avx512)
#undef LONGMEM_MEMORY_ATTENTION_TASKS

}  // namespace longmem
