// The loops for x86-64 processors with AVX-512 F, BW, DQ and VL.
//
// Every header that the loops use is included BEFORE the target changes: an inline library function that was compiled
// with AVX-512 here could otherwise be the copy that the linker keeps for the whole library.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "core/adamw_math.h"
#include "core/penalty_math.h"
#include "core/segments.h"
#include "cpu/loops.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

// GCC 12 warns of uninitialised registers that its own intrinsics leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define CRL_ISA avx512
#define CRL_AVX512
#include "cpu/loops.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
