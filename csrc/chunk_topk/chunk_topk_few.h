// chunk_topk for a few queries, as when decoding. Included once per instruction set (see common/simd_task.h).
//
// Every centroid is read once and used little, so this runs as fast as memory delivers. Features lie across
// the lanes, a vector's worth of centroids is summed together, and 16-bit centroids are widened in registers.

#include "chunk_topk/chunk_topk.h"
#include "chunk_topk/chunk_topk_winners.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

template <Scalar type>
struct Element {
  using Type = uint16_t;
};
template <>
struct Element<Scalar::f32> {
  using Type = float;
};

// Queries that share what is loaded of a row: as many as registers hold the sums of.
constexpr int kTogether = kLanes == 16 ? 4 : 2;

constexpr int64_t kAhead = 32;  // rows between what is read and what is fetched

// Begins to fetch n rows. Hardware alone fetches a third of what memory could deliver. Inlined, because GCC
// takes a function that only fetches for one that does nothing.
template <int n, typename Value>
__attribute__((always_inline)) inline void fetch_rows(const Value* row, int64_t stride, int64_t D) {
  for (int j = 0; j < n; ++j, row += stride) {
    for (int64_t d = 0; d < D; d += 64 / sizeof(Value)) __builtin_prefetch(row + d);
  }
}

// Lane l of the sum below comes from this lane of a and b (counted on), and from the one `apart` further on.
constexpr int source(int apart, int l) {
  const int within = l % (2 * apart);
  return within < apart ? l : kLanes + l - apart;
}

// Adds lanes that are `apart`: half the lanes of the result come from a, half from b.
template <int apart, int... lane>
inline Vector fold(Vector a, Vector b, Lanes<lane...>) {
  return shuffle<source(apart, lane)...>(a, b) + shuffle<(source(apart, lane) + apart)...>(a, b);
}

// One ring's head, one split of its slots, all queries that search it.
template <Scalar type>
class FewTask {
 public:
  using Value = typename Element<type>::Type;

  FewTask(const ChunkTopkParams& p, int64_t task)
      : p_(p),
        task_(task),
        search_(task / p.splits / p.G),
        head_(task / p.splits % p.G),
        ring_(ring_of_row(p.ring_index, p.R, p.B, search_ * p.rows)),
        begin_(task % p.splits * p.split_slots),
        end_(smaller(begin_ + p.split_slots, p.count[ring_])),
        queries_(chunk_topk_queries(p)),
        padded_((p.D + kLanes - 1) / kLanes * kLanes),
        centroid_(static_cast<const Value*>(p.centroid) + ring_ * p.centroid_stride[0] +
                  head_ * p.centroid_stride[1]),
        query_(queries_ * padded_),
        rest_(kLanes * p.D),
        winners_(p.K, queries_, queries_) {}

  void run() {
    for (int64_t n = 0; n < queries_; ++n) {
      const int64_t at = query_place(p_, search_, head_, n).in_query;
      load_row(p_.query, p_.query_type, at, p_.D, query_ + n * padded_);
    }
    for (int64_t m = begin_; m < end_; m += kLanes) {
      prefetch(m);
      const Block block = load_block(m);
      int64_t q = 0;
      for (; q + kTogether <= queries_; q += kTogether) take_best<kTogether>(q, block, m);
      for (; q < queries_; ++q) take_best<1>(q, block, m);
    }
    for (int64_t q = 0; q < queries_; ++q) {
      for (int nan = 0; nan < 2; ++nan) add_exceptional(q, nan != 0);
      if (p_.splits > 1) {
        const int64_t to = (task_ * queries_ + q) * p_.K;
        winners_.write(q, p_.split_ids + to, p_.split_scores + to);
      } else {
        const int64_t to = query_place(p_, search_, head_, q).in_results;
        winners_.write(q, p_.ids + to, p_.scores + to);
      }
    }
  }

 private:
  // kLanes centroids, of which `there` says what exists.
  struct Block {
    const Value* first;
    int64_t stride;
    uint32_t there;
  };

  Block load_block(int64_t m) const {
    const int64_t stride = p_.centroid_stride[2], n = end_ - m;
    const Value* first = centroid_ + m * stride;
    if (n >= kLanes) return {first, stride, static_cast<uint32_t>((uint64_t{1} << kLanes) - 1)};
    for (int64_t j = 0; j < n; ++j) std::memcpy(rest_ + j * p_.D, first + j * stride, p_.D * sizeof(Value));
    return {rest_, p_.D, (1u << n) - 1};
  }

