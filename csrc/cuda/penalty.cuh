// The penalties' kernels, low-rank and diagonal.
#pragma once

#include <cooperative_groups.h>

#include <type_traits>

#include "core/penalty_math.h"
#include "cuda/octets.cuh"
#include "cuda/reductions.cuh"

namespace crl {
namespace {

// targets (+)= sum_k coefficients[k] u_k, rounded once.
//
// From the last tile to the first: after project(), L2 holds the last tiles of the directions.
template <class Widest, bool kOverwrite, class TermView>
__device__ void combine(const DeviceTable& table, const View& targets, const TermView& directions, int num_terms,
                        const Coefficients<Widest>& coefficients) {
  const int64_t rounds = (table.tiles() - 1 - blockIdx.x) / gridDim.x;  // the grid has no more blocks than tiles
  for (int64_t tile = blockIdx.x + rounds * gridDim.x; tile >= 0; tile -= gridDim.x) {
    const Place place = table.place(tile);
    Octet<Widest> target;
    if (!kOverwrite) target = read<Widest>(table, targets, place);
    Number<Widest> sums[kOctet] = {};
    add_terms(Terms<Widest, TermView>(table, directions, place), num_terms, coefficients, sums);
    if (!kOverwrite) convert(target);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) target.set(j, rounded(kOverwrite ? sums[j] : plus(sums[j], target[j])));
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

template <class Widest, class TermView>
__global__ void __launch_bounds__(kThreads, resident<Widest>(3))
    projections_kernel(DeviceTable table, View theta, TermView directions, int num_terms, double* partial) {
  project<Widest>(table, theta, directions, num_terms, partial);
}

template <class Widest, bool kOverwrite, class TermView>
__global__ void __launch_bounds__(kThreads, resident<Widest>(3))
    combine_kernel(DeviceTable table, View targets, TermView directions, int num_terms, const double* coefficients) {
  combine<Widest, kOverwrite>(table, targets, directions, num_terms, Coefficients<Widest>(coefficients, num_terms));
}

// Between projections_kernel and combine_kernel, in one block: coefficients and the value.
__global__ void __launch_bounds__(kThreads)
    forces_kernel(Penalty penalty, const double* partial, int64_t count, double* coefficients, double* value) {
  const double total = forces(penalty, partial, count, coefficients);
  if (threadIdx.x == 0) *value = total;
}

// The same three in one launch for at most kSharedTerms terms, whose blocks are all resident and wait for one another
// in between. A block takes the same tiles both times, backwards the second time, so the tiles of the directions that
// it read last are still in L2.
template <class Widest, class TermView>
__global__ void __launch_bounds__(kThreads, resident<Widest>(std::is_same_v<TermView, View> ? 3 : 2))
    penalty_kernel(DeviceTable table, View targets, View theta, TermView directions, Penalty penalty, double* partial,
                   double* value) {
  __shared__ double coefficients[kSharedTerms];
  project<Widest>(table, theta, directions, penalty.num_terms, partial);
  cooperative_groups::this_grid().sync();
  const double total = forces(penalty, partial, gridDim.x, coefficients);
  if (blockIdx.x == 0 && threadIdx.x == 0) *value = total;
  const Coefficients<Widest> factors(coefficients, penalty.num_terms);
  combine<Widest, false>(table, targets, directions, penalty.num_terms, factors);
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
    sum += quadratic(theta, fisher, anchor, [](int, Number<Widest>) {});
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// The same, and targets (+)= c S (theta - m), in one pass.
template <class Widest, bool kOverwrite>
__global__ void __launch_bounds__(kThreads, resident<Widest>(kPairs<Widest> ? 2 : 3))
    quadratic_gradient_kernel(DeviceTable table, Diagonal diagonal, View targets, const double* coefficient,
                              double* partial) {
  const Number<Widest> c = number<Number<Widest>>(*coefficient);
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
    sum += quadratic(theta, fisher, anchor, [&](int j, Number<Widest> slope) {
      target.set(j, rounded(kOverwrite ? product(slope, c) : plus(product(slope, c), target[j])));
    });
    write(table, targets, place, target);
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// theta <- theta - w (theta - m)
template <class Widest>
__global__ void __launch_bounds__(kThreads, resident<Widest>(3))
    shrink_kernel(DeviceTable table, Diagonal diagonal, const double* strength) {
  const Number<Widest> eta_lambda = number<Number<Widest>>(*strength);
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

}  // namespace
}  // namespace crl
