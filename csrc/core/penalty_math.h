// The penalties' arithmetic of one element, of one term and of one sum, in float64. CPU and CUDA kernels share the
// functions marked CRL_HOST_DEVICE.
//
// `Real` is double, or, in the CPU loops, a vector of doubles. Functions of a Real are static, because those loops are
// compiled for several instruction sets, and the linker must not keep one set's copy for all.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace crl {

// The fraction of the distance to the anchor that a proximal step of strength eta * lambda covers in a coordinate with
// Fisher S:
// w = strength * S / (1 + strength * S), the minimiser of (theta' - theta)^2 / 2 + strength * S (theta' - m)^2 / 2.
// 0 where S is 0, 1 where strength * S is infinite; NaN is kept.
template <class Real>
CRL_HOST_DEVICE static inline Real proximal_weight(Real fisher, Real strength) {
  const Real zero = {}, largest = zero + 1.7976931348623157e308;
  Real x = fisher == 0.0 ? zero : fisher * strength;
  x = x > largest ? largest : x;
  return x / (1.0 + x);
}

// theta after that step.
template <class Real>
CRL_HOST_DEVICE static inline Real proximal_step(Real theta, Real fisher, Real anchor, Real strength) {
  return theta - proximal_weight(fisher, strength) * (theta - anchor);
}

// One term of the low-rank penalty of strength c at drift = u . theta - b: its value (c / 2) a drift^2, and the
// coefficient c a drift that u has in its gradient.
struct LowRankTerm {
  double value, force;
};
CRL_HOST_DEVICE inline LowRankTerm low_rank_term(double projection, double anchor_projection, double curvature,
                                                 double coefficient) {
  const double drift = projection - anchor_projection;
  const double force = coefficient * (curvature * drift);
  return {0.5 * force * drift, force};
}

// The sum of values[0], values[stride], ... in index order.
inline double ordered_sum(const double* values, int64_t count, int64_t stride = 1) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += values[i * stride];
  return sum;
}

}  // namespace crl
