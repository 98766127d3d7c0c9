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

  // The same for terms of which some are int8.
  Int8View add_int8(const std::vector<Operand>& terms) {
    const int segments = static_cast<int>(table_.segments());
    Int8View result = {{static_cast<int>(entries_.size()), 3 * segments, 3}, 0};
    std::vector<int64_t> lengths(segments);  // of blocks; -1 where two terms differ
    for (const Operand& term : terms) {
      for (int i = 0; i < segments; ++i) {
        const FlatView::Entry& entry = term.view().entries()[i];
        const Scales scales = term.scales().empty() ? Scales{} : term.scales()[i];
        const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(scales.data));
        entries_.insert(entries_.end(), {entry_of(entry.origin, entry.dtype), address, scales.length});
        wide_ |= entry.dtype == DType::kFloat64;
        if (scales.data == nullptr) continue;
        lengths[i] = lengths[i] == 0 || lengths[i] == scales.length ? scales.length : -1;
      }
    }
    result.octets = static_cast<int>(entries_.size());
    for (int i = 0; i < segments; ++i) {
      const bool whole = lengths[i] % kOctet == 0 && table_.begin(i) % kOctet == 0;
      const bool few = (table_.end(i) - table_.begin(i)) / kOctet <= UINT32_MAX;  // a kernel divides in 32 bits
      entries_.push_back(whole && few ? lengths[i] / kOctet : 0);
    }
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
