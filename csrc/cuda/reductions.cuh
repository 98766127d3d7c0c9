// Sums over the flat vector: how a grid of resident blocks walks its tiles and reduces.
//
// Arithmetic is as good as float64, except AdamW's own. Reductions have two stages and no atomics: each block writes
// one sum of all of its tiles for each term, and finish_kernel adds those in a fixed order. Flat indices and the grid
// alone determine the elements of a thread, so results are bitwise the same from run to run on a device, and for a list
// and a flat tensor.
//
// A pass is limited by memory. By Little's law an H100 wants about 18 KiB under way on each multiprocessor (3.35 TB/s x
// 700 ns / 132). 80 registers leave room for 768 threads, each of which requests 32 to 128 bytes before it waits for
// any: 24 to 96 KiB. Figures on paper: not run on a GPU.
#pragma once

#include "cuda/directions.cuh"

namespace crl {
namespace {

constexpr int kWarps = kThreads / kWarp;

// The blocks that a multiprocessor holds at least: as many as registers allow without spilling. Lists with float64,
// which are for tests and small models, set no minimum.
template <class Widest>
constexpr int resident(int blocks) {
  return sizeof(Widest) == 4 ? blocks : 1;
}

// The sum over a warp, in every lane.
__device__ double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// The sums over a warp of two values: of the first in lanes 0 to 15, of the second in lanes 16 to 31.
__device__ double warp_sums(double first, double second) {
  const bool upper = threadIdx.x % kWarp >= kWarp / 2;
  double value = (upper ? second : first) + __shfl_xor_sync(~0u, upper ? first : second, kWarp / 2);
#pragma unroll
  for (int distance = kWarp / 4; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// The sum over the block, in every thread. All threads call it, once in a kernel.
__device__ double block_sum(double value) {
  __shared__ double sums[kWarps];
  const double sum = warp_sum(value);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += sums[warp];
  return total;
}

// The sum of all blocks' sums of one term, in every lane of a warp. Not through L1: in the cooperative kernel the same
// launch wrote them.
__device__ double total_of(const double* partial, int64_t count) {
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += __ldcg(partial + i);
  return warp_sum(sum);
}

// x . u over an octet.
template <class Widest, class Elements, class Direction>
__device__ double dot(const Elements& x, const Direction& u) {
  if constexpr (kPairs<Widest>) {
    DoubleFloat sum = {};
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const DoubleFloat product = exact_product(x[j], u[j]);
      largest = fmaxf(largest, fabsf(product.high));
      sum = plus(sum, product);
    }
    if (in_range(largest)) return widened(sum);
  }
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < kOctet; ++j) sum = fma(static_cast<double>(x[j]), static_cast<double>(u[j]), sum);
  return sum;
}

// sum S (theta - m)^2 over an octet. Calls slope(j, S (theta - m)) for each element.
template <class Widest, class Slope>
__device__ double quadratic(const Octet<Widest>& theta, const Octet<Widest>& fisher, const Octet<Widest>& anchor,
                            const Slope& slope) {
  Number<Widest> sum = {};
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    const auto distance = difference(theta[j], anchor[j]);
    const auto weighted = product(distance, fisher[j]);
    sum = multiply_add(weighted, distance, sum);
    slope(j, weighted);
  }
  if constexpr (kPairs<Widest>) {
    if (in_range(sum.high)) return widened(sum);
    double wide = 0.0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const double distance = static_cast<double>(theta[j]) - anchor[j];
      wide = fma(fisher[j] * distance, distance, wide);
    }
    return wide;
  } else {
    return sum;
  }
}

// A warp's sums of up to 32 terms, one in each lane, so that they take one register. Two terms are added in one pass
// over the warp, which leaves the even terms in lanes 0 to 15 and the odd ones in lanes 16 to 31. A single term is
// added over the warp at the end.
struct TermSums {
  double sum = 0.0, even = 0.0;  // `even`: of this thread's octet, for the even term before an odd one

  __device__ static int term_of_lane() {
    const int lane = threadIdx.x % kWarp;
    return lane % (kWarp / 2) * 2 + lane / (kWarp / 2);
  }

  // Adds the warp's octets of one term. All lanes call it, for the terms 0, 1, ..., terms - 1, in this order.
  __device__ void add(double octet, int term, int terms) {
    if (terms == 1) {
      sum += octet;
    } else if (term % 2 == 0 && term + 1 < terms) {
      even = octet;
    } else {
      const double total = term % 2 == 0 ? warp_sums(octet, 0.0) : warp_sums(even, octet);
      if (term_of_lane() / 2 == term / 2) sum += total;
    }
  }

