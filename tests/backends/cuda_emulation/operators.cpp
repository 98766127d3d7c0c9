// The CUDA operators, compiled for the host and registered for tensors of the CPU.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "cuda_runtime.h"
#include "operands.h"

// For STD_CUDA_CHECK: the emulated device makes no errors.
inline AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char**) { return 0; }
inline void torch_c10_cuda_free_error_msg(char*) {}

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(emulated_stream);
  return 0;
}

namespace torch::stable::accelerator {
struct EmulatedGuard {  // the emulated device has no index to switch to
  explicit EmulatedGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard EmulatedGuard

#define CUDA CPU  // the dispatch key of the registration; the headers above have their own use for the name
#include "cuda/adamw.cu"
#include "cuda/penalty.cu"
#include "cuda/table_cache.cu"

namespace crl {
namespace {

void place_kernel(DeviceTable table, View view, int64_t tile, int64_t* segments, int64_t* addresses) {
  const Place place = table.place(tile);
  segments[threadIdx.x] = place.index < table.numel ? place.segment : -1;
  addresses[threadIdx.x] = reinterpret_cast<int64_t>(table.at(view, 0, place.segment, place.index).data);
}

}  // namespace
}  // namespace crl

// The segments and addresses of the octets of a tile's 256 threads, for tensors with made-up lengths, addresses and
// dtypes.
extern "C" void emulated_places(int64_t count, const int64_t* lengths, const int64_t* addresses, const int64_t* dtypes,
                                int64_t tile, int64_t* octet_segments, int64_t* octet_addresses) {
  const crl::SegmentTable segments(std::vector<int64_t>(lengths, lengths + count));
  crl::FlatView tensors(count);
  for (int64_t i = 0; i < count; ++i) {
    tensors.add({reinterpret_cast<void*>(addresses[i]), static_cast<crl::DType>(dtypes[i])}, segments.begin(i));
  }
  crl::PackedTable packed(segments);
  const crl::View view = packed.add(tensors);
  const crl::Tensor anywhere = torch::stable::empty({1}, crl::ScalarType::Float);
  const crl::WrittenTable written = crl::write_table(packed.words(), segments, crl::Launcher(anywhere));
  emulation::run(1, crl::kThreads, false,
                 [&] { crl::place_kernel(written.table, view, tile, octet_segments, octet_addresses); });
}
