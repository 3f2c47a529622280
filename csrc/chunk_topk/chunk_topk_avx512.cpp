#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>

#define LONGMEM_SIMD_NAMESPACE avx512
#define LONGMEM_SIMD_LANES 16

namespace longmem::avx512 {
// Bit i is set where a[i] > b[i]; false for NaN.
inline uint32_t above(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
}  // namespace longmem::avx512

#include "chunk_topk/chunk_topk_task.h"
#endif
