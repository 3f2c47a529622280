#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/scalar.h"
#include "ring_write/ring_write.h"

namespace longmem {
namespace {

template <typename Input, typename Storage>
class HeadWriter {
 public:
  HeadWriter(const RingWriteParams& p, int64_t ring, int64_t head, int64_t begin, int64_t end)
      : p_(p),
        ring_(ring),
        head_(head),
        begin_(begin),
        end_(end),
        closed_(end / p.C),
        first_live_(std::max(begin / p.C, closed_ - p.M)),
        store_(static_cast<Storage*>(p.store) + (ring * p.G + head) * p.M * 2 * p.C * p.D),
        centroid_(static_cast<Storage*>(p.centroid) + (ring * p.G + head) * p.M * p.D),
        tail_(static_cast<Storage*>(p.tail) + (ring * p.G + head) * 2 * p.C * p.D) {}

  void run() {
    flush_tail();
    write_tokens();
    for (int64_t chunk = first_live_; chunk < closed_; ++chunk) write_centroid(chunk);
  }

 private:
  Storage* slot(int64_t chunk) const { return store_ + (chunk % p_.M) * 2 * p_.C * p_.D; }

  // The open chunk closes in this call: what an earlier call left in the tail becomes its beginning.
  void flush_tail() {
    const int64_t chunk = begin_ / p_.C, open = begin_ % p_.C;
    if (chunk >= closed_ || chunk < first_live_) return;
    for (int64_t kv = 0; kv < 2; ++kv) {
      const Storage* from = tail_ + kv * p_.C * p_.D;
      std::copy(from, from + open * p_.D, slot(chunk) + kv * p_.C * p_.D);
    }
  }

  void write_tokens() {
    const Input* key = static_cast<const Input*>(p_.key) + head_ * p_.key_stride[1];
    const Input* value = static_cast<const Input*>(p_.value) + head_ * p_.value_stride[1];
    int64_t chunk = begin_ / p_.C, offset = begin_ % p_.C;
    for (int64_t row = 0; row < p_.B; ++row) {
      if (ring_of_row(p_, row) != ring_) continue;
      for (int64_t token = 0; token < p_.T; ++token) {
        if (p_.mask && !p_.mask[row * p_.mask_stride[0] + token * p_.mask_stride[1]]) continue;
        if (chunk >= first_live_) {
          Storage* to = (chunk < closed_ ? slot(chunk) : tail_) + offset * p_.D;
          convert(key + row * p_.key_stride[0] + token * p_.key_stride[2], to);
          convert(value + row * p_.value_stride[0] + token * p_.value_stride[2], to + p_.C * p_.D);
        }
        if (++offset == p_.C) offset = 0, ++chunk;
      }
    }
  }

  void convert(const Input* from, Storage* to) const {
    for (int64_t d = 0; d < p_.D; ++d) to[d] = static_cast<Storage>(static_cast<float>(from[d]));
  }

  void write_centroid(int64_t chunk) const {
    const Storage* keys = slot(chunk);
    Storage* mean = centroid_ + (chunk % p_.M) * p_.D;
    for (int64_t d = 0; d < p_.D; ++d) {
      float total = 0.0f;
      for (int64_t c = 0; c < p_.C; ++c) total += static_cast<float>(keys[c * p_.D + d]);
      mean[d] = static_cast<Storage>(total / static_cast<float>(p_.C));
    }
  }

  const RingWriteParams& p_;
  const int64_t ring_, head_, begin_, end_, closed_, first_live_;
  Storage *store_, *centroid_, *tail_;
};

}  // namespace

void ring_write_cpu(const RingWriteParams& p, Scalar input, Scalar storage) {
  std::vector<int64_t> end(p.cursor, p.cursor + p.R);
  for (int64_t row = 0; row < p.B; ++row) {
    int64_t kept = p.T;
    if (p.mask) {
      kept = 0;
      for (int64_t t = 0; t < p.T; ++t) kept += p.mask[row * p.mask_stride[0] + t * p.mask_stride[1]];
    }
    end[ring_of_row(p, row)] += kept;
  }
  dispatch_cpu(input, [&](auto in) {
    dispatch_cpu(storage, [&](auto out) {
      using Writer = HeadWriter<typename decltype(in)::type, typename decltype(out)::type>;
      torch::stable::parallel_for(0, p.R * p.G, 1, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          const int64_t ring = i / p.G;
          if (end[ring] > p.cursor[ring]) Writer(p, ring, i % p.G, p.cursor[ring], end[ring]).run();
        }
      });
    });
  });
  std::copy(end.begin(), end.end(), p.cursor);
}

}  // namespace longmem
