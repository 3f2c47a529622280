// Blocks of queries, and the local keys they see; part of memory_attention_task.h.
#pragma once

#include "common/simd_task.h"
#include "memory_attention/memory_attention.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

constexpr int64_t kTile = kPair;  // local keys between two looks at the running maximum

// out [n, kQueries] = rows [n, D] . block [D, kQueries]
inline void score_rows(const float* rows, int64_t row_stride, int64_t n, const float* block, int64_t D,
                       float* out) {
  int64_t j = 0;
  for (; j + kRows <= n; j += kRows) {
    Vector result[kRows][kVectors];
    multiply_rows<kRows, kVectors>(rows + j * row_stride, row_stride, block, D, result);
    std::memcpy(out + j * kQueries, result, sizeof result);
  }
  for (; j < n; ++j) {
    Vector result[1][kVectors];
    multiply_rows<1, kVectors>(rows + j * row_stride, row_stride, block, D, result);
    std::memcpy(out + j * kQueries, result, sizeof result);
  }
}

// Whether rows [n, width], whole vectors, hold neither NaN nor infinity: zero times those is no number.
inline bool all_finite(const float* rows, int64_t row_stride, int64_t n, int64_t width) {
  Vector total{};
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t d = 0; d < width; d += kLanes) total += load(rows + j * row_stride + d) * 0.0f;
  }
  return sum(total) == 0.0f;
}

inline Vector lane_numbers() {
  Vector lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
  return lane;
}

// `scores` of keys at `distance` from their queries, with distance bias, -inf where the key is not visible.
inline Vector bias(const MemoryAttentionParams& p, float slope, Vector distance, Vector scores) {
  Vector s = scores - distance * slope;
  if (p.causal) s = distance < 0.0f ? fill(-kInfinity) : s;
  if (p.window) s = distance >= static_cast<float>(p.window) ? fill(-kInfinity) : s;
  return s;
}

// One block of consecutive queries of one head.
struct Block {
  const MemoryAttentionParams& p;
  int64_t b, h, g, ring, first, count;  // queries [first, first + count)

  Block(const MemoryAttentionParams& params, int64_t row, int64_t head, int64_t query, int64_t end)
      : p(params),
        b(row),
        h(head),
        g(head / (params.H / params.G)),
        ring(ring_of_row(params.ring_index, params.R, params.B, row)),
        first(query),
        count(smaller(kQueries, end - query)) {}

  static Block of_task(const MemoryAttentionParams& p, int64_t task) {
    const int64_t blocks = (p.T + kQueries - 1) / kQueries;
    return Block(p, task / blocks / p.H, task / blocks % p.H, task % blocks * kQueries, p.T);
  }

  // Row of query i in contiguous [B, H, T].
  int64_t row(int64_t i) const { return (b * p.H + h) * p.T + first + i; }

  int64_t at(const int64_t (&stride)[3], int64_t i) const {
    return b * stride[0] + h * stride[1] + (first + i) * stride[2];
  }

  void load_query(const void* base, const int64_t (&stride)[3], int64_t i, float* to) const {
    load_row(base, p.type, at(stride, i), p.D, to);
  }

  // All queries as rows [kQueries, padded], zero where there is none, and turned around and times `factor` as
  // columns [padded, kQueries].
  void load_queries(const void* base, const int64_t (&stride)[3], float factor, float* rows,
                    float* columns) const {
    for (int64_t i = 0; i < count; ++i) load_query(base, stride, i, rows + i * p.padded);
    std::memset(rows + count * p.padded, 0, (kQueries - count) * p.padded * sizeof(float));
    for (int64_t i = 0; i < kQueries; i += kLanes) {
      for (int64_t d = 0; d < p.D; d += kLanes)
        transpose(rows + i * p.padded + d, p.padded, columns + d * kQueries + i, kQueries);
    }
    for (int64_t i = 0; i < p.padded * kQueries; i += kLanes) store(columns + i, load(columns + i) * factor);
  }

