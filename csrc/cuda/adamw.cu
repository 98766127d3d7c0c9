// AdamW's operators on a GPU, with the penalty inside the step. crl_kernels/backends/reference.py defines them.

#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cuda/adamw.cuh"
#include "cuda/call.cuh"
#include "operands.h"

namespace crl {
namespace {

AdamWViews add(Call& call, const AdamWOperands& operands, const float* found_inf) {
  return {call.add(operands.theta),
          call.add(operands.gradient),
          call.add(operands.m),
          call.add(operands.v),
          operands.rounding ? call.add(*operands.rounding) : View{},
          operands.settings.const_data_ptr<double>(),
          found_inf};
}

// Calls pass(true_type or false_type, ...) with each of two choices, which kernels have as template arguments.
template <class Pass>
auto with_choices(bool decoupled, bool rounded, const Pass& pass) {
  if (decoupled) return rounded ? pass(std::true_type{}, std::true_type{}) : pass(std::true_type{}, std::false_type{});
  return rounded ? pass(std::false_type{}, std::true_type{}) : pass(std::false_type{}, std::false_type{});
}

Tensor low_rank_adamw_(const Tensors params, const Tensors grads, const Tensors exp_avgs, const Tensors exp_avg_sqs,
                       const Tensor settings, const std::optional<Tensor> found_inf, const Tensors directions,
                       const Tensor coefficients, bool decoupled, const std::optional<Tensors> roundings) {
  const SegmentTable table = segment_table(params, {directions, coefficients.numel()});
  const AdamWOperands operands(table, params, grads, exp_avgs, exp_avg_sqs, settings, roundings);
  const Tensor c = coefficients_of(coefficients, params[0]);
  const int num_terms = checked_terms(c.numel());
  std::vector<Operand> u;
  if (num_terms) u = directions_of(table, directions, num_terms, params[0]);
  Call call(table, params[0]);
  const AdamWViews views = add(call, operands, flag_of(found_inf, params[0]));
  Tensor projections = call.with_directions(u, [&](auto u_view) {
    using TermView = decltype(u_view);
    const auto grid = with_choices(decoupled, roundings.has_value(), [&](auto decoupled_, auto rounded) {
      constexpr bool kDecoupled = decltype(decoupled_)::value, kRounded = decltype(rounded)::value;
      return call.grid(low_rank_adamw_kernel<float, kDecoupled, kRounded, TermView>,
                       low_rank_adamw_kernel<double, kDecoupled, kRounded, TermView>);
    });
    Tensor partial = call.partial_sums(grid, num_terms);
    call.launch(grid, views, u_view, num_terms, c.const_data_ptr<double>(), partial.mutable_data_ptr<double>());
    return num_terms ? call.finish(grid, partial, num_terms, {num_terms}) : call.float64({0});
  });
  operands.write_back();
  return projections;
}

Tensor diagonal_adamw_(const Tensors params, const Tensors grads, const Tensors exp_avgs, const Tensors exp_avg_sqs,
                       const Tensor settings, const std::optional<Tensor> found_inf, const Tensors fisher,
                       const Tensors anchor, bool decoupled, const std::optional<Tensors> roundings) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  const AdamWOperands operands(table, params, grads, exp_avgs, exp_avg_sqs, settings, roundings);
  const Operand s(table, fisher, params[0]), m(table, anchor, params[0]);
  Call call(table, params[0]);
  const AdamWViews views = add(call, operands, flag_of(found_inf, params[0]));
  const View s_view = call.add(s), m_view = call.add(m);
  const auto grid = with_choices(decoupled, roundings.has_value(), [&](auto decoupled_, auto rounded) {
    constexpr bool kDecoupled = decltype(decoupled_)::value, kRounded = decltype(rounded)::value;
    return call.grid(diagonal_adamw_kernel<float, kDecoupled, kRounded>,
                     diagonal_adamw_kernel<double, kDecoupled, kRounded>);
  });
  Tensor partial = call.partial_sums(grid, 1);
  call.launch(grid, views, s_view, m_view, partial.mutable_data_ptr<double>());
  operands.write_back();
  return call.finish(grid, partial, 1, {});
}

STABLE_TORCH_LIBRARY_IMPL(crl_kernels, CUDA, m) {
  m.impl("low_rank_adamw_", TORCH_BOX(&low_rank_adamw_));
  m.impl("diagonal_adamw_", TORCH_BOX(&diagonal_adamw_));
}

}  // namespace
}  // namespace crl
