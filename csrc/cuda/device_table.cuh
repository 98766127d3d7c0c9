// A segment table and its flat views in device memory, and the walk along them that every kernel makes.
//
// One thread block works on one chunk. Thread t owns flat elements begin + t, begin + t + kThreads, ... of the chunk,
// whatever tensors they lie in, so sums do not depend on where tensors begin.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/segments.h"

namespace crl {

constexpr int kThreads = 256;
constexpr int kPerThread = static_cast<int>(kChunk) / kThreads;

// Where a flat view's entries, pairs (origin, dtype), lie in the table.
struct ViewHandle {
  int64_t offset;
  int64_t stride;  // 2 words per segment, or 0 for a flat vector, which has one entry
};

// Where the handles of K views lie in the table.
struct TermsHandle {
  int64_t offset;
  int64_t count;
};

// What kernels see: begins of the segments and their end, then entries of views, then handles of terms.
struct DeviceTable {
  const int64_t* words;
  int64_t segments;

  __device__ int64_t numel() const { return words[segments]; }

  // The tensor that holds flat elements of `segment`, as if flat element 0 were there too.
  __device__ Pointer at(ViewHandle view, int64_t segment, int64_t index = 0) const {
    const int64_t* entry = words + view.offset + segment * view.stride;
    const DType dtype = static_cast<DType>(entry[1]);
    return {reinterpret_cast<void*>(entry[0] + index * size_of(dtype)), dtype};
  }

  __device__ ViewHandle term(TermsHandle terms, int64_t k) const {
    const int64_t* handle = words + terms.offset + 2 * k;
    return {handle[0], handle[1]};
  }

  // Calls piece(segment, begin, end) for each run of this block's chunk that lies within one segment, in order.
  template <class Piece>
  __device__ void for_each_piece(const Piece& piece) const {
    int64_t index = blockIdx.x * kChunk;
    const int64_t last = index + kChunk < numel() ? index + kChunk : numel();
    int64_t low = 0, high = segments;  // the last segment that begins at or before index
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (words[middle] <= index ? low : high) = middle;
    }
    for (int64_t segment = low; index < last; ++segment) {
      const int64_t stop = last < words[segment + 1] ? last : words[segment + 1];
      if (stop > index) piece(segment, index, stop);
      index = stop;
    }
  }
};

// Calls element(i, index) for this thread's elements between begin and end; i numbers them within the thread.
template <class Element>
__device__ void for_each_element(int64_t begin, int64_t end, const Element& element) {
  const int64_t first = blockIdx.x * kChunk + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t index = first + static_cast<int64_t>(i) * kThreads;
    if (index >= begin && index < end) element(i, index);
  }
}

// Calls f with a typed pointer, f(T*). The branch is the same for the whole block.
template <class F>
__device__ void typed(Pointer pointer, const F& f) {
  switch (pointer.dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(pointer.data));
    case DType::kFloat64:
      return f(static_cast<double*>(pointer.data));
    case DType::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(pointer.data));
    case DType::kFloat16:
      return f(static_cast<__half*>(pointer.data));
  }
}

__device__ inline double load(const double* source) { return *source; }
__device__ inline double load(const float* source) { return *source; }
__device__ inline double load(const __nv_bfloat16* source) { return __bfloat162float(*source); }
__device__ inline double load(const __half* source) { return __half2float(*source); }

__device__ inline void store(double* target, double value) { *target = value; }
__device__ inline void store(float* target, double value) { *target = static_cast<float>(value); }
__device__ inline void store(__nv_bfloat16* target, double value) {
  *target = __float2bfloat16_rn(static_cast<float>(value));
}
__device__ inline void store(__half* target, double value) { *target = __float2half_rn(static_cast<float>(value)); }

}  // namespace crl
