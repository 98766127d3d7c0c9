// Eight consecutive flat elements: read, converted, written.
//
// An octet that lies in one tensor at an address divisible by 16 is moved 16 bytes at a time; any other, at the ends of
// a tensor or in one whose address does not fit its flat index, element by element. Both give the same bits. A tensor
// that follows one of odd length has no octet of the first kind, so the second has to be quick too: its first load
// brings the octet into L1, and the lanes of a warp store consecutive elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/device_table.cuh"
#include "cuda/float64_arithmetic.cuh"

namespace crl {
namespace {

// kOnce: data that a pass reads once is evicted first. kKeep: directions, which a value and its gradient read twice.
enum class Caching { kOnce, kKeep };

// Eight elements as they are in memory. They are converted later, so that a thread can load several octets before it
// waits for the first: to Widest, which is float where no tensor of the lists is float64 and double elsewhere. Both
// hold every value exactly; arithmetic in float64 converts one element at a time, in half the registers.
template <class Widest>
struct Octet {
  uint32_t bits[kOctet * sizeof(Widest) / 4];
  DType dtype;

  // The elements, once they are converted.
  __device__ Factor<Widest> operator[](int i) const {
    if constexpr (sizeof(Widest) == 8) return __hiloint2double(bits[2 * i + 1], bits[2 * i]);
    return __uint_as_float(bits[i]);
  }
  __device__ void set(int i, Widest value) {
    if constexpr (sizeof(Widest) == 8) {
      bits[2 * i] = __double2loint(value);
      bits[2 * i + 1] = __double2hiint(value);
    } else {
      bits[i] = __float_as_uint(value);
    }
  }
};

constexpr int kUnit = 16;  // bytes of the widest access

__device__ bool aligned(Pointer pointer) { return reinterpret_cast<uintptr_t>(pointer.data) % kUnit == 0; }

template <Caching kCaching, class T>
__device__ T load(const void* source) {
  const T* typed = static_cast<const T*>(source);
  return kCaching == Caching::kKeep ? __ldg(typed) : __ldcs(typed);
}

__device__ float from_bfloat16(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ float from_float16(uint32_t bits) { return __half2float(__ushort_as_half(static_cast<uint16_t>(bits))); }
__device__ uint32_t to_bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
__device__ uint32_t to_float16(float value) { return __half_as_ushort(__float2half_rn(value)); }

// One element; in kernels without float64 there is no such tensor.
template <class Widest, Caching kCaching>
__device__ Widest load_element(Pointer source) {
  switch (source.dtype) {
    case DType::kFloat64:
      if constexpr (sizeof(Widest) == 8) return load<kCaching, double>(source.data);
      return 0;
    case DType::kFloat32:
      return load<kCaching, float>(source.data);
    case DType::kBFloat16:
      return from_bfloat16(load<kCaching, unsigned short>(source.data));
    default:
      return from_float16(load<kCaching, unsigned short>(source.data));
  }
}

template <class Widest>
__device__ void store_element(Pointer target, Widest value) {
  const float narrow = static_cast<float>(value);
  switch (target.dtype) {
    case DType::kFloat64:
      if constexpr (sizeof(Widest) == 8) __stcs(static_cast<double*>(target.data), value);
      return;
    case DType::kFloat32:
      return __stcs(static_cast<float*>(target.data), narrow);
    case DType::kBFloat16:
      return __stcs(static_cast<unsigned short*>(target.data), static_cast<unsigned short>(to_bfloat16(narrow)));
    default:
      return __stcs(static_cast<unsigned short*>(target.data), static_cast<unsigned short>(to_float16(narrow)));
  }
}

// A thread's elements in shared memory, where a loop can index them: an octet of the second kind is rare, and unrolled
// code for it takes registers from the common case. A row is 4 elements longer than the block, so that a warp that
// reads all elements of 4 threads uses 32 banks.
template <class Widest>
__device__ Widest& staged(int i, int thread = threadIdx.x) {
  __shared__ Widest elements[kOctet][kThreads + 4];
  return elements[i][thread];
}

// Writes the octets that a warp has staged to the one tensor that holds them. This thread's octet begins at `first`.
template <class Widest>
__device__ void store_by_warp(Pointer first) {
  const int lane = threadIdx.x % kWarp;
  const int64_t size = size_of(first.dtype);
  char* target = static_cast<char*>(first.data) - lane * (kOctet - 1) * size;  // of element `lane` of the warp's 256
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < kOctet; ++i, target += kWarp * size) {
    const int thread = threadIdx.x - lane + (i * kWarp + lane) / kOctet;
    store_element({target, first.dtype}, staged<Widest>(lane % kOctet, thread));
  }
  __syncwarp();  // before a thread stages its next octet
}

// The octet of a view's term at a place. Elements past the end of the vector are 0.
template <class Widest, Caching kCaching = Caching::kOnce>
__device__ Octet<Widest> read(const DeviceTable& table, const View& view, const Place& place, int term = 0) {
  Octet<Widest> octet = {};  // uninitialised, the second unit of 16-bit elements would be the loop's last one, copied
  const Pointer first = table.at(view, term, place.segment, place.index);
  if (place.in_one_segment && aligned(first)) {
    octet.dtype = first.dtype;
    const char* source = static_cast<const char*>(first.data);
    const int bytes = kOctet * static_cast<int>(size_of(first.dtype));
#pragma unroll
    for (int i = 0; i < kOctet * static_cast<int>(sizeof(Widest)) / kUnit; ++i) {
      if (i == 0 || i * kUnit < bytes) {
        const uint4 unit = load<kCaching, uint4>(source + i * kUnit);
        octet.bits[4 * i] = unit.x;
        octet.bits[4 * i + 1] = unit.y;
        octet.bits[4 * i + 2] = unit.z;
        octet.bits[4 * i + 3] = unit.w;
      }
    }
  } else {
    octet.dtype = sizeof(Widest) == 8 ? DType::kFloat64 : DType::kFloat32;
    if (place.in_one_segment) {
      char* source = static_cast<char*>(first.data);
#pragma unroll 1
      for (int i = 0; i < kOctet; ++i, source += size_of(first.dtype)) {
        staged<Widest>(i) = load_element<Widest, kCaching>({source, first.dtype});
      }
    } else {
      table.for_each_element(place, [&](int i, int segment, int64_t index) {
        staged<Widest>(i) = segment < 0 ? 0 : load_element<Widest, kCaching>(table.at(view, term, segment, index));
      });
    }
#pragma unroll
    for (int i = 0; i < kOctet; ++i) octet.set(i, staged<Widest>(i));
  }
  return octet;
}

template <class Widest>
__device__ void convert(Octet<Widest>& octet) {
  const Octet<Widest> raw = octet;
  octet.dtype = sizeof(Widest) == 8 ? DType::kFloat64 : DType::kFloat32;
  if (raw.dtype == DType::kFloat16) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) octet.set(i, from_float16(raw.bits[i / 2] >> (i % 2 * 16)));
  } else if (raw.dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) octet.set(i, from_bfloat16(raw.bits[i / 2] >> (i % 2 * 16)));
  } else if (sizeof(Widest) == 8 && raw.dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) octet.set(i, __uint_as_float(raw.bits[i]));
  }
}

