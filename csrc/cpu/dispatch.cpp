// Which set of loops this processor runs.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace crl {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const bool use_avx2 = [] {
    const char* forced = std::getenv("CRL_KERNELS_ISA");  // "baseline": to test those loops on any processor
    if (forced != nullptr && std::strcmp(forced, "baseline") == 0) return false;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // a processor with AVX2 has F16C
  }();
  if (use_avx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

}  // namespace crl
