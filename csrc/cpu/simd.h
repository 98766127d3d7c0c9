// A vector of doubles, loaded from and stored to any parameter dtype.
//
// GCC and Clang vector extensions: the same lines become AVX-512, AVX2, SSE2 or NEON, in registers of their own width,
// according to the target that is in force where this file is included (see loops.inc for CRL_ISA, CRL_AVX2 and
// CRL_AVX512). Arithmetic is float64, so every dtype goes through the same loops; only AdamW computes in its
// parameters' dtype.
//
// load<Real>(source) and store(target, value) move one double or kWidth of them, with the same rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

#if defined(CRL_AVX512)
constexpr int kWidth = 8;
#elif defined(CRL_AVX2)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif

using Doubles = double __attribute__((vector_size(8 * kWidth)));
using Floats = float __attribute__((vector_size(4 * kWidth)));
using UInts = uint32_t __attribute__((vector_size(4 * kWidth)));
using UShorts = uint16_t __attribute__((vector_size(2 * kWidth)));
using Singles = float __attribute__((vector_size(8 * kWidth)));  // a whole register of float32: 2 kWidth of them

template <class Vector>
inline Vector load_bits(const void* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

// Conversions. GCC 12 compiles the generic form to several instructions, so the one instruction, where it exists, is
// called by name: a dot product of 250,000 bfloat16 elements takes 64 us instead of 126 us (EPYC, AVX2).
#if defined(__SSE2__)
// 8 bytes in the low half of a register, and back.
template <class Bits>
inline __m128i in_low_half(Bits bits) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bits));
}
template <class Bits>
inline Bits low_half(__m128i words) {
  Bits bits;
  _mm_storel_epi64(reinterpret_cast<__m128i*>(&bits), words);
  return bits;
}
#endif

#if defined(CRL_AVX512)
inline Doubles widen(Floats value) { return (Doubles)_mm512_cvtps_pd((__m256)value); }
inline Floats narrow(Doubles value) { return (Floats)_mm512_cvtpd_ps((__m512d)value); }
inline Floats from_bfloat16(UShorts bits) {
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
}
inline UShorts low_halves(UInts words) { return (UShorts)_mm256_cvtepi32_epi16((__m256i)words); }
inline Floats from_half(UShorts bits) { return (Floats)_mm256_cvtph_ps((__m128i)bits); }
inline UShorts to_half(Floats value) { return (UShorts)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT); }
inline Doubles fused_multiply_add(Doubles a, Doubles b, Doubles c) {
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(CRL_AVX2)
inline Doubles widen(Floats value) { return (Doubles)_mm256_cvtps_pd((__m128)value); }
inline Floats narrow(Doubles value) { return (Floats)_mm256_cvtpd_ps((__m256d)value); }
inline Floats from_bfloat16(UShorts bits) { return (Floats)_mm_unpacklo_epi16(_mm_setzero_si128(), in_low_half(bits)); }
inline UShorts low_halves(UInts words) { return low_half<UShorts>(_mm_packus_epi32((__m128i)words, (__m128i)words)); }
inline Floats from_half(UShorts bits) { return (Floats)_mm_cvtph_ps(in_low_half(bits)); }
inline UShorts to_half(Floats value) {
  return low_half<UShorts>(_mm_cvtps_ph((__m128)value, _MM_FROUND_TO_NEAREST_INT));
}
inline Doubles fused_multiply_add(Doubles a, Doubles b, Doubles c) {
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
#if defined(__SSE2__)
inline Doubles widen(Floats value) { return (Doubles)_mm_cvtps_pd((__m128)in_low_half(value)); }
inline Floats narrow(Doubles value) { return low_half<Floats>((__m128i)_mm_cvtpd_ps((__m128d)value)); }
inline Floats from_bfloat16(UShorts bits) {
  const __m128i two = _mm_cvtsi32_si128(load_bits<int32_t>(&bits));
  return low_half<Floats>(_mm_unpacklo_epi16(_mm_setzero_si128(), two));
}
#else
inline Doubles widen(Floats value) { return __builtin_convertvector(value, Doubles); }
inline Floats narrow(Doubles value) { return __builtin_convertvector(value, Floats); }
inline Floats from_bfloat16(UShorts bits) { return (Floats)(__builtin_convertvector(bits, UInts) << 16); }
#endif
inline UShorts low_halves(UInts words) { return __builtin_convertvector(words, UShorts); }
inline Floats from_half(UShorts bits) {
  Floats result;
  for (int i = 0; i < kWidth; ++i) result[i] = static_cast<float>(Half(bits[i], Half::from_bits()));
  return result;
}
inline UShorts to_half(Floats value) {
  UShorts result;
  for (int i = 0; i < kWidth; ++i) result[i] = Half(value[i]).x;
  return result;
}
inline Doubles fused_multiply_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }
#endif

inline double fused_multiply_add(double a, double b, double c) {
#if defined(CRL_AVX2) || defined(CRL_AVX512)
  return std::fma(a, b, c);  // one instruction with FMA, a slow library call without
#else
  return a * b + c;
#endif
}

// Rounds to the nearest bfloat16, ties to even; every NaN becomes the quiet one.
inline UShorts to_bfloat16(Floats value) {
  const UInts bits = (UInts)value;
  const UInts nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UInts is_nan = (UInts)(value != value);
  return low_halves((nearest_even & ~is_nan) | (is_nan & 0x7fc0));
}

inline Doubles load_vector(const double* source) { return load_bits<Doubles>(source); }
inline Doubles load_vector(const float* source) { return widen(load_bits<Floats>(source)); }
inline Doubles load_vector(const BFloat16* source) { return widen(from_bfloat16(load_bits<UShorts>(source))); }
inline Doubles load_vector(const Half* source) { return widen(from_half(load_bits<UShorts>(source))); }

inline double load_one(const double* source) { return *source; }
template <class T>
inline double load_one(const T* source) {
  return static_cast<double>(static_cast<float>(*source));
}

template <class Real, class T>
inline Real load(const T* source) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    return load_one(source);
  } else {
    return load_vector(source);
  }
}

