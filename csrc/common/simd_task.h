// What CPU tasks are written with. Included once per instruction set by a file that defines
// LONGMEM_SIMD_NAMESPACE and LONGMEM_SIMD_LANES and that is compiled with the instructions on.
//
// Everything is internal to that file, and nothing of the standard library's templates is used: a function
// that the linker could share between instruction sets would be one that a lesser CPU cannot run.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/scalar_type.h"

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

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
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

// A zero-initialised array.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(new T[n]()) {}
  ~Buffer() { delete[] data_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ffu;
  uint32_t bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // zero and subnormals are multiples of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                        // subnormal: let float addition do the rounding
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, sizeof rounded);
    return sign | static_cast<uint16_t>(rounded - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// `n` elements from element `from` of an array of `type`, as float32.
inline void load_row(const void* base, Scalar type, int64_t from, int64_t n, float* to) {
  if (type == Scalar::f32) {
    std::memcpy(to, static_cast<const float*>(base) + from, n * sizeof(float));
    return;
  }
  const uint16_t* row = static_cast<const uint16_t*>(base) + from;
  if (type == Scalar::f16) {
    for (int64_t d = 0; d < n; ++d) to[d] = half_to_float(row[d]);
    return;
  }
  for (int64_t d = 0; d < n; ++d) {
    const uint32_t bits = static_cast<uint32_t>(row[d]) << 16;
    std::memcpy(to + d, &bits, sizeof bits);
  }
}

// The reverse: `n` float32 rounded into an array of `type` at element `to`.
inline void store_row(const float* from, int64_t n, void* base, Scalar type, int64_t to) {
  if (type == Scalar::f32) {
    std::memcpy(static_cast<float*>(base) + to, from, n * sizeof(float));
    return;
  }
  uint16_t* row = static_cast<uint16_t*>(base) + to;
  for (int64_t d = 0; d < n; ++d)
    row[d] = type == Scalar::f16 ? float_to_half(from[d]) : float_to_bfloat(from[d]);
}

// Inner products of n rows [n, D] with a block of queries [D, kQueries].
template <int n>
inline void multiply_rows(const float* rows, int64_t row_stride, const float* block, int64_t D,
                          Vector (&out)[n][kVectors]) {
  for (int j = 0; j < n; ++j) {
    for (int v = 0; v < kVectors; ++v) out[j][v] = Vector{};
  }
  for (int64_t d = 0; d < D; ++d) {
    const Vector* q = reinterpret_cast<const Vector*>(block + d * kQueries);
    for (int j = 0; j < n; ++j) {
      for (int v = 0; v < kVectors; ++v) out[j][v] += q[v] * rows[j * row_stride + d];
    }
  }
}

}  // namespace
}  // namespace LONGMEM_SIMD_NAMESPACE
}  // namespace longmem
