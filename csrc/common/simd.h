// Which vector instructions this CPU has. CPU kernels are compiled once per level and chosen at run time.
#pragma once

#include <cstdlib>
#include <cstring>

namespace longmem {

enum class Simd { baseline, avx2, avx512 };

// LONGMEM_SIMD=baseline|avx2 lowers the level, for tests and measurements; it never raises it.
inline Simd simd_level() {
  static const Simd level = [] {
    Simd found = Simd::baseline;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found = Simd::avx2;
    if (found == Simd::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
      found = Simd::avx512;
#endif
    const char* wanted = std::getenv("LONGMEM_SIMD");
    if (wanted != nullptr && std::strcmp(wanted, "baseline") == 0) return Simd::baseline;
    if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0 && found == Simd::avx512) return Simd::avx2;
    return found;
  }();
  return level;
}

inline const char* simd_name(Simd level) {
  return level == Simd::avx512 ? "avx512" : level == Simd::avx2 ? "avx2" : "baseline";
}

}  // namespace longmem
