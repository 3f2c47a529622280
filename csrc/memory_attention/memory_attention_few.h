// Forward tasks when queries are few, as in decoding: keys are shared by all queries of a key/value head, and
// split into pieces of fixed size, so that the result does not depend on the number of threads. Part of
// memory_attention_task.h.
#pragma once

#include "memory_attention/memory_attention_forward.h"

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

constexpr int64_t kFew = kLanes * 3 / 4;  // T up to here, in queries per head

inline int64_t pieces_of(const MemoryAttentionParams& p) { return (p.S + kSplit - 1) / kSplit; }

// Where the piece of one query lies: its output [D], relative to its maximum, the maximum and the total.
inline float* piece_at(const MemoryAttentionParams& p, int64_t row, int64_t split) {
  return p.pieces + (row * pieces_of(p) + split) * (p.D + 2);
}

class Piece {
 public:
  Piece(const MemoryAttentionParams& p, int64_t task)
      : p_(p),
        b_(task / pieces_of(p) / p.G),
        g_(task / pieces_of(p) % p.G),
        split_(task % pieces_of(p)),
        first_(split_ * kSplit),
        n_(smaller(kSplit, p.S - first_)),
        queries_(p.H / p.G * p.T),
        dropout_(p),
        query_(queries_ * p.padded),
        scores_(queries_ * kSplit),
        out_(p.padded),
        key_at_(kSplit),
        value_at_(kSplit),
        seen_at_(kSplit) {}

  void run() {
    if (!any_visible()) return write_nothing();
    for (int64_t i = 0; i < queries_; ++i) {
      block_of(i).load_query(p_.query, p_.query_stride, 0, query_ + i * p_.padded);
      multiply(query_ + i * p_.padded, p_.D, p_.scale);
    }
    for (int64_t j = 0; j < kSplit; ++j) {
      const int64_t key = first_ + smaller(j, n_ - 1);
      key_at_[j] = b_ * p_.key_stride[0] + g_ * p_.key_stride[1] + key * p_.key_stride[2];
      value_at_[j] = b_ * p_.value_stride[0] + g_ * p_.value_stride[1] + key * p_.value_stride[2];
    }
    // A tile of keys serves all queries while it is in the first-level cache.
    for (int64_t j = 0; j < n_; j += kTile) {
      const Scattered keys{p_.key, p_.type, key_at_ + j, smaller(kTile, n_ - j), p_.D};
      for (int64_t i = 0; i < queries_; ++i)
        score_scattered(keys, query_ + i * p_.padded, Scattered{}, scores_ + i * kSplit + j);
    }
    for (int64_t i = 0; i < queries_; ++i) finish(block_of(i), scores_ + i * kSplit);
  }

 private:
  bool any_visible() const {
    const Block first = block_of(0);
    return first_ + n_ > first.begin() && first.any_shown(first_, n_);
  }

  void write_nothing() const {
    for (int64_t i = 0; i < queries_; ++i) {
      float* piece = piece_at(p_, block_of(i).row(0), split_);
      std::memset(piece, 0, (p_.D + 2) * sizeof(float));
      piece[p_.D] = -kInfinity;
    }
  }

  // Query i of those that share the keys.
  Block block_of(int64_t i) const { return Block(p_, b_, g_ * (p_.H / p_.G) + i / p_.T, i % p_.T, p_.T); }

  void finish(const Block& block, float* scores) const {
    hide(block, scores);
    const Sum sum = exponentiate(scores, n_);
    if (dropout_.on) drop(block.row(0), scores);
    combine_scattered({p_.value, p_.type, value_at_, n_, p_.D}, scores, out_);
    // As in Forward: hidden NaN and infinity, weighed with zero, show in the result.
    if (!all_finite(out_, 0, 1, p_.padded) && !block.all_see(first_, n_)) combine_seen(block, scores);
    float* piece = piece_at(p_, block.row(0), split_);
    std::memcpy(piece, out_, p_.D * sizeof(float));
    piece[p_.D] = sum.maximum;
    piece[p_.D + 1] = sum.total;
  }

  // The output of the weights of those keys that the query sees; `weights` is overwritten.
  void combine_seen(const Block& block, float* weights) const {
    int64_t seen = 0;
    for (int64_t j = 0; j < n_; ++j) {
      if (!block.seers(first_ + j, 0)[0]) continue;
      seen_at_[seen] = value_at_[j];
      weights[seen++] = weights[j];
    }
    combine_scattered({p_.value, p_.type, seen_at_, seen, p_.D}, weights, out_);
  }

  // Distance bias and visibility.
  void hide(const Block& block, float* scores) const {
    const float slope = p_.slopes ? p_.slopes[block.h] : 0.0f;
    const Vector lane = lane_numbers();
    for (int64_t j = 0; j < n_; j += kLanes) {
      const Vector distance = static_cast<float>(p_.S - p_.T + block.first - first_ - j) - lane;
      store(scores + j, bias(p_, slope, distance, load(scores + j)));
    }
    for (int64_t j = 0; p_.key_mask && j < n_; ++j) {
      if (!*block.key_mask(first_ + j)) scores[j] = -kInfinity;
    }
  }

  void drop(int64_t row, float* weights) const {
    const uint32_t bits = dropout_.row(row);
    BitsVector column;
    for (int i = 0; i < kLanes; ++i) column[i] = Dropout::column(i);
    for (int64_t j = 0; j < n_; j += kLanes) {
      const Vector factor = dropout_.factor((column + Dropout::column(first_ + j)) ^ bits);
      store(weights + j, load(weights + j) * factor);
    }
  }

  const MemoryAttentionParams& p_;
  const int64_t b_, g_, split_, first_, n_, queries_;
  const Dropout dropout_;
  Buffer<float> query_;                          // [queries, padded]
  Buffer<float> scores_;                         // [queries, kSplit]
  Buffer<float> out_;                            // [padded]
  Buffer<int64_t> key_at_, value_at_, seen_at_;  // [kSplit]
};

// Puts the pieces of a query together and attends to its memory.
inline void finish_few(const Block& block) {
  const auto& p = block.p;
  Memory memory(p);
  const Buffer<float> local(p.padded), memory_part(p.padded);
  const int64_t row = block.row(0);
  Sum sum{-kInfinity, 0.0f};
  for (int64_t split = 0; split < pieces_of(p); ++split) {
    const float maximum = piece_at(p, row, split)[p.D];
    sum.maximum = maximum > sum.maximum ? maximum : sum.maximum;
  }
  const float base = sum.maximum == -kInfinity ? 0.0f : sum.maximum;
  for (int64_t split = 0; split < pieces_of(p); ++split) {
    const float* piece = piece_at(p, row, split);
    const float factor = std::exp(piece[p.D] - base);
    sum.total += factor * piece[p.D + 1];
    for (int64_t d = 0; d < p.D; ++d) local[d] += factor * piece[d];
  }
  multiply(local, p.D, sum.inverse());
  finish(block, 0, local, sum.lse(), memory, memory_part);
}

}  // namespace

int64_t memory_attention_few() { return kFew; }

void memory_attention_piece(const MemoryAttentionParams& p, int64_t task) { Piece(p, task).run(); }

void memory_attention_finish(const MemoryAttentionParams& p, int64_t task) {
  finish_few(Block(p, task / p.T / p.H, task / p.T % p.H, task % p.T, p.T));
}

}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
