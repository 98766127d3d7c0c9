// From lists of tensors to a segment table and flat views: what every operator does first, on every device.
//
// Python checks the user's input and explains errors; the checks here only keep memory safe.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "core/adamw_math.h"
#include "core/segments.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // in older torch there is only the one without the error's message
#include <torch/headeronly/util/shim_utils.h>
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace crl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Tensor's own scalar_type() and device() make a dozen calls into torch each. So dtypes and devices are compared as
// torch's codes, which take one or two.
inline int32_t dtype_code_of(const Tensor& tensor) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

inline bool is_int8(const Tensor& tensor) { return dtype_code_of(tensor) == aoti_torch_dtype_int8(); }

inline DType dtype_of(const Tensor& tensor) {
  const int32_t code = dtype_code_of(tensor);
  if (code == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (code == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (code == aoti_torch_dtype_float16()) return DType::kFloat16;
  STD_TORCH_CHECK(code == aoti_torch_dtype_float64(),
                  "crl_kernels: expected float32, float64, bfloat16 or float16 tensors");
  return DType::kFloat64;
}

struct DeviceCode {
  int32_t type, index;
  bool operator==(const DeviceCode& other) const { return type == other.type && index == other.index; }
};

inline DeviceCode device_code_of(const Tensor& tensor) {
  DeviceCode code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &code.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &code.index));
  return code;
}

// The order of a tensor's own memory.
inline MemoryOrder memory_order_of(const Tensor& tensor) {
  int64_t *sizes, *strides;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  return {tensor.dim(), sizes, strides};
}

// Whether the elements of a tensor that has some fill one stretch of memory, each place once.
inline bool is_dense(const MemoryOrder& order, int64_t numel) {
  int64_t filled = 1;  // by the fastest dimensions
  for (int64_t repeat = 0; repeat < order.dims; ++repeat) {
    for (int64_t i = 0; i < order.dims; ++i) {
      if (order.sizes[i] != 1 && order.strides[i] == filled) filled *= order.sizes[i];
    }
  }
  return filled == numel;
}

// A list of K directions: K flat tensors, or term by term one tensor for each segment, which tensors of scales follow
// if the list may have int8 tensors.
struct Directions {
  const Tensors& tensors;
  int64_t terms;

  int64_t pieces() const { return static_cast<int64_t>(tensors.size()) / terms; }
  bool has_scales(int64_t segments) const { return terms > 0 && pieces() == 2 * segments; }
  const Tensor* term(int64_t k) const { return tensors.data() + k * pieces(); }

  // Whether a segment is int8 in any term.
  bool any_int8(int64_t segments, int64_t segment) const {
    for (int64_t k = 0; has_scales(segments) && k < terms; ++k) {
      if (is_int8(term(k)[segment])) return true;
    }
    return false;
  }
};

// The table of the tensors whose memory decides the order of each segment's elements: the parameters, or the targets. A
// segment with an int8 direction is row-major, as its blocks are.
inline SegmentTable segment_table(const Tensors& tensors, const Directions& directions) {
  STD_TORCH_CHECK(!tensors.empty(), "crl_kernels: expected at least one tensor");
  std::vector<int64_t> lengths;
  std::vector<MemoryOrder> orders;
  lengths.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    lengths.push_back(tensors[i].numel());
    if (tensors[i].is_contiguous()) continue;
    const MemoryOrder own = memory_order_of(tensors[i]);
    if (!is_dense(own, lengths.back())) continue;
    if (directions.any_int8(static_cast<int64_t>(tensors.size()), static_cast<int64_t>(i))) continue;
    orders.resize(tensors.size());
    orders[i] = own;
  }
  return SegmentTable(lengths, std::move(orders));
}
inline SegmentTable segment_table(const Tensors& tensors) {
  const Tensors none;
  return segment_table(tensors, {none, 0});
}

// Whether a tensor has its elements in this order (null: row-major), one after the other.
inline bool is_in_order(const Tensor& tensor, const MemoryOrder* order) {
  if (order == nullptr) return tensor.is_contiguous();
  const MemoryOrder own = memory_order_of(tensor);
  if (own.dims != order->dims) return false;
  for (int64_t i = 0; i < own.dims; ++i) {
    if (own.sizes[i] != order->sizes[i] || (own.sizes[i] != 1 && own.strides[i] != order->strides[i])) return false;
  }
  return true;
}

