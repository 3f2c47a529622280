#pragma once

namespace longmem {

// Element types the kernels take.
enum class Scalar { f32, bf16, f16 };

}  // namespace longmem
