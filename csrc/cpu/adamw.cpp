// AdamW's operators on a CPU, with the penalty inside the step. crl_kernels/backends/reference.py defines them.

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "core/adamw_math.h"
#include "core/segments.h"
#include "cpu/loops.h"
#include "cpu/reductions.h"
#include "operands.h"

namespace crl {
namespace {

bool is_skipped(const std::optional<Tensor>& found_inf, const Tensor& same_device_as) {
  const float* flag = flag_of(found_inf, same_device_as);
  return flag != nullptr && *flag > 0.0f;
}

AdamWPiece piece_at(const AdamWOperands& operands, int64_t segment, int64_t index) {
  return {operands.theta.at(segment, index),
          operands.gradient.at(segment, index),
          operands.m.at(segment, index),
          operands.v.at(segment, index),
          operands.rounding ? operands.rounding->at(segment, index) : operands.theta.at(segment, index),
          operands.settings.const_data_ptr<double>() + segment * kSettings};
}

Tensor low_rank_adamw_(const Tensors params, const Tensors grads, const Tensors exp_avgs, const Tensors exp_avg_sqs,
                       const Tensor settings, const std::optional<Tensor> found_inf, const Tensors directions,
                       const Tensor coefficients, bool decoupled, const std::optional<Tensors> roundings) {
  const SegmentTable table = segment_table(params, {directions, coefficients.numel()});
  const AdamWOperands operands(table, params, grads, exp_avgs, exp_avg_sqs, settings, roundings);
  const Tensor c_tensor = coefficients_of(coefficients, params[0]);
  const int64_t num_terms = c_tensor.numel();
  std::vector<Operand> u;
  if (num_terms) u = directions_of(table, directions, num_terms, params[0]);
  const double* c = c_tensor.const_data_ptr<double>();
  const Loops& loops = chosen_loops();
  Tensor result = empty_float64({num_terms});
  double* projections = result.mutable_data_ptr<double>();
  if (is_skipped(found_inf, params[0])) {
    if (num_terms) project(table, operands.theta, u, projections);
    return result;
  }
  project_pieces(table, u, projections,
                 [&](int64_t segment, int64_t begin, int64_t n, const Pointer* pieces, double* lanes) {
                   const AdamWPiece piece = piece_at(operands, segment, begin);
                   num_terms ? loops.low_rank_adamw(piece, pieces, c, num_terms, decoupled, begin, n, lanes)
                             : loops.adamw(piece, n);
                 });
  operands.write_back();
  return result;
}

Tensor diagonal_adamw_(const Tensors params, const Tensors grads, const Tensors exp_avgs, const Tensors exp_avg_sqs,
                       const Tensor settings, const std::optional<Tensor> found_inf, const Tensors fisher,
                       const Tensors anchor, bool decoupled, const std::optional<Tensors> roundings) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  const AdamWOperands operands(table, params, grads, exp_avgs, exp_avg_sqs, settings, roundings);
  const Operand s(table, fisher, params[0]), m(table, anchor, params[0]);
  if (is_skipped(found_inf, params[0])) return quadratic(table, operands.theta, s, m);
  const Loops& loops = chosen_loops();
  Tensor value = reduce_pieces(table, [&](int64_t segment, int64_t begin, int64_t n, double* lanes) {
    loops.diagonal_adamw(piece_at(operands, segment, begin), s.at(segment, begin), m.at(segment, begin), decoupled,
                         begin, n, lanes);
  });
  operands.write_back();
  return value;
}

STABLE_TORCH_LIBRARY_IMPL(crl_kernels, CPU, m) {
  m.impl("low_rank_adamw_", TORCH_BOX(&low_rank_adamw_));
  m.impl("diagonal_adamw_", TORCH_BOX(&diagonal_adamw_));
}

}  // namespace
}  // namespace crl
