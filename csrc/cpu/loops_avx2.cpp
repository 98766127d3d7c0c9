// The loops for x86-64 processors with AVX2, FMA and F16C.
//
// Every header that the loops use is included BEFORE the target changes: an inline library function that was compiled
// with AVX2 here could otherwise be the copy that the linker keeps for the whole library.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define CRL_ISA avx2
#define CRL_AVX2
#include "cpu/loops.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
