// The CUDA stream that PyTorch has made current.
#pragma once

#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

// Declared weak because a CPU build of PyTorch lacks the symbol: a strong reference would keep the whole
// extension, CPU kernels included, from loading there. PyTorch 2.13 has a stable replacement, but 2.11
// and 2.12 do not.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);

namespace longmem {

inline void* current_cuda_stream(int32_t device_index, const char* op) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this PyTorch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

}  // namespace longmem
