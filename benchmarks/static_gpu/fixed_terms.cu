// The kernels with terms, for a fixed number of them: one makes code without a loop over terms, in which every
// instruction of a tile is seen; with many, that loop is what each further term takes. Up to four terms in int8 make
// code without a loop too.
#include "cuda/adamw.cuh"
#include "cuda/penalty.cuh"

namespace crl {
namespace {

template <int kTerms, class TermView>
__global__ void __launch_bounds__(kThreads, resident<float>(3))
    projections_of(DeviceTable table, View theta, TermView directions, double* partial) {
  project<float>(table, theta, directions, kTerms, partial);
}

template <int kTerms, class TermView>
__global__ void __launch_bounds__(kThreads, resident<float>(3))
    combine_of(DeviceTable table, View targets, TermView directions, const double* coefficients) {
  combine<float, false>(table, targets, directions, kTerms, Coefficients<float>(coefficients, kTerms));
}

template <int kTerms, class TermView>
__global__ void __launch_bounds__(kThreads, resident<float>(2))
    adamw_of(DeviceTable table, AdamWViews operands, TermView directions, const double* coefficients, double* partial) {
  low_rank_adamw<float, false, false>(table, operands, directions, kTerms, coefficients, partial);
}

#define FOR_TERMS(terms, TermView)                                                                  \
  template __global__ void projections_of<terms, TermView>(DeviceTable, View, TermView, double*);   \
  template __global__ void combine_of<terms, TermView>(DeviceTable, View, TermView, const double*); \
  template __global__ void adamw_of<terms, TermView>(DeviceTable, AdamWViews, TermView, const double*, double*);
FOR_TERMS(1, View)
FOR_TERMS(30, View)
FOR_TERMS(1, Int8View)
FOR_TERMS(2, Int8View)
FOR_TERMS(4, Int8View)

}  // namespace
}  // namespace crl
