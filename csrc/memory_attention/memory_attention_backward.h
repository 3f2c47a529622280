// Backward tasks; part of memory_attention_task.h.
//
// With out = (1 - share) local + share memory, either part's scores have the gradient
// weight * softmax * (grad . value - delta): gated, delta = grad . part; joint, where the share depends on
// all scores, delta = grad . out (FlashAttention-2, section 3.1, for one softmax in two pieces).

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

// What backward needs to know of one query.
struct QueryGrad {
  float share, local_delta, memory_delta, dgate;

  QueryGrad(const Block& block, int64_t i, const float* grad) {
    const auto& p = block.p;
    const int64_t row = block.row(i);
    share = block.share(p.local_lse[row], p.memory_lse[row]);
    local_delta = dot(grad, p.local_out + row * p.D, p.D);
    memory_delta = dot(grad, p.memory_out + row * p.D, p.D);
    dgate = p.gate ? share * (1.0f - share) * (memory_delta - local_delta) : 0.0f;
    if (!p.gate) local_delta = memory_delta = (1.0f - share) * local_delta + share * memory_delta;
  }
};

class BackwardMemory {
 public:
  explicit BackwardMemory(const Block& block)
      : block_(block),
        p_(block.p),
        grad_(p_.D),
        query_(p_.D),
        out_(p_.D),
        scratch_(p_.D),
        weights_(padded_tokens(p_)),
        products_(padded_tokens(p_)) {}

  void run() {
    for (int64_t i = 0; i < block_.count; ++i) {
      block_.load_query(p_.grad, p_.grad_stride, i, 1.0f, grad_);
      const QueryGrad about(block_, i, grad_);
      p_.dgate[block_.row(i)] = about.dgate;
      for (int64_t d = 0; d < p_.D; ++d) out_[d] = 0.0f;
      if (about.share > 0.0f) differentiate(i, about);
      store_row(out_, p_.D, p_.dmemory_query, p_.type, block_.row(i) * p_.D);
    }
  }

 private:
  void differentiate(int64_t i, const QueryGrad& about) {
    const int64_t padded = padded_tokens(p_);
    const Chunks chunks(block_, i);
    block_.load_query(p_.memory_query, p_.memory_query_stride, i, p_.scale, query_);
    score_chunks(chunks, query_, p_.D, padded, scratch_, weights_);
    chunks.for_each_value(scratch_,
                          [&](int64_t token, const float* row) { products_[token] = dot(grad_, row, p_.D); });
    const float lse = p_.memory_lse[block_.row(i)], factor = about.share * p_.scale;
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vector weight = exp_of_negative(load(weights_ + j) - lse) * factor;
      store(weights_ + j, weight * (load(products_ + j) - about.memory_delta));
    }
    chunks.for_each_key(
        scratch_, [&](int64_t token, const float* row) { add_scaled(weights_[token], row, p_.D, out_); });
  }

  const Block block_;
  const MemoryAttentionParams& p_;
  Buffer<float> grad_, query_, out_, scratch_;  // [D]
  Buffer<float> weights_, products_;            // [K * C] and padding
};

// All query heads of one key/value head, so that dkey and dvalue are summed in one order.
class BackwardLocal {
 public:
  BackwardLocal(const MemoryAttentionParams& p, int64_t row, int64_t kv_head)
      : p_(p),
        b_(row),
        g_(kv_head),
        padded_((p.D + kLanes - 1) / kLanes * kLanes),
        dkey_(p.S * padded_),
        dvalue_(p.S * padded_),
        query_(p.D * kQueries),
        grad_(p.D * kQueries),
        dquery_(p.D * kQueries),
        query_rows_(kQueries * padded_),
        grad_rows_(kQueries * padded_),
        weights_(kTile * kQueries),
        products_(kTile * kQueries),
        rows_(kTile * p.D),
        row_(p.D),
        lse_(kQueries),
        delta_(kQueries),
        share_(kQueries) {}

  void run() {
    const int64_t group = p_.H / p_.G;
    for (int64_t h = g_ * group; h < (g_ + 1) * group; ++h) {
      for (int64_t t = 0; t < p_.T; t += kQueries) differentiate(Block(p_, b_, h, t));
    }
    for (int64_t j = 0; j < p_.S; ++j) {
      const int64_t at = ((b_ * p_.G + g_) * p_.S + j) * p_.D;
      store_row(dkey_ + j * padded_, p_.D, p_.dkey, p_.type, at);
      store_row(dvalue_ + j * padded_, p_.D, p_.dvalue, p_.type, at);
    }
  }

