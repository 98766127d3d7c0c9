// The CUDA kernels: a grid of resident blocks that walk the tiles of the flat vector, all arithmetic in float64 but
// for AdamW's own.
//
// Reductions have two stages and no atomics: each block writes one sum of all its tiles for each term, and those are
// added in a fixed order. Which elements a thread owns follows from flat indices and the grid alone, so results are
// bitwise the same from run to run on a device, and for a list and a flat tensor.
//
// A pass is limited by memory. By Little's law an H100 wants about 18 KiB under way on each multiprocessor (3.35 TB/s x
// 700 ns / 132). 80 registers leave room for 768 threads, each of which asks for 32 to 96 bytes before it waits for
// any: 24 to 72 KiB (quadratic_gradient_kernel: 512 threads, 128 bytes). Figures on paper: not run on a GPU.
#pragma once

#include <cooperative_groups.h>

#include "core/adamw_math.h"
#include "core/penalty_math.h"
#include "cuda/octets.cuh"

namespace crl {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTermsAtOnce = 2;         // octets of directions that a thread asks for before it waits
constexpr int kCooperativeTerms = 512;  // coefficients that a block of the cooperative kernel can hold

// How many blocks a multiprocessor is to hold at least: what registers allow without spilling. With float64 in the
// lists, which is for tests and small models, they are left as they fall.
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

// The sum of what all blocks wrote for one term, in every lane of a warp. Not through L1: the cooperative kernel wrote
// them itself.
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

// targets (+)= sum_k coefficients[k] u_k, rounded once.
//
// From the last tile to the first: after project() what is left of the directions in L2 are their last tiles.
template <class Widest, bool kOverwrite>
__device__ void combine(const DeviceTable& table, const View& targets, const View& directions, int num_terms,
                        const double* coefficients) {
  const int64_t rounds = (table.tiles() - 1 - blockIdx.x) / gridDim.x;  // the grid has no more blocks than tiles
  for (int64_t tile = blockIdx.x + rounds * gridDim.x; tile >= 0; tile -= gridDim.x) {
    const Place place = table.place(tile);
    Octet<Widest> target;
    if (!kOverwrite) target = read<Widest>(table, targets, place);
    double sums[kOctet] = {};
    for (int k = 0; k < num_terms; k += kTermsAtOnce) {
      Octet<Widest> u[kTermsAtOnce];
#pragma unroll
      for (int i = 0; i < kTermsAtOnce; ++i) {
        if (k + i < num_terms) u[i] = read<Widest, Caching::kKeep>(table, directions, place, k + i);
      }
#pragma unroll
      for (int i = 0; i < kTermsAtOnce; ++i) {
        if (k + i < num_terms) {
          const double c = coefficients[k + i];
          convert(u[i]);
#pragma unroll
          for (int j = 0; j < kOctet; ++j) sums[j] = fma(c, u[i][j], sums[j]);
        }
      }
    }
    if (!kOverwrite) convert(target);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) target.set(j, kOverwrite ? sums[j] : target[j] + sums[j]);
    write(table, targets, place, target);
  }
}

// The numbers of a low-rank penalty, on the device.
struct Penalty {
  int num_terms;
  const double *curvatures, *anchor_projections, *coefficient;
};

// coefficients[k] = c a_k (u_k . theta - b_k); returns (c / 2) sum_k a_k (u_k . theta - b_k)^2 in every thread. Every
// block that calls it adds the same numbers in the same order.
__device__ double forces(const Penalty& penalty, const double* partial, int64_t count, double* coefficients) {
  const double c = *penalty.coefficient;
  double value = 0.0;
  for (int k = threadIdx.x / kWarp; k < penalty.num_terms; k += kWarps) {
    const LowRankTerm term =
        low_rank_term(total_of(partial + k * count, count), penalty.anchor_projections[k], penalty.curvatures[k], c);
    if (threadIdx.x % kWarp == 0) {
      coefficients[k] = term.force;
      value += term.value;
    }
  }
  return block_sum(value);  // and its barrier publishes the coefficients to the block
}

template <class Widest>
__global__ void __launch_bounds__(kThreads, resident<Widest>(3))
    projections_kernel(DeviceTable table, View theta, View directions, int num_terms, double* partial) {
  project<Widest>(table, theta, directions, num_terms, partial);
}

// result[k] = the sum of partial[k * count ... k * count + count - 1]; a warp for each k.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* partial, int64_t count, int num_terms, double* result) {
  const int k = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (k >= num_terms) return;
  const double total = total_of(partial + k * count, count);
  if (threadIdx.x % kWarp == 0) result[k] = total;
}

template <class Widest, bool kOverwrite>
__global__ void __launch_bounds__(kThreads, resident<Widest>(3))
    combine_kernel(DeviceTable table, View targets, View directions, int num_terms, const double* coefficients) {
  combine<Widest, kOverwrite>(table, targets, directions, num_terms, coefficients);
}

