// The K best of each query so far. Included once per instruction set (see common/simd_task.h).

#include "common/simd_task.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

// In descending order.
struct Winners {
  int64_t K;
  Buffer<float> threshold;  // [capacity] K-th best score; lanes without a query stay at +inf
  Buffer<float> score;      // [capacity, K]
  Buffer<int32_t> slot;     // [capacity, K]
  Buffer<int32_t> found;    // [capacity]

  Winners(int64_t k, int64_t queries, int64_t capacity)
      : K(k), threshold(capacity), score(capacity * k), slot(capacity * k), found(capacity) {
    for (int64_t q = 0; q < capacity; ++q) threshold[q] = q < queries ? -kInfinity : kInfinity;
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

  // Behind all others.
  void append(int64_t q, float s, int32_t m) {
    const int64_t at = q * K + found[q]++;
    score[at] = s;
    slot[at] = m;
  }

  // Writes K ids and scores: -1 and -inf where fewer were found.
  void write(int64_t q, int32_t* ids, float* scores) const {
    for (int64_t i = 0; i < K; ++i) {
      const bool there = i < found[q];
      ids[i] = there ? slot[q * K + i] : -1;
      scores[i] = there ? score[q * K + i] : -kInfinity;
    }
  }
};

}  // namespace
}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
