// The flat view of a list of tensors.
//
// A model's parameters are a list of tensors; the penalty sees one vector of P elements, cut into fixed chunks. A
// SegmentTable knows where each tensor begins in that vector. A FlatView is anything that runs along it: the
// parameters, their gradients, a direction u_k, a diagonal Fisher. It is stored either as one tensor per parameter or
// as one flat tensor; both give an address for every flat index, so kernels treat both alike.
//
// Every operator works element by element along a segment, or sums over it. So a segment's elements may follow one
// another in any order that is the same in all operands: that of the parameter's memory, where that is dense.
//
// Chunks are cut at fixed flat indices and never at tensor boundaries, and partial sums belong to chunks. So every
// reduction is bitwise the same for a list and for a flat tensor, and for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/host_device.h"

namespace crl {

constexpr int64_t kChunk = 4096;  // elements per partial sum: 16 KiB of float32, so a chunk stays in L1 for K terms
constexpr int64_t kLanes = 16;    // on a CPU, flat element j of a chunk is added to lane j % kLanes of its partial sum

// Twice the size of an element in bytes; float16 adds one, to differ from bfloat16. CUDA kernels look a dtype up for
// every octet, and then need its size at once. Only directions are int8, and their elements have Scales.
enum class DType : uint32_t { kFloat64 = 16, kFloat32 = 8, kBFloat16 = 4, kFloat16 = 5, kInt8 = 2 };

CRL_HOST_DEVICE inline int64_t size_of(DType dtype) { return static_cast<uint32_t>(dtype) / 2; }

// The address and the dtype of some elements.
struct Pointer {
  void* data;
  DType dtype;
};

// Of the int8 elements of a segment: element i of it is q[i] * data[i / length], exactly, in float32.
struct Scales {
  const float* data = nullptr;
  int64_t length = 1;
};

// The order in which the elements of a segment follow one another: that of the memory of a tensor of these sizes and
// strides. They are the tensor's own, which has to outlive the table. None of it: row-major.
struct MemoryOrder {
  int64_t dims = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;
};

class SegmentTable {
 public:
  // `orders` has one entry for each segment, or none if all are row-major.
  explicit SegmentTable(const std::vector<int64_t>& lengths, std::vector<MemoryOrder> orders = {})
      : orders_(std::move(orders)) {
    begins_.reserve(lengths.size() + 1);
    begins_.push_back(0);
    for (int64_t length : lengths) begins_.push_back(begins_.back() + length);
  }

  int64_t segments() const { return static_cast<int64_t>(begins_.size()) - 1; }
  int64_t numel() const { return begins_.back(); }
  int64_t begin(int64_t segment) const { return begins_[segment]; }
  int64_t end(int64_t segment) const { return begins_[segment + 1]; }
  int64_t chunks() const { return (numel() + kChunk - 1) / kChunk; }

  bool row_major() const { return orders_.empty(); }
  // The order of a segment that is not row-major; null of one that is.
  const MemoryOrder* order(int64_t segment) const {
    return row_major() || orders_[segment].dims == 0 ? nullptr : &orders_[segment];
  }

  // The segment that holds flat element `index`; empty segments hold none.
  int64_t find(int64_t index) const {
    return std::upper_bound(begins_.begin(), begins_.end(), index) - begins_.begin() - 1;
  }

  // Calls piece(segment, begin, end) for each run of flat elements of `chunk` that lies within one segment, in order.
  template <class Piece>
  void for_each_piece(int64_t chunk, const Piece& piece) const {
    const int64_t last = std::min((chunk + 1) * kChunk, numel());
    int64_t index = chunk * kChunk;
    for (int64_t segment = find(index); index < last; ++segment) {
      const int64_t stop = std::min(last, end(segment));
      if (stop > index) piece(segment, index, stop);
      index = stop;
    }
  }

 private:
  std::vector<int64_t> begins_;
  std::vector<MemoryOrder> orders_;
};

class FlatView {
 public:
  struct Entry {
    uintptr_t origin;  // where flat element 0 would be, were the whole vector laid out like this segment
    DType dtype;
  };

  // For `count` tensors: one per segment of a table, or a single flat one.
  explicit FlatView(int64_t count) : flat_(count == 1) { entries_.reserve(count); }

  // The next tensor, which begins at the flat index `begin`.
  void add(Pointer tensor, int64_t begin) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.data);
    entries_.push_back({address - static_cast<uintptr_t>(begin * size_of(tensor.dtype)), tensor.dtype});
  }

  // One entry for all segments, if flat, or one for each.
  const std::vector<Entry>& entries() const { return entries_; }

  Pointer at(int64_t segment, int64_t index) const {
    const Entry& entry = entries_[flat_ ? 0 : segment];
    return {reinterpret_cast<void*>(entry.origin + static_cast<uintptr_t>(index * size_of(entry.dtype))), entry.dtype};
  }

 private:
  bool flat_;
  std::vector<Entry> entries_;
};

}  // namespace crl
