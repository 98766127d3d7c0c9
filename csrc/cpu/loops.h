// The table of loops, one for each instruction set, and which of them this processor runs.
//
// The loops of the penalties and of AdamW go over one piece of a chunk: n <= kChunk consecutive elements within one
// tensor. Reductions add flat element j to lanes[j % kLanes], by a fused multiply-add, in index order. `index` is the
// flat index of the first element, so the sum does not depend on where tensors begin and end.
//
// The sample_* loops go over one block of a matrix of per-sample gradients: `num_rows` rows of `n` consecutive
// elements, each row `stride` elements after the one before. They prefetch `ahead` elements early.
#pragma once

#include <cstdint>

#include "core/segments.h"
#include "cpu/weight_gradients.h"

namespace crl {

// The operands of a step of AdamW: theta, m and v, all float32 or all float64; the gradient, of that dtype, or of 16
// bits beside float32; the rounding, of 16 bits beside float32, or theta itself; a row of settings (see
// core/adamw_math.h). Where theta's rounding is another number than is there, the step begins with that number.
struct AdamWPiece {
  Pointer theta, gradient, m, v, rounding;
  const double* settings;
};

struct Loops {
  const char* name;  // of the instruction set

  // In penalty.inc.

  // values[j] = q[j] * the scale of element first + j of the segment
  void (*dequantise)(const int8_t* q, Scales scales, int64_t first, int64_t n, float* values);
  // lanes[k * kLanes ...] += x * u[k], for each of the terms k
  void (*dot)(Pointer x, const Pointer* u, int64_t terms, int64_t index, int64_t n, double* lanes);
  // target = target + sum_k c[k] u[k], or the sum alone if overwrite; rounded once
  void (*combine)(Pointer target, const Pointer* u, const double* c, int64_t terms, int64_t n, bool overwrite);
  // lanes += S (theta - m)^2
  void (*quadratic)(Pointer theta, Pointer fisher, Pointer anchor, int64_t index, int64_t n, double* lanes);
  // The same, and target = target + c S (theta - m), or c S (theta - m) if overwrite, in one pass
  void (*quadratic_gradient)(Pointer target, Pointer theta, Pointer fisher, Pointer anchor, int64_t index, int64_t n,
                             double c, bool overwrite, double* lanes);
  // theta = theta - w (theta - m), w = proximal_weight(S, strength)
  void (*shrink)(Pointer theta, Pointer fisher, Pointer anchor, int64_t n, double strength);

  // In adamw.inc.

  // One step, whose theta is rounded to the rounding.
  void (*adamw)(AdamWPiece piece, int64_t n);
  // The same with q = share sum_k c[k] u[k], added to the gradient, or to theta before the step if decoupled; and
  // lanes[k * kLanes ...] += theta * u[k] after it.
  void (*low_rank_adamw)(AdamWPiece piece, const Pointer* u, const double* c, int64_t terms, bool decoupled,
                         int64_t index, int64_t n, double* lanes);
  // The same with share S (theta - m) added to the gradient, or, if decoupled, the proximal step of that strength
  // before; and lanes += S (theta - m)^2 of theta before either.
  void (*diagonal_adamw)(AdamWPiece piece, Pointer fisher, Pointer anchor, bool decoupled, int64_t index, int64_t n,
                         double* lanes);

  // In sample_matrix.inc.

  // sums[j] += sum_i g_ij, sq_norms[i] += sum_j g_ij^2 and, unless null, squares[j] += sum_i g_ij^2, in one read of
  // the rows. `sums` and `squares` hold sample_columns(n) elements. Unless in_float64, short sums are float32.
  void (*sample_sums)(Pointer rows, int64_t stride, int64_t num_rows, int64_t n, int64_t ahead, bool in_float64,
                      double* sums, double* squares, double* sq_norms);
  // dots[i * dots_stride + k] += g_i . w_k, for `terms` vectors w_k of float32, or of float64 if g is
  void (*sample_dots)(Pointer rows, int64_t stride, int64_t num_rows, Pointer weights, int64_t weights_stride,
                      int64_t terms, int64_t n, int64_t ahead, bool in_float64, double* dots, int64_t dots_stride);
  // target = sums / count, rounded once
  void (*divide)(Pointer target, const double* sums, double count, int64_t n);

  // In weight_gradients.inc; operands are all float32 or all float64.

  // Channels of a block's columns
  int64_t (*block_columns)(DType dtype);
  // block: (kBlockRows, columns), the sum over (height, width) pixels of rows (..., kBlockRows) x columns (...,
  // columns) at kernel offset (ky, kx)
  void (*correlate)(DType dtype, const void* rows, const Walk& row_walk, const void* columns, const Walk& column_walk,
                    int64_t height, int64_t width, int64_t ky, int64_t kx, void* block);
  // rows: (samples, length); length is a multiple of block_columns(dtype)
  void (*tile_statistics)(DType dtype, const void* rows, int64_t samples, int64_t length, const TileStatistics& result);
};

constexpr int64_t kLineBytes = 64;  // a cache line

// The column sums of n columns have room for whole cache lines of the smallest dtype.
constexpr int64_t sample_columns(int64_t n) { return (n + kLineBytes / 2 - 1) / (kLineBytes / 2) * (kLineBytes / 2); }

namespace baseline {
extern const Loops loops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Loops loops;
}
namespace avx512 {
extern const Loops loops;
}
#endif

// The fastest set that this processor runs, or the one that CRL_KERNELS_ISA names.
const Loops& chosen_loops();

}  // namespace crl
