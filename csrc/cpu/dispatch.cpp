// Which set of loops runs: the widest that this processor has, or the one that CRL_KERNELS_ISA names, to test or to
// measure the others.
#include <cstdlib>
#include <cstring>

#include <torch/headeronly/util/Exception.h>

#include "cpu/kernels.h"

namespace crl {
namespace {

struct Choice {
  const Kernels* kernels;
  bool runs_here;
};

const Kernels& choose() {
#if defined(__x86_64__)
  // A processor with AVX2 has F16C.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Choice choices[] = {{&avx512::kernels, has_avx512}, {&avx2::kernels, has_avx2}, {&baseline::kernels, true}};
#else
  const Choice choices[] = {{&baseline::kernels, true}};
#endif
  const char* asked = std::getenv("CRL_KERNELS_ISA");
  for (const Choice& choice : choices) {
    if (asked == nullptr ? choice.runs_here : std::strcmp(asked, choice.kernels->name) == 0) {
      STD_TORCH_CHECK(choice.runs_here, "crl_kernels: CRL_KERNELS_ISA=", asked,
                      ": this processor does not have it; unset it to use the fastest that runs here");
      return *choice.kernels;
    }
  }
  STD_TORCH_CHECK(false, "crl_kernels: CRL_KERNELS_ISA=", asked,
                  ": expected baseline, or, on x86-64, avx2 or avx512; unset it to use the fastest that runs here");
  return baseline::kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace crl
