// Parameters of the CPU memory_attention kernels.
#pragma once

#include <cstdint>

#include "common/ring_index.h"
#include "common/scalar_type.h"

namespace longmem {

// Backward works on pairs of so many queries of one head and so many keys.
constexpr int64_t kPair = 64;

// A few queries are answered in pieces of so many keys.
constexpr int64_t kSplit = 256;

// Symbols as in the Python package: B rows, H query heads, G key/value heads, T queries, S local keys, D head
// dim, R rings, M chunks, C tokens per chunk, K chunks per query. Strides are in elements; last axes are
// contiguous.
struct MemoryAttentionParams {
  const void *query, *memory_query;       // [B, H, T, D]
  const void *key, *value;                // [B, G, S, D]
  const void *memory_key, *memory_value;  // [R, G, M, C, D]
  const int32_t* ids;                     // [B, H, T, K]
  const float* memory_scale;    // [R, G, M, 2] contiguous, of keys and values; with e4m3 memory alone
  const int32_t* ring_index;    // [B], or null: row b reads ring b if R == B, else ring 0
  const float* gate;            // [H] logits, or null: one joint softmax
  const float* slopes;          // [H], or null
  const bool* key_mask;         // [B, S], or null
  const int64_t* dropout_seed;  // [1], or null
  int64_t B, H, G, T, S, D, R, M, C, K;
  int64_t query_stride[3], memory_query_stride[3], key_stride[3], value_stride[3];
  int64_t memory_key_stride[4], memory_value_stride[4], ids_stride[3], key_mask_stride[2];
  int64_t window;  // 0: none
  float scale;
  bool causal;
  uint32_t dropout_threshold;  // hashes below it drop a weight
  float dropout_scale;         // what the kept ones are multiplied by
  Scalar type, memory_type;

  // Forward results, contiguous. Both parts are normalised on their own; a part without tokens is 0 with lse
  // -inf.
  void* out;                      // [B, H, T, D] of `type`
  float *local_out, *memory_out;  // [B, H, T, D]: the gate's gradient is the difference of two sums over them
  float *local_lse, *memory_lse;  // [B, H, T]
  float* pieces;                  // [B, H, T, ceil(S / kSplit), D + 2], of a few queries only

  // Backward: gradients of the results, and the gradients wanted, contiguous.
  const void* grad;  // [B, H, T, D] of `type`
  int64_t grad_stride[3];
  const float *local_lse_grad, *memory_lse_grad;  // [B, H, T], or null
  void *dquery, *dmemory_query;                   // [B, H, T, D] of `type`
  void *dkey, *dvalue;                            // [B, G, S, D] of `type`
  float* dgate;                                   // [B, H, T]: each query's part

  // Backward, in between. The gradient of a local score is softmax * (local_weight * grad . value +
  // local_offset).
  float *local_weight, *local_offset;         // [B, H, T]
  float *dquery_sum, *dkey_sum, *dvalue_sum;  // rows of `padded`; the gradients themselves where they can be
  int64_t padded;                             // D rounded up to vectors of every instruction set
};

// Backward's pairs: all queries of the heads that share a key/value head, one head after the other, in
// blocks; and its keys, in blocks.
static inline int64_t memory_attention_blocks(int64_t n) { return (n + kPair - 1) / kPair; }
static inline int64_t memory_attention_query_blocks(const MemoryAttentionParams& p) {
  return p.H / p.G * memory_attention_blocks(p.T);
}

// Whether any query of a block sees any key of another, key mask aside.
static inline bool memory_attention_sees(const MemoryAttentionParams& p, int64_t query_block,
                                         int64_t key_block) {
  const int64_t blocks = memory_attention_blocks(p.T);
  const int64_t first = p.S - p.T + query_block % blocks * kPair, key = key_block * kPair;
  const int64_t end = first + kPair < p.S ? first + kPair : p.S;
  return (!p.causal || key < end) && (!p.window || key + kPair + p.window > first + 1);
}

// Tasks at one instruction set; the right one is chosen at run time.
#define LONGMEM_MEMORY_ATTENTION_TASKS(simd)                                                              \
  namespace simd {                                                                                        \
  /* Queries per block, and how many T are few. */                                                        \
  int64_t memory_attention_block();                                                                       \
  int64_t memory_attention_few();                                                                         \
  /* Everything forward for block `task` of the ceil(T / block) blocks of each of B * H heads. */         \
  void memory_attention_forward(const MemoryAttentionParams& p, int64_t task);                            \
  /* A few queries: attention to keys [split * kSplit, (split + 1) * kSplit) of B * G heads; the rest for \
     query `task` of B * H * T. */                                                                        \
  void memory_attention_piece(const MemoryAttentionParams& p, int64_t task);                              \
  void memory_attention_finish(const MemoryAttentionParams& p, int64_t task);                             \
  /* dmemory_query, dgate, local_weight and local_offset for a block as in forward. */                    \
  void memory_attention_backward_memory(const MemoryAttentionParams& p, int64_t task);                    \
  /* Adds the gradients of one pair, task = (kv head * query blocks + query block) * key blocks + key     \
     block; `_head` adds those of all pairs of kv head `task`. */                                         \
  void memory_attention_backward_pair(const MemoryAttentionParams& p, int64_t task);                      \
  void memory_attention_backward_head(const MemoryAttentionParams& p, int64_t task);                      \
  /* Rounds the sums of B * G key/value heads, then of B * H query heads. */                              \
  void memory_attention_backward_round(const MemoryAttentionParams& p, int64_t task);                     \
  }
LONGMEM_MEMORY_ATTENTION_TASKS(baseline)
LONGMEM_MEMORY_ATTENTION_TASKS(avx2)
LONGMEM_MEMORY_ATTENTION_TASKS(avx512)
#undef LONGMEM_MEMORY_ATTENTION_TASKS

}  // namespace longmem
