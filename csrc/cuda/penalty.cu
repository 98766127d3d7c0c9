// CUDA implementations of the operators whose schemas and meanings are in crl_kernels/_ops.py.

#include <limits>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cuda/kernels.cuh"
#include "cuda/launcher.cuh"
#include "cuda/table_cache.cuh"
#include "operands.h"

namespace crl {
namespace {

// One call of an operator: its table, and the kernels it launches along it.
class Call {
 public:
  Call(const SegmentTable& table, const Tensor& tensor) : launcher_(tensor), packed_(table) {}

  template <class Operands>
  View add(const Operands& operands) {
    if constexpr (std::is_same_v<Operands, std::vector<Operand>>) {
      return packed_.add(operands);
    } else {
      return packed_.add(operands.view());
    }
  }

  const Launcher& launcher() const { return launcher_; }

  // The kernel for lists with or without float64, and the blocks it runs in: what the device holds, one tile each at
  // least.
  template <class Kernel>
  struct Grid {
    Kernel kernel;
    int blocks;
  };
  template <class Kernel>
  Grid<Kernel> grid(Kernel narrow, Kernel wide) const {
    const Kernel kernel = packed_.wide() ? wide : narrow;
    const int64_t tiles = (packed_.segments().numel() + kTile - 1) / kTile;
    return {kernel, launcher_.resident_blocks(kernel, kThreads, tiles)};
  }

  // Room for one sum of each block, for each term.
  template <class Kernel>
  Tensor partial_sums(const Grid<Kernel>& grid, int64_t num_terms) const {
    const std::vector<int64_t> shape = {num_terms, static_cast<int64_t>(grid.blocks)};
    return float64(shape);
  }
  Tensor float64(const std::vector<int64_t>& shape) const { return launcher_.empty(shape, ScalarType::Double); }

  // A kernel's first argument is the table, with all that was added.
  template <class Kernel, class... Arguments>
  void launch(const Grid<Kernel>& grid, Arguments... arguments) {
    launcher_.launch(grid.blocks, kThreads, grid.kernel, table(), arguments...);
  }
  template <class Kernel, class... Arguments>
  void launch_cooperative(const Grid<Kernel>& grid, Arguments... arguments) {
    launcher_.launch_cooperative(grid.blocks, kThreads, grid.kernel, table(), arguments...);
  }

  // The sum of each row of partial sums.
  template <class Kernel>
  Tensor finish(const Grid<Kernel>& grid, const Tensor& partial, int num_terms, const std::vector<int64_t>& shape) {
    Tensor result = float64(shape);
    launcher_.launch((num_terms + kWarps - 1) / kWarps, kThreads, finish_kernel, partial.const_data_ptr<double>(),
                     static_cast<int64_t>(grid.blocks), num_terms, result.mutable_data_ptr<double>());
    return result;
  }

 private:
  DeviceTable table() {
    if (!written_) written_ = table_cache()(packed_, launcher_);
    return written_->table;
  }

