// Binds memory_attention to PyTorch.
#include "memory_attention/memory_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/arguments.h"
#include "common/new_tensor.h"
#include "common/parallel.h"
#include "common/scalar.h"
#include "common/simd.h"

namespace longmem {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Task = void (*)(const MemoryAttentionParams&, int64_t);
constexpr const char* kOp = "memory_attention";
constexpr int64_t kMaxRetrieved = int64_t{1} << 31;  // tokens of a query

struct Tasks {
  int64_t (*block)();
  int64_t (*few)();
  Task forward, piece, finish;
  Task backward_memory, backward_pair, backward_head, backward_round;
};

#define LONGMEM_TASKS(simd)                                                                                  \
  Tasks {                                                                                                    \
    simd::memory_attention_block, simd::memory_attention_few, simd::memory_attention_forward,                \
        simd::memory_attention_piece, simd::memory_attention_finish, simd::memory_attention_backward_memory, \
        simd::memory_attention_backward_pair, simd::memory_attention_backward_head,                          \
        simd::memory_attention_backward_round                                                                \
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

template <typename T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// The inputs and options of both ops, in the order of their schemas.
struct Inputs {
  Tensor query, key, value, memory_query, memory_key, memory_value, ids;
  std::optional<Tensor> memory_scale, ring_index, gate, slopes, key_mask, dropout_seed;
  std::string fusion;
  double scale;
  bool causal;
  std::optional<int64_t> window;
  double dropout_p;
};

// Returns the checked ring of each row; see `Arguments::copy`.
std::vector<int32_t> check(const Inputs& in) {
  const Arguments arguments(kOp, in.query);
  for (const Tensor* tensor : {&in.query, &in.key, &in.ids})
    arguments.rank("query, key or chunk_ids", *tensor, 4);
  arguments.rank("memory_key", in.memory_key, 5);
  const int64_t B = in.query.size(0), H = in.query.size(1), T = in.query.size(2), D = in.query.size(3);
  const int64_t G = in.key.size(1), S = in.key.size(2), K = in.ids.size(3);
  const int64_t R = in.memory_key.size(0), M = in.memory_key.size(2), C = in.memory_key.size(3);
  for (const int64_t size : {R, G, M, C, K, D})
    arguments.in_range("every size of memory_key and chunk_ids", size, 1, INT64_MAX);
  arguments.in_range("retrieved tokens of a query K * C", K, 1, kMaxRetrieved / C + 1);
  STD_TORCH_CHECK(H > 0 && H % G == 0, kOp,
                  ": query heads H must be a multiple of key/value heads G, got H = ", H, " and G = ", G);
  STD_TORCH_CHECK(S == 0 || S >= T, kOp, ": S must be 0 or at least T, got S = ", S, " and T = ", T);
  if (in.window) arguments.in_range("window", *in.window, 1, INT64_MAX);
  const ScalarType type = in.query.scalar_type(), stored = in.memory_key.scalar_type();
  arguments.expect_rows("query", in.query, {B, H, T, D}, type);
  arguments.expect_rows("memory_query", in.memory_query, {B, H, T, D}, type);
  arguments.expect_rows("key", in.key, {B, G, S, D}, type);
  arguments.expect_rows("value", in.value, {B, G, S, D}, type);
  arguments.expect_rows("memory_key", in.memory_key, {R, G, M, C, D}, stored);
  arguments.expect_rows("memory_value", in.memory_value, {R, G, M, C, D}, stored);
  arguments.expect_rows("chunk_ids", in.ids, {B, H, T, K}, ScalarType::Int);
  STD_TORCH_CHECK((in.fusion == "gated") == in.gate.has_value(), kOp, ": fusion=", in.fusion,
                  " does not fit the gate");
  STD_TORCH_CHECK((stored == ScalarType::Float8_e4m3fn) == in.memory_scale.has_value(), kOp,
                  ": memory_scale and float8_e4m3fn memory belong together");
  arguments.expect_packed("memory_scale", in.memory_scale, {R, G, M, 2}, ScalarType::Float);
  arguments.expect_packed("gate", in.gate, {H}, ScalarType::Float);
  arguments.expect_packed("alibi_slopes", in.slopes, {H}, ScalarType::Float);
  arguments.expect("key_mask", in.key_mask, {B, S}, ScalarType::Bool);
  arguments.expect("dropout_seed", in.dropout_seed, {1}, ScalarType::Long);
  arguments.expect_ring_index(in.ring_index, B, R);
  return arguments.copy("ring_index", in.ring_index, 0, R);
}

// `rings`: what `check` returned, which lives as long as the result is used.
MemoryAttentionParams params_of(const Inputs& in, const std::vector<int32_t>& rings) {
  MemoryAttentionParams p{};
  p.query = in.query.const_data_ptr(), p.memory_query = in.memory_query.const_data_ptr();
  p.key = in.key.const_data_ptr(), p.value = in.value.const_data_ptr();
  p.memory_key = in.memory_key.const_data_ptr(), p.memory_value = in.memory_value.const_data_ptr();
  p.ids = static_cast<const int32_t*>(in.ids.const_data_ptr());
  p.memory_scale = data_of<float>(in.memory_scale), p.ring_index = in.ring_index ? rings.data() : nullptr;
  p.gate = data_of<float>(in.gate), p.slopes = data_of<float>(in.slopes);
  p.key_mask = data_of<bool>(in.key_mask), p.dropout_seed = data_of<int64_t>(in.dropout_seed);
  p.B = in.query.size(0), p.H = in.query.size(1), p.T = in.query.size(2), p.D = in.query.size(3);
  p.G = in.key.size(1), p.S = in.key.size(2), p.K = in.ids.size(3);
  p.R = in.memory_key.size(0), p.M = in.memory_key.size(2), p.C = in.memory_key.size(3);
  p.padded = (p.D + 15) / 16 * 16;
  copy_strides(in.query, p.query_stride), copy_strides(in.memory_query, p.memory_query_stride);
  copy_strides(in.key, p.key_stride), copy_strides(in.value, p.value_stride);
  copy_strides(in.memory_key, p.memory_key_stride), copy_strides(in.memory_value, p.memory_value_stride);
  copy_strides(in.ids, p.ids_stride);
  if (in.key_mask) copy_strides(*in.key_mask, p.key_mask_stride);
  p.window = in.window ? std::min(*in.window, std::max<int64_t>(p.S, 1)) : 0;  // a wider one is none
  p.scale = static_cast<float>(in.scale);
  p.causal = in.causal;
  p.dropout_threshold = static_cast<uint32_t>(in.dropout_p * 4294967296.0);
  p.dropout_scale = static_cast<float>(1.0 / (1.0 - in.dropout_p));
  p.type = scalar_of(in.query.scalar_type(), kOp, "query");
  p.memory_type = scalar_of(in.memory_key.scalar_type(), kOp, "memory_key", true);
  return p;
}

// Kernels leave out ids that are no slots, should they change after this.
void check_ids(const MemoryAttentionParams& p) {
  for (int64_t row = 0; row < p.B * p.H * p.T; ++row) {
    const int64_t t = row % p.T, h = row / p.T % p.H, b = row / p.T / p.H;
    const int32_t* ids = p.ids + b * p.ids_stride[0] + h * p.ids_stride[1] + t * p.ids_stride[2];
    int32_t lowest = -1;
    int64_t highest = -1;
    for (int64_t k = 0; k < p.K; ++k) {
      lowest = std::min(lowest, ids[k]);
      highest = std::max<int64_t>(highest, ids[k]);
    }
    STD_TORCH_CHECK(lowest >= -1 && highest < p.M, kOp, ": chunk_ids must lie in [-1, ", p.M, "), got ",
                    lowest < -1 ? lowest : highest);
  }
}

// Multiply-adds forward: scores and sums over what queries may see.
int64_t work_of(const MemoryAttentionParams& p) {
  const int64_t local = p.window ? std::min(p.window, p.S) : p.S;
  return p.B * p.H * p.T * (local + p.K * p.C) * p.D * 2;
}

void run(int64_t count, Task task, const MemoryAttentionParams& p) {
  run_tasks(count, work_of(p), [&](int64_t i) { task(p, i); });
}

// The queries of a key/value head are finished by the thread that is done with the last of its pieces; or,
// with few heads for the threads, shared out.
void attend_few(MemoryAttentionParams p) {
  const int64_t splits = (p.S + kSplit - 1) / kSplit, heads = p.B * p.G, queries = p.H / p.G * p.T;
  const std::unique_ptr<float[]> pieces(new float[heads * queries * splits * (p.D + 2)]);
  p.pieces = pieces.get();
  if (splits == 0 || heads < torch::stable::get_num_threads()) {
    run(heads * splits, tasks().piece, p);
    return run(heads * queries, tasks().finish, p);
  }
  std::vector<std::atomic<int64_t>> done(heads);
  run_tasks(heads * splits, work_of(p), [&](int64_t i) {
    tasks().piece(p, i);
    const int64_t head = i / splits;
    if (done[head].fetch_add(1, std::memory_order_acq_rel) + 1 < splits) return;
    for (int64_t query = 0; query < queries; ++query) tasks().finish(p, head * queries + query);
  });
}

int64_t blocks(const MemoryAttentionParams& p) {
  const int64_t block = tasks().block();
  return p.B * p.H * ((p.T + block - 1) / block);
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results attend(const Inputs& in) {
  const auto rings = check(in);
  auto p = params_of(in, rings);
  check_ids(p);
  const std::array<int64_t, 4> rows{p.B, p.H, p.T, p.D};
  const std::array<int64_t, 3> queries{p.B, p.H, p.T};
  Tensor out = new_tensor(in.query, rows, in.query.scalar_type());
  Tensor local_out = new_tensor(in.query, rows, ScalarType::Float);
  Tensor local_lse = new_tensor(in.query, queries, ScalarType::Float);
  Tensor memory_out = new_tensor(in.query, rows, ScalarType::Float);
  Tensor memory_lse = new_tensor(in.query, queries, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.local_out = floats(local_out), p.memory_out = floats(memory_out);
  p.local_lse = floats(local_lse), p.memory_lse = floats(memory_lse);
  if (p.B * p.T == 0) {
    return {out, local_out, local_lse, memory_out, memory_lse};
  } else if (p.T <= tasks().few()) {
    attend_few(p);
  } else {
    run(blocks(p), tasks().forward, p);
  }
  return {out, local_out, local_lse, memory_out, memory_lse};
}

// dquery, dkey and dvalue of the local part. With few key/value heads for the threads, each head's pairs are
// shared out; in one wave after the other, because two pairs with the same queries or keys add to the same
// sums, in the order that one thread would take them.
void differentiate_local(const MemoryAttentionParams& p) {
  const int64_t heads = p.B * p.G, threads = torch::stable::get_num_threads();
  if (heads % threads == 0 || heads >= 4 * threads) return run(heads, tasks().backward_head, p);
  const int64_t queries = memory_attention_query_blocks(p), keys = memory_attention_blocks(p.S);
  std::vector<int64_t> wave;
  for (int64_t number = 0; number < queries + keys - 1; ++number) {
    wave.clear();
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t k = q + keys - 1 - number;  // earlier waves have later keys, or earlier queries
      if (k < 0 || k >= keys || !memory_attention_sees(p, q, k)) continue;
      for (int64_t head = 0; head < heads; ++head) wave.push_back((head * queries + q) * keys + k);
    }
    const int64_t size = static_cast<int64_t>(wave.size()), pair = kPair * kPair * p.D;
    run_tasks(size, 5 * size * pair, [&](int64_t i) { tasks().backward_pair(p, wave[i]); });
  }
}

// dgate [H], from the part of each query.
void sum_of_queries(const MemoryAttentionParams& p, float* dgate) {
  for (int64_t h = 0; h < p.H; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t t = 0; t < p.T; ++t) sum += p.dgate[(b * p.H + h) * p.T + t];
    }
    dgate[h] = static_cast<float>(sum);
  }
}

Results differentiate(const Inputs& in, MemoryAttentionParams& p) {
  const auto empty = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(in.query, size);
  };
  const auto zeros = [&](int64_t heads, int64_t rows) {
    return torch::stable::new_zeros(in.query, {p.B, heads, rows, p.padded}, ScalarType::Float);
  };
  Tensor dquery_sum = zeros(p.H, p.T), dkey_sum = zeros(p.G, p.S), dvalue_sum = zeros(p.G, p.S);
  // For float32 inputs whose D needs no padding, the sums are the gradients themselves.
  const bool direct = p.type == Scalar::f32 && p.D == p.padded;
  Tensor dquery = direct ? dquery_sum : empty({p.B, p.H, p.T, p.D});
  Tensor dkey = direct ? dkey_sum : empty({p.B, p.G, p.S, p.D});
  Tensor dvalue = direct ? dvalue_sum : empty({p.B, p.G, p.S, p.D});
  Tensor dmemory_query = empty({p.B, p.H, p.T, p.D});
  Tensor dgate = torch::stable::new_empty(in.query, {p.H}, ScalarType::Float);
  std::vector<float> of_queries(3 * p.B * p.H * p.T);
  p.dgate = of_queries.data();
  p.local_weight = p.dgate + p.B * p.H * p.T, p.local_offset = p.local_weight + p.B * p.H * p.T;
  p.dquery = dquery.mutable_data_ptr(), p.dmemory_query = dmemory_query.mutable_data_ptr();
  p.dkey = dkey.mutable_data_ptr(), p.dvalue = dvalue.mutable_data_ptr();
  p.dquery_sum = floats(dquery_sum), p.dkey_sum = floats(dkey_sum), p.dvalue_sum = floats(dvalue_sum);