  // Inlined, as `fetch_rows` is.
  __attribute__((always_inline)) void prefetch(int64_t m) const {
    const int64_t stride = p_.centroid_stride[2];
    if (m + kAhead + kLanes <= end_) fetch_rows<kLanes>(centroid_ + (m + kAhead) * stride, stride, p_.D);
  }

  template <int n>
  void take_best(int64_t first_query, const Block& block, int64_t first_slot) {
    Vector scores[n];
    score<n>(first_query, block, scores);
    for (int i = 0; i < n; ++i) {
      const Vector s = scores[i];
      const int64_t q = first_query + i;
      for (uint32_t better = above(s, fill(winners_.threshold[q])) & block.there; better != 0;
           better &= better - 1) {
        const int lane = __builtin_ctz(better);
        // Several of one block may be better, and the threshold moves.
        if (s[lane] > winners_.threshold[q])
          winners_.insert(q, s[lane], static_cast<int32_t>(first_slot + lane));
      }
    }
  }

  // Lane j of scores[i] is the score of row j for query q + i.
  template <int n>
  void score(int64_t q, const Block& block, Vector* scores) const {
    rows<kLanes, n>(query_ + q * padded_, block.first, block.stride, scores);
  }

  // The scores of `count` rows for n queries, each spread over the lanes that are `count` apart.
  template <int count, int n>
  void rows(const float* query, const Value* first, int64_t stride, Vector* scores) const {
    if constexpr (count == 4) {
      four_rows<n>(query, first, stride, scores);
    } else {
      Vector low[n], high[n];
      rows<count / 2, n>(query, first, stride, low);
      rows<count / 2, n>(query, first + count / 2 * stride, stride, high);
      for (int i = 0; i < n; ++i) scores[i] = fold<count / 2>(low[i], high[i], AllLanes{});
    }
  }

  template <int n>
  void four_rows(const float* query, const Value* first, int64_t stride, Vector* scores) const {
    Vector total[n][4] = {};
    int64_t d = 0;
    for (; d + kLanes <= p_.D; d += kLanes) {
      for (int j = 0; j < 4; ++j) {
        const Vector row = load_as<type>(first + j * stride, d);
        for (int i = 0; i < n; ++i) total[i][j] += load(query + i * padded_ + d) * row;
      }
    }
    if (d < p_.D) {
      for (int j = 0; j < 4; ++j) {
        const Vector rest = load_first<type>(first + j * stride, d, p_.D - d);
        for (int i = 0; i < n; ++i) total[i][j] += load(query + i * padded_ + d) * rest;
      }
    }
    constexpr AllLanes lanes;
    for (int i = 0; i < n; ++i) {
      const Vector(&t)[4] = total[i];
      scores[i] = fold<2>(fold<1>(t[0], t[1], lanes), fold<1>(t[2], t[3], lanes), lanes);
    }
  }

  // As long as fewer than K numbers above -inf were found: scores of -inf follow, then NaN, each by ascending
  // slot.
  void add_exceptional(int64_t q, bool nan) {
    for (int64_t m = begin_; m < end_ && winners_.found[q] < smaller(p_.K, end_ - begin_); m += kLanes) {
      const Block block = load_block(m);
      Vector s;
      score<1>(q, block, &s);
      for (int lane = 0; lane < kLanes && winners_.found[q] < p_.K; ++lane) {
        const bool wanted = nan ? s[lane] != s[lane] : s[lane] == -kInfinity;
        if (wanted && (block.there >> lane & 1) != 0)
          winners_.append(q, s[lane], static_cast<int32_t>(m + lane));
      }
    }
  }

  const ChunkTopkParams& p_;
  const int64_t task_, search_, head_, ring_, begin_, end_, queries_, padded_;
  const Value* const centroid_;
  Buffer<float> query_;
  Buffer<Value> rest_;  // the last rows of the split, when they are fewer than lanes
  Winners winners_;
};

}  // namespace

void chunk_topk_few_task(const ChunkTopkParams& p, int64_t task) {
  switch (p.centroid_type) {
    case Scalar::f32:
      return FewTask<Scalar::f32>(p, task).run();
    case Scalar::bf16:
      return FewTask<Scalar::bf16>(p, task).run();
    case Scalar::f16:
      return FewTask<Scalar::f16>(p, task).run();
    case Scalar::e4m3:
      return;  // centroids never are; the binding refuses them
  }
}

}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
