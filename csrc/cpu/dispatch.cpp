// Which set of loops runs: the widest that this processor has, or the one that CRL_KERNELS_ISA names, for tests and
// measurements of the others.
#include <cstdlib>
#include <cstring>

#include <torch/headeronly/util/Exception.h>

#include "cpu/loops.h"

namespace crl {
namespace {

struct Choice {
  const Loops* loops;
  bool runs_here;
};

const Loops& choose() {
#if defined(__x86_64__)
  // A processor with AVX2 has F16C.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Choice choices[] = {{&avx512::loops, has_avx512}, {&avx2::loops, has_avx2}, {&baseline::loops, true}};
#else
  const Choice choices[] = {{&baseline::loops, true}};
#endif
  const char* requested = std::getenv("CRL_KERNELS_ISA");
  if (requested != nullptr && *requested == '\0') requested = nullptr;
  for (const Choice& choice : choices) {
    if (requested == nullptr ? choice.runs_here : std::strcmp(requested, choice.loops->name) == 0) {
      STD_TORCH_CHECK(choice.runs_here, "crl_kernels: CRL_KERNELS_ISA=", requested,
                      ": this processor does not have it; unset it to use the fastest that runs here");
      return *choice.loops;
    }
  }
  STD_TORCH_CHECK(false, "crl_kernels: CRL_KERNELS_ISA=", requested,
                  ": expected baseline, or, on x86-64, avx2 or avx512; unset it to use the fastest that runs here");
  return baseline::loops;
}

}  // namespace

const Loops& chosen_loops() {
  static const Loops& loops = choose();
  return loops;
}

}  // namespace crl
