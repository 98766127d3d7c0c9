// Stands in for csrc/cuda/launcher.cuh: launches kernels on the host, on tensors of the CPU.
#pragma once

#include "emulate.h"
#include "operands.h"

namespace crl {

class Launcher {
 public:
  explicit Launcher(const Tensor&) {}

  Tensor to_device(const std::vector<int64_t>& words) const {
    Tensor copy = torch::stable::empty({static_cast<int64_t>(words.size())}, ScalarType::Long);
    std::copy(words.begin(), words.end(), copy.mutable_data_ptr<int64_t>());
    return copy;
  }

  Tensor empty_float64(const std::vector<int64_t>& shape) const {
    return torch::stable::empty(shape, ScalarType::Double);
  }

  template <class... Parameters, class... Arguments>
  void launch(int64_t blocks, int threads, void (*kernel)(Parameters...), Arguments... arguments) const {
    emulation::run(blocks, threads, [&] { kernel(arguments...); });
  }
};

}  // namespace crl
