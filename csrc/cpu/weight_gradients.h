// Per-sample weight gradients of a convolution, tile by tile, and their statistics, without a matrix of them.
//
// Of sample i:  g_i[o, c, ky, kx] = sum_yx b_i[o, y, x] a_i[c, y * stride_h + ky * dilation_h - padding_h, x * ...]
// with a the layer's input and b the gradient of its output. A linear layer is a convolution with a 1 x 1 kernel.
//
// A block is one operand's kBlockRows channels x the other's `columns` channels at one offset of the kernel: an outer
// product at each pixel, summed in registers. A tile is some blocks of the same kBlockRows channels, few enough that
// the gradients of ALL samples for it, one row each, stay in the second-level cache while their sum, norms, projections
// and Gram matrix are computed.
#pragma once

#include <cstdint>

#include "core/segments.h"

namespace crl {

// x 2 vectors: 12 sums, 2 vectors and one broadcast number fill the 16 registers of AVX2.
constexpr int64_t kBlockRows = 6;

// The distances between the pixels of one operand that are used, in pixels of its packed image.
struct Walk {
  int64_t step_y, step_x;      // from one pixel of the output to the next
  int64_t offset_y, offset_x;  // from one offset of the kernel to the next
};

// The statistics of the rows of a tile, `length` elements each. The first three are added to their previous values.
// Products are summed in the rows' dtype, so squares beyond its range are infinite or zero, as they are in plain
// PyTorch.
struct TileStatistics {
  double* sq_norms;        // (samples)
  double* projections;     // (samples, num_directions)
  double* gram;            // (samples, samples): its lower triangle, and some elements above it; or null
  const void* directions;  // (num_directions, length), or null: project on the sum
  int64_t num_directions;  // 1 on the sum
  void* sum;               // (length): the sum of the rows, written
  void* sum_of_squares;    // (length), written; or null
};

}  // namespace crl