 private:
  void differentiate(const Block& block) {
    prepare(block);
    for (int64_t j = block.begin(); j < block.end(); j += kTile) {
      const int64_t n = smaller(kTile, block.end() - j);
      const Rows key(block, p_.key, p_.key_stride, j, n, rows_);
      score_rows(key.data, key.stride, n, query_, p_.D, weights_);
      bias_scores(block, j, n, weights_);
      const Rows value(block, p_.value, p_.value_stride, j, n, rows_);
      score_rows(value.data, value.stride, n, grad_, p_.D, products_);
      for (int64_t i = 0; i < n * kQueries; i += kLanes) {
        const int64_t lane = i % kQueries;
        const Vector weight = exp_of_negative(load(weights_ + i) - load(lse_ + lane)) * load(share_ + lane);
        store(weights_ + i, weight);
        store(products_ + i, weight * (load(products_ + i) - load(delta_ + lane)));
      }
      add_outer(weights_, grad_rows_, n, dvalue_ + j * padded_);
      add_outer(products_, query_rows_, n, dkey_ + j * padded_);
      const Rows again(block, p_.key, p_.key_stride, j, n, rows_);  // `rows_` held values meanwhile
      add_weighted_rows(again.data, again.stride, n, products_, p_.D, dquery_);
    }
    for (int64_t i = 0; i < block.count; ++i) {
      for (int64_t d = 0; d < p_.D; ++d) row_[d] = dquery_[d * kQueries + i] * p_.scale;
      store_row(row_, p_.D, p_.dquery, p_.type, block.row(i) * p_.D);
    }
  }

  void prepare(const Block& block) {
    std::memset(query_, 0, p_.D * kQueries * sizeof(float));
    std::memset(grad_, 0, p_.D * kQueries * sizeof(float));
    std::memset(dquery_, 0, p_.D * kQueries * sizeof(float));
    std::memset(query_rows_, 0, kQueries * padded_ * sizeof(float));
    std::memset(grad_rows_, 0, kQueries * padded_ * sizeof(float));
    for (int64_t i = 0; i < kQueries; ++i) {
      lse_[i] = delta_[i] = share_[i] = 0.0f;  // lanes without a query weigh nothing
      if (i >= block.count) continue;
      float* query = query_rows_ + i * padded_;
      float* grad = grad_rows_ + i * padded_;
      block.load_query(p_.query, p_.query_stride, i, p_.scale, query);
      block.load_query(p_.grad, p_.grad_stride, i, 1.0f, grad);
      const QueryGrad about(block, i, grad);
      const float lse = p_.local_lse[block.row(i)];
      lse_[i] = lse == -kInfinity ? 0.0f : lse;
      delta_[i] = about.local_delta;
      share_[i] = 1.0f - about.share;
      for (int64_t d = 0; d < p_.D; ++d) {
        query_[d * kQueries + i] = query[d];
        grad_[d * kQueries + i] = grad[d];
      }
    }
  }

  // sums [n, padded] += weight [n, kQueries] . rows [kQueries, padded]
  void add_outer(const float* weight, const float* rows, int64_t n, float* sums) const {
    constexpr int kKeys = 4, kWidth = 2;
    int64_t j = 0;
    for (; j + kKeys <= n; j += kKeys) {
      int64_t d = 0;
      for (; d + kWidth * kLanes <= padded_; d += kWidth * kLanes)
        add_outer<kKeys, kWidth>(weight, rows, j, d, sums);
      for (; d < padded_; d += kLanes) add_outer<kKeys, 1>(weight, rows, j, d, sums);
    }
    for (; j < n; ++j) {
      for (int64_t d = 0; d < padded_; d += kLanes) add_outer<1, 1>(weight, rows, j, d, sums);
    }
  }

  template <int keys, int width>
  void add_outer(const float* weight, const float* rows, int64_t j, int64_t d, float* sums) const {
    Vector total[keys][width];
    for (int i = 0; i < keys; ++i) {
      for (int w = 0; w < width; ++w) total[i][w] = load(sums + (j + i) * padded_ + d + w * kLanes);
    }
    for (int64_t q = 0; q < kQueries; ++q) {
      for (int w = 0; w < width; ++w) {
        const Vector row = load(rows + q * padded_ + d + w * kLanes);
        for (int i = 0; i < keys; ++i) total[i][w] += row * weight[(j + i) * kQueries + q];
      }
    }
    for (int i = 0; i < keys; ++i) {
      for (int w = 0; w < width; ++w) store(sums + (j + i) * padded_ + d + w * kLanes, total[i][w]);
    }
  }

  const MemoryAttentionParams& p_;
  const int64_t b_, g_, padded_;          // D rounded up to whole vectors
  Buffer<float> dkey_, dvalue_;           // [S, padded]
  Buffer<float> query_, grad_, dquery_;   // [D, kQueries]
  Buffer<float> query_rows_, grad_rows_;  // [kQueries, padded]
  Buffer<float> weights_, products_;      // [kTile, kQueries]
  Buffer<float> rows_;                    // [kTile, D] converted keys or values
  Buffer<float> row_;                     // [D]
  Buffer<float> lse_, delta_, share_;     // [kQueries]
};

}  // namespace

void memory_attention_backward_memory(const MemoryAttentionParams& p, int64_t task) {
  BackwardMemory(Block::of_task(p, task)).run();
}

void memory_attention_backward_local(const MemoryAttentionParams& p, int64_t task) {
  BackwardLocal(p, task / p.G, task % p.G).run();
}

}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