  // Local keys that any query of the block may see, key mask aside: [begin, end).
  int64_t begin() const { return p.window ? larger(0, p.S - p.T + first - p.window + 1) : 0; }
  int64_t end() const { return p.causal ? p.S - p.T + first + count : p.S; }

  const bool* key_mask(int64_t j) const {
    return p.key_mask + b * p.key_mask_stride[0] + j * p.key_mask_stride[1];
  }

  // Whether the key mask shows any of keys [j, j + n).
  bool any_shown(int64_t j, int64_t n) const {
    if (!p.key_mask) return true;
    for (int64_t i = j; i < j + n; ++i) {
      if (*key_mask(i)) return true;
    }
    return false;
  }

  // Whether all queries of the block see all keys [j, j + n), key mask aside.
  bool all_near(int64_t j, int64_t n) const {
    const int64_t query = p.S - p.T + first;
    return (!p.causal || j + n - 1 <= query) && (!p.window || j > query + kQueries - 1 - p.window);
  }

  // The same, key mask included.
  bool all_see(int64_t j, int64_t n) const {
    if (!all_near(j, n)) return false;
    for (int64_t i = j; p.key_mask && i < j + n; ++i) {
      if (!*key_mask(i)) return false;
    }
    return true;
  }

  // Which queries of vector v of the block see key j.
  IntVector seers(int64_t j, int v) const {
    if (p.key_mask && !*key_mask(j)) return IntVector{};
    const float distance = static_cast<float>(p.S - p.T + first + v * kLanes - j);
    return bias(p, 0.0f, lane_numbers() + distance, Vector{}) == 0.0f;
  }

  float sigmoid_of_gate() const { return 1.0f / (1.0f + std::exp(-p.gate[h])); }

  // The memory's share of a query's output.
  float share(float local_lse, float memory_lse) const {
    if (memory_lse == -kInfinity) return 0.0f;
    return p.gate ? sigmoid_of_gate() : 1.0f / (1.0f + std::exp(local_lse - memory_lse));
  }
};

// Local keys or values [j, j + n) of a block's head: in place when they are whole vectors of float32, else
// converted into `buffer` [n, padded], whose padding is zero.
struct Rows {
  const float* data;
  int64_t stride;

  Rows(const Block& block, const void* base, const int64_t (&stride_of)[3], int64_t j, int64_t n,
       float* buffer) {
    const auto& p = block.p;
    const int64_t from = block.b * stride_of[0] + block.g * stride_of[1] + j * stride_of[2];
    if (p.type == Scalar::f32 && p.D == p.padded) {
      data = static_cast<const float*>(base) + from;
      stride = stride_of[2];
      return;
    }
    for (int64_t i = 0; i < n; ++i)
      load_row(base, p.type, from + i * stride_of[2], p.D, buffer + i * p.padded);
    data = buffer;
    stride = p.padded;
  }
};

// Applies distance bias and visibility to scores [n, kQueries] of keys j, j + 1, ...
inline void bias_scores(const Block& block, int64_t j, int64_t n, float* scores) {
  const auto& p = block.p;
  const int64_t query = p.S - p.T + block.first;
  if (p.slopes || !block.all_near(j, n)) {
    const float slope = p.slopes ? p.slopes[block.h] : 0.0f;
    const Vector lane = lane_numbers();
    for (int64_t i = 0; i < n; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* at = scores + i * kQueries + v * kLanes;
        const Vector distance = lane + static_cast<float>(query + v * kLanes - (j + i));
        store(at, bias(p, slope, distance, load(at)));
      }
    }
  }
  for (int64_t i = 0; p.key_mask && i < n; ++i) {
    if (*block.key_mask(j + i)) continue;
    for (int64_t q = 0; q < kQueries; ++q) scores[i * kQueries + q] = -kInfinity;
  }
}

inline void multiply(float* row, int64_t n, float factor) {
  for (int64_t d = 0; d < n; ++d) row[d] *= factor;
}

}  // namespace
}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
