// Forward tasks; part of memory_attention_task.h.

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

class Forward {
 public:
  explicit Forward(const Block& block)
      : block_(block),
        p_(block.p),
        query_(p_.D * kQueries),
        local_(p_.D * kQueries),
        scores_(kTile * kQueries),
        rows_(kTile * p_.D),
        row_(p_.D),
        memory_(p_.D),
        weights_(padded_tokens(p_)) {}

  void run() {
    attend_local();
    for (int64_t i = 0; i < block_.count; ++i) finish(i);
  }

 private:
  void attend_local() {
    for (int64_t i = 0; i < block_.count; ++i) {
      block_.load_query(p_.query, p_.query_stride, i, p_.scale, row_);
      for (int64_t d = 0; d < p_.D; ++d) query_[d * kQueries + i] = row_[d];
    }
    for (int v = 0; v < kVectors; ++v) maximum_[v] = fill(-kInfinity), total_[v] = Vector{};
    for (int64_t j = block_.begin(); j < block_.end(); j += kTile) {
      const int64_t n = smaller(kTile, block_.end() - j);
      const Rows key(block_, p_.key, p_.key_stride, j, n, rows_);
      score_rows(key.data, key.stride, n, query_, p_.D, scores_);
      bias_scores(block_, j, n, scores_);
      rescale(n);
      const Rows value(block_, p_.value, p_.value_stride, j, n, rows_);
      add_weighted_rows(value.data, value.stride, n, scores_, p_.D, local_);
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

  // Normalises the local part of query i, attends to its chunks, and merges the two.
  void finish(int64_t i) {
    const float total = total_[i / kLanes][i % kLanes];
    const float local_lse = total > 0.0f ? maximum_[i / kLanes][i % kLanes] + std::log(total) : -kInfinity;
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    for (int64_t d = 0; d < p_.D; ++d) row_[d] = local_[d * kQueries + i] * inverse;
    const int64_t at = block_.row(i) * p_.D;
    std::memcpy(p_.local_out + at, row_, p_.D * sizeof(float));

    const float memory_lse = attend_memory(i);
    std::memcpy(p_.memory_out + at, memory_, p_.D * sizeof(float));
    p_.local_lse[block_.row(i)] = local_lse;
    p_.memory_lse[block_.row(i)] = memory_lse;

    const float share = block_.share(local_lse, memory_lse);
    for (int64_t d = 0; d < p_.D; ++d) row_[d] = (1.0f - share) * row_[d] + share * memory_[d];
    store_row(row_, p_.D, p_.out, p_.type, at);
  }

  // memory_ becomes the attention of query i over its chunks; returns its log-sum-exp.
  float attend_memory(int64_t i) {
    const int64_t padded = padded_tokens(p_);
    const Chunks chunks(block_, i);
    block_.load_query(p_.memory_query, p_.memory_query_stride, i, p_.scale, memory_);
    score_chunks(chunks, memory_, p_.D, padded, rows_, weights_);
    float maximum = -kInfinity;
    for (int64_t j = 0; j < padded; ++j) maximum = weights_[j] > maximum ? weights_[j] : maximum;
    for (int64_t d = 0; d < p_.D; ++d) memory_[d] = 0.0f;
    if (maximum == -kInfinity) return -kInfinity;
    Vector total{};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vector weight = exp_of_negative(load(weights_ + j) - maximum);
      total += weight;
      store(weights_ + j, weight);
    }
    const float sum_of_weights = sum(total);
    chunks.for_each_value(
        rows_, [&](int64_t token, const float* row) { add_scaled(weights_[token], row, p_.D, memory_); });
    for (int64_t d = 0; d < p_.D; ++d) memory_[d] /= sum_of_weights;
    return maximum + std::log(sum_of_weights);
  }

  const Block block_;
  const MemoryAttentionParams& p_;
  Vector maximum_[kVectors], total_[kVectors];
  Buffer<float> query_, local_;  // [D, kQueries]: scaled queries, unnormalised local outputs
  Buffer<float> scores_;         // [kTile, kQueries]
  Buffer<float> rows_;           // [kTile, D] converted keys or values
  Buffer<float> row_, memory_;   // [D]
  Buffer<float> weights_;        // [K * C] and padding
};

}  // namespace

void memory_attention_forward(const MemoryAttentionParams& p, int64_t task) {
  Forward(Block::of_task(p, task)).run();
}

}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
