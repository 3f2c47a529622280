// ring_write on the CPU: every chunk that closes, and every open tail, is put together from where its tokens
// are.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/scalar.h"
#include "common/scalar_convert.h"
#include "ring_write/ring_write.h"

namespace longmem {
namespace {

struct E4m3 {
  uint8_t bits;
};

// What tokens are rounded to when they arrive: the scale of a chunk is known only when it closes.
template <typename Storage>
using TokenType = std::conditional_t<std::is_same_v<Storage, E4m3>, c10::BFloat16, Storage>;

inline float widen(float x) { return x; }
inline float widen(c10::BFloat16 x) { return static_cast<float>(x); }
inline float widen(c10::Half x) { return half_to_float(x.x); }

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, c10::BFloat16* to) { *to = static_cast<c10::BFloat16>(x); }
inline void narrow(float x, c10::Half* to) { to->x = float_to_half(x); }

template <typename From, typename To>
void convert(const From* from, int64_t n, To* __restrict to) {
  if constexpr (std::is_same_v<From, To>) {
    std::copy(from, from + n, to);
  } else {
    for (int64_t i = 0; i < n; ++i) narrow(widen(from[i]), to + i);
  }
}

struct Source {
  int64_t row, token;
};

// What the call does to one ring. Chunks [first, closed) are closed and stay; chunk `closed` is left open.
struct RingPlan {
  int64_t begin, end;  // the cursor, before and after
  int64_t first, closed;
  const Source* source;  // of token `begin` and of those after it
  int64_t first_task;    // number of this ring's first task

  // Of each head. The one that closes the first chunk reads the old tail and then writes the new one.
  int64_t tasks() const { return begin == end ? 0 : std::max<int64_t>(closed - first, 1); }
};

struct Plan {
  std::vector<RingPlan> rings;
  std::vector<Source> sources;
  int64_t tasks = 0;
};

bool is_kept(const RingWriteParams& p, int64_t row, int64_t token) {
  return p.mask == nullptr || p.mask[row * p.mask_stride[0] + token * p.mask_stride[1]];
}

// Reads the mask twice. Should it say more tokens the second time, the surplus is dropped; should it say
// fewer, the call's first token stands in: nothing else is read or written, whoever changes it meanwhile.
Plan plan_of(const RingWriteParams& p) {
  Plan plan;
  std::vector<int64_t> tokens(p.R, 0);
  for (int64_t row = 0; row < p.B; ++row) {
    int64_t kept = p.mask == nullptr ? p.T : 0;
    for (int64_t t = 0; p.mask != nullptr && t < p.T; ++t) kept += is_kept(p, row, t);
    tokens[ring_of_row(p, row)] += kept;
  }
  std::vector<Source*> next(p.R);
  plan.sources.resize(p.B * p.T);
  Source* source = plan.sources.data();
  for (int64_t r = 0; r < p.R; ++r) {
    const int64_t begin = p.cursor[r];
    STD_TORCH_CHECK(begin >= 0 && begin < kMaxCursor - tokens[r],
                    "ring_write: ring.cursor must lie in [0, 2^48), also after the call, got ", begin);
    const int64_t end = begin + tokens[r], closed = end / p.C;
    const int64_t first = std::max(begin / p.C, closed - p.M);
    plan.rings.push_back({begin, end, first, closed, source, plan.tasks});
    plan.tasks += plan.rings.back().tasks() * p.G;
    next[r] = source;
    source += tokens[r];
  }
  for (int64_t row = 0; row < p.B; ++row) {
    const int64_t ring = ring_of_row(p, row);
    const Source* const stop = plan.rings[ring].source + tokens[ring];
    Source*& to = next[ring];
    for (int64_t t = 0; t < p.T && to < stop; ++t) {
      if (is_kept(p, row, t)) *to++ = {row, t};
    }
  }
  return plan;
}

template <typename Input, typename Storage>
class Writer {
 public:
  using Token = TokenType<Storage>;

  explicit Writer(const RingWriteParams& p) : p_(p), total_(p.D), chunk_(kQuantised ? 2 * p.C * p.D : 0) {}

  // Task `task` of head `head` of a ring.
  void run(const RingPlan& plan, int64_t ring, int64_t head, int64_t task) {
    const int64_t chunk = plan.first + task;
    if (chunk < plan.closed) close(plan, ring, head, chunk);
    const int64_t open = plan.closed * p_.C;
    if (task == 0) gather(plan, ring, head, std::max(plan.begin, open), plan.end, tail_of(ring, head));
  }

 private:
  static constexpr bool kQuantised = std::is_same_v<Storage, E4m3>;

  Token* tail_of(int64_t ring, int64_t head) const {
    return static_cast<Token*>(p_.tail) + (ring * p_.G + head) * 2 * p_.C * p_.D;
  }

