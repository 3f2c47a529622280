// Binds ring_write to PyTorch. Arguments have been checked by longmem_kernels/ring_write/api.py.
#include "ring_write/ring_write.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/scalar.h"
#include "common/stream.h"

namespace longmem {
namespace {

using torch::stable::Tensor;
constexpr const char* kOp = "ring_write";

RingWriteParams params_of(const Tensor& store, const Tensor& centroid, const Tensor& tail,
                          const Tensor& cursor, const std::optional<Tensor>& scale, const Tensor& key,
                          const Tensor& value, const std::optional<Tensor>& ring_index,
                          const std::optional<Tensor>& mask) {
  RingWriteParams p{};
  p.store = store.mutable_data_ptr();
  p.centroid = centroid.mutable_data_ptr();
  p.tail = tail.mutable_data_ptr();
  p.cursor = static_cast<int64_t*>(cursor.mutable_data_ptr());
  p.scale = scale ? static_cast<float*>(scale->mutable_data_ptr()) : nullptr;
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.ring_index = ring_index ? static_cast<const int32_t*>(ring_index->const_data_ptr()) : nullptr;
  p.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  p.R = store.size(0), p.G = store.size(1), p.M = store.size(2), p.C = store.size(4), p.D = store.size(5);
  p.B = key.size(0), p.T = key.size(2);
  for (int axis = 0; axis < 3; ++axis) {
    p.key_stride[axis] = key.stride(axis);
    p.value_stride[axis] = value.stride(axis);
  }
  for (int axis = 0; mask && axis < 2; ++axis) p.mask_stride[axis] = mask->stride(axis);
  return p;
}

void run_cpu(Tensor store, Tensor centroid, Tensor tail, Tensor cursor, std::optional<Tensor> scale,
             Tensor key, Tensor value, std::optional<Tensor> ring_index, std::optional<Tensor> mask) {
  const auto p = params_of(store, centroid, tail, cursor, scale, key, value, ring_index, mask);
  if (p.B * p.T == 0) return;
  for (int64_t row = 0; row < p.B; ++row) {
    const int64_t ring = ring_of_row(p, row);
    STD_TORCH_CHECK(ring >= 0 && ring < p.R, kOp, ": ring_index must lie in [0, ", p.R, "), got ", ring);
  }
  ring_write_cpu(p, scalar_of(key.scalar_type(), kOp, "key"),
                 scalar_of(store.scalar_type(), kOp, "ring.store", true));
}

#ifdef LONGMEM_CUDA
void run_cuda(Tensor store, Tensor centroid, Tensor tail, Tensor cursor, std::optional<Tensor> scale,
              Tensor key, Tensor value, std::optional<Tensor> ring_index, std::optional<Tensor> mask) {
  const auto p = params_of(store, centroid, tail, cursor, scale, key, value, ring_index, mask);
  if (p.B * p.T == 0) return;
  const int32_t device = store.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* error = ring_write_cuda(p, scalar_of(key.scalar_type(), kOp, "key"),
                                      scalar_of(store.scalar_type(), kOp, "ring.store", true),
                                      current_cuda_stream(device, kOp));
  STD_TORCH_CHECK(error == nullptr, kOp, ": CUDA launch failed: ", error);
}
#endif

}  // namespace
}  // namespace longmem

STABLE_TORCH_LIBRARY_IMPL(longmem, CPU, m) { m.impl("ring_write_cpp", TORCH_BOX(&longmem::run_cpu)); }
#ifdef LONGMEM_CUDA
STABLE_TORCH_LIBRARY_IMPL(longmem, CUDA, m) { m.impl("ring_write_cuda", TORCH_BOX(&longmem::run_cuda)); }
#endif
