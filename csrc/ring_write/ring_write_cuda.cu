// ring_write on the GPU, in one launch: no scratch, nothing read back, so that it can be captured into a CUDA
// graph.
//
// Every block settles for itself what the call gives its ring. The cursor's lower 48 bits are the cursor,
// which all blocks of the ring must have read before it moves; its upper bits count the blocks that are done,
// and the last of them stores the new cursor, with a count of zero.
//
// Whatever cursor, mask and ring_index hold, and if they change meanwhile, nothing outside of the ring and
// the input is read or written: the cursor is taken modulo 2^48, rows of rings that do not exist are dropped.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "common/scalar_convert.h"
#include "ring_write/ring_write.h"

namespace longmem {

namespace {

constexpr int kTileTokens = 64;  // a tile is as many whole chunks as this holds; no chunk is larger
constexpr int kPiece = 16;       // tokens of a row that are looked at together
constexpr int kUnroll = 4;       // tokens that a thread loads before it uses the first
constexpr int kMaxThreads = 128;
constexpr int kBlocksPerSM = 5;  // wanted: 96 registers a thread, and enough loads in flight
constexpr int kWide = 8;  // elements of one access where everything is aligned: 16 bytes of 16-bit input
constexpr unsigned long long kCursorMask = (1ull << kCursorBits) - 1;
constexpr int64_t kMaxTokens = 1 << 30;  // so that they are counted in 32 bits
constexpr int64_t kMaxBlocks = 65535;    // of a ring, all heads together: what the upper bits can count

struct E4m3 {
  uint8_t bits;
};

// What tokens are rounded to when they arrive: the scale of a chunk is known only when it closes.
template <typename Storage>
using TokenType = std::conditional_t<std::is_same<Storage, E4m3>::value, __nv_bfloat16, Storage>;

template <typename T, int W>
struct alignas(sizeof(T) * W < 16 ? sizeof(T) * W : 16) Vector {
  T at[W];
};

template <int W, typename T>
__device__ Vector<T, W> load(const T* from) {
  return *reinterpret_cast<const Vector<T, W>*>(from);
}

template <typename T, int W>
__device__ void store(T* to, const Vector<T, W>& value) {
  *reinterpret_cast<Vector<T, W>*>(to) = value;
}

template <typename To, typename From, int W>
__device__ Vector<To, W> convert(const Vector<From, W>& from) {
  if constexpr (std::is_same<To, From>::value) {
    return from;
  } else {
    Vector<To, W> to;
#pragma unroll
    for (int i = 0; i < W; ++i) to.at[i] = static_cast<To>(static_cast<float>(from.at[i]));
    return to;
  }
}

// How the work is laid out; the same for all blocks.
struct Layout {
  int blocks;  // of each ring and head
  int tile;    // chunks of a tile
  int lanes;   // threads that work on the keys, or the values, of a chunk together: a power of two, <= 32
};

// Sum of `value` over the threads before this one; `*total` is the sum over all.
__device__ int block_exclusive_sum(int value, int* total) {
  __shared__ int warp_sum[kMaxThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) warp_sum[warp] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) {
    if (w < warp) before += warp_sum[w];
    all += warp_sum[w];
  }
  *total = all;
  return before + inclusive - value;
}

// Where a token of the input is, for one head: offsets in elements, of its key and its value.
struct Source {
  int64_t offset[2];
};

// The tokens that the call gives to one ring, numbered in the order in which they are appended. Unless they
// are one whole row, as in decoding and in most of training, each thread answers for an equal share of the
// pieces of all rows.
class Stream {
 public:
  __device__ Stream(const RingWriteParams& p, int64_t ring) : p_(p), ring_(ring) {
    if (is_whole_row()) {
      size_ = static_cast<int>(p.T);
      return;
    }
    const int first = share_begin(threadIdx.x), last = share_begin(threadIdx.x + 1);
    int count = 0;
    for (int piece = first; piece < last; ++piece) count += __popc(kept(piece));
    before_ = block_exclusive_sum(count, &size_);
  }

  __device__ int size() const { return size_; }

