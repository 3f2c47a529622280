// The K best of each query so far. Included once per instruction set (see common/simd_task.h).

#include "common/simd_task.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

// Lanes of `v` moved up by one; the lowest is the highest of `below`.
template <typename V, int... lane>
inline V moved_up(V v, V below, Lanes<lane...>) {
  return shuffle<(kLanes + lane - 1)...>(below, v);
}

// In descending order.
struct Winners {
  int64_t K, padded;        // K, and rounded up to whole vectors
  Buffer<float> threshold;  // [capacity] K-th best score; lanes without a query stay at +inf
  Buffer<float> score;      // [capacity, padded], -inf where nothing was found
  Buffer<int32_t> slot;     // [capacity, padded]
  Buffer<int32_t> found;    // [capacity], at most K

  Winners(int64_t k, int64_t queries, int64_t capacity)
      : K(k),
        padded((k + kLanes - 1) / kLanes * kLanes),
        threshold(capacity),
        score(capacity * padded),
        slot(capacity * padded),
        found(capacity) {
    for (int64_t q = 0; q < capacity; ++q) threshold[q] = q < queries ? -kInfinity : kInfinity;
    for (int64_t i = 0; i < queries * padded; i += kLanes) store(score + i, fill(-kInfinity));
  }

  // `s` is above the threshold. Slots come in ascending order, so an equal score already present stays ahead.
  // Whole vectors, without a branch that depends on the place: it cannot be foreseen.
  void insert(int64_t q, float s, int32_t m) {
    float* scores = score + q * padded;
    int32_t* slots = slot + q * padded;
    for (int64_t i = padded - kLanes; i >= 0; i -= kLanes) {
      const Vector old = load(scores + i), below = i > 0 ? load(scores + i - kLanes) : fill(kInfinity);
      const IntVector old_slot = load(slots + i), below_slot = i > 0 ? load(slots + i - kLanes) : IntVector{};
      const Vector before = moved_up(old, below, AllLanes{});
      const IntVector stays = old >= s, follows = before >= s;
      store(scores + i, stays ? old : follows ? fill(s) : before);
      store(slots + i, stays     ? old_slot
                       : follows ? IntVector{} + m
                                 : moved_up(old_slot, below_slot, AllLanes{}));
    }
    if (found[q] < K) ++found[q];
    threshold[q] = scores[K - 1];
  }

  // Behind all others.
  void append(int64_t q, float s, int32_t m) {
    const int64_t at = q * padded + found[q]++;
    score[at] = s;
    slot[at] = m;
  }

  // Writes K ids and scores: -1 and -inf where fewer were found.
  void write(int64_t q, int32_t* ids, float* scores) const {
    for (int64_t i = 0; i < K; ++i) {
      const bool there = i < found[q];
      ids[i] = there ? slot[q * padded + i] : -1;
      scores[i] = there ? score[q * padded + i] : -kInfinity;
    }
  }
};

}  // namespace
}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
