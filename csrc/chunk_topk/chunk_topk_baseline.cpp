#include <cstdint>

#define LONGMEM_SIMD_NAMESPACE baseline
#define LONGMEM_SIMD_LANES 4

namespace longmem::baseline {
// Bit i is set where a[i] > b[i]; false for NaN.
template <typename V>
inline uint32_t above(V a, V b) {
  uint32_t bits = 0;
  for (int i = 0; i < LONGMEM_SIMD_LANES; ++i) bits |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return bits;
}
}  // namespace longmem::baseline

#include "chunk_topk/chunk_topk_task.h"