  // Tokens [from, to) of a head go to source[0, to - from). The whole block calls this.
  __device__ void locate(int64_t head, int from, int to, Source* source) const {
    if (is_whole_row()) {
      for (int n = from + threadIdx.x; n < to; n += blockDim.x) source[n - from] = at(ring_, head, n);
      return;
    }
    // Should the mask no longer say what it said, a token of the input stands in for what it no longer gives.
    for (int n = threadIdx.x; n < to - from; n += blockDim.x) source[n] = at(0, head, 0);
    __syncthreads();
    const int last = share_begin(threadIdx.x + 1);
    int n = before_;
    for (int piece = share_begin(threadIdx.x); piece < last && n < to; ++piece) {
      for (unsigned bits = kept(piece); bits != 0; bits &= bits - 1, ++n) {
        if (n >= from && n < to)
          source[n - from] = at(piece / row_pieces(), head, piece % row_pieces() * kPiece + __ffs(bits) - 1);
      }
    }
  }

 private:
  __device__ bool is_whole_row() const {
    return p_.ring_index == nullptr && p_.mask == nullptr && p_.R == p_.B;
  }

  __device__ int row_pieces() const { return static_cast<int>((p_.T + kPiece - 1) / kPiece); }

  __device__ int share_begin(int thread) const {
    const int pieces = static_cast<int>(p_.B) * row_pieces();
    return min(thread * static_cast<int>((pieces + blockDim.x - 1) / blockDim.x), pieces);
  }

  // One bit for each token of a piece that goes to this ring. A row whose ring does not exist goes to none:
  // nothing can be raised from here.
  __device__ unsigned kept(int piece) const {
    const int row = piece / row_pieces(), token = piece % row_pieces() * kPiece;
    if (ring_of_row(p_, row) != ring_) return 0;
    const int tokens = min(static_cast<int>(p_.T) - token, kPiece);
    unsigned bits = (1u << tokens) - 1;
    if (p_.mask == nullptr) return bits;
    const bool* mask = p_.mask + row * p_.mask_stride[0] + token * p_.mask_stride[1];
#pragma unroll 4
    for (int i = 0; i < tokens; ++i) bits &= ~(static_cast<unsigned>(!mask[i * p_.mask_stride[1]]) << i);
    return bits;
  }

  __device__ Source at(int64_t row, int64_t head, int64_t token) const {
    return {{row * p_.key_stride[0] + head * p_.key_stride[1] + token * p_.key_stride[2],
             row * p_.value_stride[0] + head * p_.value_stride[1] + token * p_.value_stride[2]}};
  }

  const RingWriteParams& p_;
  const int64_t ring_;
  int size_, before_;
};

// The keys (kv 0) or the values (kv 1) of one chunk, in the hands of a group of `lanes` threads.
template <typename Input, typename Storage, int W>
struct ChunkPart {
  using Token = TokenType<Storage>;
  static constexpr bool kQuantised = std::is_same<Storage, E4m3>::value;

  const Input* input;    // of the key or value tensor
  const Source* source;  // of the chunk's token number `old`
  const Token* tail;     // [C, D], its first `old` tokens are the chunk's beginning
  int old, C, D, kv, lane, lanes;

  __device__ const Input* address(int c, int d) const { return input + source[c - old].offset[kv] + d; }

  // Calls take(c, elements d to d + W of token c), in order of the tokens.
  template <typename F>
  __device__ void each_token(int d, F&& take) const {
#pragma unroll 1
    for (int c = 0; c < old; ++c) take(c, load<W>(tail + c * D + d));
#pragma unroll 1
    for (int c = old; c < C; c += kUnroll) {
      Vector<Input, W> arrived[kUnroll];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        if (c + j < C) arrived[j] = load<W>(address(c + j, d));
      }
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        if (c + j < C) take(c + j, convert<Token>(arrived[j]));
      }
    }
  }

  // `to` [C, D] in the store; `mean` [D], null for values; `scale` is written where there is one.
  __device__ void close(Storage* to, Token* mean, float* scale) const {
    unsigned largest = 0;
#pragma unroll 1
    for (int d = lane * W; d < D; d += lanes * W) {
      float total[W] = {};
      each_token(d, [&](int c, const Vector<Token, W>& token) {
        if constexpr (!kQuantised) store(to + c * D + d, token);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const float x = static_cast<float>(token.at[i]);
          total[i] += x;
          if constexpr (kQuantised) {
            const unsigned magnitude = bits_of(x) & 0x7fffffffu;
            largest = max(largest, magnitude);
          }
        }
      });
      if (mean != nullptr) {
        Vector<Token, W> rounded;
#pragma unroll
        for (int i = 0; i < W; ++i) rounded.at[i] = static_cast<Token>(total[i] / static_cast<float>(C));
        store(mean + d, rounded);
      }
    }
    if constexpr (kQuantised) {
      const unsigned group = (~0u >> (32 - lanes)) << (threadIdx.x % 32 / lanes * lanes);
      for (int step = lanes / 2; step > 0; step /= 2) {
        largest = max(largest, __shfl_xor_sync(group, largest, step));
      }
      quantise(e4m3_scale(largest), to);
      if (lane == 0) *scale = e4m3_scale(largest);
    }
  }

  // Reads the tokens again, which are in the cache.
  __device__ void quantise(float scale, Storage* to) const {
#pragma unroll 1
    for (int d = lane * W; d < D; d += lanes * W) {
      each_token(d, [&](int c, const Vector<Token, W>& token) {
        Vector<E4m3, W> rounded;
#pragma unroll
        for (int i = 0; i < W; ++i)
          rounded.at[i].bits = float_to_e4m3(static_cast<float>(token.at[i]) / scale);
        store(to + c * D + d, rounded);
      });
    }
  }
};