inline Tensor copy_in_order(const Tensor& tensor, const MemoryOrder* order) {
  if (order == nullptr) return torch::stable::contiguous(tensor);
  const DeviceCode device = device_code_of(tensor);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(order->dims, order->sizes, order->strides,
                                                         dtype_code_of(tensor), device.type, device.index, &handle));
  Tensor copy(handle);
  torch::stable::copy_(copy, torch::stable::reshape(tensor, {order->sizes, static_cast<size_t>(order->dims)}));
  return copy;
}

// Whether a flat tensor has each segment's elements in the segment's order, and not in row-major order.
inline bool is_row(const Tensor& tensor) { return tensor.dim() == 2 && tensor.size(0) == 1; }

// Tensors to read along a table: one for each segment, or a single flat one, (P,) in row-major order, or a row, (1, P).
// A tensor whose elements are not in its segment's order is copied; the copies live as long as this object. `scales`,
// one tensor for each segment, are those of the tensors that are int8, and empty beside others; without them none is
// int8.
class Operand {
 public:
  Operand(const SegmentTable& table, const Tensor* first, int64_t count, const Tensor& same_device_as,
          const Tensor* scales = nullptr)
      : view_(is_cut(table, first, count) ? table.segments() : count) {
    const bool flat = count == 1 && first[0].numel() == table.numel();
    STD_TORCH_CHECK(flat || count == table.segments(), "crl_kernels: expected one flat tensor or ", table.segments(),
                    " tensors, got ", count);
    const DeviceCode device = device_code_of(same_device_as);
    for (int64_t i = 0; i < count; ++i) {
      const Tensor& tensor = first[i];
      const int64_t numel = tensor.numel(), expected = flat ? table.numel() : table.end(i) - table.begin(i);
      STD_TORCH_CHECK(numel == expected, "crl_kernels: tensor ", i, " of a list has ", numel, " elements, expected ",
                      expected);
      STD_TORCH_CHECK(device_code_of(tensor) == device, "crl_kernels: tensors are on different devices");
      if (is_cut(table, first, count)) {
        cut(table, tensor);
      } else {
        if (scales != nullptr) add_scales(table, i, tensor, scales[i], device);
        add(table, i, tensor, flat && is_row(tensor) ? nullptr : table.order(i));
      }
    }
  }
  Operand(const SegmentTable& table, const Tensors& tensors, const Tensor& same_device_as)
      : Operand(table, tensors.data(), static_cast<int64_t>(tensors.size()), same_device_as) {}

  Pointer at(int64_t segment, int64_t index) const { return view_.at(segment, index); }
  const FlatView& view() const { return view_; }

  // One entry for each segment; none if no tensor is int8.
  const std::vector<Scales>& scales() const { return scales_; }

  struct Copy {
    int64_t index;  // of the tensor in the list
    Tensor tensor;
  };
  const std::vector<Copy>& copies() const { return copies_; }

 private:
  // Whether a list is one flat tensor in row-major order beside segments in other orders.
  static bool is_cut(const SegmentTable& table, const Tensor* first, int64_t count) {
    return count == 1 && table.segments() > 1 && !table.row_major() && !is_row(first[0]);
  }

  void add(const SegmentTable& table, int64_t segment, const Tensor& tensor, const MemoryOrder* order) {
    const bool in_place = is_in_order(tensor, order);
    if (!in_place) copies_.push_back({segment, copy_in_order(tensor, order)});
    const DType dtype = !scales_.empty() && is_int8(tensor) ? DType::kInt8 : dtype_of(tensor);
    view_.add({(in_place ? tensor : copies_.back().tensor).data_ptr(), dtype}, table.begin(segment));
  }