  run(blocks(p), tasks().backward_memory, p);
  differentiate_local(p);
  if (!direct) run(p.B * p.G + p.B * p.H, tasks().backward_round, p);
  sum_of_queries(p, floats(dgate));
  return {dquery, dkey, dvalue, dmemory_query, dgate};
}

Results forward(Tensor query, Tensor key, Tensor value, Tensor memory_query, Tensor memory_key,
                Tensor memory_value, Tensor ids, std::optional<Tensor> memory_scale,
                std::optional<Tensor> ring_index, std::optional<Tensor> gate, std::optional<Tensor> slopes,
                std::optional<Tensor> key_mask, std::optional<Tensor> dropout_seed, std::string fusion,
                double scale, bool causal, std::optional<int64_t> window, double dropout_p) {
  return attend({query, key, value, memory_query, memory_key, memory_value, ids, memory_scale, ring_index,
                 gate, slopes, key_mask, dropout_seed, fusion, scale, causal, window, dropout_p});
}

Results backward(std::optional<Tensor> grad, std::optional<Tensor> local_lse_grad,
                 std::optional<Tensor> memory_lse_grad, Tensor query, Tensor key, Tensor value,
                 Tensor memory_query, Tensor memory_key, Tensor memory_value, Tensor ids,
                 std::optional<Tensor> memory_scale, std::optional<Tensor> ring_index,
                 std::optional<Tensor> gate, std::optional<Tensor> slopes, std::optional<Tensor> key_mask,
                 std::optional<Tensor> dropout_seed, std::string fusion, double scale, bool causal,
                 std::optional<int64_t> window, double dropout_p, Tensor local_out, Tensor local_lse,
                 Tensor memory_out, Tensor memory_lse) {
  const Inputs in{query,        key,          value,      memory_query, memory_key, memory_value,
                  ids,          memory_scale, ring_index, gate,         slopes,     key_mask,
                  dropout_seed, fusion,       scale,      causal,       window,     dropout_p};
  const auto rings = check(in);
  auto p = params_of(in, rings);
  const Arguments arguments(kOp, query);
  for (const Tensor* part : {&local_out, &memory_out})
    arguments.expect_packed("local_out or memory_out", *part, {p.B, p.H, p.T, p.D}, ScalarType::Float);
  for (const Tensor* lse : {&local_lse, &memory_lse})
    arguments.expect_packed("local_lse or memory_lse", *lse, {p.B, p.H, p.T}, ScalarType::Float);
  arguments.expect("grad", grad, {p.B, p.H, p.T, p.D}, query.scalar_type());
  arguments.expect("local_lse_grad", local_lse_grad, {p.B, p.H, p.T}, ScalarType::Float);
  arguments.expect("memory_lse_grad", memory_lse_grad, {p.B, p.H, p.T}, ScalarType::Float);
  // Gradients may come expanded or transposed, or not at all.
  if (local_lse_grad) local_lse_grad = torch::stable::contiguous(*local_lse_grad);
  if (memory_lse_grad) memory_lse_grad = torch::stable::contiguous(*memory_lse_grad);
  p.local_lse_grad = data_of<float>(local_lse_grad), p.memory_lse_grad = data_of<float>(memory_lse_grad);
  const Tensor given = !grad                  ? torch::stable::new_zeros(query, {1, 1, 1, p.D})
                       : grad->stride(3) == 1 ? *grad
                                              : torch::stable::contiguous(*grad);
  p.grad = given.const_data_ptr();
  if (grad) copy_strides(given, p.grad_stride);
  p.local_out = floats(local_out), p.memory_out = floats(memory_out);
  p.local_lse = floats(local_lse), p.memory_lse = floats(memory_lse);
  return differentiate(in, p);
}

}  // namespace
}  // namespace longmem

STABLE_TORCH_LIBRARY_IMPL(longmem, CPU, m) {
  m.impl("memory_attention_cpp", TORCH_BOX(&longmem::forward));
  m.impl("memory_attention_backward_cpp", TORCH_BOX(&longmem::backward));
}
