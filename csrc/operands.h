// From lists of tensors to a segment table and flat views: what every operator does first, on every device.
//
// Python checks the user's input and says what is wrong with it; the checks here only keep memory safe.
#pragma once

#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "core/segments.h"

namespace crl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "crl_kernels: expected float32, float64, bfloat16 or float16 tensors");
      return DType::kFloat32;
  }
}

inline SegmentTable segment_table(const Tensors& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "crl_kernels: expected at least one tensor");
  std::vector<int64_t> lengths;
  lengths.reserve(tensors.size());
  for (const Tensor& tensor : tensors) lengths.push_back(tensor.numel());
  return SegmentTable(lengths);
}

// Tensors to read along a table: one for each segment, or a single flat one. Tensors that are not contiguous are
// copied; the copies live as long as this object.
class Operand {
 public:
  Operand(const SegmentTable& table, const Tensor* first, int64_t count, const Tensor& same_device_as)
      : view_(table, pointers(table, first, count, same_device_as)) {}
  Operand(const SegmentTable& table, const Tensors& tensors, const Tensor& same_device_as)
      : Operand(table, tensors.data(), static_cast<int64_t>(tensors.size()), same_device_as) {}

  Pointer at(int64_t segment, int64_t index) const { return view_.at(segment, index); }
  const FlatView& view() const { return view_; }

 private:
  std::vector<Pointer> pointers(const SegmentTable& table, const Tensor* first, int64_t count,
                                const Tensor& same_device_as) {
    const bool flat = count == 1 && first[0].numel() == table.numel();
    STD_TORCH_CHECK(flat || count == table.segments(), "crl_kernels: expected one flat tensor or ", table.segments(),
                    " tensors, got ", count);
    std::vector<Pointer> result;
    result.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      Tensor tensor = first[i];
      const int64_t expected = flat ? table.numel() : table.end(i) - table.begin(i);
      STD_TORCH_CHECK(tensor.numel() == expected, "crl_kernels: tensor ", i, " of a list has ", tensor.numel(),
                      " elements, expected ", expected);
      STD_TORCH_CHECK(tensor.device() == same_device_as.device(), "crl_kernels: tensors are on different devices");
      if (!tensor.is_contiguous()) {
        tensor = torch::stable::contiguous(tensor);
        copies_.push_back(tensor);
      }
      result.push_back({tensor.data_ptr(), dtype_of(tensor)});
    }
    return result;
  }

  Tensors copies_;
  FlatView view_;
};

// Tensors to write along a table. Those that are not contiguous are written through a contiguous copy: call
// write_back() after the kernel.
class Target {
 public:
  Target(const SegmentTable& table, const Tensors& tensors)
      : tensors_(tensors), contiguous_(contiguous(tensors)), operand_(table, contiguous_, tensors[0]) {}

  Pointer at(int64_t segment, int64_t index) const { return operand_.at(segment, index); }
  const FlatView& view() const { return operand_.view(); }

  void write_back() {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (!tensors_[i].is_contiguous()) torch::stable::copy_(tensors_[i], contiguous_[i]);
    }
  }

 private:
  static Tensors contiguous(const Tensors& tensors) {
    Tensors result;
    result.reserve(tensors.size());
    for (const Tensor& tensor : tensors) {
      result.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    }
    return result;
  }

  Tensors tensors_;
  Tensors contiguous_;
  Operand operand_;
};

// K directions along a table, stored as K flat tensors or term by term as K lists of one tensor per segment.
inline std::vector<Operand> directions_of(const SegmentTable& table, const Tensors& directions, int64_t num_terms,
                                          const Tensor& same_device_as) {
  const int64_t count = static_cast<int64_t>(directions.size());
  STD_TORCH_CHECK(num_terms > 0 && count % num_terms == 0, "crl_kernels: ", count, " direction tensors for ", num_terms,
                  " terms");
  const int64_t pieces = count / num_terms;
  std::vector<Operand> result;
  result.reserve(num_terms);
  for (int64_t k = 0; k < num_terms; ++k)
    result.emplace_back(table, directions.data() + k * pieces, pieces, same_device_as);
  return result;
}

// Coefficients as consecutive doubles on the device of the other operands.
inline Tensor coefficients_of(const Tensor& tensor, const Tensor& same_device_as) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.device() == same_device_as.device(),
                  "crl_kernels: coefficients are a float64 tensor on the device of the parameters");
  return torch::stable::contiguous(tensor);
}

// The same for operators that take one number.
inline Tensor coefficient_of(const Tensor& tensor, const Tensor& same_device_as) {
  STD_TORCH_CHECK(tensor.numel() == 1, "crl_kernels: expected one coefficient, got ", tensor.numel());
  return coefficients_of(tensor, same_device_as);
}

inline Tensors empty_like_all(const Tensors& tensors) {
  Tensors result;
  result.reserve(tensors.size());
  for (const Tensor& tensor : tensors) result.push_back(torch::stable::new_empty(tensor, tensor.sizes()));
  return result;
}

inline void check_targets(const Tensors& targets, const Tensors& params) {
  STD_TORCH_CHECK(targets.size() == params.size(), "crl_kernels: expected one target for each parameter");
  for (size_t i = 0; i < params.size(); ++i) {
    STD_TORCH_CHECK(targets[i].scalar_type() == params[i].scalar_type() && targets[i].device() == params[i].device(),
                    "crl_kernels: a target has another dtype than its parameter, or is on another device");
  }
}

inline void check_state_dtypes(const Tensors& fisher, const Tensors& anchor) {
  STD_TORCH_CHECK(fisher.size() == anchor.size(), "crl_kernels: fisher and anchor are lists of different lengths");
  for (size_t i = 0; i < fisher.size(); ++i) {
    const ScalarType dtype = fisher[i].scalar_type();
    STD_TORCH_CHECK(dtype == anchor[i].scalar_type() && (dtype == ScalarType::Float || dtype == ScalarType::Double),
                    "crl_kernels: the diagonal Fisher and its anchor are both float32 or both float64");
  }
}

}  // namespace crl
