// One query against rows that lie anywhere: chunks of memory, or local keys when queries are few. The head
// dim lies across the lanes, and rows are read in place, whatever their type. Part of
// memory_attention_task.h.
#pragma once

#include "common/simd_task.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

inline int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Rows [D] of `type` at elements at[0], at[1], ... of an array. There are `n`; `at` goes on to a whole vector
// with places that may be read.
struct Scattered {
  const void* base;
  Scalar type;
  const int64_t* at;
  int64_t n, D;

  template <Scalar type>
  void prefetch(int64_t j) const {
    const char* row = static_cast<const char*>(base) + at[j] * size_of(type);
    for (int64_t byte = 0; byte < D * size_of(type); byte += 64) __builtin_prefetch(row + byte);
  }
};

// out[j] = query . row j, and anything up to a whole vector. The query goes on to a whole vector with zeros.
// `next`, rows wanted soon, are on their way to the caches meanwhile.
template <Scalar type>
inline void score_scattered(const Scattered& rows, const float* query, const Scattered& next, float* out) {
  for (int64_t j = 0; j < rows.n; j += kLanes) {
    const int64_t* at = rows.at + j;
    if (j + kLanes < rows.n) {
      for (int i = 0; i < kLanes; ++i) rows.prefetch<type>(j + kLanes + i);
    }
    for (int64_t i = j; i < smaller(j + kLanes, next.n); ++i) next.prefetch<type>(i);
    Vector total[kLanes];
    for (int i = 0; i < kLanes; ++i) total[i] = Vector{};
    int64_t d = 0;
    for (; d + kLanes <= rows.D; d += kLanes) {
      const Vector q = load(query + d);
      for (int i = 0; i < kLanes; ++i) total[i] += q * load_as<type>(rows.base, at[i] + d);
    }
    if (d < rows.D) {
      const Vector q = load(query + d);
      for (int i = 0; i < kLanes; ++i) total[i] += q * load_first<type>(rows.base, at[i] + d, rows.D - d);
    }
    store(out + j, sums(total));
  }
}

// Dims [d, d + width * kLanes) of `out` = the sum of weight[j] row j.
template <Scalar type, int width>
inline void combine_dims(const Scattered& rows, const float* weight, int64_t d, float* out) {
  Vector total[width];
  for (int i = 0; i < width; ++i) total[i] = Vector{};
  for (int64_t j = 0; j < rows.n; ++j) {
    for (int i = 0; i < width; ++i) {
      total[i] += load_as<type>(rows.base, rows.at[j] + d + i * kLanes) * weight[j];
    }
  }
  for (int i = 0; i < width; ++i) store(out + d + i * kLanes, total[i]);
}

// out = the sum of weight[j] row j, and zeros up to a whole vector.
template <Scalar type>
inline void combine_scattered(const Scattered& rows, const float* weight, float* out) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= rows.D; d += 4 * kLanes) combine_dims<type, 4>(rows, weight, d, out);
  for (; d + kLanes <= rows.D; d += kLanes) combine_dims<type, 1>(rows, weight, d, out);
  if (d == rows.D) return;
  Vector total{};
  for (int64_t j = 0; j < rows.n; ++j)
    total += load_first<type>(rows.base, rows.at[j] + d, rows.D - d) * weight[j];
  store(out + d, total);
}

inline void score_scattered(const Scattered& rows, const float* query, const Scattered& next, float* out) {
  switch (rows.type) {
    case Scalar::f32:
      return score_scattered<Scalar::f32>(rows, query, next, out);
    case Scalar::bf16:
      return score_scattered<Scalar::bf16>(rows, query, next, out);
    case Scalar::f16:
      return score_scattered<Scalar::f16>(rows, query, next, out);
    case Scalar::e4m3:
      return score_scattered<Scalar::e4m3>(rows, query, next, out);
  }
}

inline void combine_scattered(const Scattered& rows, const float* weight, float* out) {
  switch (rows.type) {
    case Scalar::f32:
      return combine_scattered<Scalar::f32>(rows, weight, out);
    case Scalar::bf16:
      return combine_scattered<Scalar::bf16>(rows, weight, out);
    case Scalar::f16:
      return combine_scattered<Scalar::f16>(rows, weight, out);
    case Scalar::e4m3:
      return combine_scattered<Scalar::e4m3>(rows, weight, out);
  }
}

struct Sum {
  float maximum, total;  // -inf and 0 without a score above -inf

  float lse() const { return total == 0.0f ? -kInfinity : maximum + std::log(total); }
  float inverse() const { return total == 0.0f ? 0.0f : 1.0f / total; }
};

// Scores [n] become exponentials relative to their maximum, and those beyond n, up to a whole vector, 0.
inline Sum exponentiate(float* scores, int64_t n) {
  Vector maximum = fill(-kInfinity);
  for (int64_t j = n; j < round_up(n); ++j) scores[j] = -kInfinity;
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vector s = load(scores + j);
    maximum = s > maximum ? s : maximum;
  }
  float largest = maximum[0];
  for (int i = 1; i < kLanes; ++i) largest = maximum[i] > largest ? maximum[i] : largest;
  // -inf - -inf is no number.
  const float base = largest == -kInfinity ? 0.0f : largest;
  Vector total{};
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vector weight = exp_of_negative(load(scores + j) - base);
    total += weight;
    store(scores + j, weight);
  }
  return {largest, sum(total)};
}

}  // namespace
}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
