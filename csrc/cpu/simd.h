// Four doubles at a time, loaded from and stored to any parameter dtype.
//
// GCC and Clang vector extensions: the same lines become AVX2, SSE2 or NEON according to the target that is in force
// where this file is included (see kernels.inc for CRL_ISA and CRL_AVX2). All arithmetic is float64, so every dtype
// goes through the same loops.
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace crl {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

}  // namespace crl

namespace crl::CRL_ISA {

using Double4 = double __attribute__((vector_size(32)));
using Float4 = float __attribute__((vector_size(16)));
using UInt4 = uint32_t __attribute__((vector_size(16)));
using UShort4 = uint16_t __attribute__((vector_size(8)));

template <class Vector>
inline Vector load_bits(const void* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

// Conversions. GCC 12 makes a dozen instructions of the generic form, so where there is one instruction it is asked for
// by name: a dot product of 250,000 bfloat16 elements takes 64 us instead of 126 us (EPYC, AVX2).
#if defined(CRL_AVX2)
inline Double4 widen(Float4 value) { return (Double4)_mm256_cvtps_pd((__m128)value); }
inline Float4 narrow(Double4 value) { return (Float4)_mm256_cvtpd_ps((__m256d)value); }
inline UInt4 zero_extend(UShort4 value) {
  return (UInt4)_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&value)));
}
#else
inline Double4 widen(Float4 value) { return __builtin_convertvector(value, Double4); }
inline Float4 narrow(Double4 value) { return __builtin_convertvector(value, Float4); }
inline UInt4 zero_extend(UShort4 value) { return __builtin_convertvector(value, UInt4); }
#endif

inline Double4 load4(const double* source) { return load_bits<Double4>(source); }

inline Double4 load4(const float* source) { return widen(load_bits<Float4>(source)); }

inline Double4 load4(const BFloat16* source) {
  const UInt4 bits = zero_extend(load_bits<UShort4>(source)) << 16;
  return widen(load_bits<Float4>(&bits));
}

inline Double4 load4(const Half* source) {
#if defined(CRL_AVX2)
  return widen((Float4)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
#else
  return Double4{static_cast<float>(source[0]), static_cast<float>(source[1]), static_cast<float>(source[2]),
                 static_cast<float>(source[3])};
#endif
}

inline void store4(double* target, Double4 value) { std::memcpy(target, &value, sizeof(value)); }

inline void store4(float* target, Double4 value) {
  const Float4 rounded = narrow(value);
  std::memcpy(target, &rounded, sizeof(rounded));
}

inline void store4(BFloat16* target, Double4 value) {
  const Float4 rounded = narrow(value);
  const UInt4 bits = load_bits<UInt4>(&rounded);
  const UInt4 nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UInt4 is_nan = (UInt4)(rounded != rounded);
  const UShort4 words = __builtin_convertvector((nearest_even & ~is_nan) | (is_nan & 0x7fc0), UShort4);
  std::memcpy(target, &words, sizeof(words));
}

inline void store4(Half* target, Double4 value) {
#if defined(CRL_AVX2)
  const __m128i words = _mm_cvtps_ph((__m128)narrow(value), _MM_FROUND_TO_NEAREST_INT);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(target), words);
#else
  for (int i = 0; i < 4; ++i) target[i] = static_cast<float>(value[i]);
#endif
}

// One element, with the same rounding as above.
inline double load1(const double* source) { return *source; }
template <class T>
inline double load1(const T* source) {
  return static_cast<double>(static_cast<float>(*source));
}

inline void store1(double* target, double value) { *target = value; }
template <class T>
inline void store1(T* target, double value) {
  *target = static_cast<float>(value);
}

}  // namespace crl::CRL_ISA
