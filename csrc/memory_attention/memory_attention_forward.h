// Forward tasks for blocks of queries; part of memory_attention_task.h.
#pragma once

#include "memory_attention/memory_attention_block.h"
#include "memory_attention/memory_attention_dropout.h"
#include "memory_attention/memory_attention_memory.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

// Writes what is known of query i of a block, given its local part [D], which is overwritten.
inline void finish(const Block& block, int64_t i, float* local, float local_lse, Memory& memory,
                   float* memory_part) {
  const auto& p = block.p;
  const int64_t row = block.row(i);
  memory.find(block, i);
  const float memory_lse = memory.attend(memory_part);
  std::memcpy(p.local_out + row * p.D, local, p.D * sizeof(float));
  std::memcpy(p.memory_out + row * p.D, memory_part, p.D * sizeof(float));
  p.local_lse[row] = local_lse;
  p.memory_lse[row] = memory_lse;
  const float share = block.share(local_lse, memory_lse);
  for (int64_t d = 0; d < p.D; ++d) local[d] = (1.0f - share) * local[d] + share * memory_part[d];
  store_row(local, p.D, p.out, p.type, row * p.D);
}

class Forward {
 public:
  explicit Forward(const Block& block)
      : block_(block),
        p_(block.p),
        dropout_(p_),
        memory_(p_),
        query_(p_.padded * kQueries),
        local_(p_.padded * kQueries),
        scores_(kTile * kQueries),
        rows_(larger(kTile, kQueries) * p_.padded),
        memory_part_(p_.padded) {}

  void run() {
    attend_local();
    // NaN or infinity: seen, or hidden and weighed with zero, which is told apart only now that it matters.
    if (!all_finite(local_, kQueries, p_.D, kQueries)) {
      hidden_apart_ = true;
      attend_local();
    }
    for (int64_t i = 0; i < kQueries; i += kLanes) {
      for (int64_t d = 0; d < p_.D; d += kLanes)
        transpose(local_ + d * kQueries + i, kQueries, rows_ + i * p_.padded + d, p_.padded);
    }
    for (int64_t i = 0; i < block_.count; ++i) {
      const Sum sum{maximum_[i / kLanes][i % kLanes], total_[i / kLanes][i % kLanes]};
      float* local = rows_ + i * p_.padded;
      multiply(local, p_.D, sum.inverse());
      finish(block_, i, local, sum.lse(), memory_, memory_part_);
    }
  }

 private:
  void attend_local() {
    block_.load_queries(p_.query, p_.query_stride, p_.scale, rows_, query_);
    for (int v = 0; v < kVectors; ++v) maximum_[v] = fill(-kInfinity), total_[v] = Vector{};
    std::memset(local_, 0, p_.padded * kQueries * sizeof(float));
    for (int64_t j = block_.begin(); j < block_.end(); j += kTile) {
      const int64_t n = smaller(kTile, block_.end() - j);
      if (!block_.any_shown(j, n)) continue;
      const Rows key(block_, p_.key, p_.key_stride, j, n, rows_);
      score_rows(key.data, key.stride, n, query_, p_.D, scores_);
      bias_scores(block_, j, n, scores_);
      rescale(n);
      if (dropout_.on) drop(j, n);
      const Rows value(block_, p_.value, p_.value_stride, j, n, rows_);
      if (hidden_apart_ && !block_.all_see(j, n)) {
        add_seen_rows(value.data, value.stride, j, n);
      } else {
        add_weighted_rows(value.data, value.stride, n);
      }
    }
  }

  // Online softmax (Milakov and Gimelshein 2018): scores become weights relative to the new maximum.
  void rescale(int64_t n) {
    for (int v = 0; v < kVectors; ++v) {
      Vector maximum = maximum_[v];
      for (int64_t j = 0; j < n; ++j) {
        const Vector s = load(scores_ + j * kQueries + v * kLanes);
        maximum = s > maximum ? s : maximum;
      }
      // A query that has seen nothing yet has maximum -inf, and -inf - -inf is no number.
      const Vector base = maximum == -kInfinity ? Vector{} : maximum;
      const Vector factor = exp_of_negative(maximum_[v] - base);
      total_[v] *= factor;
      for (int64_t d = 0; d < p_.D; ++d) {
        float* at = local_ + d * kQueries + v * kLanes;
        store(at, load(at) * factor);
      }
      for (int64_t j = 0; j < n; ++j) {
        float* at = scores_ + j * kQueries + v * kLanes;
        const Vector weight = exp_of_negative(load(at) - base);
        total_[v] += weight;
        store(at, weight);
      }
      maximum_[v] = maximum;
    }
  }

  // The total of the weights has been taken before.
  void drop(int64_t j, int64_t n) const {
    BitsVector row[kVectors];
    for (int i = 0; i < kQueries; ++i) row[i / kLanes][i % kLanes] = dropout_.row(block_.row(i));
    for (int64_t i = 0; i < n; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* at = scores_ + i * kQueries + v * kLanes;
        store(at, load(at) * dropout_.factor(row[v] ^ Dropout::column(j + i)));
      }
    }
  }

  // local_ += rows [n, D]^T . scores_ [n, kQueries]
  void add_weighted_rows(const float* rows, int64_t row_stride, int64_t n) const {
    int64_t d = 0;
    for (; d + kRows <= p_.D; d += kRows) add_weighted<kRows>(rows, row_stride, n, d);
    for (; d < p_.D; ++d) add_weighted<1>(rows, row_stride, n, d);
  }

  // The same, of keys j, j + 1, ... to those queries that see them.
  void add_seen_rows(const float* rows, int64_t row_stride, int64_t j, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const IntVector seers = block_.seers(j + i, v);
        const Vector weight = load(scores_ + i * kQueries + v * kLanes);
        for (int64_t d = 0; d < p_.D; ++d) {
          float* at = local_ + d * kQueries + v * kLanes;
          const Vector before = load(at);
          store(at, seers ? before + weight * rows[i * row_stride + d] : before);
        }
      }
    }
  }

  // add_weighted_rows for dims [d, d + width).
  template <int width>
  void add_weighted(const float* rows, int64_t row_stride, int64_t n, int64_t d) const {
    Vector total[width][kVectors];
    std::memcpy(total, local_ + d * kQueries, sizeof total);
    for (int64_t j = 0; j < n; ++j) {
      const float* row = rows + j * row_stride + d;
      for (int i = 0; i < width; ++i) {
        for (int v = 0; v < kVectors; ++v) total[i][v] += load(scores_ + j * kQueries + v * kLanes) * row[i];
      }
    }
    std::memcpy(local_ + d * kQueries, total, sizeof total);
  }

  const Block block_;
  const MemoryAttentionParams& p_;
  const Dropout dropout_;
  Memory memory_;
  bool hidden_apart_ = false;  // values are not weighed with zero but left out where they are hidden
  Vector maximum_[kVectors], total_[kVectors];
  Buffer<float> query_, local_;  // [padded, kQueries]: scaled queries, unnormalised local outputs
  Buffer<float> scores_;         // [kTile, kQueries]
  Buffer<float> rows_;           // [kTile or kQueries, padded]: converted keys or values, then local outputs
  Buffer<float> memory_part_;    // [padded]
};

}  // namespace

int64_t memory_attention_block() { return kQueries; }

void memory_attention_forward(const MemoryAttentionParams& p, int64_t task) {
  Forward(Block::of_task(p, task)).run();
}

}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
