// How a segment table gets to the device: packed on the host at every call, and written only when it has changed.
//
// The key is the content: addresses, dtypes, lengths. Python makes new tensor objects at every step, and an optimizer
// may move a parameter; the addresses show both. A table that is not in the cache is written by kernels that carry its
// words in their parameters: nothing is pinned, nothing on the host has to outlive the launch, and a CUDA graph can
// hold them.
#pragma once

#include <vector>

#include "cuda/device_table.cuh"
#include "cuda/launcher.cuh"
#include "operands.h"

namespace crl {

// A table on the host.
class PackedTable {
 public:
  explicit PackedTable(const SegmentTable& table) : table_(table) {}

  View add(const FlatView& view) {
    const View result = {static_cast<int>(entries_.size()), 0, view.entries().size() == 1 ? 0 : 1};
    for (const FlatView::Entry& entry : view.entries()) {
      entries_.push_back(entry_of(entry.origin, entry.dtype));
      wide_ |= entry.dtype == DType::kFloat64;
    }
    return result;
  }

  // Terms have equally many entries, so that an entry is found without another look-up.
  View add(const std::vector<Operand>& terms) {
    View result = add(terms[0].view());
    result.per_term = static_cast<int>(entries_.size()) - result.first;
    for (size_t k = 1; k < terms.size(); ++k) add(terms[k].view());
    return result;
  }

  const SegmentTable& segments() const { return table_; }
  bool wide() const { return wide_; }  // some tensor is float64

  // The entries first: two tables of the same lists differ there.
  std::vector<int64_t> words() const {
    std::vector<int64_t> words;
    words.reserve(entries_.size() + table_.segments() + 1);
    words.insert(words.end(), entries_.begin(), entries_.end());
    for (int64_t i = 0; i < table_.segments(); ++i) words.push_back(table_.begin(i));
    words.push_back(table_.numel());
    return words;
  }

 private:
  const SegmentTable& table_;
  std::vector<int64_t> entries_;
  bool wide_ = false;
};

// A table in device memory, and the tensor that owns the memory.
struct WrittenTable {
  Tensor memory;
  DeviceTable table;
};

// From the cache, or written on the launcher's stream.
WrittenTable device_table(const PackedTable& packed, const Launcher& launcher);

}  // namespace crl
