// What CPU tasks are written with. Included once per instruction set by a file that defines
// LONGMEM_SIMD_NAMESPACE and LONGMEM_SIMD_LANES and that is compiled with the instructions on.
//
// Everything is internal to that file, and nothing of the standard library's templates is used: a function
// that the linker could share between instruction sets would be one that a lesser CPU cannot run.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/scalar_type.h"

#if LONGMEM_SIMD_LANES == 16
#include <immintrin.h>
#endif

namespace longmem {
namespace LONGMEM_SIMD_NAMESPACE {
namespace {

constexpr int kLanes = LONGMEM_SIMD_LANES;
constexpr int kVectors = 2;                  // vectors of queries that are worked on together
constexpr int kQueries = kLanes * kVectors;  // queries in a block: one per lane
constexpr int kRows = kLanes == 16 ? 8 : 4;  // rows multiplied together: their sums fill the registers
constexpr float kInfinity = __builtin_inff();

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), may_alias, aligned(4)));
typedef int32_t IntVector __attribute__((vector_size(kLanes * sizeof(int32_t)), may_alias, aligned(4)));
typedef uint32_t BitsVector __attribute__((vector_size(kLanes * sizeof(uint32_t)), may_alias, aligned(4)));
typedef uint16_t ShortVector __attribute__((vector_size(kLanes * sizeof(uint16_t)), may_alias, aligned(2)));
typedef uint8_t ByteVector __attribute__((vector_size(kLanes), may_alias, aligned(1)));

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline IntVector load(const int32_t* from) { return *reinterpret_cast<const IntVector*>(from); }
inline void store(int32_t* to, IntVector value) { *reinterpret_cast<IntVector*>(to) = value; }
inline Vector fill(float value) { return value - Vector{}; }

inline float sum(Vector v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof lane);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

inline float dot(const float* a, const float* b, int64_t n) {
  Vector total{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total += load(a + i) * load(b + i);
  float result = sum(total);
  for (; i < n; ++i) result += a[i] * b[i];
  return result;
}

// exp(x) for x <= 0, relative error below 2e-7, 0 below -87, NaN for NaN: x = n ln 2 + r, |r| <= ln 2 / 2,
// 2^n exp(r).
inline Vector exp_of_negative(Vector x) {
  const Vector clamped = x < -87.0f ? fill(-87.0f) : x;
  const IntVector n = __builtin_convertvector(clamped * 1.44269504f - 0.5f, IntVector);
  const Vector whole = __builtin_convertvector(n, Vector);
  const Vector r = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vector p = fill(1.0f / 5040.0f);
  constexpr float kTaylor[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
  for (const float c : kTaylor) p = p * r + c;
  const IntVector power = (n + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x < -87.0f ? Vector{} : p * scale;
}

// A zero-initialised array, aligned to whole vectors: those that straddle cache lines cost two loads.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : storage_(new char[n * sizeof(T) + 64]()) {
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(storage_) + 63) / 64 * 64);
  }
  ~Buffer() { delete[] storage_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  char* storage_;
  T* data_;
};

