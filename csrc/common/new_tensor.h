// Tensors that kernels allocate.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>

namespace longmem {

// A contiguous tensor on the device of `like`, without content. `torch::stable::new_empty` is the same by way
// of the dispatcher, which takes longer than a search for one token among 256 chunks.
template <size_t n>
torch::stable::Tensor new_tensor(const torch::stable::Tensor& like, const std::array<int64_t, n>& sizes,
                                 torch::headeronly::ScalarType type) {
  std::array<int64_t, n> strides;
  int64_t stride = 1;
  for (size_t axis = n; axis-- > 0;) {
    strides[axis] = stride;
    stride *= sizes[axis] > 1 ? sizes[axis] : 1;
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      n, sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      device_type, device_index, &made));
  return torch::stable::Tensor(made);
}

}  // namespace longmem
