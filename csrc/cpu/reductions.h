// How operators on a CPU go along the chunks of a flat vector, in parallel, and sum over them in a fixed order.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/penalty_math.h"
#include "core/segments.h"
#include "cpu/loops.h"
#include "operands.h"

namespace crl {

constexpr int64_t kChunksPerTask = 8;  // 32,768 elements: below that a second thread costs more than it brings

template <class F>
void parallel_over_chunks(const SegmentTable& table, const F& chunk_range) {
  torch::stable::parallel_for(0, table.chunks(), kChunksPerTask, chunk_range);
}

inline Tensor empty_float64(const std::vector<int64_t>& shape) {
  return torch::stable::empty(shape, ScalarType::Double);
}

// The sum of the lanes of one chunk.
inline double lane_sum(const double* lanes) { return ordered_sum(lanes, kLanes); }

// The terms' elements of one piece of a chunk after the other, as the loops read them: int8 elements are converted to
// float32 first. Each thread has its own.
class Pieces {
 public:
  Pieces(const SegmentTable& table, const std::vector<Operand>& u, const Loops& loops)
      : table_(table), u_(u), loops_(loops), pointers_(u.size()) {
    for (const Operand& term : u) has_int8_ = has_int8_ || !term.scales().empty();
    if (has_int8_) values_.reset(new float[u.size() * kChunk]);
  }

  const Pointer* at(int64_t segment, int64_t begin, int64_t end) {
    for (size_t k = 0; k < u_.size(); ++k) {
      Pointer& piece = pointers_[k];
      piece = u_[k].at(segment, begin);
      if (piece.dtype != DType::kInt8) continue;
      float* values = values_.get() + k * kChunk;
      loops_.dequantise(static_cast<const int8_t*>(piece.data), u_[k].scales()[segment], begin - table_.begin(segment),
                        end - begin, values);
      piece = {values, DType::kFloat32};
    }
    return pointers_.data();
  }

 private:
  const SegmentTable& table_;
  const std::vector<Operand>& u_;
  const Loops& loops_;
  std::vector<Pointer> pointers_;
  bool has_int8_ = false;
  std::unique_ptr<float[]> values_;  // kChunk for each term
};

// projections[k] = the sum of everything that calls of piece(segment, begin, n, pieces, lanes) add to the lanes of term
// k. `pieces` are the terms' elements from `begin` on.
template <class Piece>
void project_pieces(const SegmentTable& table, const std::vector<Operand>& u, double* projections, const Piece& piece) {
  const int64_t num_terms = static_cast<int64_t>(u.size());
  std::vector<double> partial(table.chunks() * num_terms);  // (chunk, term)
  parallel_over_chunks(table, [&](int64_t first, int64_t last) {
    std::vector<double> lanes(num_terms * kLanes);
    Pieces pieces(table, u, chosen_loops());
    for (int64_t chunk = first; chunk < last; ++chunk) {
      std::fill(lanes.begin(), lanes.end(), 0.0);
      table.for_each_piece(chunk, [&](int64_t segment, int64_t begin, int64_t end) {
        piece(segment, begin, end - begin, pieces.at(segment, begin, end), lanes.data());
      });
      for (int64_t k = 0; k < num_terms; ++k) partial[chunk * num_terms + k] = lane_sum(lanes.data() + k * kLanes);
    }
  });

  for (int64_t k = 0; k < num_terms; ++k) projections[k] = ordered_sum(partial.data() + k, table.chunks(), num_terms);
}

// projections[k] = u_k . theta, for an Operand or a Target theta
template <class Theta>
void project(const SegmentTable& table, const Theta& theta, const std::vector<Operand>& u, double* projections) {
  const Loops& loops = chosen_loops();
  const int64_t num_terms = static_cast<int64_t>(u.size());
  project_pieces(table, u, projections,
                 [&](int64_t segment, int64_t begin, int64_t n, const Pointer* pieces, double* lanes) {
                   loops.dot(theta.at(segment, begin), pieces, num_terms, begin, n, lanes);
                 });
}

// The sum of everything that calls of piece(segment, begin, n, lanes) add to the lanes, in a fixed order.
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

// sum S (theta - m)^2, for an Operand or a Target theta
template <class Theta>
Tensor quadratic(const SegmentTable& table, const Theta& theta, const Operand& s, const Operand& m) {
  const Loops& loops = chosen_loops();
  return reduce_pieces(table, [&](int64_t segment, int64_t begin, int64_t n, double* lanes) {
    loops.quadratic(theta.at(segment, begin), s.at(segment, begin), m.at(segment, begin), begin, n, lanes);
  });
}

}  // namespace crl
