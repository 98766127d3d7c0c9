// CUDA implementations of the operators whose schemas and meanings are in crl_kernels/_ops.py.

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cuda/kernels.cuh"
#include "cuda/launcher.cuh"
#include "operands.h"

namespace crl {
namespace {

// A segment table and its flat views, first packed on the host, then copied to the device in one tensor.
class TableOnDevice {
 public:
  TableOnDevice(const SegmentTable& table, const Tensor& tensor) : table_(table), launcher_(tensor) {
    for (int64_t i = 0; i < table.segments(); ++i) words_.push_back(table.begin(i));
    words_.push_back(table.numel());
  }

  ViewHandle add(const FlatView& view) {
    const bool flat = view.entries().size() == 1;
    const ViewHandle handle = {static_cast<int64_t>(words_.size()), flat ? 0 : 2};
    for (const FlatView::Entry& entry : view.entries()) {
      words_.push_back(static_cast<int64_t>(entry.origin));
      words_.push_back(static_cast<int64_t>(entry.dtype));
    }
    return handle;
  }

  TermsHandle add(const std::vector<Operand>& terms) {
    std::vector<ViewHandle> handles;
    for (const Operand& term : terms) handles.push_back(add(term.view()));
    const TermsHandle result = {static_cast<int64_t>(words_.size()), static_cast<int64_t>(terms.size())};
    for (const ViewHandle& handle : handles) {
      words_.push_back(handle.offset);
      words_.push_back(handle.stride);
    }
    return result;
  }

  // Runs a kernel with one block for each chunk; its first argument is the table, with all that was added so far.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(DeviceTable, Parameters...), Arguments... arguments) {
    device_words_ = launcher_.to_device(words_);
    const DeviceTable table = {device_words_.const_data_ptr<int64_t>(), table_.segments()};
    launcher_.launch(table_.chunks(), kThreads, kernel, table, arguments...);
  }

  // Room for `rows` sums of each chunk.
  Tensor partial_sums(int64_t rows) const { return launcher_.empty_float64({rows, table_.chunks()}); }

  // The sum of each row.
  Tensor finish(const Tensor& partial, int64_t rows, const std::vector<int64_t>& shape) const {
    Tensor result = launcher_.empty_float64(shape);
    launcher_.launch(rows, kThreads, finish_kernel, partial.const_data_ptr<double>(), table_.chunks(),
                     result.mutable_data_ptr<double>());
    return result;
  }

 private:
  const SegmentTable& table_;
  Launcher launcher_;
  std::vector<int64_t> words_;
  Tensor device_words_;
};

Tensor low_rank_projections(const Tensors params, const Tensors directions, int64_t num_terms) {
  const SegmentTable table = segment_table(params);
  const Operand theta(table, params, params[0]);
  const std::vector<Operand> u = directions_of(table, directions, num_terms, params[0]);
  TableOnDevice device(table, params[0]);
  const ViewHandle theta_handle = device.add(theta.view());
  const TermsHandle u_handle = device.add(u);
  Tensor partial = device.partial_sums(num_terms);
  device.launch(projections_kernel, theta_handle, u_handle, partial.mutable_data_ptr<double>());
  return device.finish(partial, num_terms, {num_terms});
}

void combine_into(Target& target, const SegmentTable& table, const Tensors& directions, const Tensor& coefficients,
                  const Tensor& same_device_as, bool overwrite) {
  const std::vector<Operand> u = directions_of(table, directions, coefficients.numel(), same_device_as);
  const Tensor c = coefficients_of(coefficients, same_device_as);
  TableOnDevice device(table, same_device_as);
  const ViewHandle target_handle = device.add(target.view());
  const TermsHandle u_handle = device.add(u);
  device.launch(overwrite ? combine_kernel<true> : combine_kernel<false>, target_handle, u_handle,
                c.const_data_ptr<double>());
  target.write_back();
}

void low_rank_accumulate_(const Tensors targets, const Tensors directions, const Tensor coefficients) {
  const SegmentTable table = segment_table(targets);
  Target target(table, targets);
  combine_into(target, table, directions, coefficients, targets[0], false);
}

Tensors low_rank_combine(const Tensors directions, const Tensor coefficients, const Tensors like) {
  const Tensors result = empty_like_all(like);
  const SegmentTable table = segment_table(result);
  Target target(table, result);
  combine_into(target, table, directions, coefficients, like[0], true);
  return result;
}

Tensor diagonal_quadratic(const Tensors params, const Tensors fisher, const Tensors anchor) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  const Operand theta(table, params, params[0]), s(table, fisher, params[0]), m(table, anchor, params[0]);
  TableOnDevice device(table, params[0]);
  const Diagonal diagonal = {device.add(theta.view()), device.add(s.view()), device.add(m.view())};
  Tensor partial = device.partial_sums(1);
  device.launch(quadratic_kernel, diagonal, partial.mutable_data_ptr<double>());
  return device.finish(partial, 1, {});
}

