// The chunk_topk task, compiled once per instruction set (see common/simd_task.h); the
// including file also defines `above`.
//
// Queries lie across the vector lanes. A block of centroids is scored into registers, each vector of scores
// is compared with the K-th best of its queries, and only what is better leaves the registers: the scores are
// never stored.

#include "chunk_topk/chunk_topk.h"
#include "common/simd_task.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

constexpr int64_t kTile = 128;  // centroids kept in the first-level cache

// The K best of each query so far, in descending order.
struct Winners {
  int64_t K;
  Buffer<float> threshold;  // [kTaskQueries] K-th best score; lanes without a query stay at +inf
  Buffer<float> score;      // [kTaskQueries, K]
  Buffer<int32_t> slot;     // [kTaskQueries, K]
  Buffer<int32_t> found;    // [kTaskQueries]

  Winners(int64_t k, int64_t queries)
      : K(k), threshold(kTaskQueries), score(kTaskQueries * k), slot(kTaskQueries * k), found(kTaskQueries) {
    for (int64_t q = 0; q < kTaskQueries; ++q) threshold[q] = q < queries ? -kInfinity : kInfinity;
  }

  // `s` is above the threshold. Slots come in ascending order, so an equal score already present stays ahead.
  void insert(int64_t q, float s, int32_t m) {
    float* scores = score + q * K;
    int32_t* slots = slot + q * K;
    int64_t i = found[q] < K ? found[q]++ : K - 1;
    for (; i > 0 && scores[i - 1] < s; --i) {
      scores[i] = scores[i - 1];
      slots[i] = slots[i - 1];
    }
    scores[i] = s;
    slots[i] = m;
    if (found[q] == K) threshold[q] = scores[K - 1];
  }
};

// Scores `n` centroids [n, D] against kQueries queries [D, kQueries].
template <int n>
void score_block(const float* query, const float* centroid, int64_t D, int32_t first_slot,
                 int64_t first_query, Winners& winners) {
  Vector scores[n][kVectors];
  multiply_rows<n>(centroid, D, query, D, scores);
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

// Queries that found fewer than K numbers above -inf: scores of -inf follow, then NaN, each by ascending
// slot.
void add_exceptional(const float* query, const float* centroids, int64_t n, int64_t D, int64_t q,
                     Winners& winners, bool nan, int32_t first_slot) {
  for (int64_t m = 0; m < n && winners.found[q] < winners.K; ++m) {
    float s = 0.0f;
    for (int64_t d = 0; d < D; ++d) s += query[d * kQueries] * centroids[m * D + d];
    if (nan ? s != s : s == -kInfinity) {
      const int64_t at = q * winners.K + winners.found[q]++;
      winners.score[at] = s;
      winners.slot[at] = first_slot + static_cast<int32_t>(m);
    }
  }
}

class Task {
 public:
  Task(const ChunkTopkParams& p, int64_t task)
      : p_(p),
        group_(p.H / p.G),
        row_(task / chunk_topk_blocks(p) / p.G),
        head_(task / chunk_topk_blocks(p) % p.G),
        ring_(p.ring_index ? p.ring_index[row_]
              : p.R == p.B ? row_
                           : 0),
        count_(p.count[ring_]),
        first_(task % chunk_topk_blocks(p) * kTaskQueries),
        queries_(smaller(kTaskQueries, group_ * p.T - first_)),
        query_(kTaskQueries * p.D),
        tile_(kTile * p.D),
        winners_(p.K, queries_) {}

  void run() {
    pack_queries();
    for (int64_t m = 0; m < count_; m += kTile) score_tile(m, load_tile(m));
    for (int64_t q = 0; q < queries_; ++q) {
      for (int nan = 0; nan < 2 && winners_.found[q] < smaller(p_.K, count_); ++nan) rescan(q, nan != 0);
    }
    write();
  }

 private:
  // Query n of the task as (head, token).
  int64_t head_of(int64_t n) const { return head_ * group_ + (first_ + n) / p_.T; }
  int64_t token_of(int64_t n) const { return (first_ + n) % p_.T; }

  // [blocks, D, kQueries], so that one load gives a feature of kLanes queries.
  void pack_queries() {
    const Buffer<float> row(p_.D);
    for (int64_t n = 0; n < queries_; ++n) {
      const int64_t at =
          row_ * p_.query_stride[0] + head_of(n) * p_.query_stride[1] + token_of(n) * p_.query_stride[2];
      load_row(p_.query, p_.query_type, at, p_.D, row);
      float* block = query_ + n / kQueries * kQueries * p_.D + n % kQueries;
      for (int64_t d = 0; d < p_.D; ++d) block[d * kQueries] = row[d];
    }
  }

  int64_t load_tile(int64_t m) {
    const int64_t n = smaller(kTile, count_ - m);
    const int64_t base = ring_ * p_.centroid_stride[0] + head_ * p_.centroid_stride[1];
    for (int64_t i = 0; i < n; ++i) {
      load_row(p_.centroid, p_.centroid_type, base + (m + i) * p_.centroid_stride[2], p_.D, tile_ + i * p_.D);
    }
    return n;
  }

  void score_tile(int64_t m, int64_t n) {
    for (int64_t q = 0; q < queries_; q += kQueries) {
      const float* query = query_ + q * p_.D;
      int64_t i = 0;
      for (; i + kRows <= n; i += kRows)
        score_block<kRows>(query, tile_ + i * p_.D, p_.D, static_cast<int32_t>(m + i), q, winners_);
      for (; i < n; ++i)
        score_block<1>(query, tile_ + i * p_.D, p_.D, static_cast<int32_t>(m + i), q, winners_);
    }
  }

  void rescan(int64_t q, bool nan) {
    const float* query = query_ + q / kQueries * kQueries * p_.D + q % kQueries;
    for (int64_t m = 0; m < count_ && winners_.found[q] < p_.K; m += kTile) {
      const int64_t n = load_tile(m);
      add_exceptional(query, tile_, n, p_.D, q, winners_, nan, static_cast<int32_t>(m));
    }
  }

  void write() const {
    for (int64_t n = 0; n < queries_; ++n) {
      const int64_t to = ((row_ * p_.H + head_of(n)) * p_.T + token_of(n)) * p_.K;
      for (int64_t i = 0; i < p_.K; ++i) {
        const bool there = i < winners_.found[n];
        p_.ids[to + i] = there ? winners_.slot[n * p_.K + i] : -1;
        p_.scores[to + i] = there ? winners_.score[n * p_.K + i] : -kInfinity;
      }
    }
  }

  const ChunkTopkParams& p_;
  const int64_t group_, row_, head_, ring_, count_, first_, queries_;
  Buffer<float> query_, tile_;
  Winners winners_;
};

}  // namespace

void chunk_topk_task(const ChunkTopkParams& p, int64_t task) { Task(p, task).run(); }

}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
