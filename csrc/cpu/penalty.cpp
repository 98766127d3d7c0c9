// CPU implementations of the operators whose schemas and meanings are in crl_kernels/_ops.py.

#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/adamw_math.h"
#include "core/penalty_math.h"
#include "core/segments.h"
#include "cpu/kernels.h"
#include "operands.h"

namespace crl {
namespace {

constexpr int64_t kChunksPerTask = 8;  // 32,768 elements: below that a second thread costs more than it brings

template <class F>
void parallel_over_chunks(const SegmentTable& table, const F& chunk_range) {
  torch::stable::parallel_for(0, table.chunks(), kChunksPerTask, chunk_range);
}

Tensor empty_float64(const std::vector<int64_t>& shape) { return torch::stable::empty(shape, ScalarType::Double); }

// Sums the lanes of one chunk.
double lane_sum(const double* lanes) { return ordered_sum(lanes, kLanes); }

void pieces_at(const std::vector<Operand>& u, int64_t segment, int64_t index, Pointer* pieces) {
  for (const Operand& term : u) *pieces++ = term.at(segment, index);
}

// projections[k] = the sum of what piece(segment, begin, n, pieces, lanes) adds to the lanes of term k; `pieces` are
// the terms' elements there.
template <class Piece>
void project_pieces(const SegmentTable& table, const std::vector<Operand>& u, double* projections, const Piece& piece) {
  const int64_t num_terms = static_cast<int64_t>(u.size());
  std::vector<double> partial(table.chunks() * num_terms);  // (chunk, term)
  parallel_over_chunks(table, [&](int64_t first, int64_t last) {
    std::vector<double> lanes(num_terms * kLanes);
    std::vector<Pointer> pieces(num_terms);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      std::fill(lanes.begin(), lanes.end(), 0.0);
      table.for_each_piece(chunk, [&](int64_t segment, int64_t begin, int64_t end) {
        pieces_at(u, segment, begin, pieces.data());
        piece(segment, begin, end - begin, pieces.data(), lanes.data());
      });
      for (int64_t k = 0; k < num_terms; ++k) partial[chunk * num_terms + k] = lane_sum(lanes.data() + k * kLanes);
    }
  });

  for (int64_t k = 0; k < num_terms; ++k) projections[k] = ordered_sum(partial.data() + k, table.chunks(), num_terms);
}

// projections[k] = u_k . theta
template <class Theta>
void project(const SegmentTable& table, const Theta& theta, const std::vector<Operand>& u, double* projections) {
  const Kernels& loops = kernels();
  const int64_t num_terms = static_cast<int64_t>(u.size());
  project_pieces(table, u, projections,
                 [&](int64_t segment, int64_t begin, int64_t n, const Pointer* pieces, double* lanes) {
                   loops.dot(theta.at(segment, begin), pieces, num_terms, begin, n, lanes);
                 });
}

Tensor low_rank_projections(const Tensors params, const Tensors directions, int64_t num_terms) {
  const SegmentTable table = segment_table(params);
  const Operand theta(table, params, params[0]);
  Tensor result = empty_float64({num_terms});
  project(table, theta, directions_of(table, directions, num_terms, params[0]), result.mutable_data_ptr<double>());
  return result;
}

// targets (+)= sum_k c[k] u_k, summed in float64 and rounded once (through float32 for 16-bit dtypes, as PyTorch does).
void combine(const Target& targets, const SegmentTable& table, const std::vector<Operand>& u, const double* c,
             bool overwrite) {
  const int64_t num_terms = static_cast<int64_t>(u.size());
  const Kernels& loops = kernels();
  parallel_over_chunks(table, [&](int64_t first, int64_t last) {
    std::vector<Pointer> pieces(num_terms);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      table.for_each_piece(chunk, [&](int64_t segment, int64_t begin, int64_t end) {
        pieces_at(u, segment, begin, pieces.data());
        loops.combine(targets.at(segment, begin), pieces.data(), c, num_terms, end - begin, overwrite);
      });
    }
  });
  targets.write_back();
}

void low_rank_accumulate_(const Tensors targets, const Tensors directions, const Tensor coefficients) {
  const SegmentTable table = segment_table(targets);
  Target target(table, targets);
  const Tensor c = coefficients_of(coefficients, targets[0]);
  const std::vector<Operand> u = directions_of(table, directions, c.numel(), targets[0]);
  combine(target, table, u, c.const_data_ptr<double>(), false);
}

