// Which ring a batch row uses.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace longmem {

// `ring_index` [B], or null: row b uses ring b if R == B, else ring 0. Internal linkage, because files
// compiled for different instruction sets include it (see simd_task.h).
LONGMEM_HOST_DEVICE static inline int64_t ring_of_row(const int32_t* ring_index, int64_t R, int64_t B,
                                                      int64_t row) {
  if (ring_index != nullptr) return ring_index[row];
  return R == B ? row : 0;
}

}  // namespace longmem
