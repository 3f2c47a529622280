// Binds chunk_topk to PyTorch.
#include "chunk_topk/chunk_topk.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
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
constexpr const char* kOp = "chunk_topk";
constexpr int64_t kMaxK = 64;

using Task = void (*)(const ChunkTopkParams&, int64_t);

// The task function for many or few queries.
Task task_for(bool few) {
  switch (simd_level()) {
#if defined(__x86_64__)
    case Simd::avx512:
      return few ? avx512::chunk_topk_few_task : avx512::chunk_topk_task;
    case Simd::avx2:
      return few ? avx2::chunk_topk_few_task : avx2::chunk_topk_task;
#endif
    default:
      return few ? baseline::chunk_topk_few_task : baseline::chunk_topk_task;
  }
}

// Whether `a` comes before `b`, from lower slots: numbers in descending order, then NaN.
bool before_or_equal(float a, float b) { return a >= b || b != b; }

// The K best of what the splits found for each query; equal ones of a lower split first.
void merge_splits(const ChunkTopkParams& p) {
  const int64_t queries = chunk_topk_queries(p);
  std::vector<int64_t> next(p.splits);  // per split, the first winner that is not taken
  for (int64_t i = 0; i < p.B / p.rows * p.G * queries; ++i) {
    const int64_t head = i / queries, n = i % queries;
    const int64_t first = (head * p.splits * queries + n) * p.K;
    const int64_t to = query_place(p, head / p.G, head % p.G, n).in_results;
    const int64_t stride = queries * p.K;
    std::fill(next.begin(), next.end(), 0);
    for (int64_t k = 0; k < p.K; ++k) {
      int64_t best = -1, best_at = 0;
      for (int64_t split = 0; split < p.splits; ++split) {
        const int64_t at = first + split * stride + next[split];
        if (next[split] == p.K || p.split_ids[at] < 0) continue;
        if (best < 0 || !before_or_equal(p.split_scores[best_at], p.split_scores[at])) {
          best = split;
          best_at = at;
        }
      }
      p.ids[to + k] = best < 0 ? -1 : p.split_ids[best_at];
      p.scores[to + k] = best < 0 ? -std::numeric_limits<float>::infinity() : p.split_scores[best_at];
      if (best >= 0) ++next[best];
    }
  }
}

// Splits, when there are fewer tasks than keep all threads busy to the end; not into less than is worth it,
// because each split finds K winners of its own.
void run(ChunkTopkParams p) {
  constexpr int64_t kLeastSlots = 2048, kTasksPerThread = 4;
  const int64_t queries = chunk_topk_queries(p), searches = p.B / p.rows * p.G;
  const bool few = queries <= kFewQueries;
  const int64_t tasks = searches * (few ? 1 : chunk_topk_blocks(p));
  const int64_t slots = std::max(*std::max_element(p.count, p.count + p.R), 1);
  const int64_t wanted = (torch::stable::get_num_threads() * kTasksPerThread + tasks - 1) / tasks;
  p.splits = std::max<int64_t>(1, std::min(wanted, slots / kLeastSlots));
  // Whole tiles, so that none but the last is a rest.
  p.split_slots = ((slots + p.splits - 1) / p.splits + kTileSlots - 1) / kTileSlots * kTileSlots;
  p.splits = (slots + p.split_slots - 1) / p.split_slots;
  std::vector<int32_t> ids(p.splits > 1 ? searches * p.splits * queries * p.K : 0);
  std::vector<float> scores(ids.size());
  p.split_ids = ids.data();
  p.split_scores = scores.data();
  const Task task = task_for(few);
  run_tasks(tasks * p.splits, searches * queries * slots * p.D, [&](int64_t i) { task(p, i); });
  if (p.splits > 1) merge_splits(p);
}

Arguments check(const Tensor& query, const Tensor& centroid, const Tensor& count,
                const std::optional<Tensor>& ring_index, int64_t k) {
  const Arguments arguments(kOp, query);
  arguments.rank("query", query, 4);
  arguments.rank("centroid", centroid, 4);
  const int64_t B = query.size(0), H = query.size(1), T = query.size(2), D = query.size(3);
  const int64_t R = centroid.size(0), G = centroid.size(1), M = centroid.size(2);
  for (const int64_t size : {R, G, M, D}) arguments.in_range("every size of centroid", size, 1, INT64_MAX);
  STD_TORCH_CHECK(H > 0 && H % G == 0, kOp,
                  ": query heads H must be a multiple of memory's heads G, got H = ", H, " and G = ", G);
  arguments.in_range("k", k, 1, kMaxK + 1);
  arguments.expect_rows("query", query, {B, H, T, D}, query.scalar_type());
  arguments.expect_rows("centroid", centroid, {R, G, M, D}, centroid.scalar_type());
  arguments.expect_packed("count", count, {R}, ScalarType::Int);
  arguments.expect_ring_index(ring_index, B, R);
  return arguments;
}

std::tuple<Tensor, Tensor> run_cpu(Tensor query, Tensor centroid, Tensor count,
                                   std::optional<Tensor> ring_index, int64_t k) {
  const Arguments arguments = check(query, centroid, count, ring_index, k);
  ChunkTopkParams p{};
  p.B = query.size(0), p.H = query.size(1), p.T = query.size(2), p.D = query.size(3), p.K = k;
  p.R = centroid.size(0), p.G = centroid.size(1), p.M = centroid.size(2);
  const std::array<int64_t, 4> results{p.B, p.H, p.T, p.K};
  Tensor ids = new_tensor(query, results, ScalarType::Int);
  Tensor scores = new_tensor(query, results, ScalarType::Float);
  p.rows = p.R == 1 ? p.B : 1;
  if (p.B * p.T == 0) return {ids, scores};

  const auto counts = arguments.copy("count", count, 0, p.M + 1);
  const auto rings = arguments.copy("ring_index", ring_index, 0, p.R);
  p.query = query.const_data_ptr();
  p.centroid = centroid.const_data_ptr();
  p.count = counts.data();
  p.ring_index = ring_index ? rings.data() : nullptr;
  p.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  for (int axis = 0; axis < 3; ++axis) {
    p.query_stride[axis] = query.stride(axis);
    p.centroid_stride[axis] = centroid.stride(axis);
  }
  p.query_type = scalar_of(query.scalar_type(), kOp, "query");
  p.centroid_type = scalar_of(centroid.scalar_type(), kOp, "centroid");
  run(p);
  return {ids, scores};
}

}  // namespace
}  // namespace longmem

STABLE_TORCH_LIBRARY_IMPL(longmem, CPU, m) { m.impl("chunk_topk_cpp", TORCH_BOX(&longmem::run_cpu)); }
