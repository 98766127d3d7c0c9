// A segment table and its streams in device memory, and the walk along them that every kernel makes.
//
// One thread block works on one chunk. Thread t owns flat elements begin + t, begin + t + kThreads, ... of the chunk,
// whatever tensors they lie in, so sums do not depend on where tensors begin.
#pragma once

#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "operands.h"

namespace crl {

constexpr int kThreads = 256;
constexpr int kPerThread = static_cast<int>(kChunk) / kThreads;

// Device view of a Stream: pairs (origin, dtype), one for all segments or one for each.
struct StreamView {
  const int64_t* entries;
  int64_t stride;  // 0 for a flat stream

  __device__ Pointer at(int64_t segment, int64_t index) const {
    const int64_t* entry = entries + segment * stride;
    const DType dtype = static_cast<DType>(entry[1]);
    return {reinterpret_cast<void*>(entry[0] + index * size_of(dtype)), dtype};
  }
};

struct TableView {
  const int64_t* begins;
  int64_t segments;

  __device__ int64_t numel() const { return begins[segments]; }

  // Calls piece(segment, begin, end) for each run of this block's chunk that lies within one segment, in order.
  template <class Piece>
  __device__ void for_each_piece(const Piece& piece) const {
    int64_t index = blockIdx.x * kChunk;
    const int64_t last = min(index + kChunk, numel());
    int64_t low = 0, high = segments;  // the last segment that begins at or before index
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (begins[middle] <= index ? low : high) = middle;
    }
    for (int64_t segment = low; index < last; ++segment) {
      const int64_t stop = min(last, begins[segment + 1]);
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

// Builds the views: packs tables on the host and copies them to the device in one tensor, which this object keeps.
class DeviceTable {
 public:
  explicit DeviceTable(const SegmentTable& table) : segments_(table.segments()) {
    for (int64_t i = 0; i <= segments_; ++i) words_.push_back(i < segments_ ? table.begin(i) : table.numel());
  }

  // Returns the stream's handle for view().
  int64_t add(const Stream& stream) {
    offsets_.push_back({static_cast<int64_t>(words_.size()), stream.entries().size() == 1 ? 0 : 2});
    for (const Stream::Entry& entry : stream.entries()) {
      words_.push_back(static_cast<int64_t>(entry.origin));
      words_.push_back(static_cast<int64_t>(entry.dtype));
    }
    return static_cast<int64_t>(offsets_.size()) - 1;
  }

  void copy_to(torch::stable::Device device) {
    const int64_t count = static_cast<int64_t>(words_.size());
    Tensor host = torch::stable::empty({count}, ScalarType::Long);
    std::copy(words_.begin(), words_.end(), host.mutable_data_ptr<int64_t>());
    device_words_ = torch::stable::to(host, device);
  }

  TableView table() const { return {device_words_.const_data_ptr<int64_t>(), segments_}; }
  StreamView view(int64_t stream) const {
    const auto [offset, stride] = offsets_[stream];
    return {device_words_.const_data_ptr<int64_t>() + offset, stride};
  }

 private:
  int64_t segments_;
  std::vector<int64_t> words_;
  std::vector<std::pair<int64_t, int64_t>> offsets_;
  Tensor device_words_;
};

}  // namespace crl
