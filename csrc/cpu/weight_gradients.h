// Per-sample weight gradients of a convolution, tile by tile, and their statistics, without a matrix of them.
//
// Of sample i:  g_i[o, c, ky, kx] = sum_yx b_i[o, y, x] a_i[c, y * stride_h + ky * dilation_h - padding_h, x * ...]
// with a the layer's input and b the gradient of its output. A linear layer is a convolution with a 1 x 1 kernel.
//
// A tile is kRows output channels x `columns` input channels x some of the kernel's offsets. It is small enough that
// the gradients of ALL samples for it, one row each, stay in the second-level cache while their sum, norms, projections
// and Gram matrix are taken.
#pragma once

#include <cstdint>

#include "core/segments.h"

namespace crl {

constexpr int64_t kRows = 6;  // x 2 vectors: 12 sums, 2 vectors of a and one of b fill the 16 registers of AVX2

// How one sample's packed operands are walked. a: (padded height, padded width, columns); b: (height, width, kRows).
struct Walk {
  int64_t height, width;                // of b
  int64_t padded_width;                 // of a
  int64_t stride_h, stride_w;           // in pixels of a
  int64_t dilation_h, dilation_w;       // likewise
  int64_t kernel_w;                     // offset f is (f / kernel_w, f % kernel_w)
};

// What is taken of the rows of a tile; each is added to what is there. `length` elements a row.
struct TileStatistics {
  double* sq_norms;         // (samples)
  double* projections;      // (samples, directions), or (samples) on the sum
  double* gram;             // (samples, samples), the lower triangle; or null
  const void* directions;   // (directions, length), or null: project on the sum
  int64_t num_directions;
  void* sum;                // (length): the sum of the rows, written
  void* sum_of_squares;     // (length), written; or null
};

struct WeightGradientLoops {
  // input channels of a tile
  int64_t (*columns)(DType dtype);
  // row: (last - first offsets, kRows, columns)
  void (*correlate)(DType dtype, const void* a, const void* b, const Walk& walk, int64_t first_offset,
                    int64_t last_offset, void* row);
  // rows: (samples, length); length is a multiple of 2 vectors
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
