// CPU implementations of the operators whose schemas and meanings are in crl_kernels/_ops.py.

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

Tensor low_rank_projections(const Tensors params, const Tensors directions, int64_t num_terms) {
  const SegmentTable table = segment_table(params);
  const Operand theta(table, params, params[0]);
  const std::vector<Operand> u = directions_of(table, directions, num_terms, params[0]);
  const Kernels& loops = kernels();

  std::vector<double> partial(table.chunks() * num_terms);  // (chunk, term)
  parallel_over_chunks(table, [&](int64_t first, int64_t last) {
    std::vector<double> lanes(num_terms * kLanes);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      std::fill(lanes.begin(), lanes.end(), 0.0);
      table.for_each_piece(chunk, [&](int64_t segment, int64_t begin, int64_t end) {
        const Pointer x = theta.at(segment, begin);
        for (int64_t k = 0; k < num_terms; ++k) {
          loops.dot(x, u[k].at(segment, begin), begin, end - begin, lanes.data() + k * kLanes);
        }
      });
      for (int64_t k = 0; k < num_terms; ++k) partial[chunk * num_terms + k] = lane_sum(lanes.data() + k * kLanes);
    }
  });

  Tensor result = empty_float64({num_terms});
  double* projections = result.mutable_data_ptr<double>();
  for (int64_t k = 0; k < num_terms; ++k) projections[k] = ordered_sum(partial.data() + k, table.chunks(), num_terms);
  return result;
}

// targets (+)= sum_k coefficients[k] u_k. Several terms are summed in float64 first, so a target is rounded
// once (through float32 for 16-bit dtypes, as PyTorch does).
void combine_into(Target& targets, const SegmentTable& table, const Tensors& directions, const Tensor& coefficients,
                  const Tensor& same_device_as, bool overwrite) {
  const std::vector<Operand> u = directions_of(table, directions, coefficients.numel(), same_device_as);
  const Tensor consecutive = coefficients_of(coefficients, same_device_as);
  const double* c = consecutive.const_data_ptr<double>();
  const Kernels& loops = kernels();
  parallel_over_chunks(table, [&](int64_t first, int64_t last) {
    double sum[kChunk];
    for (int64_t chunk = first; chunk < last; ++chunk) {
      table.for_each_piece(chunk, [&](int64_t segment, int64_t begin, int64_t end) {
        const Pointer target = targets.at(segment, begin);
        const int64_t n = end - begin;
        if (u.size() == 1) {
          loops.axpy(target, u[0].at(segment, begin), n, c[0], overwrite);
          return;
        }
        for (size_t k = 0; k < u.size(); ++k) {
          loops.accumulate(sum, u[k].at(segment, begin), n, c[k], k == 0);
        }
        loops.add(target, sum, n, overwrite);
      });
    }
  });
  targets.write_back();
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

STABLE_TORCH_LIBRARY_IMPL(crl_kernels, CPU, m) {
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
