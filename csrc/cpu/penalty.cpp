// The penalties' operators on a CPU, low-rank and diagonal. crl_kernels/backends/reference.py defines them.

#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "core/penalty_math.h"
#include "core/segments.h"
#include "cpu/loops.h"
#include "cpu/reductions.h"
#include "operands.h"

namespace crl {
namespace {

Tensor low_rank_projections(const Tensors params, const Tensors directions, int64_t num_terms) {
  const SegmentTable table = segment_table(params, {directions, num_terms});
  const Operand theta(table, params, params[0]);
  Tensor result = empty_float64({num_terms});
  project(table, theta, directions_of(table, directions, num_terms, params[0]), result.mutable_data_ptr<double>());
  return result;
}

// targets (+)= sum_k c[k] u_k, summed in float64 and rounded once (through float32 for 16-bit dtypes, as PyTorch does).
void combine(const Target& targets, const SegmentTable& table, const std::vector<Operand>& u, const double* c,
             bool overwrite) {
  const int64_t num_terms = static_cast<int64_t>(u.size());
  const Loops& loops = chosen_loops();
  parallel_over_chunks(table, [&](int64_t first, int64_t last) {
    Pieces pieces(table, u, loops);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      table.for_each_piece(chunk, [&](int64_t segment, int64_t begin, int64_t end) {
        const Pointer* terms = pieces.at(segment, begin, end);
        loops.combine(targets.at(segment, begin), terms, c, num_terms, end - begin, overwrite);
      });
    }
  });
  targets.write_back();
}

void low_rank_accumulate_(const Tensors targets, const Tensors directions, const Tensor coefficients) {
  const SegmentTable table = segment_table(targets, {directions, coefficients.numel()});
  Target target(table, targets);
  const Tensor c = coefficients_of(coefficients, targets[0]);
  const std::vector<Operand> u = directions_of(table, directions, c.numel(), targets[0]);
  combine(target, table, u, c.const_data_ptr<double>(), false);
}

Tensor low_rank_penalty_accumulate_(const Tensors targets, const Tensors params, const Tensors directions,
                                    const Tensor curvatures, const Tensor anchor_projections,
                                    const Tensor coefficient) {
  check_targets(targets, params);
  const int64_t num_terms = curvatures.numel();
  const SegmentTable table = segment_table(params, {directions, num_terms});
  Target target(table, targets);
  const Operand theta(table, params, params[0]);
  const std::vector<Operand> u = directions_of(table, directions, num_terms, params[0]);
  const Tensor a_tensor = coefficients_of(curvatures, params[0]);
  const Tensor b_tensor = coefficients_of(anchor_projections, params[0]);
  STD_TORCH_CHECK(b_tensor.numel() == num_terms, "crl_kernels: ", b_tensor.numel(), " anchor projections for ",
                  num_terms, " terms");
  const double *a = a_tensor.const_data_ptr<double>(), *b = b_tensor.const_data_ptr<double>();
  const double c = *coefficient_of(coefficient, params[0]).const_data_ptr<double>();

  std::vector<double> force(num_terms);
  project(table, theta, u, force.data());
  double value = 0.0;
  for (int64_t k = 0; k < num_terms; ++k) {
    const LowRankTerm term = low_rank_term(force[k], b[k], a[k], c);
    value += term.value;
    force[k] = term.force;
  }
  combine(target, table, u, force.data(), false);
  Tensor result = empty_float64({});
  *result.mutable_data_ptr<double>() = value;
  return result;
}

Tensors low_rank_combine(const Tensors directions, const Tensor coefficients, const Tensors like) {
  const Tensors result = empty_like_all(like);
  const SegmentTable table = segment_table(result, {directions, coefficients.numel()});
  Target target(table, result);
  const Tensor c = coefficients_of(coefficients, like[0]);
  const std::vector<Operand> u = directions_of(table, directions, c.numel(), like[0]);
  combine(target, table, u, c.const_data_ptr<double>(), true);
  return result;
}

Tensor diagonal_quadratic(const Tensors params, const Tensors fisher, const Tensors anchor) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  const Operand theta(table, params, params[0]), s(table, fisher, params[0]), m(table, anchor, params[0]);
  return quadratic(table, theta, s, m);
}

Tensor gradient_into(const Tensors& targets, const Tensors& params, const Tensors& fisher, const Tensors& anchor,
                     const Tensor& coefficient, bool overwrite) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  check_targets(targets, params);
  Target target(table, targets);
  const Operand theta(table, params, params[0]), s(table, fisher, params[0]), m(table, anchor, params[0]);
  const double c = *coefficient_of(coefficient, params[0]).const_data_ptr<double>();
  const Loops& loops = chosen_loops();
  Tensor value = reduce_pieces(table, [&](int64_t segment, int64_t begin, int64_t n, double* lanes) {
    loops.quadratic_gradient(target.at(segment, begin), theta.at(segment, begin), s.at(segment, begin),
                             m.at(segment, begin), begin, n, c, overwrite, lanes);
  });
  target.write_back();
  return value;
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
  const double eta_lambda = *coefficient_of(strength, params[0]).const_data_ptr<double>();
  const Loops& loops = chosen_loops();
  parallel_over_chunks(table, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      table.for_each_piece(chunk, [&](int64_t segment, int64_t begin, int64_t end) {
        loops.shrink(theta.at(segment, begin), s.at(segment, begin), m.at(segment, begin), end - begin, eta_lambda);
      });
    }
  });
  theta.write_back();
}

STABLE_TORCH_LIBRARY_IMPL(crl_kernels, CPU, m) {
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
