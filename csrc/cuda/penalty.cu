// The penalties' operators on a GPU, low-rank and diagonal. crl_kernels/backends/reference.py defines them.

#include <vector>

#include <torch/csrc/stable/library.h>

#include "cuda/call.cuh"
#include "cuda/penalty.cuh"
#include "operands.h"

namespace crl {
namespace {

Tensor low_rank_projections(const Tensors params, const Tensors directions, int64_t num_terms) {
  const SegmentTable table = segment_table(params, {directions, num_terms});
  const Operand theta(table, params, params[0]);
  const std::vector<Operand> u = directions_of(table, directions, num_terms, params[0]);
  Call call(table, params[0]);
  const View theta_view = call.add(theta);
  return call.with_directions(u, [&](auto u_view) {
    using TermView = decltype(u_view);
    const auto grid = call.grid(projections_kernel<float, TermView>, projections_kernel<double, TermView>);
    Tensor partial = call.partial_sums(grid, num_terms);
    call.launch(grid, theta_view, u_view, checked_terms(num_terms), partial.mutable_data_ptr<double>());
    return call.finish(grid, partial, checked_terms(num_terms), {num_terms});
  });
}

template <bool kOverwrite>
void combine_into(Target& target, const SegmentTable& table, const Tensors& directions, const Tensor& coefficients,
                  const Tensor& same_device_as) {
  const std::vector<Operand> u = directions_of(table, directions, coefficients.numel(), same_device_as);
  const Tensor c = coefficients_of(coefficients, same_device_as);
  Call call(table, same_device_as);
  const View target_view = call.add(target);
  call.with_directions(u, [&](auto u_view) {
    using TermView = decltype(u_view);
    const auto grid =
        call.grid(combine_kernel<float, kOverwrite, TermView>, combine_kernel<double, kOverwrite, TermView>);
    call.launch(grid, target_view, u_view, checked_terms(c.numel()), c.const_data_ptr<double>());
  });
  target.write_back();
}

void low_rank_accumulate_(const Tensors targets, const Tensors directions, const Tensor coefficients) {
  const SegmentTable table = segment_table(targets, {directions, coefficients.numel()});
  Target target(table, targets);
  combine_into<false>(target, table, directions, coefficients, targets[0]);
}

Tensors low_rank_combine(const Tensors directions, const Tensor coefficients, const Tensors like) {
  const Tensors result = empty_like_all(like);
  const SegmentTable table = segment_table(result, {directions, coefficients.numel()});
  Target target(table, result);
  combine_into<true>(target, table, directions, coefficients, like[0]);
  return result;
}

int64_t bytes_of(const SegmentTable& table, const std::vector<Operand>& terms) {
  int64_t bytes = 0;
  for (const Operand& term : terms) {
    for (int64_t i = 0; i < table.segments(); ++i) {
      const int64_t numel = table.end(i) - table.begin(i);
      bytes += numel * size_of(term.at(i, table.begin(i)).dtype);
      if (!term.scales().empty()) bytes += numel / term.scales()[i].length * static_cast<int64_t>(sizeof(float));
    }
  }
  return bytes;
}

Tensor low_rank_penalty_accumulate_(const Tensors targets, const Tensors params, const Tensors directions,
                                    const Tensor curvatures, const Tensor anchor_projections,
                                    const Tensor coefficient) {
  check_targets(targets, params);
  const SegmentTable table = segment_table(params, {directions, curvatures.numel()});
  Target target(table, targets);
  const Operand theta(table, params, params[0]);
  const std::vector<Operand> u = directions_of(table, directions, curvatures.numel(), params[0]);
  const Tensor a = coefficients_of(curvatures, params[0]), b = coefficients_of(anchor_projections, params[0]);
  const Tensor c = coefficient_of(coefficient, params[0]);
  STD_TORCH_CHECK(a.numel() == b.numel(), "crl_kernels: ", b.numel(), " anchor projections for ", a.numel(), " terms");
  const Penalty penalty = {checked_terms(a.numel()), a.const_data_ptr<double>(), b.const_data_ptr<double>(),
                           c.const_data_ptr<double>()};

  Call call(table, params[0]);
  const View target_view = call.add(target), theta_view = call.add(theta);
  Tensor value = call.float64({});
  call.with_directions(u, [&](auto u_view) {
    using TermView = decltype(u_view);
    // One launch, with a barrier instead of two more launches, where the directions stay in L2 for their second
    // reading. Otherwise three launches, so that none is limited by the registers and the grid of another.
    if (call.launcher().attribute(cudaDevAttrCooperativeLaunch) && penalty.num_terms <= kSharedTerms &&
        bytes_of(table, u) <= call.launcher().attribute(cudaDevAttrL2CacheSize)) {
      const auto grid = call.grid(penalty_kernel<float, TermView>, penalty_kernel<double, TermView>);
      Tensor partial = call.partial_sums(grid, penalty.num_terms);
      if (call.launch_cooperative(grid, target_view, theta_view, u_view, penalty, partial.mutable_data_ptr<double>(),
                                  value.mutable_data_ptr<double>())) {
        return;
      }
    }
    const auto projecting = call.grid(projections_kernel<float, TermView>, projections_kernel<double, TermView>);
    const auto combining = call.grid(combine_kernel<float, false, TermView>, combine_kernel<double, false, TermView>);
    Tensor partial = call.partial_sums(projecting, penalty.num_terms);
    Tensor forces = call.float64({penalty.num_terms});
    call.launch(projecting, theta_view, u_view, penalty.num_terms, partial.mutable_data_ptr<double>());
    call.launcher().launch(1, kThreads, forces_kernel, penalty, partial.const_data_ptr<double>(),
                           static_cast<int64_t>(projecting.blocks), forces.mutable_data_ptr<double>(),
                           value.mutable_data_ptr<double>());
    call.launch(combining, target_view, u_view, penalty.num_terms, forces.const_data_ptr<double>());
  });
  target.write_back();
  return value;
}

Tensor diagonal_quadratic(const Tensors params, const Tensors fisher, const Tensors anchor) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  const Operand theta(table, params, params[0]), s(table, fisher, params[0]), m(table, anchor, params[0]);
  Call call(table, params[0]);
  const Diagonal diagonal = {call.add(theta), call.add(s), call.add(m)};
  const auto grid = call.grid(quadratic_kernel<float>, quadratic_kernel<double>);
  Tensor partial = call.partial_sums(grid, 1);
  call.launch(grid, diagonal, partial.mutable_data_ptr<double>());
  return call.finish(grid, partial, 1, {});
}

template <bool kOverwrite>
Tensor gradient_into(const Tensors& targets, const Tensors& params, const Tensors& fisher, const Tensors& anchor,
                     const Tensor& coefficient) {
  check_state_dtypes(fisher, anchor);
  check_targets(targets, params);
  const SegmentTable table = segment_table(params);
  Target target(table, targets);
  const Operand theta(table, params, params[0]), s(table, fisher, params[0]), m(table, anchor, params[0]);
  const Tensor c = coefficient_of(coefficient, params[0]);
  Call call(table, params[0]);
  const Diagonal diagonal = {call.add(theta), call.add(s), call.add(m)};
  const View target_view = call.add(target);
  const auto grid =
      call.grid(quadratic_gradient_kernel<float, kOverwrite>, quadratic_gradient_kernel<double, kOverwrite>);
  Tensor partial = call.partial_sums(grid, 1);
  call.launch(grid, diagonal, target_view, c.const_data_ptr<double>(), partial.mutable_data_ptr<double>());
  target.write_back();
  return call.finish(grid, partial, 1, {});
}

Tensor diagonal_accumulate_(const Tensors targets, const Tensors params, const Tensors fisher, const Tensors anchor,
                            const Tensor coefficient) {
  return gradient_into<false>(targets, params, fisher, anchor, coefficient);
}

Tensors diagonal_gradient(const Tensors params, const Tensors fisher, const Tensors anchor, const Tensor coefficient) {
  const Tensors result = empty_like_all(params);
  gradient_into<true>(result, params, fisher, anchor, coefficient);
  return result;
}

void diagonal_shrink_(const Tensors params, const Tensors fisher, const Tensors anchor, const Tensor strength) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  Target theta(table, params);
  const Operand s(table, fisher, params[0]), m(table, anchor, params[0]);
  const Tensor eta_lambda = coefficient_of(strength, params[0]);
  Call call(table, params[0]);
  const Diagonal diagonal = {call.add(theta), call.add(s), call.add(m)};
  const auto grid = call.grid(shrink_kernel<float>, shrink_kernel<double>);
  call.launch(grid, diagonal, eta_lambda.const_data_ptr<double>());
  theta.write_back();
}

STABLE_TORCH_LIBRARY_IMPL(crl_kernels, CUDA, m) {
  m.impl("low_rank_projections", TORCH_BOX(&low_rank_projections));
  m.impl("low_rank_combine", TORCH_BOX(&low_rank_combine));
  m.impl("low_rank_accumulate_", TORCH_BOX(&low_rank_accumulate_));
  m.impl("low_rank_penalty_accumulate_", TORCH_BOX(&low_rank_penalty_accumulate_));
  m.impl("diagonal_quadratic", TORCH_BOX(&diagonal_quadratic));
  m.impl("diagonal_gradient", TORCH_BOX(&diagonal_gradient));
  m.impl("diagonal_accumulate_", TORCH_BOX(&diagonal_accumulate_));
  m.impl("diagonal_shrink_", TORCH_BOX(&diagonal_shrink_));
}

}  // namespace
}  // namespace crl