  // partial[(first + k) * gridDim.x + block] for the terms k.
  __device__ void write(int first, int terms, double* partial) const {
    __shared__ double sums[kWarps][kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, term = term_of_lane();
    __syncthreads();  // the previous use of `sums` is over
    sums[warp][lane] = terms == 1 ? warp_sum(sum) : sum;
    __syncthreads();
    if (warp == 0 && term < terms) {
      double total = 0.0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += sums[w][lane];
      partial[int64_t{first + term} * gridDim.x + blockIdx.x] = total;
    }
  }
};

// partial[k * gridDim.x + block] = u_k . theta over the block's tiles, from the first to the last, for k >= begin.
//
// More than 32 terms read theta again for each 32: at most 1/32 more than the directions themselves in float32.
template <class Widest, class TermView>
__device__ void project(const DeviceTable& table, const View& theta, const TermView& directions, int num_terms,
                        double* partial, int begin = 0) {
  for (int first = begin; first < num_terms; first += kWarp) {
    const int terms = num_terms - first < kWarp ? num_terms - first : kWarp;
    TermSums sums;
    for (int64_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
      const Place place = table.place(tile);
      Octet<Widest> x = read<Widest>(table, theta, place);
      const Terms<Widest, TermView> u(table, directions, place);
      Factor<Widest> values[kOctet];
      for (int k = 0; k < terms; k += u.kAtOnce) {
        typename Terms<Widest, TermView>::Loaded octets[u.kAtOnce];
#pragma unroll
        for (int i = 0; i < u.kAtOnce; ++i) {
          if (k + i < terms) octets[i] = u.load(first + k + i);
        }
        if (k == 0) {
          convert(x);
#pragma unroll
          for (int j = 0; j < kOctet; ++j) values[j] = x[j];
        }
#pragma unroll
        for (int i = 0; i < u.kAtOnce; ++i) {
          if (k + i < terms) {
            const double product =
                u.use(octets[i], first + k + i, [&](const auto& elements) { return dot<Widest>(values, elements); });
            sums.add(product, k + i, terms);
          }
        }
      }
    }
    sums.write(first, terms, partial);
  }
}

constexpr int kSharedTerms = 512;

// The coefficients of a low-rank sum. Where float64 is slow, the block converts the first ones once, into shared
// memory.
template <class Widest>
class Coefficients {
 public:
  // All threads of the block call it.
  __device__ Coefficients(const double* values, int num_terms) : values_(values) {
    if constexpr (kPairs<Widest>) {
      for (int k = threadIdx.x; k < num_terms && k < kSharedTerms; k += kThreads) {
        converted()[k] = number<Number<Widest>>(values[k]);
      }
      __syncthreads();
    }
  }

  __device__ Number<Widest> operator[](int k) const {
    if constexpr (kPairs<Widest>) {
      return k < kSharedTerms ? converted()[k] : number<Number<Widest>>(values_[k]);
    } else {
      return values_[k];
    }
  }

 private:
  __device__ static Number<Widest>* converted() {
    __shared__ Number<Widest> coefficients[kSharedTerms];
    return coefficients;
  }

  const double* values_;
};

// sums[j] += sum_k coefficients[k] u_k, over an octet.
template <class Widest, class TermView>
__device__ void add_terms(const Terms<Widest, TermView>& u, int num_terms, const Coefficients<Widest>& coefficients,
                          Number<Widest> (&sums)[kOctet]) {
  for (int k = 0; k < num_terms; k += u.kAtOnce) {
    typename Terms<Widest, TermView>::Loaded octets[u.kAtOnce];
#pragma unroll
    for (int i = 0; i < u.kAtOnce; ++i) {
      if (k + i < num_terms) octets[i] = u.load(k + i);
    }
#pragma unroll
    for (int i = 0; i < u.kAtOnce; ++i) {
      if (k + i < num_terms) {
        const Number<Widest> c = coefficients[k + i];
        u.use(octets[i], k + i, [&](const auto& elements) {
#pragma unroll
          for (int j = 0; j < kOctet; ++j) sums[j] = multiply_add(c, elements[j], sums[j]);
        });
      }
    }
  }
}

// result[k] = the sum of partial[k * count ... k * count + count - 1]; a warp for each k.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* partial, int64_t count, int num_terms, double* result) {
  const int k = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (k >= num_terms) return;
  const double total = total_of(partial + k * count, count);
  if (threadIdx.x % kWarp == 0) result[k] = total;
}

}  // namespace
}  // namespace crl
