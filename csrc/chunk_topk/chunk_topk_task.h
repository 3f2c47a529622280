// The chunk_topk task, compiled once per instruction set (see common/simd_task.h); the
// including file also defines `above`.
//
// Queries lie across the vector lanes. A block of centroids is scored into registers, each vector of scores
// is compared with the K-th best of its queries, and only what is better leaves the registers: the scores are
// never stored.

#include "chunk_topk/chunk_topk_few.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

constexpr int64_t kTile = 128;  // centroids kept in the first-level cache

// Scores `n` centroids [n, D] against kQueries queries [D, kQueries].
template <int n>
void score_block(const float* query, const float* centroid, int64_t stride, int64_t D, int32_t first_slot,
                 int64_t first_query, Winners& winners) {
  Vector scores[n][kVectors];
  multiply_rows<n>(centroid, stride, query, D, scores);
  const float* threshold = winners.threshold + first_query;
  for (int j = 0; j < n; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      for (uint32_t better = above(scores[j][v], load(threshold + v * kLanes)); better != 0;
           better &= better - 1) {
        const int lane = __builtin_ctz(better);
        winners.insert(first_query + v * kLanes + lane, scores[j][v][lane], first_slot + j);
      }
    }
  }
}

// Centroids [n, D], the first of them in slot `first`.
struct Tile {
  const float* data;
  int64_t stride, n, first;
};

class Task {
 public:
  Task(const ChunkTopkParams& p, int64_t task)
      : p_(p),
        search_(task / chunk_topk_blocks(p) / p.G),
        head_(task / chunk_topk_blocks(p) % p.G),
        ring_(ring_of_row(p.ring_index, p.R, p.B, search_ * p.rows)),
        count_(p.count[ring_]),
        first_(task % chunk_topk_blocks(p) * kTaskQueries),
        queries_(smaller(kTaskQueries, chunk_topk_queries(p) - first_)),
        query_(kTaskQueries * p.D),
        tile_(kTile * p.D),
        winners_(p.K, queries_, kTaskQueries) {}

  void run() {
    pack_queries();
    for (int64_t m = 0; m < count_; m += kTile) score_tile(load_tile(m));
    for (int64_t q = 0; q < queries_; ++q) {
      for (int nan = 0; nan < 2 && winners_.found[q] < smaller(p_.K, count_); ++nan)
        add_exceptional(q, nan != 0);
    }
    write();
  }

 private:
  // Query n of the task.
  QueryPlace place_of(int64_t n) const { return query_place(p_, search_, head_, first_ + n); }

  // [blocks, D, kQueries], so that one load gives a feature of kLanes queries.
  void pack_queries() {
    const Buffer<float> row(p_.D);
    for (int64_t n = 0; n < queries_; ++n) {
      load_row(p_.query, p_.query_type, place_of(n).in_query, p_.D, row);
      float* block = block_of(n);
      for (int64_t d = 0; d < p_.D; ++d) block[d * kQueries] = row[d];
    }
  }

  // The first feature of query n; the next is kQueries further on.
  float* block_of(int64_t n) const { return query_ + n / kQueries * kQueries * p_.D + n % kQueries; }

  Tile load_tile(int64_t m) const {
    const int64_t n = smaller(kTile, count_ - m), stride = p_.centroid_stride[2];
    const int64_t at = ring_ * p_.centroid_stride[0] + head_ * p_.centroid_stride[1] + m * stride;
    if (p_.centroid_type == Scalar::f32) return {static_cast<const float*>(p_.centroid) + at, stride, n, m};
    for (int64_t i = 0; i < n; ++i) {
      load_row(p_.centroid, p_.centroid_type, at + i * stride, p_.D, tile_ + i * p_.D);
    }
    return {tile_, p_.D, n, m};
  }

  void score_tile(const Tile& tile) {
    for (int64_t q = 0; q < queries_; q += kQueries) {
      const float* query = query_ + q * p_.D;
      int64_t i = 0;
      for (; i < tile.n; i += i + kRows <= tile.n ? kRows : 1) {
        const float* centroid = tile.data + i * tile.stride;
        const auto slot = static_cast<int32_t>(tile.first + i);
        if (i + kRows <= tile.n) {
          score_block<kRows>(query, centroid, tile.stride, p_.D, slot, q, winners_);
        } else {
          score_block<1>(query, centroid, tile.stride, p_.D, slot, q, winners_);
        }
      }
    }
  }

  // One score, summed as the fast paths sum it.
  float score(int64_t q, const float* centroid) const {
    const float* query = block_of(q);
    float s = 0.0f;
    for (int64_t d = 0; d < p_.D; ++d) s += query[d * kQueries] * centroid[d];
    return s;
  }

  // A query that found fewer than K numbers above -inf: scores of -inf follow, then NaN, each by ascending
  // slot.
  void add_exceptional(int64_t q, bool nan) {
    for (int64_t m = 0; m < count_; m += kTile) {
      const Tile tile = load_tile(m);
      for (int64_t i = 0; i < tile.n && winners_.found[q] < p_.K; ++i) {
        const float s = score(q, tile.data + i * tile.stride);
        if (nan ? s == s : s != -kInfinity) continue;
        winners_.append(q, s, static_cast<int32_t>(m + i));
      }
    }
  }

  void write() const {
    for (int64_t n = 0; n < queries_; ++n) {
      const int64_t to = place_of(n).in_results;
      winners_.write(n, p_.ids + to, p_.scores + to);
    }
  }

  const ChunkTopkParams& p_;
  const int64_t search_, head_, ring_, count_, first_, queries_;
  Buffer<float> query_, tile_;
  Winners winners_;
};

}  // namespace

void chunk_topk_task(const ChunkTopkParams& p, int64_t task) { Task(p, task).run(); }

}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
