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

typedef uint16_t HalfVector __attribute__((vector_size(kLanes * sizeof(uint16_t)), may_alias, aligned(2)));

// Integers select: vectors of bool have no portable form.
inline IntVector select(IntVector condition, IntVector yes, IntVector no) {
  return (condition & yes) | (~condition & no);
}

// kLanes elements as float32.
template <Scalar type>
inline Vector widen(const typename Element<type>::Type* from) {
  if constexpr (type == Scalar::f32) {
    return load(from);
  } else {
    const IntVector h = __builtin_convertvector(*reinterpret_cast<const HalfVector*>(from), IntVector);
    if constexpr (type == Scalar::bf16) return reinterpret_cast<Vector>(h << 16);
    const IntVector magnitude = (h & 0x7fff) << 13;
    // Subnormal halves are multiples of 2^-24: float subtraction normalises them.
    constexpr int32_t kSmallest = 0x38800000;  // 2^-14
    const IntVector subnormal =
        reinterpret_cast<IntVector>(reinterpret_cast<Vector>(magnitude | kSmallest) - 0x1p-14f);
    const IntVector exponent =
        select(magnitude >= 0x0f800000, IntVector{} + (224 << 23), IntVector{} + (112 << 23));
    const IntVector bits = select(magnitude < 0x00800000, subnormal, magnitude + exponent);
    return reinterpret_cast<Vector>(bits | ((h & 0x8000) << 16));
  }
}

template <int... lane>
struct Lanes {};
template <int n, int... lane>
struct LanesUpTo : LanesUpTo<n - 1, n - 1, lane...> {};
template <int... lane>
struct LanesUpTo<0, lane...> {
  using Type = Lanes<lane...>;
};

// Lane l of the sum below comes from this lane of a and b (counted on), and from the one `apart` further on.
constexpr int source(int apart, int l) {
  const int within = l % (2 * apart);
  return within < apart ? l : kLanes + l - apart;
}

// Adds lanes that are `apart`: half the lanes of the result come from a, half from b.
template <int apart, int... lane>
inline Vector fold(Vector a, Vector b, Lanes<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source(apart, lane)...) +
         __builtin_shufflevector(a, b, (source(apart, lane) + apart)...);
#else
  return __builtin_shuffle(a, b, IntVector{source(apart, lane)...}) +
         __builtin_shuffle(a, b, IntVector{source(apart, lane) + apart...});
#endif
}

// Lane j of the result is the sum over the lanes of v[j].
template <int apart = 1>
inline Vector sums(Vector (&v)[kLanes]) {
  if constexpr (apart == kLanes) {
    return v[0];
  } else {
    for (int j = 0; j < kLanes / apart; j += 2) {
      v[j / 2] = fold<apart>(v[j], v[j + 1], typename LanesUpTo<kLanes>::Type{});
    }
    return sums<2 * apart>(v);
  }
}

// One ring's head, one split of its slots, all queries that search it.
template <Scalar type>
class FewTask {
 public:
  using Value = typename Element<type>::Type;

  FewTask(const ChunkTopkParams& p, int64_t task)
      : p_(p),
        group_(p.H / p.G),
        task_(task),
        row_(task / p.splits / p.G),
        head_(task / p.splits % p.G),
        ring_(ring_of_row(p.ring_index, p.R, p.B, row_)),
        begin_(task % p.splits * kSplitSlots),
        end_(smaller(begin_ + kSplitSlots, p.count[ring_])),
        queries_(group_ * p.T),
        padded_((p.D + kLanes - 1) / kLanes * kLanes),
        centroid_(static_cast<const Value*>(p.centroid) + ring_ * p.centroid_stride[0] +
                  head_ * p.centroid_stride[1]),
        query_(queries_ * padded_),
        winners_(p.K, queries_, queries_) {}

  void run() {
    for (int64_t n = 0; n < queries_; ++n) {
      const int64_t head = head_ * group_ + n / p_.T, token = n % p_.T;
      const int64_t at = row_ * p_.query_stride[0] + head * p_.query_stride[1] + token * p_.query_stride[2];
      load_row(p_.query, p_.query_type, at, p_.D, query_ + n * padded_);
    }
    for (int64_t m = begin_; m < end_; m += kLanes) {
      const Block block = load_block(m);
      for (int64_t q = 0; q < queries_; ++q) {
        const Vector s = score(q, block);
        for (uint32_t better = above(s, fill(winners_.threshold[q])) & block.there; better != 0;
             better &= better - 1) {
          const int lane = __builtin_ctz(better);
          // Several of one block may be better, and the threshold moves.
          if (s[lane] > winners_.threshold[q]) winners_.insert(q, s[lane], static_cast<int32_t>(m + lane));
        }
      }
    }
    for (int64_t q = 0; q < queries_; ++q) {
      for (int nan = 0; nan < 2; ++nan) add_exceptional(q, nan != 0);
      const int64_t to = (task_ * queries_ + q) * p_.K;
      winners_.write(q, p_.split_ids + to, p_.split_scores + to);
    }
  }

 private:
  // kLanes centroids; past the end of the split the last one again.
  struct Block {
    const Value* row[kLanes];
    uint32_t there;
  };

  Block load_block(int64_t m) const {
    Block block;
    for (int j = 0; j < kLanes; ++j)
      block.row[j] = centroid_ + smaller(m + j, end_ - 1) * p_.centroid_stride[2];
    const int64_t n = smaller(kLanes, end_ - m);
    block.there = (1u << n) - 1;
    return block;
  }

  Vector score(int64_t q, const Block& block) const {
    const float* query = query_ + q * padded_;
    Vector total[kLanes];
    for (int j = 0; j < kLanes; ++j) total[j] = Vector{};
    int64_t d = 0;
    for (; d + kLanes <= p_.D; d += kLanes) {
      const Vector features = load(query + d);
      for (int j = 0; j < kLanes; ++j) total[j] += features * widen<type>(block.row[j] + d);
    }
    if (d < p_.D) {
      for (int j = 0; j < kLanes; ++j) {
        Value rest[kLanes] = {};
        std::memcpy(rest, block.row[j] + d, (p_.D - d) * sizeof(Value));
        total[j] += load(query + d) * widen<type>(rest);
      }
    }
    return sums(total);
  }

  // As long as fewer than K numbers above -inf were found: scores of -inf follow, then NaN, each by ascending
  // slot.
  void add_exceptional(int64_t q, bool nan) {
    for (int64_t m = begin_; m < end_ && winners_.found[q] < smaller(p_.K, end_ - begin_); m += kLanes) {
      const Block block = load_block(m);
      const Vector s = score(q, block);
      for (int lane = 0; lane < kLanes && winners_.found[q] < p_.K; ++lane) {
        const bool wanted = nan ? s[lane] != s[lane] : s[lane] == -kInfinity;
        if (wanted && (block.there >> lane & 1) != 0)
          winners_.append(q, s[lane], static_cast<int32_t>(m + lane));
      }
    }
  }

  const ChunkTopkParams& p_;
  const int64_t group_, task_, row_, head_, ring_, begin_, end_, queries_, padded_;
  const Value* const centroid_;
  Buffer<float> query_;
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
