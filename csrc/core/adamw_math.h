// AdamW's arithmetic of one element, in the element's own type. CPU and CUDA kernels share it.
//
//   g = factor * grad (+ the penalty's gradient)      m = m + (1 - beta1) (g - m)      v = beta2 v + (1 - beta2) g^2
//   theta = decay * theta - step_size * m / (root_scale * sqrt(v) + eps)
//
// `Scalar` is float or double; `Real` is that, or, in the CPU loops, a vector of them. As in penalty_math.h, what takes
// a Real is static.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace crl {

constexpr int64_t kSettings = 8;  // numbers in a row of the operators' `settings`

// What holds for all elements of a tensor, from its row.
template <class Scalar>
struct AdamW {
  Scalar factor;           // of the gradient: 1 / its scale, negative to maximise
  Scalar new_m;            // 1 - beta1
  Scalar old_v, new_v;     // beta2, 1 - beta2
  Scalar decay;            // 1 - lr * weight_decay
  Scalar step_size;        // lr / (1 - beta1^t)
  Scalar root_scale, eps;  // the first is 1 / sqrt(1 - beta2^t)

  CRL_HOST_DEVICE explicit AdamW(const double* row)
      : factor(static_cast<Scalar>(row[0])),
        new_m(static_cast<Scalar>(1.0 - row[1])),
        old_v(static_cast<Scalar>(row[2])),
        new_v(static_cast<Scalar>(1.0 - row[2])),
        decay(static_cast<Scalar>(row[3])),
        step_size(static_cast<Scalar>(row[4])),
        root_scale(static_cast<Scalar>(row[5])),
        eps(static_cast<Scalar>(row[6])) {}
};

// The share of the penalty that a row asks for: of the low-rank sum, or the strength of the diagonal penalty.
CRL_HOST_DEVICE inline double penalty_share(const double* row) { return row[7]; }

template <class Scalar, class Real>
CRL_HOST_DEVICE static inline Real first_moment(const AdamW<Scalar>& adamw, Real m, Real gradient) {
  return m + adamw.new_m * (gradient - m);
}

template <class Scalar, class Real>
CRL_HOST_DEVICE static inline Real second_moment(const AdamW<Scalar>& adamw, Real v, Real gradient) {
  return adamw.old_v * v + adamw.new_v * gradient * gradient;
}

// `root` is sqrt(v).
template <class Scalar, class Real>
CRL_HOST_DEVICE static inline Real adamw_step(const AdamW<Scalar>& adamw, Real theta, Real m, Real root) {
  return adamw.decay * theta - adamw.step_size * (m / (adamw.root_scale * root + adamw.eps));
}

}  // namespace crl
