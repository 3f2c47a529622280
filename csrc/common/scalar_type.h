#pragma once

namespace longmem {

// Element types the kernels take. Only memory may be e4m3, with a float32 scale for the keys and one for the
// values of each chunk.
enum class Scalar { f32, bf16, f16, e4m3 };

}  // namespace longmem
