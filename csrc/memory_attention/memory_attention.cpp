// Binds memory_attention to PyTorch. Arguments have been checked by longmem_kernels/memory_attention/api.py.
#include "memory_attention/memory_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/scalar.h"
#include "common/simd.h"

namespace longmem {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr const char* kOp = "memory_attention";

struct Tasks {
  int64_t (*block)();
  void (*forward)(const MemoryAttentionParams&, int64_t);
  void (*backward_memory)(const MemoryAttentionParams&, int64_t);
  void (*backward_local)(const MemoryAttentionParams&, int64_t);
};

#define LONGMEM_TASKS(simd)                                                                               \
  Tasks {                                                                                                 \
    simd::memory_attention_block, simd::memory_attention_forward, simd::memory_attention_backward_memory, \
        simd::memory_attention_backward_local                                                             \
  }

Tasks tasks() {
  switch (simd_level()) {
#if defined(__x86_64__)
    case Simd::avx512:
      return LONGMEM_TASKS(avx512);
    case Simd::avx2:
      return LONGMEM_TASKS(avx2);
#endif
    default:
      return LONGMEM_TASKS(baseline);
  }
}

template <int n>
void copy_strides(const Tensor& tensor, int64_t (&strides)[n]) {
  for (int axis = 0; axis < n; ++axis) strides[axis] = tensor.stride(axis);
}

MemoryAttentionParams params_of(const Tensor& query, const Tensor& key, const Tensor& value,
                                const Tensor& memory_query, const Tensor& memory_key,
                                const Tensor& memory_value, const Tensor& ids,
                                const std::optional<Tensor>& ring_index, const std::optional<Tensor>& gate,
                                const std::optional<Tensor>& slopes, const std::string& fusion, double scale,
                                bool causal, std::optional<int64_t> window) {
  MemoryAttentionParams p{};
  p.query = query.const_data_ptr(), p.memory_query = memory_query.const_data_ptr();
  p.key = key.const_data_ptr(), p.value = value.const_data_ptr();
  p.memory_key = memory_key.const_data_ptr(), p.memory_value = memory_value.const_data_ptr();
  p.ids = static_cast<const int32_t*>(ids.const_data_ptr());
  p.ring_index = ring_index ? static_cast<const int32_t*>(ring_index->const_data_ptr()) : nullptr;
  p.gate = gate ? static_cast<const float*>(gate->const_data_ptr()) : nullptr;
  p.slopes = slopes ? static_cast<const float*>(slopes->const_data_ptr()) : nullptr;
  p.B = query.size(0), p.H = query.size(1), p.T = query.size(2), p.D = query.size(3);
  p.G = key.size(1), p.S = key.size(2), p.K = ids.size(3);
  p.R = memory_key.size(0), p.M = memory_key.size(2), p.C = memory_key.size(3);
  copy_strides(query, p.query_stride), copy_strides(memory_query, p.memory_query_stride);
  copy_strides(key, p.key_stride), copy_strides(value, p.value_stride);
  copy_strides(memory_key, p.memory_key_stride), copy_strides(memory_value, p.memory_value_stride);
  copy_strides(ids, p.ids_stride);
  p.window = window.value_or(0);
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.type = scalar_of(query.scalar_type(), kOp, "query");
  p.memory_type = scalar_of(memory_key.scalar_type(), kOp, "memory_key");
  STD_TORCH_CHECK((fusion == "gated") == gate.has_value(), kOp, ": fusion=", fusion,
                  " does not fit the gate");
  STD_TORCH_CHECK(p.K <= 1 || ids.stride(3) == 1, kOp, ": the last axis of chunk_ids must be contiguous");
  for (int64_t row = 0; p.ring_index && row < p.B; ++row) {
    const int64_t ring = p.ring_index[row];
    STD_TORCH_CHECK(ring >= 0 && ring < p.R, kOp, ": ring_index must lie in [0, ", p.R, "), got ", ring);
  }
  return p;
}

void run(int64_t count, void (*task)(const MemoryAttentionParams&, int64_t), const MemoryAttentionParams& p) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) task(p, i);
  });
}

