// Backward tasks; part of memory_attention_task.h.
//
// With out = (1 - share) local + share memory, either part's scores have the gradient
// softmax * (weight * (grad . value - delta) + gradient of the log-sum-exp). Gated, delta = grad . part;
// joint, where the share depends on all scores, delta = grad . out (FlashAttention-2, section 3.1, for one
// softmax in two pieces).
#pragma once

#include "memory_attention/memory_attention_block.h"
#include "memory_attention/memory_attention_dropout.h"
#include "memory_attention/memory_attention_memory.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

// What backward needs to know of one query: of each part, weight, and what is added to weight * grad . value.
struct QueryGrad {
  float local_weight, local_offset, memory_weight, memory_offset, dgate;

  QueryGrad(const Block& block, int64_t i, const float* grad) {
    const auto& p = block.p;
    const int64_t row = block.row(i);
    const float share = block.share(p.local_lse[row], p.memory_lse[row]);
    float local_delta = dot(grad, p.local_out + row * p.D, p.D);
    float memory_delta = dot(grad, p.memory_out + row * p.D, p.D);
    const bool gated = p.gate && p.memory_lse[row] != -kInfinity;
    dgate = gated ? share * (1.0f - share) * (memory_delta - local_delta) : 0.0f;
    if (!p.gate) local_delta = memory_delta = (1.0f - share) * local_delta + share * memory_delta;
    local_weight = 1.0f - share;
    memory_weight = share;
    local_offset = (p.local_lse_grad ? p.local_lse_grad[row] : 0.0f) - local_weight * local_delta;
    memory_offset = (p.memory_lse_grad ? p.memory_lse_grad[row] : 0.0f) - memory_weight * memory_delta;
    // Nothing was seen: the part is 0 whatever the scores.
    if (p.local_lse[row] == -kInfinity) local_weight = local_offset = 0.0f;
    if (p.memory_lse[row] == -kInfinity) memory_weight = memory_offset = 0.0f;
  }
};

class BackwardMemory {
 public:
  explicit BackwardMemory(const Block& block)
      : block_(block),
        p_(block.p),
        memory_(p_),
        grad_(p_.padded),
        out_(p_.padded),
        weights_(round_up(p_.K * p_.C)),
        products_(round_up(p_.K * p_.C)) {}

  void run() {
    for (int64_t i = 0; i < block_.count; ++i) {
      const int64_t row = block_.row(i);
      block_.load_query(p_.grad, p_.grad_stride, i, grad_);
      const QueryGrad about(block_, i, grad_);
      p_.dgate[row] = about.dgate;
      p_.local_weight[row] = about.local_weight;
      p_.local_offset[row] = about.local_offset;
      std::memset(out_, 0, p_.D * sizeof(float));
      if (about.memory_weight != 0.0f || about.memory_offset != 0.0f) differentiate(i, about);
      store_row(out_, p_.D, p_.dmemory_query, p_.type, row * p_.D);
    }
  }

 private:
  void differentiate(int64_t i, const QueryGrad& about) {
    memory_.find(block_, i);
    memory_.score(weights_);
    memory_.multiply_values(grad_, products_);
    const float lse = p_.memory_lse[block_.row(i)];
    for (int64_t j = 0; j < memory_.n; j += kLanes) {
      const Vector weight = exp_of_negative(load(weights_ + j) - lse) * p_.scale;
      store(weights_ + j, weight * (load(products_ + j) * about.memory_weight + about.memory_offset));
    }
    memory_.combine_keys(weights_, out_);
  }

  const Block block_;
  const MemoryAttentionParams& p_;
  Memory memory_;
  Buffer<float> grad_, out_;          // [padded]
  Buffer<float> weights_, products_;  // [K * C] and padding
};

// sums [rows, padded] += weight^T . x [n, padded], where weight k of row r lies at r * row_stride + k *
// stride.
struct Accumulation {
  const float *weight, *x;
  int64_t row_stride, stride, x_stride, n, padded;
  float* sums;

  void run(int64_t rows) const {
    constexpr int kWidth = kLanes == 16 ? 4 : 2;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      int64_t d = 0;
      for (; d + kWidth * kLanes <= padded; d += kWidth * kLanes) add<4, kWidth>(r, d);
      for (; d < padded; d += kLanes) add<4, 1>(r, d);
    }
    for (; r < rows; ++r) {
      for (int64_t d = 0; d < padded; d += kLanes) add<1, 1>(r, d);
    }
  }

  template <int rows, int width>
  void add(int64_t r, int64_t d) const {
    Vector total[rows][width];
    for (int i = 0; i < rows; ++i) {
      for (int w = 0; w < width; ++w) total[i][w] = load(sums + (r + i) * padded + d + w * kLanes);
    }
    const float* from = weight + r * row_stride;
    for (int64_t k = 0; k < n; ++k) {
      Vector row[width];
      for (int w = 0; w < width; ++w) row[w] = load(x + k * x_stride + d + w * kLanes);
      for (int i = 0; i < rows; ++i) {
        for (int w = 0; w < width; ++w) total[i][w] += row[w] * from[i * row_stride + k * stride];
      }
    }
    for (int i = 0; i < rows; ++i) {
      for (int w = 0; w < width; ++w) store(sums + (r + i) * padded + d + w * kLanes, total[i][w]);
    }
  }
};