  Launcher launcher_;
  PackedTable packed_;
  std::optional<WrittenTable> written_;
};

int terms_of(int64_t num_terms) {
  STD_TORCH_CHECK(num_terms <= std::numeric_limits<int>::max() / kThreads, "crl_kernels: ", num_terms, " terms");
  return static_cast<int>(num_terms);
}

Tensor low_rank_projections(const Tensors params, const Tensors directions, int64_t num_terms) {
  const SegmentTable table = segment_table(params);
  const Operand theta(table, params, params[0]);
  const std::vector<Operand> u = directions_of(table, directions, num_terms, params[0]);
  Call call(table, params[0]);
  const View theta_view = call.add(theta), u_view = call.add(u);
  const auto grid = call.grid(projections_kernel<float>, projections_kernel<double>);
  Tensor partial = call.partial_sums(grid, num_terms);
  call.launch(grid, theta_view, u_view, terms_of(num_terms), partial.mutable_data_ptr<double>());
  return call.finish(grid, partial, terms_of(num_terms), {num_terms});
}

template <bool kOverwrite>
void combine_into(Target& target, const SegmentTable& table, const Tensors& directions, const Tensor& coefficients,
                  const Tensor& same_device_as) {
  const std::vector<Operand> u = directions_of(table, directions, coefficients.numel(), same_device_as);
  const Tensor c = coefficients_of(coefficients, same_device_as);
  Call call(table, same_device_as);
  const View target_view = call.add(target), u_view = call.add(u);
  const auto grid = call.grid(combine_kernel<float, kOverwrite>, combine_kernel<double, kOverwrite>);
  call.launch(grid, target_view, u_view, terms_of(c.numel()), c.const_data_ptr<double>());
  target.write_back();
}

void low_rank_accumulate_(const Tensors targets, const Tensors directions, const Tensor coefficients) {
  const SegmentTable table = segment_table(targets);
  Target target(table, targets);
  combine_into<false>(target, table, directions, coefficients, targets[0]);
}

Tensors low_rank_combine(const Tensors directions, const Tensor coefficients, const Tensors like) {
  const Tensors result = empty_like_all(like);
  const SegmentTable table = segment_table(result);
  Target target(table, result);
  combine_into<true>(target, table, directions, coefficients, like[0]);
  return result;
}

int64_t bytes_of(const SegmentTable& table, const std::vector<Operand>& terms) {
  int64_t bytes = 0;
  for (const Operand& term : terms) {
    for (int64_t i = 0; i < table.segments(); ++i) {
      bytes += (table.end(i) - table.begin(i)) * size_of(term.at(i, table.begin(i)).dtype);
    }
  }
  return bytes;
}

Tensor low_rank_penalty_accumulate_(const Tensors targets, const Tensors params, const Tensors directions,
                                    const Tensor curvatures, const Tensor anchor_projections,
                                    const Tensor coefficient) {
  check_targets(targets, params);
  const SegmentTable table = segment_table(params);
  Target target(table, targets);
  const Operand theta(table, params, params[0]);
  const std::vector<Operand> u = directions_of(table, directions, curvatures.numel(), params[0]);
  const Tensor a = coefficients_of(curvatures, params[0]), b = coefficients_of(anchor_projections, params[0]);
  const Tensor c = coefficient_of(coefficient, params[0]);
  STD_TORCH_CHECK(a.numel() == b.numel(), "crl_kernels: ", b.numel(), " anchor projections for ", a.numel(), " terms");
  const Penalty penalty = {terms_of(a.numel()), a.const_data_ptr<double>(), b.const_data_ptr<double>(),
                           c.const_data_ptr<double>()};

  Call call(table, params[0]);
  const View target_view = call.add(target), theta_view = call.add(theta), u_view = call.add(u);
  Tensor value = call.float64({});
  // One launch where its second reading of the directions finds them in L2; it is a barrier instead of two launches.
  // Otherwise three, none of which is limited by the registers and the grid of another.
  if (call.launcher().attribute(cudaDevAttrCooperativeLaunch) && penalty.num_terms <= kCooperativeTerms &&
      bytes_of(table, u) <= call.launcher().attribute(cudaDevAttrL2CacheSize)) {
    const auto grid = call.grid(penalty_kernel<float>, penalty_kernel<double>);
    Tensor partial = call.partial_sums(grid, penalty.num_terms);
    call.launch_cooperative(grid, target_view, theta_view, u_view, penalty, partial.mutable_data_ptr<double>(),
                            value.mutable_data_ptr<double>());
  } else {
    const auto projecting = call.grid(projections_kernel<float>, projections_kernel<double>);
    const auto combining = call.grid(combine_kernel<float, false>, combine_kernel<double, false>);
    Tensor partial = call.partial_sums(projecting, penalty.num_terms);
    Tensor coefficients = call.float64({penalty.num_terms});
    call.launch(projecting, theta_view, u_view, penalty.num_terms, partial.mutable_data_ptr<double>());
    call.launcher().launch(1, kThreads, forces_kernel, penalty, partial.const_data_ptr<double>(),
                           static_cast<int64_t>(projecting.blocks), coefficients.mutable_data_ptr<double>(),
                           value.mutable_data_ptr<double>());
    call.launch(combining, target_view, u_view, penalty.num_terms, coefficients.const_data_ptr<double>());
  }
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

Optimizer add(Call& call, const AdamWOperands& operands, const float* found_inf) {
  return {call.add(operands.theta),
          call.add(operands.gradient),
          call.add(operands.m),
          call.add(operands.v),
          operands.settings.const_data_ptr<double>(),
          found_inf};
}

Tensor low_rank_adamw_(const Tensors params, const Tensors grads, const Tensors exp_avgs, const Tensors exp_avg_sqs,
                       const Tensor settings, const std::optional<Tensor> found_inf, const Tensors directions,
                       const Tensor coefficients, bool decoupled) {
  const SegmentTable table = segment_table(params);
  const AdamWOperands operands(table, params, grads, exp_avgs, exp_avg_sqs, settings);
  const Tensor c = coefficients_of(coefficients, params[0]);
  const int num_terms = terms_of(c.numel());
  std::vector<Operand> u;
  if (num_terms) u = directions_of(table, directions, num_terms, params[0]);
  Call call(table, params[0]);
  const Optimizer optimizer = add(call, operands, flag_of(found_inf, params[0]));
  const View u_view = num_terms ? call.add(u) : View{};
  const auto grid = decoupled ? call.grid(low_rank_adamw_kernel<float, true>, low_rank_adamw_kernel<double, true>)
                              : call.grid(low_rank_adamw_kernel<float, false>, low_rank_adamw_kernel<double, false>);
  Tensor partial = call.partial_sums(grid, num_terms);
  call.launch(grid, optimizer, u_view, num_terms, c.const_data_ptr<double>(), partial.mutable_data_ptr<double>());
  operands.write_back();
  return num_terms ? call.finish(grid, partial, num_terms, {num_terms}) : call.float64({0});
}

Tensor diagonal_adamw_(const Tensors params, const Tensors grads, const Tensors exp_avgs, const Tensors exp_avg_sqs,
                       const Tensor settings, const std::optional<Tensor> found_inf, const Tensors fisher,
                       const Tensors anchor, bool decoupled) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  const AdamWOperands operands(table, params, grads, exp_avgs, exp_avg_sqs, settings);
  const Operand s(table, fisher, params[0]), m(table, anchor, params[0]);
  Call call(table, params[0]);
  const Optimizer optimizer = add(call, operands, flag_of(found_inf, params[0]));
  const View s_view = call.add(s), m_view = call.add(m);
  const auto grid = decoupled ? call.grid(diagonal_adamw_kernel<float, true>, diagonal_adamw_kernel<double, true>)
                              : call.grid(diagonal_adamw_kernel<float, false>, diagonal_adamw_kernel<double, false>);
  Tensor partial = call.partial_sums(grid, 1);
  call.launch(grid, optimizer, s_view, m_view, partial.mutable_data_ptr<double>());
  operands.write_back();
  return call.finish(grid, partial, 1, {});
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
  m.impl("low_rank_adamw_", TORCH_BOX(&low_rank_adamw_));
  m.impl("diagonal_adamw_", TORCH_BOX(&diagonal_adamw_));
}

}  // namespace
}  // namespace crl
