// The step from a run-time type to a compile-time one.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "common/scalar_type.h"

namespace longmem {

// `quantised`: whether the argument may be float8_e4m3fn, which only memory is.
inline Scalar scalar_of(torch::headeronly::ScalarType type, const char* op, const char* argument,
                        bool quantised = false) {
  switch (type) {
    case torch::headeronly::ScalarType::Float:
      return Scalar::f32;
    case torch::headeronly::ScalarType::BFloat16:
      return Scalar::bf16;
    case torch::headeronly::ScalarType::Half:
      return Scalar::f16;
    case torch::headeronly::ScalarType::Float8_e4m3fn:
      if (quantised) return Scalar::e4m3;
      [[fallthrough]];
    default:
      STD_TORCH_CHECK(false, op, ": ", argument, " must be float32, bfloat16",
                      quantised ? ", float16 or float8_e4m3fn" : " or float16", ", got ScalarType ",
                      static_cast<int>(type));
  }
}

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the CPU type of `scalar`, which is not e4m3.
template <typename F>
void dispatch_cpu(Scalar scalar, F&& f) {
  switch (scalar) {
    case Scalar::f32:
      return f(Type<float>{});
    case Scalar::bf16:
      return f(Type<c10::BFloat16>{});
    case Scalar::f16:
      return f(Type<c10::Half>{});
    case Scalar::e4m3:
      STD_TORCH_CHECK(false, "float8_e4m3fn is a storage format; nothing is computed in it");
  }
}

}  // namespace longmem
