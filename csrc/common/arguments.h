// What torch ops check of their tensors before they follow a pointer. The public functions check more, and
// say it better; this holds for every caller: what is torch.compile'd, and torch.ops.longmem.* called by
// hand.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace longmem {

// The arguments of one call of `op`; `first` is the tensor on whose device all others must be.
class Arguments {
 public:
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;

  Arguments(const char* op, const Tensor& first) : op_(op) {
    STD_TORCH_CHECK(first.defined(), op, ": the first argument must be a tensor");
    cuda_ = first.is_cuda();
    device_ = index_of(first);
  }

  // The rank, before sizes are read. From Python, None comes as a tensor that is none.
  void rank(const char* name, const Tensor& tensor, int64_t wanted) const {
    STD_TORCH_CHECK(tensor.defined(), op_, ": ", name, " must be a tensor");
    STD_TORCH_CHECK(tensor.dim() == wanted, op_, ": ", name, " must have ", wanted, " axes, got ",
                    tensor.dim());
  }

  // Sizes, dtype and device.
  void expect(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
              ScalarType type) const {
    STD_TORCH_CHECK(tensor.defined(), op_, ": ", name, " must be a tensor");
    const auto got = tensor.sizes();
    STD_TORCH_CHECK(std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()), op_, ": ", name,
                    " must have the shape ", text_of(sizes), ", got ", text_of(got));
    STD_TORCH_CHECK(tensor.scalar_type() == type, op_, ": ", name, " must have ScalarType ",
                    static_cast<int>(type), ", got ", static_cast<int>(tensor.scalar_type()));
    STD_TORCH_CHECK(tensor.is_cuda() == cuda_ && index_of(tensor) == device_, op_, ": ", name,
                    " must be on the device of the first argument");
  }

  // And rows that are read whole: the stride of the last axis is never looked at.
  void expect_rows(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                   ScalarType type) const {
    expect(name, tensor, sizes, type);
    const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
    STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, op_, ": the last axis of ", name,
                    " must be contiguous");
  }

  // And no stride is looked at.
  void expect_packed(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                     ScalarType type) const {
    expect(name, tensor, sizes, type);
    STD_TORCH_CHECK(tensor.is_contiguous(), op_, ": ", name, " must be contiguous");
  }

  void expect(const char* name, const std::optional<Tensor>& tensor, std::initializer_list<int64_t> sizes,
              ScalarType type) const {
    if (tensor) expect(name, *tensor, sizes, type);
  }

  void expect_packed(const char* name, const std::optional<Tensor>& tensor,
                     std::initializer_list<int64_t> sizes, ScalarType type) const {
    if (tensor) expect_packed(name, *tensor, sizes, type);
  }

  // `ring_index` [B], or none: then the rows are as many as the rings, or there is one ring.
  void expect_ring_index(const std::optional<Tensor>& ring_index, int64_t B, int64_t R) const {
    expect_packed("ring_index", ring_index, {B}, ScalarType::Int);
    STD_TORCH_CHECK(ring_index || R == 1 || R == B, op_,
                    ": ring_index is needed when R is neither 1 nor B, got R = ", R, " and B = ", B);
  }

  // Whether any byte lies in both.
  static bool overlap(const Tensor& a, const Tensor& b) {
    if (a.numel() == 0 || b.numel() == 0) return false;
    return begin_of(a) < begin_of(b) + bytes_of(b) && begin_of(b) < begin_of(a) + bytes_of(a);
  }

  // A size, or another number.
  void in_range(const char* name, int64_t value, int64_t low, int64_t end) const {
    STD_TORCH_CHECK(value >= low && value < end, op_, ": ", name, " must lie in [", low, ", ", end, "), got ",
                    value);
  }

  // A copy of an int32 tensor [n] on the CPU, whose values must lie in [low, end); empty without one. What
  // was checked is what is used, whoever writes to the tensor meanwhile.
  std::vector<int32_t> copy(const char* name, const std::optional<Tensor>& tensor, int64_t low,
                            int64_t end) const {
    if (!tensor) return {};
    const auto* values = static_cast<const int32_t*>(tensor->const_data_ptr());
    std::vector<int32_t> copied(values, values + tensor->size(0));
    for (const int32_t value : copied) in_range(name, value, low, end);
    return copied;
  }

 private:
  static int32_t index_of(const Tensor& tensor) { return tensor.is_cuda() ? tensor.get_device_index() : -1; }

  static uintptr_t begin_of(const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  }

  // From its first to its last.
  static uintptr_t bytes_of(const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) last += (tensor.size(axis) - 1) * tensor.stride(axis);
    return (last + 1) * tensor.element_size();
  }

  template <typename Sizes>
  static std::string text_of(const Sizes& sizes) {
    std::string text = "(";
    for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + ")";
  }

  const char* op_;
  bool cuda_;
  int32_t device_;
};

}  // namespace longmem