// float32 arithmetic, for short sums that end in float64.
#if defined(CRL_AVX512)
inline Singles load_singles(const BFloat16* source) {
  return (Singles)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits<__m256i>(source)), 16);
}
inline Singles load_singles(const Half* source) { return (Singles)_mm512_cvtph_ps(load_bits<__m256i>(source)); }
inline Singles load_singles(const int8_t* source) {
  return (Singles)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bits<__m128i>(source)));
}
inline Floats low(Singles value) { return (Floats)_mm512_castps512_ps256((__m512)value); }
inline Floats high(Singles value) { return (Floats)_mm512_extractf32x8_ps((__m512)value, 1); }
inline Singles joined(Floats low, Floats high) {
  return (Singles)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)low), (__m256)high, 1);
}
inline Singles fused_multiply_add(Singles a, Singles b, Singles c) {
  return (Singles)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(CRL_AVX2)
inline Singles load_singles(const BFloat16* source) {
  return (Singles)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits<__m128i>(source)), 16);
}
inline Singles load_singles(const Half* source) { return (Singles)_mm256_cvtph_ps(load_bits<__m128i>(source)); }
inline Singles load_singles(const int8_t* source) {
  const __m128i eight = in_low_half(load_bits<int64_t>(source));
  return (Singles)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
}
inline Floats low(Singles value) { return (Floats)_mm256_castps256_ps128((__m256)value); }
inline Floats high(Singles value) { return (Floats)_mm256_extractf128_ps((__m256)value, 1); }
inline Singles joined(Floats low, Floats high) { return (Singles)_mm256_set_m128((__m128)high, (__m128)low); }
inline Singles fused_multiply_add(Singles a, Singles b, Singles c) {
  return (Singles)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
inline Singles joined(Floats low, Floats high) {
  const Floats halves[2] = {low, high};
  return load_bits<Singles>(halves);
}
inline Singles load_singles(const BFloat16* source) {
  return joined(from_bfloat16(load_bits<UShorts>(source)), from_bfloat16(load_bits<UShorts>(source + kWidth)));
}
inline Singles load_singles(const Half* source) {
  return joined(from_half(load_bits<UShorts>(source)), from_half(load_bits<UShorts>(source + kWidth)));
}
#if defined(__SSE2__)
inline Singles load_singles(const int8_t* source) {
  const __m128i bytes = _mm_cvtsi32_si128(load_bits<int32_t>(source));
  const __m128i pairs = _mm_unpacklo_epi8(bytes, bytes), words = _mm_unpacklo_epi16(pairs, pairs);
  return (Singles)_mm_cvtepi32_ps(_mm_srai_epi32(words, 24));
}
#else
inline Singles load_singles(const int8_t* source) {
  using Bytes = int8_t __attribute__((vector_size(2 * kWidth)));
  return __builtin_convertvector(load_bits<Bytes>(source), Singles);
}
#endif
inline Floats low(Singles value) { return load_bits<Floats>(&value); }
inline Floats high(Singles value) { return load_bits<Floats>(reinterpret_cast<const char*>(&value) + sizeof(Floats)); }
inline Singles fused_multiply_add(Singles a, Singles b, Singles c) { return a * b + c; }
#endif
inline Singles load_singles(const float* source) { return load_bits<Singles>(source); }
inline Singles load_singles(const double* source) {
  return joined(narrow(load_bits<Doubles>(source)), narrow(load_bits<Doubles>(source + kWidth)));
}

// value, rounded to a 16-bit dtype.
template <class T>
inline float rounded_to(float value) {
  return static_cast<float>(T(value));
}
template <class T>
inline Singles rounded_to(Singles value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    using Words = uint32_t __attribute__((vector_size(8 * kWidth)));
    const Words bits = (Words)value;
    const Words nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    return value == value ? (Singles)nearest_even : value;  // a NaN stays one
  } else {
    return joined(from_half(to_half(low(value))), from_half(to_half(high(value))));
  }
}

