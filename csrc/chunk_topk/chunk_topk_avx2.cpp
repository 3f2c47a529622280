#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>

#define LONGMEM_SIMD_NAMESPACE avx2
#define LONGMEM_SIMD_LANES 8

namespace longmem::avx2 {
// Bit i is set where a[i] > b[i]; false for NaN.
inline uint32_t above(__m256 a, __m256 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
}  // namespace longmem::avx2

#include "chunk_topk/chunk_topk_task.h"
#endif