// value, once an element of a dtype holds it.
template <class Widest>
__device__ Widest rounded_to(DType dtype, Widest value) {
  if (dtype == DType::kFloat64) return value;
  const float narrow = static_cast<float>(value);
  if (dtype == DType::kBFloat16) return from_bfloat16(to_bfloat16(narrow));
  if (dtype == DType::kFloat16) return from_float16(to_float16(narrow));
  return narrow;
}

// Rounds values to the dtypes of a view's elements at a place, 16-bit ones through float32, and writes them.
template <class Widest>
__device__ void write(const DeviceTable& table, const View& view, const Place& place, const Octet<Widest>& values) {
  const Pointer first = table.at(view, 0, place.segment, place.index);
  if (place.in_one_segment && aligned(first)) {
    Octet<Widest> rounded = values;
    float narrow[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) narrow[i] = static_cast<float>(values[i]);
    if (first.dtype == DType::kFloat16) {
#pragma unroll
      for (int i = 0; i < kOctet; i += 2) rounded.bits[i / 2] = to_float16(narrow[i]) | to_float16(narrow[i + 1]) << 16;
    } else if (first.dtype == DType::kBFloat16) {
#pragma unroll
      for (int i = 0; i < kOctet; i += 2)
        rounded.bits[i / 2] = to_bfloat16(narrow[i]) | to_bfloat16(narrow[i + 1]) << 16;
    } else if (sizeof(Widest) == 4 || first.dtype == DType::kFloat32) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) rounded.bits[i] = __float_as_uint(narrow[i]);
    }
    char* target = static_cast<char*>(first.data);
#pragma unroll
    for (int i = 0; i < kOctet * static_cast<int>(sizeof(Widest)) / kUnit; ++i) {
      if (i * kUnit < kOctet * size_of(first.dtype)) {
        __stcs(
            reinterpret_cast<uint4*>(target + i * kUnit),
            make_uint4(rounded.bits[4 * i], rounded.bits[4 * i + 1], rounded.bits[4 * i + 2], rounded.bits[4 * i + 3]));
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) staged<Widest>(i) = static_cast<Widest>(values[i]);
    if (table.warp_in_one_segment(place)) {
      store_by_warp<Widest>(first);
    } else {
      table.for_each_element(place, [&](int i, int segment, int64_t index) {
        if (segment >= 0) store_element(table.at(view, 0, segment, index), staged<Widest>(i));
      });
    }
  }
}

}  // namespace
}  // namespace crl
