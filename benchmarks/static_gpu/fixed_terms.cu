// The kernels with terms, for a fixed number of them: one makes code without a loop over terms, in which every
// instruction of a tile is seen; with many, that loop is what each further term takes.
#include "cuda/adamw.cuh"
#include "cuda/penalty.cuh"

namespace crl {
namespace {

template <int kTerms>
__global__ void __launch_bounds__(kThreads, resident<float>(3))
    projections_of(DeviceTable table, View theta, View directions, double* partial) {
  project<float>(table, theta, directions, kTerms, partial);
}

template <int kTerms>
__global__ void __launch_bounds__(kThreads, resident<float>(3))
    combine_of(DeviceTable table, View targets, View directions, const double* coefficients) {
  combine<float, false>(table, targets, directions, kTerms, Coefficients<float>(coefficients, kTerms));
}

template <int kTerms>
__global__ void __launch_bounds__(kThreads, resident<float>(2))
    adamw_of(DeviceTable table, AdamWViews operands, View directions, const double* coefficients, double* partial) {
  low_rank_adamw<float, false>(table, operands, directions, kTerms, coefficients, partial);
}

#define FOR_TERMS(terms)                                                              \
  template __global__ void projections_of<terms>(DeviceTable, View, View, double*);   \
  template __global__ void combine_of<terms>(DeviceTable, View, View, const double*); \
  template __global__ void adamw_of<terms>(DeviceTable, AdamWViews, View, const double*, double*);
FOR_TERMS(1)
FOR_TERMS(30)

}  // namespace
}  // namespace crl