// What the call does to one head of a ring. Chunks and tokens are counted from the one that was open before.
template <typename Input, typename Storage, int W>
struct Writer {
  using Token = TokenType<Storage>;

  const RingWriteParams& p;
  const Layout& layout;
  int64_t ring, head, chunk;  // `chunk`: number of the chunk that was open
  int old;                    // tokens it had

  __device__ Token* tail() const { return static_cast<Token*>(p.tail) + (ring * p.G + head) * 2 * p.C * p.D; }
  __device__ const Input* input(int kv) const { return static_cast<const Input*>(kv ? p.value : p.key); }

  // Closes chunks [from, to); `source` begins with the first token that is not in the tail.
  __device__ void close(int from, int to, const Source* source) const {
    const int chunks = to - from, C = static_cast<int>(p.C), D = static_cast<int>(p.D);
    const int in_tail = from == 0 ? old : 0;
    const int64_t from_slot = (chunk + from) % p.M;
#pragma unroll 1
    for (int group = threadIdx.x / layout.lanes; group < 2 * chunks; group += blockDim.x / layout.lanes) {
      const int kv = group >= chunks, i = kv ? group - chunks : group;
      const int64_t slot = from_slot + i < p.M ? from_slot + i : from_slot + i - p.M;
      const int64_t place = (ring * p.G + head) * p.M + slot;
      ChunkPart<Input, Storage, W> part;
      part.input = input(kv);
      part.source = source + (i == 0 ? 0 : i * C - in_tail);
      part.tail = tail() + kv * C * D;
      part.old = i == 0 ? in_tail : 0;
      part.C = C, part.D = D, part.kv = kv;
      part.lanes = layout.lanes, part.lane = threadIdx.x % layout.lanes;
      part.close(static_cast<Storage*>(p.store) + (2 * place + kv) * C * D,
                 kv ? nullptr : static_cast<Token*>(p.centroid) + place * D, p.scale + 2 * place + kv);
    }
  }

  // Writes tokens [from, to) of the chunk left open, which are at `source`; those before them are there.
  __device__ void leave_open(int from, int to, const Source* source) const {
    const int C = static_cast<int>(p.C), D = static_cast<int>(p.D), vectors = D / W, tokens = to - from;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * tokens * vectors; i += blockDim.x) {
      const int d = i % vectors * W, n = i / vectors % tokens, kv = i / vectors / tokens;
      const Input* arrived = input(kv) + source[n].offset[kv] + d;
      store(tail() + (kv * C + from + n) * D + d, convert<Token>(load<W>(arrived)));
    }
  }
};

// Block (r * blocks + b, g) closes tiles b, b + blocks, ... of ring r for head g. Block b = 0, which reads
// the old tail, also writes the new one.
template <typename Input, typename Storage, int W>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSM)
    ring_write_kernel(RingWriteParams p, Layout layout) {
  __shared__ Source source[kTileTokens];
  __shared__ int64_t shared_begin;
  const int block = blockIdx.x % layout.blocks, C = static_cast<int>(p.C), tile = layout.tile;
  const int64_t ring = blockIdx.x / layout.blocks, head = blockIdx.y;
  auto* cursor = reinterpret_cast<volatile unsigned long long*>(p.cursor + ring);
  if (threadIdx.x == 0) shared_begin = static_cast<int64_t>(*cursor & kCursorMask);
  const Stream stream(p, ring);
  if (stream.size() == 0) return;  // all blocks of the ring leave here, and its cursor stays
  __syncthreads();

  const int old = static_cast<int>(shared_begin % C), end = old + stream.size(), closed = end / C;
  const Writer<Input, Storage, W> writer{p, layout, ring, head, shared_begin / C, old};
  const int lapped = closed > p.M ? closed - static_cast<int>(p.M) : 0;  // what would be overwritten at once
#pragma unroll 1
  for (int from = lapped + block * tile; from < closed; from += layout.blocks * tile) {
    const int to = min(from + tile, closed);
    stream.locate(head, max(from * C - old, 0), to * C - old, source);
    __syncthreads();
    writer.close(from, to, source);
    __syncthreads();
  }
  if (block == 0 && end > closed * C) {
    const int from = max(old - closed * C, 0);
    stream.locate(head, closed * C + from - old, stream.size(), source);
    __syncthreads();
    writer.leave_open(from, end - closed * C, source);
  }
  if (threadIdx.x == 0) {
    const unsigned long long arrived =
        atomicAdd(const_cast<unsigned long long*>(cursor), 1ull << kCursorBits);
    if (arrived >> kCursorBits == layout.blocks * gridDim.y - 1)
      *cursor = static_cast<unsigned long long>(shared_begin + stream.size()) & kCursorMask;
  }
}