  void close(const RingPlan& plan, int64_t ring, int64_t head, int64_t chunk) {
    const int64_t slot = (ring * p_.G + head) * p_.M + chunk % p_.M, first = chunk * p_.C;
    Storage* stored = static_cast<Storage*>(p_.store) + slot * 2 * p_.C * p_.D;
    Token* tokens;
    if constexpr (kQuantised) {
      tokens = chunk_.data();
    } else {
      tokens = stored;
    }
    for (int64_t kv = 0; kv < 2; ++kv) {  // what an earlier call left in the tail is the chunk's beginning
      const Token* tail = tail_of(ring, head) + kv * p_.C * p_.D;
      std::copy(tail, tail + std::max<int64_t>(plan.begin - first, 0) * p_.D, tokens + kv * p_.C * p_.D);
    }
    gather(plan, ring, head, std::max(plan.begin, first), first + p_.C, tokens);
    average(tokens, static_cast<Token*>(p_.centroid) + slot * p_.D);
    if constexpr (kQuantised) {
      for (int64_t kv = 0; kv < 2; ++kv) {
        const int64_t offset = kv * p_.C * p_.D;
        p_.scale[2 * slot + kv] = quantise(tokens + offset, p_.C * p_.D, stored + offset);
      }
    }
  }

  // Brings tokens [from, to) of a ring from the input to their places in a chunk [2, C, D].
  void gather(const RingPlan& plan, int64_t ring, int64_t head, int64_t from, int64_t to,
              Token* chunk) const {
    const Input* key = static_cast<const Input*>(p_.key) + head * p_.key_stride[1];
    const Input* value = static_cast<const Input*>(p_.value) + head * p_.value_stride[1];
    for (int64_t position = from; position < to; ++position) {
      const Source source = plan.source[position - plan.begin];
      Token* place = chunk + position % p_.C * p_.D;
      convert(key + source.row * p_.key_stride[0] + source.token * p_.key_stride[2], p_.D, place);
      convert(value + source.row * p_.value_stride[0] + source.token * p_.value_stride[2], p_.D,
              place + p_.C * p_.D);
    }
  }

  // In order of the tokens, as every implementation does.
  void average(const Token* keys, Token* __restrict mean) {
    float* __restrict total = total_.data();
    std::fill_n(total, p_.D, 0.0f);
    for (int64_t c = 0; c < p_.C; ++c) {
      for (int64_t d = 0; d < p_.D; ++d) total[d] += widen(keys[c * p_.D + d]);
    }
    const float count = static_cast<float>(p_.C);
    for (int64_t d = 0; d < p_.D; ++d) narrow(total[d] / count, mean + d);
  }

  // Returns the scale.
  static float quantise(const Token* from, int64_t n, Storage* __restrict to) {
    int32_t largest = 0;
    for (int64_t i = 0; i < n; ++i)
      largest = std::max(largest, static_cast<int32_t>(bits_of(widen(from[i])) & 0x7fffffffu));
    const float scale = e4m3_scale(largest);
    for (int64_t i = 0; i < n; ++i) to[i].bits = float_to_e4m3(widen(from[i]) / scale);
    return scale;
  }

  const RingWriteParams& p_;
  std::vector<float> total_;
  std::vector<Token> chunk_;
};

template <typename Input, typename Storage>
void write(const RingWriteParams& p, const Plan& plan) {
  // Waking another thread takes as long as writing so many elements.
  constexpr int64_t kWorthAThread = 65536;
  int64_t tokens = 0;
  for (const RingPlan& ring : plan.rings) tokens += ring.end - ring.begin;
  const int64_t grain =
      std::max<int64_t>(1, kWorthAThread * plan.tasks / std::max<int64_t>(1, 2 * p.G * p.D * tokens));
  torch::stable::parallel_for(0, plan.tasks, grain, [&](int64_t from, int64_t to) {
    Writer<Input, Storage> writer(p);
    int64_t ring = 0;
    for (int64_t task = from; task < to; ++task) {
      while (task >= plan.rings[ring].first_task + plan.rings[ring].tasks() * p.G) ++ring;
      const RingPlan& of_ring = plan.rings[ring];
      const int64_t i = task - of_ring.first_task;
      writer.run(of_ring, ring, i / of_ring.tasks(), i % of_ring.tasks());
    }
  });
}

}  // namespace

void ring_write_cpu(const RingWriteParams& p, Scalar input, Scalar storage) {
  const Plan plan = plan_of(p);
  dispatch_cpu(input, [&](auto in) {
    using Input = typename decltype(in)::type;
    if (storage == Scalar::e4m3) return write<Input, E4m3>(p, plan);
    dispatch_cpu(storage, [&](auto out) { write<Input, typename decltype(out)::type>(p, plan); });
  });
  for (int64_t r = 0; r < p.R; ++r) p.cursor[r] = plan.rings[r].end;
}

}  // namespace longmem
