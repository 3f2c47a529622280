// The Python module: importing it registers the kernels; `build_info` says how it was built and what it
// found.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/simd.h"

#define LONGMEM_STRING_(x) #x
#define LONGMEM_STRING(x) LONGMEM_STRING_(x)

namespace {

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info;
  info["version"] = LONGMEM_STRING(LONGMEM_VERSION);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["simd"] = longmem::simd_name(longmem::simd_level());
#ifdef LONGMEM_CUDA
  info["cuda"] = LONGMEM_STRING(LONGMEM_CUDA_VERSION);
  info["cuda_architectures"] = LONGMEM_STRING(LONGMEM_CUDA_ARCHITECTURES);
#else
  info["cuda"] = "";
  info["cuda_architectures"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of longmem_kernels.";
  m.def("build_info", &build_info,
        "Version, compiler, SIMD level of this CPU, CUDA version and architectures ('' when built without "
        "CUDA).");
}