Tensor low_rank_penalty_accumulate_(const Tensors targets, const Tensors params, const Tensors directions,
                                    const Tensor curvatures, const Tensor anchor_projections,
                                    const Tensor coefficient) {
  check_targets(targets, params);
  const SegmentTable table = segment_table(params);
  Target target(table, targets);
  const Operand theta(table, params, params[0]);
  const int64_t num_terms = curvatures.numel();
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
  const SegmentTable table = segment_table(result);
  Target target(table, result);
  const Tensor c = coefficients_of(coefficients, like[0]);
  const std::vector<Operand> u = directions_of(table, directions, c.numel(), like[0]);
  combine(target, table, u, c.const_data_ptr<double>(), true);
  return result;
}

// Runs piece(segment, begin, n, lanes) over the table and returns the sum of all lanes, in a fixed order.
template <class Piece>
Tensor reduce_pieces(const SegmentTable& table, const Piece& piece) {
  std::vector<double> partial(table.chunks());
  parallel_over_chunks(table, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double lanes[kLanes] = {};
      table.for_each_piece(
          chunk, [&](int64_t segment, int64_t begin, int64_t end) { piece(segment, begin, end - begin, lanes); });
      partial[chunk] = lane_sum(lanes);
    }
  });
  Tensor result = empty_float64({});
  *result.mutable_data_ptr<double>() = ordered_sum(partial.data(), table.chunks());
  return result;
}

Tensor diagonal_quadratic(const Tensors params, const Tensors fisher, const Tensors anchor) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  const Operand theta(table, params, params[0]), s(table, fisher, params[0]), m(table, anchor, params[0]);
  const Kernels& loops = kernels();
  return reduce_pieces(table, [&](int64_t segment, int64_t begin, int64_t n, double* lanes) {
    loops.quadratic(theta.at(segment, begin), s.at(segment, begin), m.at(segment, begin), begin, n, lanes);
  });
}

Tensor gradient_into(const Tensors& targets, const Tensors& params, const Tensors& fisher, const Tensors& anchor,
                     const Tensor& coefficient, bool overwrite) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  check_targets(targets, params);
  Target target(table, targets);
  const Operand theta(table, params, params[0]), s(table, fisher, params[0]), m(table, anchor, params[0]);
  const double c = *coefficient_of(coefficient, params[0]).const_data_ptr<double>();
  const Kernels& loops = kernels();
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
  const Kernels& loops = kernels();
  parallel_over_chunks(table, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      table.for_each_piece(chunk, [&](int64_t segment, int64_t begin, int64_t end) {
        loops.shrink(theta.at(segment, begin), s.at(segment, begin), m.at(segment, begin), end - begin, eta_lambda);
      });
    }
  });
  theta.write_back();
}

bool is_skipped(const std::optional<Tensor>& found_inf, const Tensor& same_device_as) {
  const float* flag = flag_of(found_inf, same_device_as);
  return flag != nullptr && *flag > 0.0f;
}

AdamWPiece piece_at(const AdamWOperands& operands, int64_t segment, int64_t index) {
  return {operands.theta.at(segment, index), operands.gradient.at(segment, index), operands.m.at(segment, index),
          operands.v.at(segment, index), operands.settings.const_data_ptr<double>() + segment * kSettings};
}

Tensor low_rank_adamw_(const Tensors params, const Tensors grads, const Tensors exp_avgs, const Tensors exp_avg_sqs,
                       const Tensor settings, const std::optional<Tensor> found_inf, const Tensors directions,
                       const Tensor coefficients, bool decoupled) {
  const SegmentTable table = segment_table(params);
  const AdamWOperands operands(table, params, grads, exp_avgs, exp_avg_sqs, settings);
  const Tensor c_tensor = coefficients_of(coefficients, params[0]);
  const int64_t num_terms = c_tensor.numel();
  std::vector<Operand> u;
  if (num_terms) u = directions_of(table, directions, num_terms, params[0]);
  const double* c = c_tensor.const_data_ptr<double>();
  const Kernels& loops = kernels();
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
                       const Tensors anchor, bool decoupled) {
  check_state_dtypes(fisher, anchor);
  const SegmentTable table = segment_table(params);
  const AdamWOperands operands(table, params, grads, exp_avgs, exp_avg_sqs, settings);
  const Operand s(table, fisher, params[0]), m(table, anchor, params[0]);
  if (is_skipped(found_inf, params[0])) return diagonal_quadratic(params, fisher, anchor);
  const Kernels& loops = kernels();
  Tensor value = reduce_pieces(table, [&](int64_t segment, int64_t begin, int64_t n, double* lanes) {
    loops.diagonal_adamw(piece_at(operands, segment, begin), s.at(segment, begin), m.at(segment, begin), decoupled,
                         begin, n, lanes);
  });
  operands.write_back();
  return value;
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
  m.impl("low_rank_adamw_", TORCH_BOX(&low_rank_adamw_));
  m.impl("diagonal_adamw_", TORCH_BOX(&diagonal_adamw_));
}

}  // namespace
}  // namespace crl
