// The memory_attention tasks, compiled once per instruction set (see common/simd_task.h).
//
// Local part: flash attention with the queries of a block across the vector lanes, so that softmax is
// lane-wise. Memory part: every query has its own chunks, so there the head dim lies across the lanes, and
// chunks are read in place.

#include "common/simd_task.h"
#include "memory_attention/memory_attention.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

constexpr int64_t kTile = 64;  // local keys between two looks at the running maximum

// y += a x
inline void add_scaled(float a, const float* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + load(x + i) * a);
  for (; i < n; ++i) y[i] += a * x[i];
}

// out [n, kQueries] = rows [n, D] . block [D, kQueries]
inline void score_rows(const float* rows, int64_t row_stride, int64_t n, const float* block, int64_t D,
                       float* out) {
  int64_t j = 0;
  for (; j + kRows <= n; j += kRows) {
    Vector result[kRows][kVectors];
    multiply_rows<kRows>(rows + j * row_stride, row_stride, block, D, result);
    std::memcpy(out + j * kQueries, result, sizeof result);
  }
  for (; j < n; ++j) {
    Vector result[1][kVectors];
    multiply_rows<1>(rows + j * row_stride, row_stride, block, D, result);
    std::memcpy(out + j * kQueries, result, sizeof result);
  }
}

// block [D, kQueries] += rows [n, D]^T . weight [n, kQueries], for dims [d, d + width)
template <int width>
inline void add_weighted(const float* rows, int64_t row_stride, int64_t n, const float* weight, int64_t d,
                         float* block) {
  Vector total[width][kVectors];
  std::memcpy(total, block + d * kQueries, sizeof total);
  for (int64_t j = 0; j < n; ++j) {
    const float* row = rows + j * row_stride + d;
    for (int i = 0; i < width; ++i) {
      for (int v = 0; v < kVectors; ++v) total[i][v] += load(weight + j * kQueries + v * kLanes) * row[i];
    }
  }
  std::memcpy(block + d * kQueries, total, sizeof total);
}

inline void add_weighted_rows(const float* rows, int64_t row_stride, int64_t n, const float* weight,
                              int64_t D, float* block) {
  int64_t d = 0;
  for (; d + kRows <= D; d += kRows) add_weighted<kRows>(rows, row_stride, n, weight, d, block);
  for (; d < D; ++d) add_weighted<1>(rows, row_stride, n, weight, d, block);
}

// One block of consecutive queries of one head.
struct Block {
  const MemoryAttentionParams& p;
  int64_t b, h, g, ring, first, count;  // queries [first, first + count)

  Block(const MemoryAttentionParams& params, int64_t row, int64_t head, int64_t query)
      : p(params),
        b(row),
        h(head),
        g(head / (params.H / params.G)),
        ring(ring_of_row(params.ring_index, params.R, params.B, row)),
        first(query),
        count(smaller(kQueries, params.T - query)) {}

  static Block of_task(const MemoryAttentionParams& p, int64_t task) {
    const int64_t blocks = (p.T + kQueries - 1) / kQueries;
    return Block(p, task / blocks / p.H, task / blocks % p.H, task % blocks * kQueries);
  }

  // Row of query i in contiguous [B, H, T].
  int64_t row(int64_t i) const { return (b * p.H + h) * p.T + first + i; }

  int64_t at(const int64_t (&stride)[3], int64_t i) const {
    return b * stride[0] + h * stride[1] + (first + i) * stride[2];
  }

  void load_query(const void* base, const int64_t (&stride)[3], int64_t i, float factor, float* to) const {
    load_row(base, p.type, at(stride, i), p.D, to);
    for (int64_t d = 0; d < p.D; ++d) to[d] *= factor;
  }

  // Local keys that any query of the block may see: [begin, end).
  int64_t begin() const { return p.window ? larger(0, p.S - p.T + first - p.window + 1) : 0; }
  int64_t end() const { return p.causal ? p.S - p.T + first + count : p.S; }

  float sigmoid_of_gate() const { return 1.0f / (1.0f + std::exp(-p.gate[h])); }

  // The memory's share of query i's output.
  float share(float local_lse, float memory_lse) const {
    if (memory_lse == -kInfinity) return 0.0f;
    return p.gate ? sigmoid_of_gate() : 1.0f / (1.0f + std::exp(local_lse - memory_lse));
  }
};

// Local keys or values [j, j + n) of a block's head: in place when they are float32, else converted into
// `buffer`.
struct Rows {
  const float* data;
  int64_t stride;

