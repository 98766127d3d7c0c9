// Writes segment tables to the device and keeps the last ones.
#include "cuda/table_cache.cuh"

#include <list>
#include <map>
#include <mutex>
#include <utility>

namespace crl {
namespace {

constexpr int kWordsPerLaunch = 500;  // 4,000 of the 4,096 bytes that kernel parameters may have on every device
constexpr size_t kCachedTables = 64;  // for each device; a training step uses one or two

struct Words {
  int64_t at[kWordsPerLaunch];
};

__global__ void __launch_bounds__(kThreads)
    write_kernel(const __grid_constant__ Words words, int count, int64_t* target) {
  for (int i = threadIdx.x; i < count; i += kThreads) target[i] = words.at[i];
}

// windows[i] = the segment that holds flat element i * kWindow, or the last element.
__global__ void __launch_bounds__(kThreads)
    index_kernel(const int64_t* begins, int segments, int64_t count, int64_t* windows) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t last = begins[segments] - 1;
    const int64_t index = i * kWindow < last ? i * kWindow : last;
    int low = 0, high = segments - 1;
    while (low < high) {  // the last segment that begins at or before index
      const int middle = low + (high - low + 1) / 2;
      if (begins[middle] <= index) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    windows[i] = low;
  }
}

WrittenTable write_table(const std::vector<int64_t>& words, const SegmentTable& segments, const Launcher& launcher) {
  const int64_t count = static_cast<int64_t>(words.size());
  const int64_t windows = (segments.numel() + kWindow - 1) / kWindow + 1;
  Tensor memory = launcher.empty({count + windows}, ScalarType::Long);
  int64_t* target = memory.mutable_data_ptr<int64_t>();
  for (int64_t first = 0; first < count; first += kWordsPerLaunch) {
    const int part = static_cast<int>(std::min<int64_t>(count - first, kWordsPerLaunch));
    Words parameters;
    std::copy_n(words.begin() + first, part, parameters.at);
    launcher.launch(1, kThreads, write_kernel, parameters, part, target + first);
  }
  const int64_t* begins = target + count - segments.segments() - 1;
  const int blocks = launcher.resident_blocks(index_kernel, kThreads, (windows + kThreads - 1) / kThreads);
  launcher.launch(blocks, kThreads, index_kernel, begins, static_cast<int>(segments.segments()), windows,
                  target + count);
  return {memory, {target, begins, target + count, segments.numel()}};
}

// The last tables written on each device. A table belongs to the stream that it was written on: on another stream it
// might be read too early, or its memory reused too early.
class TableCache {
 public:
  WrittenTable operator()(const PackedTable& packed, const Launcher& launcher) {
    const SegmentTable& segments = packed.segments();
    std::vector<int64_t> words = packed.words();
    // In a graph a table is a temporary like any other. The kernels that write it are captured with the rest and
    // replayed before every use, so a replay depends on nothing outside of the graph, and nothing is kept for graphs
    // that may be gone.
    if (launcher.capturing()) return write_table(words, segments, launcher);
    const Key key = {launcher.stream(), segments.segments()};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::list<Entry>& tables = tables_[launcher.device_index()];
      for (auto entry = tables.begin(); entry != tables.end(); ++entry) {
        if (entry->key == key && entry->words == words) {
          tables.splice(tables.begin(), tables, entry);
          return entry->written;
        }
      }
    }
    const WrittenTable written = write_table(words, segments, launcher);
    const std::lock_guard<std::mutex> lock(mutex_);
    std::list<Entry>& tables = tables_[launcher.device_index()];
    tables.push_front({key, std::move(words), written});
    if (tables.size() > kCachedTables) tables.pop_back();
    return written;
  }

 private:
  using Key = std::pair<cudaStream_t, int64_t>;
  struct Entry {
    Key key;
    std::vector<int64_t> words;
    WrittenTable written;
  };

  std::mutex mutex_;
  std::map<int32_t, std::list<Entry>> tables_;  // by device, the one used last first
};

}  // namespace

WrittenTable device_table(const PackedTable& packed, const Launcher& launcher) {
  static TableCache& cache =
      *new TableCache;  // never destroyed: at the end of the process the device may be gone first
  return cache(packed, launcher);
}

}  // namespace crl