// The most chunks that this call can close in one ring.
int64_t chunks_per_ring(const RingWriteParams& p) {
  const bool owned = p.ring_index == nullptr && p.R == p.B;
  const int64_t chunks = (owned ? p.T : p.B * p.T) / p.C + 1;
  return std::min(chunks, p.M);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether every token of the input, and everything in the ring, begins where a wide access may.
bool can_be_wide(const RingWriteParams& p) {
  const int64_t size[3] = {p.B, p.G, p.T};
  bool wide = p.D % kWide == 0;
  for (int axis = 0; axis < 3; ++axis) {
    if (size[axis] > 1) wide &= p.key_stride[axis] % kWide == 0 && p.value_stride[axis] % kWide == 0;
  }
  for (const void* pointer : {p.key, p.value, static_cast<const void*>(p.store),
                              static_cast<const void*>(p.centroid), static_cast<const void*>(p.tail)})
    wide &= is_aligned(pointer);
  return wide;
}

template <typename Input, typename Storage, int W>
void launch(const RingWriteParams& p, cudaStream_t stream) {
  const int64_t chunks = chunks_per_ring(p);
  Layout layout;
  layout.tile = static_cast<int>(std::min(kTileTokens / p.C, chunks));
  layout.lanes = 1;
  while (layout.lanes < 32 && layout.lanes * W < p.D) layout.lanes *= 2;
  const int64_t tiles = (chunks + layout.tile - 1) / layout.tile;
  layout.blocks = static_cast<int>(std::min({tiles, kMaxBlocks / p.G, INT32_MAX / p.R}));
  const unsigned threads = std::min((2 * layout.tile * layout.lanes + 31) / 32 * 32, kMaxThreads);
  const dim3 grid(static_cast<unsigned>(p.R * layout.blocks), static_cast<unsigned>(p.G));
  ring_write_kernel<Input, Storage, W><<<grid, threads, 0, stream>>>(p, layout);
}

template <typename Input, typename Storage>
void launch(const RingWriteParams& p, cudaStream_t stream) {
  if (can_be_wide(p)) return launch<Input, Storage, kWide>(p, stream);
  launch<Input, Storage, 1>(p, stream);
}

template <typename Input>
void launch(const RingWriteParams& p, Scalar storage, cudaStream_t stream) {
  switch (storage) {
    case Scalar::f32:
      return launch<Input, float>(p, stream);
    case Scalar::bf16:
      return launch<Input, __nv_bfloat16>(p, stream);
    case Scalar::f16:
      return launch<Input, __half>(p, stream);
    case Scalar::e4m3:
      return launch<Input, E4m3>(p, stream);
  }
}

}  // namespace

const char* ring_write_cuda(const RingWriteParams& p, Scalar input, Scalar storage, void* stream) {
  // Said before anything has changed.
  if (p.C > kTileTokens) return "too many tokens in a chunk";
  if (p.G > kMaxBlocks || p.R > INT32_MAX) return "too many rings or heads for one launch";
  if (p.B * p.T > kMaxTokens) return "too many tokens for one launch";
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (input) {
    case Scalar::f32:
      launch<float>(p, storage, cuda_stream);
      break;
    case Scalar::bf16:
      launch<__nv_bfloat16>(p, storage, cuda_stream);
      break;
    case Scalar::f16:
      launch<__half>(p, storage, cuda_stream);
      break;
    case Scalar::e4m3:
      return "float8_e4m3fn is a storage format; no input comes in it";
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace longmem