  Rows(const Block& block, const void* base, const int64_t (&stride_of)[3], int64_t j, int64_t n,
       float* buffer) {
    const auto& p = block.p;
    const int64_t from = block.b * stride_of[0] + block.g * stride_of[1] + j * stride_of[2];
    if (p.type == Scalar::f32) {
      data = static_cast<const float*>(base) + from;
      stride = stride_of[2];
      return;
    }
    for (int64_t i = 0; i < n; ++i) load_row(base, p.type, from + i * stride_of[2], p.D, buffer + i * p.D);
    data = buffer;
    stride = p.D;
  }
};

// Applies distance bias and visibility to scores [n, kQueries] of keys j, j + 1, ...
inline void bias_scores(const Block& block, int64_t j, int64_t n, float* scores) {
  const auto& p = block.p;
  const int64_t last = j + n - 1, query = p.S - p.T + block.first;
  const bool all_visible = (!p.causal || last <= query) && (!p.window || j > query + kQueries - 1 - p.window);
  if (all_visible && !p.slopes) return;
  const float slope = p.slopes ? p.slopes[block.h] : 0.0f;
  Vector lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
  for (int64_t i = 0; i < n; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = scores + i * kQueries + v * kLanes;
      const Vector distance = lane + static_cast<float>(query + v * kLanes - (j + i));
      Vector s = load(at) - distance * slope;
      if (p.causal) s = distance < 0.0f ? fill(-kInfinity) : s;
      if (p.window) s = distance >= static_cast<float>(p.window) ? fill(-kInfinity) : s;
      store(at, s);
    }
  }
}

// The chunks of one query, scored; read in place when they are float32.
class Chunks {
 public:
  Chunks(const Block& block, int64_t i)
      : p_(block.p),
        ids_(p_.ids + block.b * p_.ids_stride[0] + block.h * p_.ids_stride[1] +
             (block.first + i) * p_.ids_stride[2]),
        key_at_(block.ring * p_.memory_key_stride[0] + block.g * p_.memory_key_stride[1]),
        value_at_(block.ring * p_.memory_value_stride[0] + block.g * p_.memory_value_stride[1]) {}

  bool valid(int64_t k) const { return ids_[k] >= 0 && ids_[k] < p_.M; }

  // Calls f(token, row) for every token of every valid chunk, token = k * C + c.
  template <typename F>
  void for_each_key(float* buffer, F&& f) const {
    for_each(p_.memory_key, p_.memory_key_stride, key_at_, buffer, f);
  }
  template <typename F>
  void for_each_value(float* buffer, F&& f) const {
    for_each(p_.memory_value, p_.memory_value_stride, value_at_, buffer, f);
  }

 private:
  template <typename F>
  void for_each(const void* base, const int64_t (&stride)[4], int64_t at, float* buffer, F&& f) const {
    for (int64_t k = 0; k < p_.K; ++k) {
      if (k + 1 < p_.K && valid(k + 1)) prefetch(base, at + ids_[k + 1] * stride[2], stride[3]);
      if (!valid(k)) continue;
      for (int64_t c = 0; c < p_.C; ++c) {
        const int64_t from = at + ids_[k] * stride[2] + c * stride[3];
        if (p_.memory_type == Scalar::f32) {
          f(k * p_.C + c, static_cast<const float*>(base) + from);
        } else {
          load_row(base, p_.memory_type, from, p_.D, buffer);
          f(k * p_.C + c, buffer);
        }
      }
    }
  }

  // Chunks lie anywhere in a bank larger than the caches; the next one is on its way while this one is used.
  void prefetch(const void* base, int64_t from, int64_t stride) const {
    const int64_t size = p_.memory_type == Scalar::f32 ? 4 : 2;
    for (int64_t c = 0; c < p_.C; ++c) {
      const char* row = static_cast<const char*>(base) + (from + c * stride) * size;
      for (int64_t byte = 0; byte < p_.D * size; byte += 64) __builtin_prefetch(row + byte);
    }
  }

  const MemoryAttentionParams& p_;
  const int32_t* ids_;
  const int64_t key_at_, value_at_;
};

// Scores of one query's chunks, -inf where there is none: [K * C], rounded up to whole vectors.
inline void score_chunks(const Chunks& chunks, const float* query, int64_t D, int64_t padded, float* buffer,
                         float* scores) {
  for (int64_t j = 0; j < padded; ++j) scores[j] = -kInfinity;
  chunks.for_each_key(buffer, [&](int64_t token, const float* row) { scores[token] = dot(query, row, D); });
}

inline int64_t padded_tokens(const MemoryAttentionParams& p) {
  return (p.K * p.C + kLanes - 1) / kLanes * kLanes;
}

}  // namespace

int64_t memory_attention_block() { return kQueries; }

}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem

#include "memory_attention/memory_attention_backward.h"
#include "memory_attention/memory_attention_forward.h"
