// Per-sample weight gradients of a convolution, tile by tile, and their statistics, without a matrix of them.
//
// Of sample i:  g_i[o, c, ky, kx] = sum_yx b_i[o, y, x] a_i[c, y * stride_h + ky * dilation_h - padding_h, x * ...]
// with a the layer's input and b the gradient of its output. A linear layer is a convolution with a 1 x 1 kernel.
//
// A block is one operand's kBlockRows channels x the other's `columns` channels at one offset of the kernel: an outer
// product at each pixel, summed in registers. A tile is some blocks of the same kBlockRows channels, few enough that
// the gradients of ALL samples for it, one row each, stay in the second-level cache while their sum, norms, projections
// and Gram matrix are taken.
#pragma once

#include <cstdint>

#include "core/segments.h"

namespace crl {

// x 2 vectors: 12 sums, 2 vectors and one broadcast number fill the 16 registers of AVX2.
constexpr int64_t kBlockRows = 6;

// How one operand's pixels are walked, in pixels of its packed image.
struct Walk {
  int64_t step_y, step_x;      // from one pixel of the output to the next
  int64_t offset_y, offset_x;  // from one offset of the kernel to the next
};

// What is taken of the rows of a tile, `length` elements each. The first three are added to what is there. Products are
// summed in the rows' dtype, so squares beyond its range are infinite or zero, as they are in plain PyTorch.
struct TileStatistics {
  double* sq_norms;        // (samples)
  double* projections;     // (samples, num_directions)
  double* gram;            // (samples, samples): its lower triangle, and some elements above it; or null
  const void* directions;  // (num_directions, length), or null: project on the sum
  int64_t num_directions;  // 1 on the sum
  void* sum;               // (length): the sum of the rows, written
  void* sum_of_squares;    // (length), written; or null
};

struct WeightGradientLoops {
  // Of float32 or float64, as are all operands: channels of a block's columns
  int64_t (*columns)(DType dtype);
  // block: (kBlockRows, columns), the sum over (height, width) pixels of rows (..., kBlockRows) x columns (...,
  // columns) at kernel offset (ky, kx)
  void (*correlate)(DType dtype, const void* rows, const Walk& row_walk, const void* columns, const Walk& column_walk,
                    int64_t height, int64_t width, int64_t ky, int64_t kx, void* block);
  // rows: (samples, length); length is a multiple of columns(dtype)
  void (*statistics)(DType dtype, const void* rows, int64_t samples, int64_t length, const TileStatistics& result);
};

namespace baseline {
extern const WeightGradientLoops weight_gradient_loops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const WeightGradientLoops weight_gradient_loops;
}
namespace avx512 {
extern const WeightGradientLoops weight_gradient_loops;
}
#endif

// Of the set that kernels() is of.
const WeightGradientLoops& weight_gradient_loops();

}  // namespace crl
