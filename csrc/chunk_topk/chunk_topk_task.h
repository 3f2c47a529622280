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

// Scores `n` centroids [n, D] against the first vectors of a block of queries [D, kQueries].
template <int n, int vectors>
void score_block(const float* query, const float* centroid, int64_t stride, int64_t D, int32_t first_slot,
                 int64_t first_query, Winners& winners) {
  Vector scores[n][vectors];
  multiply_rows<n, vectors>(centroid, stride, query, D, scores);
  const float* threshold = winners.threshold + first_query;
  for (int j = 0; j < n; ++j) {
    for (int v = 0; v < vectors; ++v) {
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
        part_(task / chunk_topk_blocks(p)),
        search_(part_ / p.splits / p.G),
        head_(part_ / p.splits % p.G),
        ring_(ring_of_row(p.ring_index, p.R, p.B, search_ * p.rows)),
        begin_(part_ % p.splits * p.split_slots),
        end_(smaller(begin_ + p.split_slots, p.count[ring_])),
        first_(task % chunk_topk_blocks(p) * kTaskQueries),
        queries_(smaller(kTaskQueries, chunk_topk_queries(p) - first_)),
        padded_((queries_ + kQueries - 1) / kQueries * kQueries),
        query_(padded_ * p.D),
        tile_(p.centroid_type == Scalar::f32 ? 0 : kTileSlots * p.D),
        winners_(p.K, queries_, padded_) {}

  void run() {
    pack_queries();
    for (int64_t m = begin_; m < end_; m += kTileSlots) score_tile(load_tile(m));
    for (int64_t q = 0; q < queries_; ++q) {
      for (int nan = 0; nan < 2 && winners_.found[q] < smaller(p_.K, end_ - begin_); ++nan)
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
    const int64_t n = smaller(kTileSlots, end_ - m), stride = p_.centroid_stride[2];
    const int64_t at = ring_ * p_.centroid_stride[0] + head_ * p_.centroid_stride[1] + m * stride;
    if (p_.centroid_type == Scalar::f32) return {static_cast<const float*>(p_.centroid) + at, stride, n, m};
    for (int64_t i = 0; i < n; ++i) {
      load_row(p_.centroid, p_.centroid_type, at + i * stride, p_.D, tile_ + i * p_.D);
    }
    return {tile_, p_.D, n, m};
  }

  void score_tile(const Tile& tile) {
    for (int64_t q = 0; q < queries_; q += kQueries) {
      if (queries_ - q > kLanes) {
        score_tile<kRows, kVectors>(tile, q);
      } else {
        score_tile<kRows * kVectors, 1>(tile, q);
      }
    }
  }

  // For the block of queries from q on, in blocks of `rows` centroids.
  template <int rows, int vectors>
  void score_tile(const Tile& tile, int64_t q) {
    const float* query = query_ + q * p_.D;
    for (int64_t i = 0; i < tile.n; i += i + rows <= tile.n ? rows : 1) {
      const float* centroid = tile.data + i * tile.stride;
      const auto slot = static_cast<int32_t>(tile.first + i);
      // The first block of queries brings the tile into the cache.
      if (q == 0 && tile.data != tile_ && tile.first + i + kAhead + rows <= end_)
        fetch_rows<rows>(centroid + kAhead * tile.stride, tile.stride, p_.D);
      if (i + rows <= tile.n) {
        score_block<rows, vectors>(query, centroid, tile.stride, p_.D, slot, q, winners_);
      } else {
        score_block<1, vectors>(query, centroid, tile.stride, p_.D, slot, q, winners_);
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
    for (int64_t m = begin_; m < end_; m += kTileSlots) {
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
      if (p_.splits > 1) {
        const int64_t to = (part_ * chunk_topk_queries(p_) + first_ + n) * p_.K;
        winners_.write(n, p_.split_ids + to, p_.split_scores + to);
      } else {
        const int64_t to = place_of(n).in_results;
        winners_.write(n, p_.ids + to, p_.scores + to);
      }
    }
  }

  const ChunkTopkParams& p_;
  const int64_t part_, search_, head_, ring_, begin_, end_, first_, queries_, padded_;
  Buffer<float> query_, tile_;
  Winners winners_;
};

}  // namespace

void chunk_topk_task(const ChunkTopkParams& p, int64_t task) { Task(p, task).run(); }

}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
