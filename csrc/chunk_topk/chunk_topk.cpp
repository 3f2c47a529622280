// Binds chunk_topk to PyTorch. Arguments have been checked by longmem_kernels/chunk_topk/api.py.
#include "chunk_topk/chunk_topk.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/scalar.h"
#include "common/simd.h"

namespace longmem {
namespace {

using torch::stable::Tensor;
constexpr const char* kOp = "chunk_topk";

void run_task(const ChunkTopkParams& p, int64_t task) {
  switch (simd_level()) {
#if defined(__x86_64__)
    case Simd::avx512:
      return avx512::chunk_topk_task(p, task);
    case Simd::avx2:
      return avx2::chunk_topk_task(p, task);
#endif
    default:
      return baseline::chunk_topk_task(p, task);
  }
}

std::tuple<Tensor, Tensor> run_cpu(Tensor query, Tensor centroid, Tensor count,
                                   std::optional<Tensor> ring_index, int64_t k) {
  ChunkTopkParams p{};
  p.B = query.size(0), p.H = query.size(1), p.T = query.size(2), p.D = query.size(3), p.K = k;
  p.R = centroid.size(0), p.G = centroid.size(1), p.M = centroid.size(2);
  Tensor ids = torch::stable::new_empty(query, {p.B, p.H, p.T, p.K}, torch::headeronly::ScalarType::Int);
  Tensor scores = torch::stable::new_empty(query, {p.B, p.H, p.T, p.K}, torch::headeronly::ScalarType::Float);
  if (p.B * p.T == 0) return {ids, scores};

  const Tensor counts = torch::stable::contiguous(count);
  p.query = query.const_data_ptr();
  p.centroid = centroid.const_data_ptr();
  p.count = static_cast<const int32_t*>(counts.const_data_ptr());
  p.ring_index = ring_index ? static_cast<const int32_t*>(ring_index->const_data_ptr()) : nullptr;
  p.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  for (int axis = 0; axis < 3; ++axis) {
    p.query_stride[axis] = query.stride(axis);
    p.centroid_stride[axis] = centroid.stride(axis);
  }
  p.query_type = scalar_of(query.scalar_type(), kOp, "query");
  p.centroid_type = scalar_of(centroid.scalar_type(), kOp, "centroid");
  for (int64_t row = 0; row < p.B; ++row) {
    const int64_t ring = ring_of_row(p.ring_index, p.R, p.B, row);
    STD_TORCH_CHECK(ring >= 0 && ring < p.R, kOp, ": ring_index must lie in [0, ", p.R, "), got ", ring);
    STD_TORCH_CHECK(p.count[ring] >= 0 && p.count[ring] <= p.M, kOp, ": count must lie in [0, ", p.M,
                    "], got ", p.count[ring]);
  }
  torch::stable::parallel_for(0, p.B * p.G * chunk_topk_blocks(p), 1, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) run_task(p, task);
  });
  return {ids, scores};
}

}  // namespace
}  // namespace longmem

STABLE_TORCH_LIBRARY_IMPL(longmem, CPU, m) { m.impl("chunk_topk_cpp", TORCH_BOX(&longmem::run_cpu)); }
