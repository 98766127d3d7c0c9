// AdamW's kernels, with the penalty inside the step.
#pragma once

#include "core/adamw_math.h"
#include "core/penalty_math.h"
#include "cuda/octets.cuh"
#include "cuda/reductions.cuh"

namespace crl {
namespace {

// The operands of a step of AdamW. `found_inf` may be null. `rounding` is of kernels with kRounded.
struct AdamWViews {
  View theta, gradient, m, v, rounding;
  const double* settings;
  const float* found_inf;

  __device__ bool skips() const { return found_inf != nullptr && *found_inf > 0.0f; }
};

// A thread's octets of theta, its gradient and its moments. Arithmetic is float where no tensor of the lists is
// float64.
template <class Widest>
struct AdamWOctets {
  Octet<Widest> theta, gradient, m, v;

  __device__ AdamWOctets(const DeviceTable& table, const AdamWViews& operands, const Place& place)
      : theta(read<Widest>(table, operands.theta, place)),
        gradient(read<Widest>(table, operands.gradient, place)),
        m(read<Widest>(table, operands.m, place)),
        v(read<Widest>(table, operands.v, place)) {}

  __device__ void convert_all() {
    convert(theta);
    convert(gradient);
    convert(m);
    convert(v);
  }

  // Takes theta from the roundings that are other numbers. They are read no sooner: that would take registers of the
  // terms before.
  __device__ void adopt(const DeviceTable& table, const AdamWViews& operands, const Place& place) {
    Octet<Widest> rounding = read<Widest>(table, operands.rounding, place);
    convert(rounding);
    int segment = place.segment;
    int64_t end = __ldg(table.begins + segment + 1);
    DType dtype = table.at(operands.rounding, 0, segment, place.index).dtype;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (!place.in_one_segment) {
        const int64_t index = place.index + j;
        if (index >= table.numel) break;
        while (index >= end) end = __ldg(table.begins + ++segment + 1);
        dtype = table.at(operands.rounding, 0, segment, index).dtype;
      }
      const Widest value = static_cast<Widest>(theta[j]), written = static_cast<Widest>(rounding[j]);
      if (rounded_to(dtype, value) != written) theta.set(j, written);
    }
  }

  // Moves all eight; penalize(j, share, start, gradient) adds the penalty to one element's start or gradient.
  template <bool kRounded, class Penalize>
  __device__ void step(const DeviceTable& table, const AdamWViews& operands, const Place& place,
                       const Penalize& penalize) {
    int segment = place.segment;
    int64_t end = __ldg(table.begins + segment + 1);
    const double* row = operands.settings + segment * kSettings;
    AdamW<Widest> adamw(row);
    Number<Widest> share = number<Number<Widest>>(penalty_share(row));
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (!place.in_one_segment) {
        const int64_t index = place.index + j;
        if (index >= table.numel) break;  // past the last element, where eps = 0 would make 0 / 0
        while (index >= end) end = __ldg(table.begins + ++segment + 1);
        row = operands.settings + segment * kSettings;
        adamw = AdamW<Widest>(row);
        share = number<Number<Widest>>(penalty_share(row));
      }
      Widest start = static_cast<Widest>(theta[j]), g = adamw.factor * static_cast<Widest>(gradient[j]);
      penalize(j, share, start, g);
      const Widest first = first_moment(adamw, static_cast<Widest>(m[j]), g);
      const Widest second = second_moment(adamw, static_cast<Widest>(v[j]), g);
      Widest value = adamw_step(adamw, start, first, static_cast<Widest>(sqrt(second)));
      if constexpr (sizeof(Widest) == 8) {  // the projection is of the value as it is stored
        const bool narrow = table.at(operands.theta, 0, segment, place.index + j).dtype == DType::kFloat32;
        if (narrow) value = static_cast<float>(value);
      }
      theta.set(j, value);
      m.set(j, first);
      v.set(j, second);
    }
    write(table, operands.theta, place, theta);
    write(table, operands.m, place, m);
    write(table, operands.v, place, v);
    if constexpr (kRounded) write(table, operands.rounding, place, theta);
  }
};

