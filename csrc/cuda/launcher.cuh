// Launches kernels on one device and its current stream, without waiting for it.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "operands.h"

namespace crl {

class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : device_(tensor.device()), guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    cudaStreamCaptureStatus capturing;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream_, &capturing));
    STD_TORCH_CHECK(capturing == cudaStreamCaptureStatusNone,
                    "crl_kernels: these operators cannot be captured in a CUDA graph; call them outside of it");
  }

  // A copy on the device. The source is pinned, so the host does not wait, and torch keeps it until the copy is done.
  Tensor to_device(const std::vector<int64_t>& words) const {
    const int64_t count = static_cast<int64_t>(words.size());
    Tensor pinned = torch::stable::empty({count}, ScalarType::Long, std::nullopt, std::nullopt, /*pin_memory=*/true);
    std::copy(words.begin(), words.end(), pinned.mutable_data_ptr<int64_t>());
    return torch::stable::to(pinned, device_, /*non_blocking=*/true);
  }

  Tensor empty_float64(const std::vector<int64_t>& shape) const {
    return torch::stable::empty(shape, ScalarType::Double, std::nullopt, device_);
  }

  template <class... Parameters, class... Arguments>
  void launch(int64_t blocks, int threads, void (*kernel)(Parameters...), Arguments... arguments) const {
    if (blocks == 0) return;
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace crl