int64_t blocks(const MemoryAttentionParams& p) {
  const int64_t block = tasks().block();
  return p.B * p.H * ((p.T + block - 1) / block);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor query, Tensor key, Tensor value, Tensor memory_query, Tensor memory_key, Tensor memory_value,
    Tensor ids, std::optional<Tensor> ring_index, std::optional<Tensor> gate, std::optional<Tensor> slopes,
    std::string fusion, double scale, bool causal, std::optional<int64_t> window) {
  auto p = params_of(query, key, value, memory_query, memory_key, memory_value, ids, ring_index, gate, slopes,
                     fusion, scale, causal, window);
  const auto part = [&] { return torch::stable::new_empty(query, {p.B, p.H, p.T, p.D}, ScalarType::Float); };
  const auto lse = [&] { return torch::stable::new_empty(query, {p.B, p.H, p.T}, ScalarType::Float); };
  Tensor out = torch::stable::new_empty(query, {p.B, p.H, p.T, p.D});
  Tensor local_out = part(), memory_out = part(), local_lse = lse(), memory_lse = lse();
  p.out = out.mutable_data_ptr();
  p.local_out = static_cast<float*>(local_out.mutable_data_ptr());
  p.memory_out = static_cast<float*>(memory_out.mutable_data_ptr());
  p.local_lse = static_cast<float*>(local_lse.mutable_data_ptr());
  p.memory_lse = static_cast<float*>(memory_lse.mutable_data_ptr());
  run(blocks(p), tasks().forward, p);
  return {out, local_out, local_lse, memory_out, memory_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor query, Tensor key, Tensor value, Tensor memory_query, Tensor memory_key,
    Tensor memory_value, Tensor ids, std::optional<Tensor> ring_index, std::optional<Tensor> gate,
    std::optional<Tensor> slopes, std::string fusion, double scale, bool causal,
    std::optional<int64_t> window, Tensor local_out, Tensor local_lse, Tensor memory_out, Tensor memory_lse) {
  auto p = params_of(query, key, value, memory_query, memory_key, memory_value, ids, ring_index, gate, slopes,
                     fusion, scale, causal, window);
  // A gradient may come expanded or transposed; its last axis must not.
  const Tensor packed = grad.stride(3) == 1 ? grad : torch::stable::contiguous(grad);
  p.grad = packed.const_data_ptr();
  copy_strides(packed, p.grad_stride);
  p.local_out = static_cast<float*>(local_out.mutable_data_ptr());
  p.memory_out = static_cast<float*>(memory_out.mutable_data_ptr());
  p.local_lse = static_cast<float*>(local_lse.mutable_data_ptr());
  p.memory_lse = static_cast<float*>(memory_lse.mutable_data_ptr());

  Tensor dquery = torch::stable::new_empty(query, {p.B, p.H, p.T, p.D});
  Tensor dmemory_query = torch::stable::new_empty(query, {p.B, p.H, p.T, p.D});
  Tensor dkey = torch::stable::new_empty(key, {p.B, p.G, p.S, p.D});
  Tensor dvalue = torch::stable::new_empty(key, {p.B, p.G, p.S, p.D});
  Tensor dgate = torch::stable::new_empty(query, {p.H}, ScalarType::Float);
  std::vector<float> dgate_of_query(p.B * p.H * p.T);
  p.dquery = dquery.mutable_data_ptr(), p.dmemory_query = dmemory_query.mutable_data_ptr();
  p.dkey = dkey.mutable_data_ptr(), p.dvalue = dvalue.mutable_data_ptr();
  p.dgate = dgate_of_query.data();
  run(blocks(p), tasks().backward_memory, p);
  run(p.B * p.G, tasks().backward_local, p);

  float* total = static_cast<float*>(dgate.mutable_data_ptr());
  for (int64_t h = 0; h < p.H; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t t = 0; t < p.T; ++t) sum += dgate_of_query[(b * p.H + h) * p.T + t];
    }
    total[h] = static_cast<float>(sum);
  }
  return {dquery, dkey, dvalue, dmemory_query, dgate};
}

}  // namespace
}  // namespace longmem

STABLE_TORCH_LIBRARY_IMPL(longmem, CPU, m) {
  m.impl("memory_attention_cpp", TORCH_BOX(&longmem::forward));
  m.impl("memory_attention_backward_cpp", TORCH_BOX(&longmem::backward));
}
