// Sums over the flat vector: how a grid of resident blocks walks its tiles and reduces.
//
// Arithmetic is float64, except AdamW's own. Reductions have two stages and no atomics: each block writes one sum of
// all of its tiles for each term, and finish_kernel adds those in a fixed order. Flat indices and the grid alone
// determine the elements of a thread, so results are bitwise the same from run to run on a device, and for a list and a
// flat tensor.
//
// A pass is limited by memory. By Little's law an H100 wants about 18 KiB under way on each multiprocessor (3.35 TB/s x
// 700 ns / 132). 80 registers leave room for 768 threads, each of which requests 32 to 96 bytes before it waits for
// any: 24 to 72 KiB (quadratic_gradient_kernel: 512 threads, 128 bytes). Figures on paper: not run on a GPU.
#pragma once

#include "cuda/octets.cuh"

namespace crl {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTermsAtOnce = 2;  // octets of directions that a thread loads before it waits

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

// partial[k * gridDim.x + block] for the terms k from `first` on, at most a warp of them: lane j of each warp has the
// warp's sum of term first + j.
__device__ void write_term_sums(double sum, int first, int terms, double* partial) {
  __shared__ double sums[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // the previous use of `sums` is over
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && lane < terms) {
    double total = 0.0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w][lane];
    partial[int64_t{first + lane} * gridDim.x + blockIdx.x] = total;
  }
}

// partial[k * gridDim.x + block] = u_k . theta over the block's tiles, from the first to the last, for k >= begin.
//
// Lane j of each warp keeps the warp's sum of term j, so that 32 terms need one register and one reading of theta. More
// terms read theta again for each 32: at most 1/32 more than the directions themselves in float32.
template <class Widest>
__device__ void project(const DeviceTable& table, const View& theta, const View& directions, int num_terms,
                        double* partial, int begin = 0) {
  const int lane = threadIdx.x % kWarp;
  for (int first = begin; first < num_terms; first += kWarp) {
    const int terms = num_terms - first < kWarp ? num_terms - first : kWarp;
    double sum = 0.0;
    for (int64_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
      const Place place = table.place(tile);
      Octet<Widest> x = read<Widest>(table, theta, place);
      double values[kOctet];
      for (int k = 0; k < terms; k += kTermsAtOnce) {
        Octet<Widest> u[kTermsAtOnce];
#pragma unroll
        for (int i = 0; i < kTermsAtOnce; ++i) {
          if (k + i < terms) u[i] = read<Widest, Caching::kKeep>(table, directions, place, first + k + i);
        }
        if (k == 0) {
          convert(x);
#pragma unroll
          for (int j = 0; j < kOctet; ++j) values[j] = x[j];
        }
#pragma unroll
        for (int i = 0; i < kTermsAtOnce; ++i) {
          if (k + i < terms) {
            convert(u[i]);
            double dot = 0.0;
#pragma unroll
            for (int j = 0; j < kOctet; ++j) dot = fma(values[j], u[i][j], dot);
            dot = warp_sum(dot);
            if (lane == k + i) sum += dot;
          }
        }
      }
    }
    write_term_sums(sum, first, terms, partial);
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
