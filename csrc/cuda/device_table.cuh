// A segment table and its flat views in device memory, and how a thread locates its elements in it.
//
// The flat vector is cut into octets of 8 elements and tiles of 2,048. A block works on a tile at a time and each of
// its threads on one octet, whatever tensors the elements lie in, so sums do not depend on where tensors begin. Eight
// elements are one 16-byte access in a 16-bit dtype and two in float32.
#pragma once

#include <cstdint>

#include "core/segments.h"

namespace crl {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kOctet = 8;
constexpr int64_t kTile = kThreads * kOctet;
constexpr int64_t kWindow = 1 << 15;  // flat elements for each word of the index
static_assert(kWindow % kTile == 0, "a tile lies in one window");

// Where a flat view's entries lie in the table: one for each term and segment, or one for all segments of a flat
// tensor.
struct View {
  int first;
  int per_term;
  int per_segment;
};

// Directions of which some pieces, of one term and segment, are int8. A piece has three entries: its own and, if it is
// int8, the address of its scales and the elements of a block, which have one scale. An entry for each segment, at
// `octets`, is the octets of a block, where those are a whole number and begin where blocks do; elsewhere 0.
struct Int8View {
  View pieces;
  int octets;
};

// An entry has an origin in its lower bits and a dtype in the upper ones. The origin is where flat element 0 would be,
// were the whole vector laid out like the entry's tensor. Addresses have at most 57 bits.
constexpr int kOriginBits = 59;
constexpr uint64_t kOrigin = (uint64_t{1} << kOriginBits) - 1;
CRL_HOST_DEVICE inline int64_t entry_of(uintptr_t origin, DType dtype) {
  return static_cast<int64_t>(static_cast<uint64_t>(dtype) << kOriginBits | (origin & kOrigin));
}
// Flat element `index` of an entry's tensor.
CRL_HOST_DEVICE inline Pointer pointer_of(int64_t entry, int64_t index) {
  const uint64_t bits = static_cast<uint64_t>(entry);
  const DType dtype = static_cast<DType>(bits >> kOriginBits);
  return {reinterpret_cast<void*>((bits + index * size_of(dtype)) & kOrigin), dtype};
}

// A thread's octet: its first flat element, the segment that holds it, and whether that segment holds all eight.
struct Place {
  int64_t index;
  int segment;
  bool in_one_segment;
};

// The table as kernels see it. The index gives, for every window, the segment that holds its first element, and one
// more for the last element: a window of large tensors needs no search, and one of small tensors a short search in L1.
// It is so coarse that its size is negligible (3 KiB for 25 million parameters), and few blocks wait for it.
struct DeviceTable {
  const int64_t* entries;
  const int64_t* begins;   // of the segments, then the end of the last
  const int64_t* windows;  // the index
  int64_t numel;

  __device__ int64_t tiles() const { return (numel + kTile - 1) / kTile; }

  __device__ Pointer at(const View& view, int term, int segment, int64_t index) const {
    const uint32_t entry = view.first + segment * view.per_segment + term * view.per_term;
    return pointer_of(__ldg(entries + entry), index);
  }

  // The place of this thread's octet. Past the end of the vector it is not in one segment.
  __device__ Place place(int64_t tile) const {
    const int64_t index = tile * kTile + threadIdx.x * kOctet;
    const int64_t* window = windows + tile / (kWindow / kTile);
    int low = static_cast<int>(__ldg(window)), high = static_cast<int>(__ldg(window + 1));
    while (low < high) {  // the last segment that begins at or before index
      const int middle = low + (high - low + 1) / 2;
      if (__ldg(begins + middle) <= index) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return {index, low, index + kOctet <= __ldg(begins + low + 1)};
  }

  // Whether the octets of this thread's warp all lie in the segment of `place`; the same for all of them.
  __device__ bool warp_in_one_segment(const Place& place) const {
    const int64_t first = place.index - threadIdx.x % kWarp * kOctet;
    return __ldg(begins + place.segment) <= first && first + kWarp * kOctet <= __ldg(begins + place.segment + 1);
  }

  // Calls element(i, segment, index) for each element of an octet that may lie in several segments; the segment is -1
  // past the end of the vector.
  template <class Element>
  __device__ void for_each_element(const Place& place, const Element& element) const {
    int segment = place.segment;
    int64_t end = __ldg(begins + segment + 1);
#pragma unroll 1
    for (int i = 0; i < kOctet; ++i) {
      const int64_t index = place.index + i;
      while (index >= end && index < numel) end = __ldg(begins + ++segment + 1);
      element(i, index < numel ? segment : -1, index);
    }
  }
};

}  // namespace crl