// Between projections_kernel and combine_kernel, in one block: coefficients and the value.
__global__ void __launch_bounds__(kThreads)
    forces_kernel(Penalty penalty, const double* partial, int64_t count, double* coefficients, double* value) {
  const double total = forces(penalty, partial, count, coefficients);
  if (threadIdx.x == 0) *value = total;
}

// The same three in one launch, whose blocks are all resident and wait for one another in between. A block takes the
// same tiles both times, backwards the second time, so what it read last of the directions is still in L2.
template <class Widest>
__global__ void __launch_bounds__(kThreads, resident<Widest>(3))
    penalty_kernel(DeviceTable table, View targets, View theta, View directions, Penalty penalty, double* partial,
                   double* value) {
  __shared__ double coefficients[kCooperativeTerms];
  project<Widest>(table, theta, directions, penalty.num_terms, partial);
  cooperative_groups::this_grid().sync();
  const double total = forces(penalty, partial, gridDim.x, coefficients);
  if (blockIdx.x == 0 && threadIdx.x == 0) *value = total;
  combine<Widest, false>(table, targets, directions, penalty.num_terms, coefficients);
}

// theta, S and m of the diagonal penalty.
struct Diagonal {
  View theta, fisher, anchor;
};

// partial[block] = sum S (theta - m)^2 over the block's tiles
template <class Widest>
__global__ void __launch_bounds__(kThreads, resident<Widest>(4))
    quadratic_kernel(DeviceTable table, Diagonal diagonal, double* partial) {
  double sum = 0.0;
  for (int64_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
    const Place place = table.place(tile);
    Octet<Widest> theta = read<Widest>(table, diagonal.theta, place);
    Octet<Widest> fisher = read<Widest>(table, diagonal.fisher, place);
    Octet<Widest> anchor = read<Widest>(table, diagonal.anchor, place);
    convert(theta);
    convert(fisher);
    convert(anchor);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const double distance = theta[j] - anchor[j];
      sum = fma(fisher[j] * distance, distance, sum);
    }
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// The same, and targets (+)= c S (theta - m), in one pass.
template <class Widest, bool kOverwrite>
__global__ void __launch_bounds__(kThreads, resident<Widest>(2))
    quadratic_gradient_kernel(DeviceTable table, Diagonal diagonal, View targets, const double* coefficient,
                              double* partial) {
  const double c = *coefficient;
  double sum = 0.0;
  for (int64_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
    const Place place = table.place(tile);
    Octet<Widest> theta = read<Widest>(table, diagonal.theta, place);
    Octet<Widest> fisher = read<Widest>(table, diagonal.fisher, place);
    Octet<Widest> anchor = read<Widest>(table, diagonal.anchor, place);
    Octet<Widest> target;
    if (!kOverwrite) target = read<Widest>(table, targets, place);
    convert(theta);
    convert(fisher);
    convert(anchor);
    if (!kOverwrite) convert(target);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const double distance = theta[j] - anchor[j];
      const double slope = fisher[j] * distance;
      sum = fma(slope, distance, sum);
      target.set(j, kOverwrite ? c * slope : fma(c, slope, target[j]));
    }
    write(table, targets, place, target);
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// theta <- theta - w (theta - m)
template <class Widest>
__global__ void __launch_bounds__(kThreads, resident<Widest>(3))
    shrink_kernel(DeviceTable table, Diagonal diagonal, const double* strength) {
  const double eta_lambda = *strength;
  for (int64_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
    const Place place = table.place(tile);
    Octet<Widest> theta = read<Widest>(table, diagonal.theta, place);
    Octet<Widest> fisher = read<Widest>(table, diagonal.fisher, place);
    Octet<Widest> anchor = read<Widest>(table, diagonal.anchor, place);
    convert(theta);
    convert(fisher);
    convert(anchor);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) theta.set(j, proximal_step(theta[j], fisher[j], anchor[j], eta_lambda));
    write(table, diagonal.theta, place, theta);
  }
}

// What a step of AdamW moves and reads. `found_inf` may be null.
struct Optimizer {
  View theta, gradient, m, v;
  const double* settings;
  const float* found_inf;

  __device__ bool skips() const { return found_inf != nullptr && *found_inf > 0.0f; }
};

// A thread's octets of theta, its gradient and its moments. Arithmetic is float where no tensor of the lists is
// float64.
template <class Widest>
struct OptimizerOctets {
  Octet<Widest> theta, gradient, m, v;

  __device__ OptimizerOctets(const DeviceTable& table, const Optimizer& optimizer, const Place& place)
      : theta(read<Widest>(table, optimizer.theta, place)),
        gradient(read<Widest>(table, optimizer.gradient, place)),
        m(read<Widest>(table, optimizer.m, place)),
        v(read<Widest>(table, optimizer.v, place)) {}

  __device__ void convert_all() {
    convert(theta);
    convert(gradient);
    convert(m);
    convert(v);
  }

  // Moves all eight, where penalize(j, share, start, gradient) puts the penalty into one element's start or gradient.
  template <class Penalize>
  __device__ void step(const DeviceTable& table, const Optimizer& optimizer, const Place& place,
                       const Penalize& penalize) {
    int segment = place.segment;
    int64_t end = __ldg(table.begins + segment + 1);
    const double* row = optimizer.settings + segment * kSettings;
    AdamW<Widest> adamw(row);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (!place.whole) {
        const int64_t index = place.index + j;
        while (index >= end && index < table.numel) end = __ldg(table.begins + ++segment + 1);
        row = optimizer.settings + segment * kSettings;
        adamw = AdamW<Widest>(row);
      }
      Widest start = static_cast<Widest>(theta[j]), g = adamw.factor * static_cast<Widest>(gradient[j]);
      penalize(j, penalty_share(row), start, g);
      const Widest first = first_moment(adamw, static_cast<Widest>(m[j]), g);
      const Widest second = second_moment(adamw, static_cast<Widest>(v[j]), g);
      Widest moved = adamw_step(adamw, start, first, static_cast<Widest>(sqrt(second)));
      if constexpr (sizeof(Widest) == 8) {  // what is projected is what is stored
        const bool narrow = table.at(optimizer.theta, 0, segment, place.index + j).dtype == DType::kFloat32;
        if (narrow) moved = static_cast<float>(moved);
      }
      theta.set(j, moved);
      m.set(j, first);
      v.set(j, second);
    }
    write(table, optimizer.theta, place, theta);
    write(table, optimizer.m, place, m);
    write(table, optimizer.v, place, v);
  }
};