inline Vector floats_of(BitsVector bits) {
  Vector v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline BitsVector bits_of(Vector v) {
  BitsVector bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline Vector from_half(ShortVector half) {
#if LONGMEM_SIMD_LANES == 16
  __m256i halves;
  std::memcpy(&halves, &half, sizeof halves);
  return _mm512_maskz_cvtph_ps(0xffff, halves);
#else
  // Zero and subnormals are multiples of the smallest number: with the exponent of the smallest normal one
  // they are that much too large, and subtracting it is exact. Other exponents move from bias 15 to 127.
  const BitsVector bits = __builtin_convertvector(half, BitsVector), magnitude = bits & 0x7fffu;
  const BitsVector small = bits_of(floats_of((magnitude << 13) + (113u << 23)) - 0x1p-14f);
  const BitsVector special = magnitude >= 0x7c00u ? BitsVector{} + (112u << 23) : BitsVector{};
  const BitsVector large = (magnitude << 13) + (112u << 23) + special;
  return floats_of((magnitude < 0x400u ? small : large) | (bits & 0x8000u) << 16);
#endif
}

// As above, from bias 7.
inline Vector from_e4m3(BitsVector byte) {
  const BitsVector magnitude = byte & 0x7fu;
  const BitsVector small = bits_of(floats_of((magnitude << 20) + (121u << 23)) - 0x1p-6f);
  const BitsVector large = magnitude == 0x7fu ? BitsVector{} + 0x7fc00000u : (magnitude << 20) + (120u << 23);
  return floats_of((magnitude < 8u ? small : large) | (byte & 0x80u) << 24);
}

// Round to nearest even; NaN stays NaN.
inline BitsVector to_half(Vector value) {
  const BitsVector bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is a multiple of 2^-24, to which adding 0.5 rounds.
  const BitsVector small = bits_of(floats_of(magnitude) + 0.5f) - 0x3f000000u;
  const BitsVector large = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const BitsVector finite = magnitude < 0x38800000u ? small : large;
  const BitsVector special = BitsVector{} + 0x7c00u + ((magnitude > 0x7f800000u) & 0x200u);
  return (bits >> 16 & 0x8000u) | (magnitude < 0x477ff000u ? finite : special);
}

inline BitsVector to_bfloat(Vector value) {
  const BitsVector bits = bits_of(value);
  const BitsVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? BitsVector{} + 0x7fc0u : rounded;
}

constexpr int64_t size_of(Scalar type) { return type == Scalar::f32 ? 4 : type == Scalar::e4m3 ? 1 : 2; }

// kLanes elements from element `from` of an array of `type`, as float32.
template <Scalar type>
inline Vector load_as(const void* base, int64_t from) {
  const char* at = static_cast<const char*>(base) + from * size_of(type);
  if constexpr (type == Scalar::f32) {
    return load(reinterpret_cast<const float*>(at));
  } else if constexpr (type == Scalar::e4m3) {
    ByteVector bytes;
    std::memcpy(&bytes, at, sizeof bytes);
    return from_e4m3(__builtin_convertvector(bytes, BitsVector));
  } else {
    ShortVector shorts;
    std::memcpy(&shorts, at, sizeof shorts);
    return type == Scalar::f16 ? from_half(shorts)
                               : floats_of(__builtin_convertvector(shorts, BitsVector) << 16);
  }
}

// The same for the first n < kLanes of them, the rest being zero and not read.
template <Scalar type>
inline Vector load_first(const void* base, int64_t from, int64_t n) {
  alignas(64) char element[kLanes * size_of(type)] = {};
  std::memcpy(element, static_cast<const char*>(base) + from * size_of(type), n * size_of(type));
  return load_as<type>(element, 0);
}

// `n` elements from element `from` of an array of `type`, as float32.
template <Scalar type>
inline void load_row_as(const void* base, int64_t from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load_as<type>(base, from + i));
  if (i == n) return;
  const Vector rest = load_first<type>(base, from + i, n - i);
  std::memcpy(to + i, &rest, (n - i) * sizeof(float));
}

inline void load_row(const void* base, Scalar type, int64_t from, int64_t n, float* to) {
  switch (type) {
    case Scalar::f32:
      return load_row_as<Scalar::f32>(base, from, n, to);
    case Scalar::bf16:
      return load_row_as<Scalar::bf16>(base, from, n, to);
    case Scalar::f16:
      return load_row_as<Scalar::f16>(base, from, n, to);
    case Scalar::e4m3:
      return load_row_as<Scalar::e4m3>(base, from, n, to);
  }
}

// The reverse: `n` float32 rounded into an array of `type`, not e4m3, at element `to`.
inline void store_row(const float* from, int64_t n, void* base, Scalar type, int64_t to) {
  if (type == Scalar::f32) {
    std::memcpy(static_cast<float*>(base) + to, from, n * sizeof(float));
    return;
  }
  uint16_t* row = static_cast<uint16_t*>(base) + to;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = smaller(kLanes, n - i);
    const Vector value = count == kLanes ? load(from + i) : load_first<Scalar::f32>(from, i, count);
    const BitsVector rounded = type == Scalar::f16 ? to_half(value) : to_bfloat(value);
    const ShortVector narrow = __builtin_convertvector(rounded, ShortVector);
    std::memcpy(row + i, &narrow, count * sizeof(uint16_t));
  }
}

// 0 to n - 1 as template arguments. std::integer_sequence would be shared between instruction sets.
template <int... lane>
struct Lanes {};
template <int n, int... lane>
struct LanesUpTo : LanesUpTo<n - 1, n - 1, lane...> {};
template <int... lane>
struct LanesUpTo<0, lane...> {
  using Type = Lanes<lane...>;
};
using AllLanes = typename LanesUpTo<kLanes>::Type;

// Lanes of a, counted from 0, and of b, counted from kLanes. GCC has clang's builtin since version 12.
template <int... from, typename V>
inline V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, from...);
#else
  return __builtin_shuffle(a, b, IntVector{from...});
#endif
}

constexpr int folded(int width, int lane) { return lane / width * 2 * width + lane % width; }

template <int width, int... lane>
inline void fold(Vector* v, Lanes<lane...> lanes) {
  for (int i = 0; i < width; ++i) {
    const Vector a = v[2 * i], b = v[2 * i + 1];
    v[i] = shuffle<folded(width, lane)...>(a, b) + shuffle<(folded(width, lane) + width)...>(a, b);
  }
  if constexpr (width > 1) fold<width / 2>(v, lanes);
}

// Lane i is the sum of the lanes of v[i], of which there are kLanes and which are overwritten.
inline Vector sums(Vector* v) {
  fold<kLanes / 2>(v, AllLanes{});
  return v[0];
}

constexpr int exchanged_low(int width, int lane) { return lane & width ? kLanes + lane - width : lane; }
constexpr int exchanged_high(int width, int lane) { return lane & width ? kLanes + lane : lane + width; }

template <int width, int... lane>
inline void exchange(Vector* v, Lanes<lane...> lanes) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & width) continue;
    const Vector a = v[i], b = v[i + width];
    v[i] = shuffle<exchanged_low(width, lane)...>(a, b);
    v[i + width] = shuffle<exchanged_high(width, lane)...>(a, b);
  }
  if constexpr (width > 1) exchange<width / 2>(v, lanes);
}

// Transposes a matrix of kLanes x kLanes.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vector v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = load(from + i * from_stride);
  exchange<kLanes / 2>(v, AllLanes{});
  for (int i = 0; i < kLanes; ++i) store(to + i * to_stride, v[i]);
}

// Inner products of n rows [n, D] with the first vectors of a block of queries [D, kQueries].
template <int n, int vectors>
inline void multiply_rows(const float* rows, int64_t row_stride, const float* block, int64_t D,
                          Vector (&out)[n][vectors]) {
  for (int j = 0; j < n; ++j) {
    for (int v = 0; v < vectors; ++v) out[j][v] = Vector{};
  }
  for (int64_t d = 0; d < D; ++d) {
    const Vector* q = reinterpret_cast<const Vector*>(block + d * kQueries);
    for (int j = 0; j < n; ++j) {
      for (int v = 0; v < vectors; ++v) out[j][v] += q[v] * rows[j * row_stride + d];
    }
  }
}

}  // namespace
}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
