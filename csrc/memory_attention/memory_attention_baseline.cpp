#include <cstdint>

#define LONGMEM_SIMD_NAMESPACE baseline
#define LONGMEM_SIMD_LANES 4

#include "memory_attention/memory_attention_task.h"
