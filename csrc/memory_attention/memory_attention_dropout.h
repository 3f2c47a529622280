// Which local weights dropout keeps; part of memory_attention_task.h. The hash is specified in
// longmem_kernels/memory_attention/reference.py.
#pragma once

#include "common/simd_task.h"
#include "memory_attention/memory_attention.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

// "lowbias32", a 32-bit hash by C. Wellons, of a number or of each lane.
template <typename Bits>
inline Bits mix(Bits x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

class Dropout {
 public:
  explicit Dropout(const MemoryAttentionParams& p)
      : on(p.dropout_seed != nullptr), threshold_(p.dropout_threshold), scale_(p.dropout_scale) {
    if (!on) return;
    const auto seed = static_cast<uint64_t>(*p.dropout_seed);
    low_ = mix(static_cast<uint32_t>(seed));
    high_ = static_cast<uint32_t>(seed >> 32) ^ 0x9e3779b9u;
  }

  // What the hash of a weight depends on besides the key: its row in [B, H, T].
  uint32_t row(int64_t index) const {
    const auto bits = static_cast<uint64_t>(index);
    return mix(mix(static_cast<uint32_t>(bits) ^ low_) ^ mix(high_) ^ static_cast<uint32_t>(bits >> 32));
  }

  static uint32_t column(int64_t key) { return static_cast<uint32_t>(key) * 0x9e3779b1u; }

  // 0 where a weight is dropped, else what it is multiplied by; `bits` is row ^ column.
  Vector factor(BitsVector bits) const { return mix(bits) >= threshold_ ? fill(scale_) : Vector{}; }

  const bool on;

 private:
  uint32_t threshold_, low_ = 0, high_ = 0;
  float scale_;
};

}  // namespace
}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