// Pairs of a query block and a key block of one key/value head. Every sum takes its query blocks in ascending
// and its key blocks in descending order, whoever computes them.
class BackwardLocal {
 public:
  BackwardLocal(const MemoryAttentionParams& p, int64_t head)
      : p_(p),
        b_(head / p.G),
        g_(head % p.G),
        dropout_(p),
        query_(kPair * p.padded),
        grad_(kPair * p.padded),
        query_rows_(kPair * p.padded),
        grad_rows_(kPair * p.padded),
        key_rows_(kTile * p.padded),
        value_rows_(kTile * p.padded),
        weights_(kTile * kQueries),
        products_(kTile * kQueries),
        lse_(kPair),
        weight_(kPair),
        offset_(kPair),
        dropout_row_(kPair) {}

  void run() {
    for (int64_t q = 0; q < memory_attention_query_blocks(p_); ++q) {
      prepare(q);
      for (int64_t k = memory_attention_blocks(p_.S) - 1; k >= 0; --k) {
        if (memory_attention_sees(p_, q, k)) add_pair(k);
      }
    }
  }

  // Takes up a block of queries.
  void prepare(int64_t query_block) {
    const int64_t blocks = memory_attention_blocks(p_.T);
    h_ = g_ * (p_.H / p_.G) + query_block / blocks;
    first_ = query_block % blocks * kPair;
    end_ = smaller(first_ + kPair, p_.T);
    for (int64_t i = 0; first_ + i < end_; i += kQueries) {
      const Block block = block_at(i);
      block.load_queries(p_.query, p_.query_stride, p_.scale, query_rows_ + i * p_.padded,
                         query_ + i * p_.padded);
      block.load_queries(p_.grad, p_.grad_stride, 1.0f, grad_rows_ + i * p_.padded, grad_ + i * p_.padded);
      for (int64_t lane = 0; lane < kQueries; ++lane) {
        const int64_t row = block.row(lane);
        const bool there = lane < block.count;  // lanes without a query weigh nothing
        const float lse = there ? p_.local_lse[row] : 0.0f;
        lse_[i + lane] = lse == -kInfinity ? 0.0f : lse;
        weight_[i + lane] = there ? p_.local_weight[row] : 0.0f;
        offset_[i + lane] = there ? p_.local_offset[row] : 0.0f;
        dropout_row_[i + lane] = dropout_.row(row);
      }
      finite_[i / kQueries] = all_finite(query_rows_ + i * p_.padded, p_.padded, kQueries, p_.padded) &&
                              all_finite(grad_rows_ + i * p_.padded, p_.padded, kQueries, p_.padded);
    }
  }

  // Adds what the queries taken up and a block of keys do.
  void add_pair(int64_t key_block) {
    const int64_t j = key_block * kTile, tile = smaller(kTile, p_.S - j);
    const Block all(p_, b_, h_, first_, end_);
    if (!all.any_shown(j, tile)) return;
    const Rows key(all, p_.key, p_.key_stride, j, tile, key_rows_);
    const Rows value(all, p_.value, p_.value_stride, j, tile, value_rows_);
    const int64_t at = ((b_ * p_.G + g_) * p_.S + j) * p_.padded;
    int keys_finite = -1;  // not known yet
    for (int64_t i = 0; first_ + i < end_; i += kQueries) {
      const Block block = block_at(i);
      const int64_t n = smaller(tile, block.end() - j);
      if (n <= 0 || j + n <= block.begin()) continue;
      score_rows(key.data, key.stride, n, query_ + i * p_.padded, p_.D, weights_);
      bias_scores(block, j, n, weights_);
      score_rows(value.data, value.stride, n, grad_ + i * p_.padded, p_.D, products_);
      differentiate(i, j, n);
      // Zero times NaN is not zero: only where there is some are the hidden pairs of a block told apart.
      if (!block.all_see(j, n)) {
        if (keys_finite < 0) keys_finite = all_finite(key.data, key.stride, tile, p_.padded);
        if (!keys_finite || !finite_[i / kQueries] || !all_finite(weights_, kQueries, n, kQueries) ||
            !all_finite(products_, kQueries, n, kQueries)) {
          add_seen(block, i, j, n, key);
          continue;
        }
      }
      const float* query = query_rows_ + i * p_.padded;
      const float* grad = grad_rows_ + i * p_.padded;
      const int64_t padded = p_.padded;
      Accumulation{weights_, grad, kQueries, 1, padded, block.count, padded, p_.dvalue_sum + at}.run(n);
      Accumulation{products_, query, kQueries, 1, padded, block.count, padded, p_.dkey_sum + at}.run(n);
      Accumulation{products_,  key.data, 1,      kQueries,
                   key.stride, n,        padded, p_.dquery_sum + block.row(0) * padded}
          .run(block.count);
    }
  }

