// The CUDA kernels: one block for each chunk, all arithmetic in float64.
//
// Reductions have two stages and no atomics: each block writes one sum per chunk, and finish_kernel adds them in a
// fixed order. Results are bitwise the same from run to run, and for a list and a flat tensor.
#pragma once

#include "core/penalty_math.h"
#include "cuda/device_table.cuh"

namespace crl {
namespace {

// The sum of every thread's value in thread 0; 0 elsewhere.
__device__ double block_sum(double value) {
  __shared__ double values[kThreads];
  __syncthreads();  // the previous use of `values` is over
  values[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  return threadIdx.x == 0 ? values[0] : 0.0;
}

// partial[k * gridDim.x + chunk] = u_k . theta over the chunk. The chunk of theta is in L1 after the first term.
__global__ void __launch_bounds__(kThreads)
    projections_kernel(DeviceTable table, ViewHandle theta, TermsHandle directions, double* partial) {
  for (int64_t k = 0; k < directions.count; ++k) {
    const ViewHandle direction = table.term(directions, k);
    double sum = 0.0;
    table.for_each_piece([&](int64_t segment, int64_t begin, int64_t end) {
      typed(table.at(theta, segment), [&](const auto* x) {
        typed(table.at(direction, segment), [&](const auto* u) {
          for_each_element(begin, end, [&](int, int64_t index) { sum = fma(load(x + index), load(u + index), sum); });
        });
      });
    });
    const double total = block_sum(sum);
    if (threadIdx.x == 0) partial[k * gridDim.x + blockIdx.x] = total;
  }
}

// result[k] = sum of partial[k * count ... k * count + count - 1]; one block for each k.
__global__ void __launch_bounds__(kThreads) finish_kernel(const double* partial, int64_t count, double* result) {
  partial += blockIdx.x * count;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) result[blockIdx.x] = total;
}

// targets (+)= sum_k coefficients[k] u_k, rounded once.
template <bool kOverwrite>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(DeviceTable table, ViewHandle targets, TermsHandle directions, const double* coefficients) {
  double sums[kPerThread] = {};
  for (int64_t k = 0; k < directions.count; ++k) {
    const ViewHandle direction = table.term(directions, k);
    const double c = coefficients[k];
    table.for_each_piece([&](int64_t segment, int64_t begin, int64_t end) {
      typed(table.at(direction, segment), [&](const auto* u) {
        for_each_element(begin, end, [&](int i, int64_t index) { sums[i] = fma(c, load(u + index), sums[i]); });
      });
    });
  }
  table.for_each_piece([&](int64_t segment, int64_t begin, int64_t end) {
    typed(table.at(targets, segment), [&](auto* target) {
      for_each_element(begin, end, [&](int i, int64_t index) {
        store(target + index, kOverwrite ? sums[i] : load(target + index) + sums[i]);
      });
    });
  });
}

// theta, S and m of the diagonal penalty; S and m are both float32 or both float64.
struct Diagonal {
  ViewHandle theta, fisher, anchor;

  // Calls element(theta*, S, m, segment, index) for this thread's elements.
  template <class Element>
  __device__ void for_each(const DeviceTable& table, const Element& element) const {
    table.for_each_piece([&](int64_t segment, int64_t begin, int64_t end) {
      const Pointer s = table.at(fisher, segment), m = table.at(anchor, segment);
      typed(table.at(theta, segment), [&](auto* x) {
        for_each_element(begin, end, [&](int, int64_t index) {
          if (s.dtype == DType::kFloat64) {
            element(x + index, static_cast<const double*>(s.data)[index], static_cast<const double*>(m.data)[index],
                    segment, index);
          } else {
            element(x + index, static_cast<const float*>(s.data)[index], static_cast<const float*>(m.data)[index],
                    segment, index);
          }
        });
      });
    });
  }
};

// partial[chunk] = sum S (theta - m)^2
__global__ void __launch_bounds__(kThreads) quadratic_kernel(DeviceTable table, Diagonal diagonal, double* partial) {
  double sum = 0.0;
  diagonal.for_each(table, [&](const auto* theta, double fisher, double anchor, int64_t, int64_t) {
    const double distance = load(theta) - anchor;
    sum = fma(fisher * distance, distance, sum);
  });
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// The same, and targets (+)= c S (theta - m), in one pass. A target has its parameter's dtype.
template <bool kOverwrite>
__global__ void __launch_bounds__(kThreads)
    quadratic_gradient_kernel(DeviceTable table, Diagonal diagonal, ViewHandle targets, const double* coefficient,
                              double* partial) {
  const double c = *coefficient;
  double sum = 0.0;
  diagonal.for_each(table, [&](auto* theta, double fisher, double anchor, int64_t segment, int64_t index) {
    const double distance = load(theta) - anchor;
    const double slope = fisher * distance;
    sum = fma(slope, distance, sum);
    auto* target = static_cast<decltype(theta)>(table.at(targets, segment, index).data);
    store(target, kOverwrite ? c * slope : fma(c, slope, load(target)));
  });
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// theta <- theta - w (theta - m)
__global__ void __launch_bounds__(kThreads)
    shrink_kernel(DeviceTable table, Diagonal diagonal, const double* strength) {
  const double eta_lambda = *strength;
  diagonal.for_each(table, [&](auto* theta, double fisher, double anchor, int64_t, int64_t) {
    const double value = load(theta);
    store(theta, value - proximal_weight(fisher, eta_lambda) * (value - anchor));
  });
}

}  // namespace
}  // namespace crl
