// The loops over one piece of a chunk: n <= kChunk consecutive elements, within one tensor.
//
// Reductions add flat element j to lanes[j % kLanes], by a fused multiply-add, in index order. `index` is the flat
// index of the first element, so the sum does not depend on where tensors begin and end.
#pragma once

#include <cstdint>

#include "core/segments.h"

namespace crl {

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
};

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
