// Arithmetic of one element and of one sum, in float64. CPU and CUDA kernels share what is marked for both.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace crl {

// The share of the way to the anchor that a proximal step of strength eta * lambda goes in a coordinate of Fisher S:
// w = strength * S / (1 + strength * S), the minimiser of (theta' - theta)^2 / 2 + strength * S (theta' - m)^2 / 2.
// 0 where S is 0, 1 where strength * S is infinite; NaN is kept.
CRL_HOST_DEVICE inline double proximal_weight(double fisher, double strength) {
  constexpr double kLargest = 1.7976931348623157e308;
  double x = fisher == 0.0 ? 0.0 : fisher * strength;
  x = x > kLargest ? kLargest : x;
  return x / (1.0 + x);
}

// The sum of values[0], values[stride], ... in index order.
inline double ordered_sum(const double* values, int64_t count, int64_t stride = 1) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += values[i * stride];
  return sum;
}

}  // namespace crl
