// The loops over one piece of a chunk: n <= kChunk consecutive elements, within one tensor.
//
// Reductions add flat element j to lanes[j % kLanes], by a fused multiply-add, in index order. `index` is the flat
// index of the first element, so the sum does not depend on where tensors begin and end.
//
// The sample_* loops are over one block of a matrix of per-sample gradients: `num_rows` rows of `n` consecutive
// elements, each row `stride` elements after the one before. What they read next is asked for `ahead` elements early.
#pragma once

#include <cstdint>

#include "core/segments.h"

namespace crl {

// What AdamW moves and reads: theta, m and v all float32 or all float64; the gradient of that dtype, or of 16 bits
// beside float32; a row of settings (see core/adamw_math.h).
struct AdamWPiece {
  Pointer theta, gradient, m, v;
  const double* settings;
};

struct Kernels {
  const char* name;
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
  // A step of AdamW.
  void (*adamw)(AdamWPiece piece, int64_t n);
  // The same with q = share sum_k c[k] u[k], added to the gradient, or to theta before the step if decoupled; and
  // lanes[k * kLanes ...] += theta * u[k] after it.
  void (*low_rank_adamw)(AdamWPiece piece, const Pointer* u, const double* c, int64_t terms, bool decoupled,
                         int64_t index, int64_t n, double* lanes);
  // The same with the gradient share S (theta - m), or the proximal step of that strength before, if decoupled; and
  // lanes += S (theta - m)^2 before it.
  void (*diagonal_adamw)(AdamWPiece piece, Pointer fisher, Pointer anchor, bool decoupled, int64_t index, int64_t n,
                         double* lanes);
  // sums[j] += sum_i g_ij, sq_norms[i] += sum_j g_ij^2 and, unless null, squares[j] += sum_i g_ij^2, in one read.
  // `sums` and `squares` hold sample_columns(n) elements. If not in_float64, short sums are taken in float32.
  void (*sample_sums)(Pointer rows, int64_t stride, int64_t num_rows, int64_t n, int64_t ahead, bool in_float64,
                      double* sums, double* squares, double* sq_norms);
  // dots[i * dots_stride + k] += g_i . w_k, for `terms` vectors w_k of float32, or of float64 if g is
  void (*sample_dots)(Pointer rows, int64_t stride, int64_t num_rows, Pointer weights, int64_t weights_stride,
                      int64_t terms, int64_t n, int64_t ahead, bool in_float64, double* dots, int64_t dots_stride);
  // target = sums / count, rounded once
  void (*divide)(Pointer target, const double* sums, double count, int64_t n);
};

constexpr int64_t kLineBytes = 64;  // of a cache line

// Column sums of a block of n columns are kept for whole lines of the smallest dtype.
constexpr int64_t sample_columns(int64_t n) { return (n + kLineBytes / 2 - 1) / (kLineBytes / 2) * (kLineBytes / 2); }

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

// The fastest set that this processor runs, or the one that CRL_KERNELS_ISA names.
const Kernels& kernels();

}  // namespace crl
