// Conversions between float32 and narrower formats: to the nearest value, ties to even, NaN to NaN. Free of
// branches, so that loops over them become vector instructions. Internal linkage, because files compiled for
// different instruction sets include it (see simd_task.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace longmem {

constexpr float kE4m3Max = 448.0f;

LONGMEM_HOST_DEVICE static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LONGMEM_HOST_DEVICE static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// `?:` would let the compiler move the float arithmetic of one case into a branch, and leave it there.
LONGMEM_HOST_DEVICE static inline uint32_t choose(bool first, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(first);
  return (a & mask) | (b & ~mask);
}

LONGMEM_HOST_DEVICE static inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  // Zero and subnormals are multiples of 2^-24; other exponents move from bias 15 to 127, the largest to 255.
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t large = (magnitude << 13) + (magnitude >= 0x7c00u ? 224u << 23 : 112u << 23);
  return float_of(sign | choose(magnitude < 0x0400u, small, large));
}

LONGMEM_HOST_DEVICE static inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is a multiple of 2^-24, to which adding 0.5 rounds.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t large = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t finite = choose(magnitude < 0x38800000u, small, large);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(sign | choose(magnitude < 0x477ff000u, finite, special));
}

// |value| below 464, which is what rounds to `kE4m3Max`, or NaN.
LONGMEM_HOST_DEVICE static inline uint8_t float_to_e4m3(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  // Below 2^-6 the result is a multiple of 2^-9, to which adding 2^14 rounds.
  const uint32_t small = bits_of(float_of(magnitude) + 0x1p14f) - 0x46800000u;
  const uint32_t large = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  const uint32_t finite = choose(magnitude < 0x3c800000u, small, large);
  return static_cast<uint8_t>(sign | choose(magnitude > 0x7f800000u, 0x7fu, finite));
}

// What the largest magnitude of a chunk, given as bits, is divided by to become the largest e4m3. Not finite
// when the chunk holds a value that is not: bits of infinity and NaN are larger than those of any number.
LONGMEM_HOST_DEVICE static inline float e4m3_scale(uint32_t largest_magnitude) {
  const float scale = float_of(largest_magnitude) / kE4m3Max;
  return scale < 0x1p-126f ? 0x1p-126f : scale;
}

}  // namespace longmem