Tensor gradient_into(const Tensors& targets, const Tensors& params, const Tensors& fisher, const Tensors& anchor,
                     const Tensor& coefficient, bool overwrite) {
  check_state_dtypes(fisher, anchor);
  check_targets(targets, params);
  const SegmentTable table = segment_table(params);
  Target target(table, targets);
  const Operand theta(table, params, params[0]), s(table, fisher, params[0]), m(table, anchor, params[0]);
  const Tensor c = coefficient_of(coefficient, params[0]);
  TableOnDevice device(table, params[0]);
  const Diagonal diagonal = {device.add(theta.view()), device.add(s.view()), device.add(m.view())};
  const ViewHandle target_handle = device.add(target.view());
  Tensor partial = device.partial_sums(1);
  device.launch(overwrite ? quadratic_gradient_kernel<true> : quadratic_gradient_kernel<false>, diagonal, target_handle,
                c.const_data_ptr<double>(), partial.mutable_data_ptr<double>());
  target.write_back();
  return device.finish(partial, 1, {});
}

Tensor diagonal_accumulate_(const Tensors targets, const Tensors params, const Tensors fisher, const Tensors anchor,
                            const Tensor coefficient) {
  return gradient_into(targets, params, fisher, anchor, coefficient, false);
}

Tensors diagonal_gradient(const Tensors params, const Tensors fisher, const Tensors anchor, const Tensor coefficient) {
  const Tensors result = empty_like_all(params);
  gradient_into(result, params, fisher, anchor, coefficient, true);
  return result;
}

void diagonal_shrink_(const Tensors params, const Tensors fisher, const Tensors anchor, const Tensor strength) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  Target theta(table, params);
  const Operand s(table, fisher, params[0]), m(table, anchor, params[0]);
  const Tensor eta_lambda = coefficient_of(strength, params[0]);
  TableOnDevice device(table, params[0]);
  const Diagonal diagonal = {device.add(theta.view()), device.add(s.view()), device.add(m.view())};
  device.launch(shrink_kernel, diagonal, eta_lambda.const_data_ptr<double>());
  theta.write_back();
}

STABLE_TORCH_LIBRARY_IMPL(crl_kernels, CUDA, m) {
  m.impl("low_rank_projections", TORCH_BOX(&low_rank_projections));
  m.impl("low_rank_combine", TORCH_BOX(&low_rank_combine));
  m.impl("low_rank_accumulate_", TORCH_BOX(&low_rank_accumulate_));
  m.impl("diagonal_quadratic", TORCH_BOX(&diagonal_quadratic));
  m.impl("diagonal_gradient", TORCH_BOX(&diagonal_gradient));
  m.impl("diagonal_accumulate_", TORCH_BOX(&diagonal_accumulate_));
  m.impl("diagonal_shrink_", TORCH_BOX(&diagonal_shrink_));
}

}  // namespace
}  // namespace crl
