// Parameters of the CPU chunk_topk kernel.
#pragma once

#include <cstdint>

#include "common/ring_index.h"
#include "common/scalar_type.h"

namespace longmem {

// Symbols as in the Python package: B rows, H query heads, T tokens, R rings, G heads of memory, M chunks, K
// winners. Strides are in elements; the last axis is contiguous.
struct ChunkTopkParams {
  const void* query;          // [B, H, T, D]
  const void* centroid;       // [R, G, M, D]
  const int32_t* count;       // [R]
  const int32_t* ring_index;  // [B], or null: row b searches ring b if R == B, else ring 0
  int32_t* ids;               // [B, H, T, K] contiguous
  float* scores;              // [B, H, T, K] contiguous
  int64_t B, H, T, D, R, G, M, K;
  int64_t rows;  // batch rows searched in one task, because they share a ring: B if R == 1, else 1
  int64_t query_stride[3], centroid_stride[3];
  Scalar query_type, centroid_type;

  // Tasks share the slots: the winners of each part, ids and scores [B / rows, G, splits, queries, K]. A
  // score depends on its query and its centroid alone, so results depend on no splits.
  int32_t* split_ids;
  float* split_scores;
  int64_t splits, split_slots;
};

// Queries that search the same centroids: [rows, H/G, T], one after another. Functions of this header are
// static, so that the linker cannot merge those of different instruction sets.
static inline int64_t chunk_topk_queries(const ChunkTopkParams& p) { return p.rows * (p.H / p.G) * p.T; }

// Where query `n` of those that search head `head` of memory for rows [search * rows, (search + 1) * rows)
// is.
struct QueryPlace {
  int64_t in_query, in_results;
};

static inline QueryPlace query_place(const ChunkTopkParams& p, int64_t search, int64_t head, int64_t n) {
  const int64_t group = p.H / p.G, token = n % p.T;
  const int64_t row = search * p.rows + n / p.T / group, query_head = head * group + n / p.T % group;
  return {row * p.query_stride[0] + query_head * p.query_stride[1] + token * p.query_stride[2],
          ((row * p.H + query_head) * p.T + token) * p.K};
}

// Up to so many queries per head of memory, memory is what takes time.
constexpr int64_t kFewQueries = 8;

// Centroids that a task keeps in the first-level cache.
constexpr int64_t kTileSlots = 128;

// Queries one task searches for: as many as share one pass over a tile of centroids.
constexpr int64_t kTaskQueries = 128;

// Tasks are numbered ((search * G + g) * splits + split) * blocks + block, over the queries that search the
// same centroids; few tasks are for all queries, (search * G + g) * splits + split.
static inline int64_t chunk_topk_blocks(const ChunkTopkParams& p) {
  return (chunk_topk_queries(p) + kTaskQueries - 1) / kTaskQueries;
}

// One task at one instruction set; the right one is chosen at run time.
namespace baseline {
void chunk_topk_task(const ChunkTopkParams& p, int64_t task);
void chunk_topk_few_task(const ChunkTopkParams& p, int64_t task);
}  // namespace baseline
namespace avx2 {
void chunk_topk_task(const ChunkTopkParams& p, int64_t task);
void chunk_topk_few_task(const ChunkTopkParams& p, int64_t task);
}  // namespace avx2
namespace avx512 {
void chunk_topk_task(const ChunkTopkParams& p, int64_t task);
void chunk_topk_few_task(const ChunkTopkParams& p, int64_t task);
}  // namespace avx512

}  // namespace longmem
