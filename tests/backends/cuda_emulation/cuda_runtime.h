// Stands in for CUDA's header of this name: a small device whose properties tests can change, and which counts.
#pragma once

#include "emulate.h"

extern "C" {
inline int64_t emulated_stream = 0;
inline int64_t emulated_capturing = 0;
inline int64_t emulated_cooperative_launch = 1;
inline int64_t emulated_cooperative_blocks = 1 << 20;  // more are refused
inline int64_t emulated_l2_bytes = 1 << 16;
inline int64_t emulated_launches = 0;
inline int64_t emulated_cooperative_launches = 0;
inline int64_t emulated_units = 0;     // accesses of 16 bytes
inline int64_t emulated_octets = 0;    // accesses of eight bytes, int8 elements
inline int64_t emulated_elements = 0;  // accesses of one element or scale
}

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulation {
template <class T>
void count(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) fail("a misaligned access");
  if (sizeof(T) == 16) ++emulated_units;
  if (std::is_same_v<T, uint2>) ++emulated_octets;
  if (std::is_floating_point_v<T> || sizeof(T) <= 2) ++emulated_elements;
}
}  // namespace emulation

template <class T>
T __ldg(const T* source) {
  emulation::count(source);
  return *source;
}
template <class T>
T __ldcs(const T* source) {
  return __ldg(source);
}
inline double __ldcg(const double* source) { return *source; }
template <class T>
void __stcs(T* target, T value) {
  emulation::count(target);
  *target = value;
}

template <class To, class From>
To bits_as(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline int __double2loint(double value) { return static_cast<int>(bits_as<uint64_t>(value)); }
inline int __double2hiint(double value) { return static_cast<int>(bits_as<uint64_t>(value) >> 32); }
inline double __hiloint2double(int high, int low) {
  return bits_as<double>(static_cast<uint64_t>(static_cast<unsigned>(high)) << 32 | static_cast<unsigned>(low));
}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}

inline float __fmul_rn(float a, float b) { return a * b; }

using cudaError_t = int;
constexpr cudaError_t cudaErrorCooperativeLaunchTooLarge = 720;
using cudaStream_t = void*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrCooperativeLaunch, cudaDevAttrL2CacheSize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct dim3 {
  explicit dim3(unsigned x = 1) : x(x) {}
  unsigned x;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t emulated_error = 0;  // the last one
inline cudaError_t cudaGetLastError() { return std::exchange(emulated_error, 0); }

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulated_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return 0;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = static_cast<int>(attribute == cudaDevAttrMultiProcessorCount ? 3
                            : attribute == cudaDevAttrL2CacheSize       ? emulated_l2_bytes
                                                                        : emulated_cooperative_launch);
  return 0;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return 0;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const bool cooperative = config->numAttrs == 1 && config->attrs[0].val.cooperative;
  if (emulated_error) emulation::fail("an error that nobody has cleared");
  if (cooperative && config->gridDim.x > emulated_cooperative_blocks) {
    return emulated_error = cudaErrorCooperativeLaunchTooLarge;
  }
  ++(cooperative ? emulated_cooperative_launches : emulated_launches);
  emulation::run(config->gridDim.x, static_cast<int>(config->blockDim.x), cooperative, [&] { kernel(arguments...); });
  return 0;
}