// A step of AdamW with share * sum_k coefficients[k] u_k, in the gradient or, decoupled, added to theta before, and
// partial[k * gridDim.x + block] = u_k . theta after it. A direction's second reading finds the tile in L1 or L2.
//
// As in project(), the lanes of a warp keep the sums of 32 terms; more terms read theta again.
template <class Widest, bool kDecoupled, bool kRounded, class TermView>
__device__ void low_rank_adamw(const DeviceTable& table, const AdamWViews& operands, const TermView& directions,
                               int num_terms, const double* coefficients, double* partial) {
  const int terms = num_terms < kWarp ? num_terms : kWarp;
  const bool skip = operands.skips();
  const Coefficients<Widest> factors(coefficients, num_terms);
  TermSums sums;
  for (int64_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
    const Place place = table.place(tile);
    AdamWOctets<Widest> octets(table, operands, place);
    Number<Widest> pull[kOctet] = {};
    const Terms<Widest, TermView> u(table, directions, place);
    add_terms(u, num_terms, factors, pull);
    octets.convert_all();
    if constexpr (kRounded) {
      if (!skip) octets.adopt(table, operands, place);
    }
    if (!skip) {
      octets.template step<kRounded>(
          table, operands, place, [&](int j, Number<Widest> share, Widest& start, Widest& gradient) {
            (kDecoupled ? start : gradient) += static_cast<Widest>(rounded(product(pull[j], share)));
          });
    }
#pragma unroll 2  // TermSums adds two terms at a time
    for (int k = 0; k < terms; ++k) {
      auto octet = u.load(k);
      const double product = u.use(octet, k, [&](const auto& elements) { return dot<Widest>(octets.theta, elements); });
      sums.add(product, k, terms);
    }
  }
  sums.write(0, terms, partial);
  project<Widest>(table, operands.theta, directions, num_terms, partial, kWarp);
}

template <class Widest, bool kDecoupled, bool kRounded, class TermView>
__global__ void __launch_bounds__(kThreads, resident<Widest>(2))
    low_rank_adamw_kernel(DeviceTable table, AdamWViews operands, TermView directions, int num_terms,
                          const double* coefficients, double* partial) {
  low_rank_adamw<Widest, kDecoupled, kRounded>(table, operands, directions, num_terms, coefficients, partial);
}

// The same with share S (theta - m), or the proximal step of that strength, and partial[block] = sum S (theta - m)^2
// before it.
template <class Widest, bool kDecoupled, bool kRounded>
__global__ void __launch_bounds__(kThreads, resident<Widest>(2))
    diagonal_adamw_kernel(DeviceTable table, AdamWViews operands, View fisher_view, View anchor_view, double* partial) {
  const bool skip = operands.skips();
  double sum = 0.0;
  for (int64_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
    const Place place = table.place(tile);
    AdamWOctets<Widest> octets(table, operands, place);
    Octet<Widest> fisher = read<Widest>(table, fisher_view, place);
    Octet<Widest> anchor = read<Widest>(table, anchor_view, place);
    octets.convert_all();
    if constexpr (kRounded) {
      if (!skip) octets.adopt(table, operands, place);
    }
    convert(fisher);
    convert(anchor);
    sum += quadratic(octets.theta, fisher, anchor, [](int, Number<Widest>) {});
    if (!skip) {
      octets.template step<kRounded>(
          table, operands, place, [&](int j, Number<Widest> share, Widest& start, Widest& gradient) {
            if (kDecoupled) {
              start = static_cast<Widest>(proximal_step(octets.theta[j], fisher[j], anchor[j], share));
            } else {
              const Number<Widest> slope = product(difference(octets.theta[j], anchor[j]), fisher[j]);
              gradient += static_cast<Widest>(rounded(product(slope, share)));
            }
          });
    }
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

}  // namespace
}  // namespace crl
