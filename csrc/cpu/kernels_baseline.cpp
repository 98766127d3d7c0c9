// The loops for the compiler's default instruction set (SSE2 on x86-64, NEON on Arm).
#include <cstdlib>
#include <cstring>

#define CRL_ISA baseline
#include "cpu/kernels.inc"

namespace crl {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const bool use_avx2 = [] {
    const char* forced = std::getenv("CRL_KERNELS_ISA");  // "baseline": to test these loops on any processor
    if (forced != nullptr && std::strcmp(forced, "baseline") == 0) return false;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }();
  if (use_avx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

}  // namespace crl
