#include <cstdint>

#if defined(__x86_64__)
#define LONGMEM_SIMD_NAMESPACE avx2
#define LONGMEM_SIMD_LANES 8

#include "memory_attention/memory_attention_task.h"
#endif