template <class Bits>
inline void store_bits(void* target, Bits bits) {
  std::memcpy(target, &bits, sizeof(bits));
}

inline float square_root(float value) { return std::sqrt(value); }
inline double square_root(double value) { return std::sqrt(value); }
#if defined(CRL_AVX512)
inline Singles square_root(Singles value) { return (Singles)_mm512_sqrt_ps((__m512)value); }
inline Doubles square_root(Doubles value) { return (Doubles)_mm512_sqrt_pd((__m512d)value); }
#elif defined(CRL_AVX2)
inline Singles square_root(Singles value) { return (Singles)_mm256_sqrt_ps((__m256)value); }
inline Doubles square_root(Doubles value) { return (Doubles)_mm256_sqrt_pd((__m256d)value); }
#elif defined(__SSE2__)
inline Singles square_root(Singles value) { return (Singles)_mm_sqrt_ps((__m128)value); }
inline Doubles square_root(Doubles value) { return (Doubles)_mm_sqrt_pd((__m128d)value); }
#else
template <class Vector>
inline Vector square_root(Vector value) {
  for (size_t i = 0; i < sizeof(value) / sizeof(value[0]); ++i) value[i] = std::sqrt(value[i]);
  return value;
}
#endif

inline void store(double* target, Doubles value) { store_bits(target, value); }
inline void store(float* target, Doubles value) { store_bits(target, narrow(value)); }
inline void store(BFloat16* target, Doubles value) { store_bits(target, to_bfloat16(narrow(value))); }
inline void store(Half* target, Doubles value) { store_bits(target, to_half(narrow(value))); }

inline void store(float* target, Singles value) { store_bits(target, value); }
inline void store(BFloat16* target, Singles value) {
  store_bits(target, to_bfloat16(low(value)));
  store_bits(target + kWidth, to_bfloat16(high(value)));
}
inline void store(Half* target, Singles value) {
  store_bits(target, to_half(low(value)));
  store_bits(target + kWidth, to_half(high(value)));
}

inline void store(double* target, double value) { *target = value; }
template <class T>
inline void store(T* target, double value) {
  *target = static_cast<float>(value);
}

// The same number in every place; `c - 0` keeps the sign of a zero.
template <class Real>
inline Real broadcast(double c) {
  return c - Real{};
}

}  // namespace crl::CRL_ISA
