// Binds ring_write to PyTorch.
#include "ring_write/ring_write.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/arguments.h"
#include "common/scalar.h"
#include "common/stream.h"

namespace longmem {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr const char* kOp = "ring_write";
constexpr int64_t kMaxChunkSize = 64;  // as in longmem_kernels/ring.py

std::vector<const Tensor*> parts_of(const Tensor& store, const Tensor& centroid, const Tensor& tail,
                                    const Tensor& cursor, const std::optional<Tensor>& scale) {
  std::vector<const Tensor*> parts{&store, &centroid, &tail, &cursor};
  if (scale) parts.push_back(&*scale);
  return parts;
}

// A copy of tokens that lie in what is written.
Tensor apart(const std::vector<const Tensor*>& written, const Tensor& tokens) {
  const auto lies_in = [&](const Tensor* part) { return Arguments::overlap(tokens, *part); };
  return std::any_of(written.begin(), written.end(), lies_in) ? torch::stable::clone(tokens) : tokens;
}

Arguments check(const Tensor& store, const Tensor& centroid, const Tensor& tail, const Tensor& cursor,
                const std::optional<Tensor>& scale, const Tensor& key, const Tensor& value,
                const std::optional<Tensor>& ring_index, const std::optional<Tensor>& mask) {
  const Arguments arguments(kOp, store);
  arguments.rank("ring.store", store, 6);
  arguments.rank("key", key, 4);
  const int64_t R = store.size(0), G = store.size(1), M = store.size(2), C = store.size(4), D = store.size(5);
  const int64_t B = key.size(0), T = key.size(2);
  for (const int64_t size : {R, G, M, D}) arguments.in_range("every size of ring.store", size, 1, INT64_MAX);
  arguments.in_range("tokens per chunk of ring.store", C, 1, kMaxChunkSize + 1);
  const ScalarType stored = store.scalar_type();
  const bool quantised = stored == ScalarType::Float8_e4m3fn;
  const ScalarType kept = quantised ? ScalarType::BFloat16 : stored;
  STD_TORCH_CHECK(scale.has_value() == quantised, kOp,
                  ": ring.scale and a float8_e4m3fn ring.store belong together");
  arguments.expect_packed("ring.store", store, {R, G, M, 2, C, D}, stored);
  arguments.expect_packed("ring.centroid", centroid, {R, G, M, D}, kept);
  arguments.expect_packed("ring.tail", tail, {R, G, 2, C, D}, kept);
  arguments.expect_packed("ring.cursor", cursor, {R}, ScalarType::Long);
  arguments.expect_packed("ring.scale", scale, {R, G, M, 2}, ScalarType::Float);
  arguments.expect_rows("key", key, {B, G, T, D}, key.scalar_type());
  arguments.expect_rows("value", value, {B, G, T, D}, key.scalar_type());
  arguments.expect_ring_index(ring_index, B, R);
  arguments.expect("mask", mask, {B, T}, ScalarType::Bool);
  const auto parts = parts_of(store, centroid, tail, cursor, scale);
  for (size_t i = 0; i < parts.size(); ++i) {
    for (size_t j = 0; j < i; ++j)
      STD_TORCH_CHECK(!Arguments::overlap(*parts[i], *parts[j]), kOp,
                      ": the parts of ring must not overlap in memory");
  }
  return arguments;
}

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
  const Arguments arguments = check(store, centroid, tail, cursor, scale, key, value, ring_index, mask);
  const auto written = parts_of(store, centroid, tail, cursor, scale);
  key = apart(written, key), value = apart(written, value);
  auto p = params_of(store, centroid, tail, cursor, scale, key, value, ring_index, mask);
  if (p.B * p.T == 0) return;
  const auto rings = arguments.copy("ring_index", ring_index, 0, p.R);
  if (ring_index) p.ring_index = rings.data();
  ring_write_cpu(p, scalar_of(key.scalar_type(), kOp, "key"),
                 scalar_of(store.scalar_type(), kOp, "ring.store", true));
}

#ifdef LONGMEM_CUDA
void run_cuda(Tensor store, Tensor centroid, Tensor tail, Tensor cursor, std::optional<Tensor> scale,
              Tensor key, Tensor value, std::optional<Tensor> ring_index, std::optional<Tensor> mask) {
  check(store, centroid, tail, cursor, scale, key, value, ring_index, mask);
  const torch::stable::accelerator::DeviceGuard guard(store.get_device_index());
  const auto written = parts_of(store, centroid, tail, cursor, scale);
  key = apart(written, key), value = apart(written, value);
  const auto p = params_of(store, centroid, tail, cursor, scale, key, value, ring_index, mask);
  if (p.B * p.T == 0) return;
  const int32_t device = store.get_device_index();
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
