// The CUDA stream that PyTorch has made current.
#pragma once

#include <cstdint>

// Declared weak because a CPU build of PyTorch lacks the symbol: a strong reference would keep the whole
// extension, CPU kernels included, from loading there. PyTorch 2.13 has a stable replacement, but 2.11
// and 2.12 do not.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);
