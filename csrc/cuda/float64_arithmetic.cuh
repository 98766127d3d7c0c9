// Arithmetic that is as good as float64, on cards where float64 itself is slow.
//
// Most cards below the data-centre ones compute 1/64 as many float64 results as float32 ones (1/32 on Turing); there a
// conversion and a product for each element would take longer than its memory. On those cards, and where no tensor is
// float64, a number is an unevaluated sum of two floats, high + low, with 48 bits in all. Sums and products come from
// the error-free transformations of Dekker (1971) and of Ogita, Rump and Oishi, "Accurate sum and dot product", SIAM
// J. Sci. Comput. 26 (2005): what rounding has cut off high is computed exactly and added to low. Sums are widened to
// float64 once for each octet; until then they lose some 2^-48 of the octet's magnitudes.
//
// Exponents are those of float: a sum whose products are too small or too large for it is computed again in float64.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/penalty_math.h"

// Whether float64 is slow on the architecture that is being compiled for. Tests define it.
#ifndef CRL_SLOW_FLOAT64
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 700 && __CUDA_ARCH__ != 800 && __CUDA_ARCH__ != 900 && \
    __CUDA_ARCH__ != 1000
#define CRL_SLOW_FLOAT64 1
#else
#define CRL_SLOW_FLOAT64 0
#endif
#endif

namespace crl {
namespace {

struct DoubleFloat {
  float high, low;
};

// A sum and what rounding has cut off.
__device__ DoubleFloat exact_sum(float a, float b) {
  const float sum = a + b, of_b = sum - a;
  return {sum, (a - (sum - of_b)) + (b - of_b)};
}

// A product and what rounding has cut off. __fmul_rn, because the compiler may fuse a plain product with a later sum.
__device__ DoubleFloat exact_product(float a, float b) {
  const float product = __fmul_rn(a, b);
  return {product, fmaf(a, b, -product)};
}

// What a kernel computes with, and the type of an element in front of it, in lists whose widest dtype is Widest.
template <class Widest>
constexpr bool kPairs = sizeof(Widest) == 4 && CRL_SLOW_FLOAT64;
template <class Widest>
using Number = std::conditional_t<kPairs<Widest>, DoubleFloat, double>;
template <class Widest>
using Factor = std::conditional_t<kPairs<Widest>, float, double>;

template <class N>
__device__ N number(double value) {
  if constexpr (std::is_same_v<N, double>) {
    return value;
  } else {
    const float high = static_cast<float>(value);
    return {high, isinf(high) ? 0.0f : static_cast<float>(value - high)};
  }
}

__device__ double difference(double a, double b) { return a - b; }
__device__ DoubleFloat difference(float a, float b) { return exact_sum(a, -b); }

__device__ double product(double a, double b) { return a * b; }
__device__ DoubleFloat product(DoubleFloat a, float b) {
  const DoubleFloat p = exact_product(a.high, b);
  return {p.high, fmaf(a.low, b, p.low)};
}
__device__ DoubleFloat product(DoubleFloat a, DoubleFloat b) {
  const DoubleFloat p = product(a, b.high);
  return {p.high, fmaf(a.high, b.low, p.low)};
}

__device__ double plus(double a, double b) { return a + b; }
__device__ DoubleFloat plus(DoubleFloat a, float b) {
  const DoubleFloat sum = exact_sum(a.high, b);
  return {sum.high, a.low + sum.low};
}
__device__ DoubleFloat plus(DoubleFloat a, DoubleFloat b) {
  const DoubleFloat sum = plus(a, b.high);
  return {sum.high, sum.low + b.low};
}

// a b + sum
__device__ double multiply_add(double a, double b, double sum) { return fma(a, b, sum); }
template <class Other>
__device__ DoubleFloat multiply_add(DoubleFloat a, Other b, DoubleFloat sum) {
  return plus(sum, product(a, b));
}
__device__ DoubleFloat multiply_add(float a, float b, DoubleFloat sum) { return plus(sum, exact_product(a, b)); }

// Rounded once. Where high is infinite, low is not a number.
__device__ double rounded(double value) { return value; }
__device__ float rounded(DoubleFloat value) { return isnan(value.low) ? value.high : value.high + value.low; }

// Whether what rounding cuts off products of this magnitude is within float's exponents. False for NaN, and for a zero,
// which stands for products that are too small.
__device__ bool in_range(float magnitude) { return magnitude >= 0x1p-75f && magnitude <= 0x1p100f; }

__device__ double widened(DoubleFloat value) { return static_cast<double>(value.high) + value.low; }

using ::crl::proximal_step;
__device__ float proximal_step(float theta, float fisher, float anchor, DoubleFloat strength) {
  constexpr float kLarge = 1e30f;  // x / (1 + x) is 1
  DoubleFloat x = fisher == 0.0f ? DoubleFloat{} : product(strength, fisher);
  if (x.high > kLarge) x = {kLarge, 0.0f};
  const DoubleFloat denominator = plus(x, 1.0f);
  const float quotient = x.high / denominator.high;
  const float rest = fmaf(-quotient, denominator.high, x.high) + fmaf(-quotient, denominator.low, x.low);
  const DoubleFloat move = product(DoubleFloat{quotient, rest / denominator.high}, difference(theta, anchor));
  return rounded(plus(DoubleFloat{-move.high, -move.low}, theta));
}

}  // namespace
}  // namespace crl