 private:
  // What add_pair does with all pairs of a block, for those alone that are visible.
  void add_seen(const Block& block, int64_t i, int64_t j, int64_t n, const Rows& key) const {
    const int64_t at = ((b_ * p_.G + g_) * p_.S + j) * p_.padded;
    for (int64_t k = 0; k < n; ++k) {
      for (int64_t lane = 0; lane < block.count; ++lane) {
        if (!block.seers(j + k, lane / kLanes)[lane % kLanes]) continue;
        const float weight = weights_[k * kQueries + lane], product = products_[k * kQueries + lane];
        add(p_.dvalue_sum + at + k * p_.padded, weight, grad_rows_ + (i + lane) * p_.padded);
        add(p_.dkey_sum + at + k * p_.padded, product, query_rows_ + (i + lane) * p_.padded);
        add(p_.dquery_sum + block.row(lane) * p_.padded, product, key.data + k * key.stride);
      }
    }
  }

  // sum [padded] += weight * row
  void add(float* sum, float weight, const float* row) const {
    for (int64_t d = 0; d < p_.padded; d += kLanes) store(sum + d, load(sum + d) + load(row + d) * weight);
  }

  Block block_at(int64_t i) const { return Block(p_, b_, h_, first_ + i, end_); }

  // Scores and grad . value of keys j, j + 1, ... become what values weigh in the output, and the scores'
  // gradients times the scale.
  void differentiate(int64_t i, int64_t j, int64_t n) const {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t lane = i + v * kLanes;
      const Vector lse = load(lse_ + lane), part = load(weight_ + lane), offset = load(offset_ + lane);
      const BitsVector row = *reinterpret_cast<const BitsVector*>(dropout_row_ + lane);
      for (int64_t k = 0; k < n; ++k) {
        float* weight = weights_ + k * kQueries + v * kLanes;
        float* product = products_ + k * kQueries + v * kLanes;
        const Vector softmax = exp_of_negative(load(weight) - lse);
        const Vector kept = dropout_.on ? part * dropout_.factor(row ^ Dropout::column(j + k)) : part;
        store(weight, softmax * kept);
        store(product, softmax * p_.scale * (kept * load(product) + offset));
      }
    }
  }

  const MemoryAttentionParams& p_;
  const int64_t b_, g_;
  const Dropout dropout_;
  int64_t h_ = 0, first_ = 0, end_ = 0;   // the queries taken up
  Buffer<float> query_, grad_;            // [padded, kQueries] for each kQueries of them
  Buffer<float> query_rows_, grad_rows_;  // [kPair, padded]
  Buffer<float> key_rows_, value_rows_;   // [kTile, padded], when converted
  Buffer<float> weights_, products_;      // [kTile, kQueries]
  Buffer<float> lse_, weight_, offset_;   // [kPair]
  Buffer<uint32_t> dropout_row_;          // [kPair]
  bool finite_[kPair / kQueries];         // of each kQueries queries and their gradients
};

inline void round_rows(const MemoryAttentionParams& p, const float* sums, void* rows, int64_t first,
                       int64_t n) {
  for (int64_t i = first; i < first + n; ++i) store_row(sums + i * p.padded, p.D, rows, p.type, i * p.D);
}

}  // namespace

void memory_attention_backward_memory(const MemoryAttentionParams& p, int64_t task) {
  BackwardMemory(Block::of_task(p, task)).run();
}

void memory_attention_backward_pair(const MemoryAttentionParams& p, int64_t task) {
  const int64_t keys = memory_attention_blocks(p.S), queries = memory_attention_query_blocks(p);
  BackwardLocal local(p, task / keys / queries);
  local.prepare(task / keys % queries);
  local.add_pair(task % keys);
}

void memory_attention_backward_head(const MemoryAttentionParams& p, int64_t task) {
  BackwardLocal(p, task).run();
}

void memory_attention_backward_round(const MemoryAttentionParams& p, int64_t task) {
  if (task < p.B * p.G) {
    round_rows(p, p.dkey_sum, p.dkey, task * p.S, p.S);
    round_rows(p, p.dvalue_sum, p.dvalue, task * p.S, p.S);
  } else {
    round_rows(p, p.dquery_sum, p.dquery, (task - p.B * p.G) * p.T, p.T);
  }
}

}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