  void add_scales(const SegmentTable& table, int64_t segment, const Tensor& tensor, const Tensor& scales,
                  DeviceCode device) {
    const int64_t numel = tensor.numel(), count = scales.numel();
    const bool int8 = is_int8(tensor);
    STD_TORCH_CHECK(dtype_code_of(scales) == aoti_torch_dtype_float32() && device_code_of(scales) == device,
                    "crl_kernels: scales of directions are float32 tensors on the device of the parameters");
    STD_TORCH_CHECK(int8 && numel > 0 ? count > 0 && numel % count == 0 : count == 0, "crl_kernels: direction tensor ",
                    segment, " of a term has ", numel, " elements and ", count,
                    " scales; expected a number of scales that divides int8 elements, and none beside others");
    STD_TORCH_CHECK(!int8 || table.order(segment) == nullptr,
                    "crl_kernels: int8 directions beside parameters that are not read in row-major order");
    if (!int8) return;
    scales_.resize(table.segments());
    if (numel == 0) return;
    Tensor in_order = torch::stable::contiguous(scales);
    scales_[segment] = {static_cast<const float*>(in_order.data_ptr()), numel / count};
    if (!scales.is_contiguous()) contiguous_scales_.push_back(in_order);
  }

  void cut(const SegmentTable& table, const Tensor& flat) {
    Tensor row_major = torch::stable::reshape(flat, {-1});
    if (!flat.is_contiguous()) copies_.push_back({0, row_major});
    for (int64_t i = 0; i < table.segments(); ++i) {
      const Tensor part = torch::stable::narrow(row_major, 0, table.begin(i), table.end(i) - table.begin(i));
      add(table, i, part, table.order(i));
    }
  }

  std::vector<Copy> copies_;
  std::vector<Tensor> contiguous_scales_;
  std::vector<Scales> scales_;
  FlatView view_;
};

// Tensors to write along a table, one for each segment, which outlive this object. Those whose elements are not in
// their segment's order are written through a copy: call write_back() after the kernel.
class Target {
 public:
  Target(const SegmentTable& table, const Tensors& tensors) : tensors_(tensors), operand_(table, tensors, tensors[0]) {
    STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == table.segments(), "crl_kernels: expected ",
                    table.segments(), " tensors to write to, got ", tensors.size());
    for (const Operand::Copy& copy : operand_.copies()) {
      const Tensor& tensor = tensors[copy.index];
      for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
        STD_TORCH_CHECK(tensor.size(dim) < 2 || tensor.stride(dim) != 0, "crl_kernels: tensor ", copy.index,
                        " of a list that is to be written to was expanded along dimension ", dim,
                        ", so its elements share memory; clone() it first");
      }
    }
  }

  Pointer at(int64_t segment, int64_t index) const { return operand_.at(segment, index); }
  const FlatView& view() const { return operand_.view(); }

  void write_back() const {
    for (const Operand::Copy& copy : operand_.copies()) {
      Tensor tensor = tensors_[copy.index];
      torch::stable::copy_(tensor, torch::stable::reshape(copy.tensor, tensor.sizes()));
    }
  }

 private:
  const Tensors& tensors_;
  Operand operand_;
};

// K directions along a table that was made with them.
inline std::vector<Operand> directions_of(const SegmentTable& table, const Tensors& tensors, int64_t num_terms,
                                          const Tensor& same_device_as) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  STD_TORCH_CHECK(num_terms > 0 && count % num_terms == 0, "crl_kernels: ", count, " direction tensors for ", num_terms,
                  " terms");
  const Directions directions{tensors, num_terms};
  const bool has_scales = directions.has_scales(table.segments());
  const int64_t pieces = has_scales ? table.segments() : directions.pieces();
  std::vector<Operand> result;
  result.reserve(num_terms);
  for (int64_t k = 0; k < num_terms; ++k) {
    const Tensor* term = directions.term(k);
    result.emplace_back(table, term, pieces, same_device_as, has_scales ? term + pieces : nullptr);
  }
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

// The address of a GradScaler's flag on the device of the other operands; null without one.
inline const float* flag_of(const std::optional<Tensor>& flag, const Tensor& same_device_as) {
  if (!flag) return nullptr;
  STD_TORCH_CHECK(flag->numel() == 1 && flag->scalar_type() == ScalarType::Float &&
                      device_code_of(*flag) == device_code_of(same_device_as),
                  "crl_kernels: found_inf is one float32 on the device of the parameters");
  return flag->const_data_ptr<float>();
}

