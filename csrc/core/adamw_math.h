// AdamW's arithmetic of one element, in the element's own type. CPU and CUDA kernels share it.
//
//   g = factor * grad (+ the penalty's gradient)      m = m + (1 - beta1) (g - m)      v = beta2 v + (1 - beta2) g^2
//   theta = decay * theta - step_size * m / (root_scale * sqrt(v) + eps)
//
// `Scalar` is float or double; `Real` is the same type, or, in the CPU loops, a vector of it. As in penalty_math.h,
// functions of a Real are static.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace crl {

// The columns of the operators' `settings`, which have one row of float64 for each parameter; AdamWSettings in
// crl_kernels/backends/reference.py names them in the same order. kSettings is their number.
enum Setting : int64_t { kFactor, kBeta1, kBeta2, kDecay, kStepSize, kRootScale, kEps, kShare, kSettings };

// The numbers that all elements of a tensor share, from its row of settings.
template <class Scalar>
struct AdamW {
  Scalar factor;           // of the gradient: 1 / its scale, negative to maximise
  Scalar new_m;            // 1 - beta1
  Scalar old_v, new_v;     // beta2, 1 - beta2
  Scalar decay;            // 1 - lr * weight_decay
  Scalar step_size;        // lr / (1 - beta1^t)
  Scalar root_scale, eps;  // the first is 1 / sqrt(1 - beta2^t)

  CRL_HOST_DEVICE explicit AdamW(const double* row)
      : factor(static_cast<Scalar>(row[kFactor])),
        new_m(static_cast<Scalar>(1.0 - row[kBeta1])),
        old_v(static_cast<Scalar>(row[kBeta2])),
        new_v(static_cast<Scalar>(1.0 - row[kBeta2])),
        decay(static_cast<Scalar>(row[kDecay])),
        step_size(static_cast<Scalar>(row[kStepSize])),
        root_scale(static_cast<Scalar>(row[kRootScale])),
        eps(static_cast<Scalar>(row[kEps])) {}
};

// The factor of the low-rank sum, or the strength of the diagonal penalty.
CRL_HOST_DEVICE inline double penalty_share(const double* row) { return row[kShare]; }

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
