// The chunks of one query, and attention to them; part of memory_attention_task.h.
#pragma once

#include "memory_attention/memory_attention_block.h"
#include "memory_attention/memory_attention_rows.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

class Memory {
 public:
  explicit Memory(const MemoryAttentionParams& p)
      : p_(p),
        size_(round_up(p.K * p.C)),
        key_at_(size_),
        value_at_(size_),
        key_scale_(p.memory_scale ? size_ : 0),
        value_scale_(p.memory_scale ? size_ : 0),
        query_(round_up(p.D)),
        weights_(size_) {}

  // Finds the tokens of a query's chunks: n of them, in `keys` and `values`.
  void find(const Block& block, int64_t i) {
    const int32_t* ids = p_.ids + block.at(p_.ids_stride, i);
    const int64_t head = block.ring * p_.G + block.g;
    const int64_t key = block.ring * p_.memory_key_stride[0] + block.g * p_.memory_key_stride[1];
    const int64_t value = block.ring * p_.memory_value_stride[0] + block.g * p_.memory_value_stride[1];
    n = 0;
    for (int64_t k = 0; k < p_.K; ++k) {
      const int64_t id = ids[k];
      if (id < 0 || id >= p_.M) continue;
      list(key + id * p_.memory_key_stride[2], p_.memory_key_stride[3], key_at_ + n);
      list(value + id * p_.memory_value_stride[2], p_.memory_value_stride[3], value_at_ + n);
      if (p_.memory_scale) {
        const float* scale = p_.memory_scale + (head * p_.M + id) * 2;
        for (int64_t c = 0; c < p_.C; ++c) key_scale_[n + c] = scale[0], value_scale_[n + c] = scale[1];
      }
      n += p_.C;
    }
    for (int64_t j = n; n > 0 && j < round_up(n); ++j)
      key_at_[j] = key_at_[n - 1], value_at_[j] = value_at_[n - 1];
    block.load_query(p_.memory_query, p_.memory_query_stride, i, query_);
    multiply(query_, p_.D, p_.scale);
  }

  // Attends the query of the last `find` to its chunks: writes `out` [D, padded to a whole vector] and
  // returns their log-sum-exp.
  float attend(float* out) {
    score(weights_);
    const Sum sum = exponentiate(weights_, n);
    const float inverse = sum.inverse();
    for (int64_t j = 0; j < n; ++j) weights_[j] *= p_.memory_scale ? inverse * value_scale_[j] : inverse;
    combine_scattered(values(), weights_, out);
    return sum.lse();
  }

  void score(float* scores) const {
    score_scattered(keys(), query_, values(), scores);
    for (int64_t j = 0; p_.memory_scale && j < n; ++j) scores[j] *= key_scale_[j];
  }

  // products[j] = grad . value j
  void multiply_values(const float* grad, float* products) const {
    score_scattered(values(), grad, Scattered{}, products);
    for (int64_t j = 0; p_.memory_scale && j < n; ++j) products[j] *= value_scale_[j];
  }

  // out = the sum of weights[j] key j; `weights` may be overwritten.
  void combine_keys(float* weights, float* out) const {
    for (int64_t j = 0; p_.memory_scale && j < n; ++j) weights[j] *= key_scale_[j];
    combine_scattered(keys(), weights, out);
  }

  int64_t n = 0;

 private:
  // Where the tokens of a chunk lie.
  void list(int64_t first, int64_t stride, int64_t* at) const {
    for (int64_t c = 0; c < p_.C; ++c) at[c] = first + c * stride;
  }

  Scattered keys() const { return {p_.memory_key, p_.memory_type, key_at_, n, p_.D}; }
  Scattered values() const { return {p_.memory_value, p_.memory_type, value_at_, n, p_.D}; }

  const MemoryAttentionParams& p_;
  const int64_t size_;
  Buffer<int64_t> key_at_, value_at_;
  Buffer<float> key_scale_, value_scale_;
  Buffer<float> query_, weights_;
};

}  // namespace
}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