// A step of AdamW with share * sum_k coefficients[k] u_k, in the gradient or, decoupled, added to theta before, and
// partial[k * gridDim.x + block] = u_k . theta after it. A direction's second reading finds the tile in L1 or L2.
//
// As in project(), lane j of each warp keeps the sum of term j, for the first 32 terms; more terms read theta again.
template <class Widest, bool kDecoupled>
__global__ void __launch_bounds__(kThreads, resident<Widest>(2))
    low_rank_adamw_kernel(DeviceTable table, Optimizer optimizer, View directions, int num_terms,
                          const double* coefficients, double* partial) {
  const int lane = threadIdx.x % kWarp, terms = num_terms < kWarp ? num_terms : kWarp;
  const bool skip = optimizer.skips();
  double sum = 0.0;
  for (int64_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
    const Place place = table.place(tile);
    OptimizerOctets<Widest> octets(table, optimizer, place);
    double pull[kOctet] = {};
    for (int k = 0; k < num_terms; ++k) {
      Octet<Widest> u = read<Widest, Caching::kKeep>(table, directions, place, k);
      const double c = coefficients[k];
      convert(u);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) pull[j] = fma(c, u[j], pull[j]);
    }
    octets.convert_all();
    if (!skip) {
      octets.step(table, optimizer, place, [&](int j, double share, Widest& start, Widest& gradient) {
        (kDecoupled ? start : gradient) += static_cast<Widest>(share * pull[j]);
      });
    }
    for (int k = 0; k < terms; ++k) {
      Octet<Widest> u = read<Widest, Caching::kKeep>(table, directions, place, k);
      convert(u);
      double dot = 0.0;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) dot = fma(octets.theta[j], u[j], dot);
      dot = warp_sum(dot);
      if (lane == k) sum += dot;
    }
  }
  write_term_sums(sum, 0, terms, partial);
  project<Widest>(table, optimizer.theta, directions, num_terms, partial, kWarp);
}

// The same with share S (theta - m), or the proximal step of that strength, and partial[block] = sum S (theta - m)^2
// before it.
template <class Widest, bool kDecoupled>
__global__ void __launch_bounds__(kThreads, resident<Widest>(kDecoupled ? 1 : 2))
    diagonal_adamw_kernel(DeviceTable table, Optimizer optimizer, View fisher_view, View anchor_view, double* partial) {
  const bool skip = optimizer.skips();
  double sum = 0.0;
  for (int64_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
    const Place place = table.place(tile);
    OptimizerOctets<Widest> octets(table, optimizer, place);
    Octet<Widest> fisher = read<Widest>(table, fisher_view, place);
    Octet<Widest> anchor = read<Widest>(table, anchor_view, place);
    octets.convert_all();
    convert(fisher);
    convert(anchor);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const double distance = octets.theta[j] - anchor[j];
      sum = fma(fisher[j] * distance, distance, sum);
    }
    if (!skip) {
      octets.step(table, optimizer, place, [&](int j, double share, Widest& start, Widest& gradient) {
        if (kDecoupled) {
          start = static_cast<Widest>(proximal_step(octets.theta[j], fisher[j], anchor[j], share));
        } else {
          gradient += static_cast<Widest>(share * (fisher[j] * (octets.theta[j] - anchor[j])));
        }
      });
    }
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

}  // namespace
}  // namespace crl