// In the memory orders of `tensors`, as autograd expects of the gradients of parameters.
inline Tensors empty_like_all(const Tensors& tensors) {
  Tensors result;
  result.reserve(tensors.size());
  for (const Tensor& tensor : tensors) result.push_back(torch::stable::empty_like(tensor));
  return result;
}

// Operand and Target check that each list is on one device.
inline void check_targets(const Tensors& targets, const Tensors& params) {
  STD_TORCH_CHECK(targets.size() == params.size(), "crl_kernels: expected one target for each parameter");
  for (size_t i = 0; i < params.size(); ++i) {
    STD_TORCH_CHECK(dtype_code_of(targets[i]) == dtype_code_of(params[i]),
                    "crl_kernels: a target has another dtype than its parameter");
  }
  STD_TORCH_CHECK(params.empty() || device_code_of(targets[0]) == device_code_of(params[0]),
                  "crl_kernels: targets are on another device than the parameters");
}

// A rounding has 16 bits beside float32, or is theta itself.
inline void check_roundings(const Tensors& roundings, const Tensors& params) {
  STD_TORCH_CHECK(roundings.size() == params.size(), "crl_kernels: expected one rounding for each parameter");
  for (size_t i = 0; i < params.size(); ++i) {
    const DType dtype = dtype_of(params[i]), of_rounding = dtype_of(roundings[i]);
    const bool is_theta = of_rounding == dtype && roundings[i].data_ptr() == params[i].data_ptr();
    STD_TORCH_CHECK(is_theta || (dtype == DType::kFloat32 && size_of(of_rounding) == 2),
                    "crl_kernels: a rounding has 16 bits beside float32, or is the parameter itself");
  }
}

inline void check_state_dtypes(const Tensors& fisher, const Tensors& anchor) {
  STD_TORCH_CHECK(fisher.size() == anchor.size(), "crl_kernels: fisher and anchor are lists of different lengths");
  for (size_t i = 0; i < fisher.size(); ++i) {
    const DType dtype = dtype_of(fisher[i]);
    STD_TORCH_CHECK(dtype == dtype_of(anchor[i]) && (dtype == DType::kFloat32 || dtype == DType::kFloat64),
                    "crl_kernels: the diagonal Fisher and its anchor are both float32 or both float64");
  }
}

// AdamW's operands along a table: the tensors that it moves, their roundings, the gradients and the settings.
struct AdamWOperands {
  Target theta, m, v;
  std::optional<Target> rounding;
  Operand gradient;
  Tensor settings;  // (segments, kSettings)

  AdamWOperands(const SegmentTable& table, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                const Tensors& exp_avg_sqs, const Tensor& settings, const std::optional<Tensors>& roundings)
      : theta(table, params),
        m(table, exp_avgs),
        v(table, exp_avg_sqs),
        gradient(table, grads, params[0]),
        settings(coefficients_of(settings, params[0])) {
    check_targets(exp_avgs, params);
    check_targets(exp_avg_sqs, params);
    if (roundings) {
      check_roundings(*roundings, params);
      rounding.emplace(table, *roundings);
    }
    STD_TORCH_CHECK(grads.size() == params.size(), "crl_kernels: expected one gradient for each parameter");
    for (size_t i = 0; i < params.size(); ++i) {
      const DType dtype = dtype_of(params[i]), gradient_dtype = dtype_of(grads[i]);
      STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kFloat64,
                      "crl_kernels: AdamW moves float32 and float64 tensors");
      STD_TORCH_CHECK(gradient_dtype == dtype || (dtype == DType::kFloat32 && size_of(gradient_dtype) == 2),
                      "crl_kernels: a gradient has its parameter's dtype, or 16 bits beside float32");
    }
    STD_TORCH_CHECK(settings.numel() == table.segments() * kSettings, "crl_kernels: expected ", kSettings,
                    " settings for each parameter");
  }

  void write_back() const {
    if (rounding) rounding->write_back();  // before theta, which it may have in place of a rounding
    theta.write_back();
    m.write_back();
    v.write_back();
  }
};

}  // namespace crl
