// Launches kernels on a tensor's device and its current stream, without waiting for them.
#pragma once

#include <algorithm>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "operands.h"

namespace crl {

// Everything here may be called while the stream is captured in a CUDA graph.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor)
      : device_(tensor.device()), index_(tensor.get_device_index()), guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int32_t device_index() const { return index_; }
  cudaStream_t stream() const { return stream_; }

  bool capturing() const {
    cudaStreamCaptureStatus status;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }

  int attribute(cudaDeviceAttr attribute) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, index_));
    return value;
  }

  Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) const {
    return torch::stable::empty(shape, dtype, std::nullopt, device_);
  }

  // As many blocks as the device holds at once, but at most `work`, and at least one.
  template <class... Parameters>
  int resident_blocks(void (*kernel)(Parameters...), int threads, int64_t work) const {
    int blocks = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
    blocks *= attribute(cudaDevAttrMultiProcessorCount);
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(blocks, work)));
  }

  template <class... Parameters, class... Arguments>
  void launch(int blocks, int threads, void (*kernel)(Parameters...), Arguments... arguments) const {
    STD_CUDA_CHECK(launch_with(false, blocks, threads, kernel, arguments...));
  }

  // All blocks run at once, so that they can wait for one another. False, with nothing launched, where they cannot: a
  // process may have only a part of the device (MPS, green contexts).
  template <class... Parameters, class... Arguments>
  bool launch_cooperative(int blocks, int threads, void (*kernel)(Parameters...), Arguments... arguments) const {
    const cudaError_t error = launch_with(true, blocks, threads, kernel, arguments...);
    if (error == cudaErrorCooperativeLaunchTooLarge) {
      cudaGetLastError();  // or the next check would report it
      return false;
    }
    STD_CUDA_CHECK(error);
    return true;
  }

 private:
  template <class... Parameters, class... Arguments>
  cudaError_t launch_with(bool cooperative, int blocks, int threads, void (*kernel)(Parameters...),
                          Arguments... arguments) const {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = cooperative ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
  }

  torch::stable::Device device_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace crl
