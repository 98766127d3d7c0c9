// Which set of loops runs: the widest that this processor has, or the one that CRL_KERNELS_ISA names, to test or to
// measure the others.
#include <cstdlib>
#include <cstring>

#include <torch/headeronly/util/Exception.h>

#include "cpu/kernels.h"
#include "cpu/weight_gradients.h"

namespace crl {
namespace {

struct Choice {
  const Kernels* kernels;
  const WeightGradientLoops* weight_gradient_loops;
  bool runs_here;
};

Choice choose() {
#if defined(__x86_64__)
  // A processor with AVX2 has F16C.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Choice choices[] = {{&avx512::kernels, &avx512::weight_gradient_loops, has_avx512},
                            {&avx2::kernels, &avx2::weight_gradient_loops, has_avx2},
                            {&baseline::kernels, &baseline::weight_gradient_loops, true}};
#else
  const Choice choices[] = {{&baseline::kernels, &baseline::weight_gradient_loops, true}};
#endif
  const char* asked = std::getenv("CRL_KERNELS_ISA");
  for (const Choice& choice : choices) {
    if (asked == nullptr ? choice.runs_here : std::strcmp(asked, choice.kernels->name) == 0) {
      STD_TORCH_CHECK(choice.runs_here, "crl_kernels: CRL_KERNELS_ISA=", asked,
                      ": this processor does not have it; unset it to use the fastest that runs here");
      return choice;
    }
  }
  STD_TORCH_CHECK(false, "crl_kernels: CRL_KERNELS_ISA=", asked,
                  ": expected baseline, or, on x86-64, avx2 or avx512; unset it to use the fastest that runs here");
  return choices[0];
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const Kernels& kernels() { return *chosen().kernels; }
const WeightGradientLoops& weight_gradient_loops() { return *chosen().weight_gradient_loops; }

}  // namespace crl
