// One call of an operator: its table, and the kernels that it launches along the flat vector.
#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "cuda/launcher.cuh"
#include "cuda/reductions.cuh"
#include "cuda/table_cache.cuh"
#include "operands.h"

namespace crl {
namespace {

class Call {
 public:
  Call(const SegmentTable& table, const Tensor& tensor) : launcher_(tensor), packed_(table) {}

  template <class Operands>
  View add(const Operands& operands) {
    return packed_.add(operands.view());
  }

  // Calls pass(view) with the view of directions, whose type chooses between kernels.
  template <class Pass>
  auto with_directions(const std::vector<Operand>& terms, const Pass& pass) {
    for (const Operand& term : terms) {
      if (!term.scales().empty()) return pass(packed_.add_int8(terms));
    }
    return pass(terms.empty() ? View{} : packed_.add(terms));
  }

  const Launcher& launcher() const { return launcher_; }

  // The kernel for lists with or without float64, and its number of blocks: as many as the device holds, with at least
  // one tile each.
  template <class Kernel>
  struct Grid {
    Kernel kernel;
    int blocks;
  };
  template <class Kernel>
  Grid<Kernel> grid(Kernel narrow, Kernel wide) const {
    const Kernel kernel = packed_.wide() ? wide : narrow;
    const int64_t tiles = (packed_.segments().numel() + kTile - 1) / kTile;
    return {kernel, launcher_.resident_blocks(kernel, kThreads, tiles)};
  }

  // Room for one sum of each block, for each term.
  template <class Kernel>
  Tensor partial_sums(const Grid<Kernel>& grid, int64_t num_terms) const {
    const std::vector<int64_t> shape = {num_terms, static_cast<int64_t>(grid.blocks)};
    return float64(shape);
  }
  Tensor float64(const std::vector<int64_t>& shape) const { return launcher_.empty(shape, ScalarType::Double); }

  // A kernel's first argument is the table of all operands that were added.
  template <class Kernel, class... Arguments>
  void launch(const Grid<Kernel>& grid, Arguments... arguments) {
    launcher_.launch(grid.blocks, kThreads, grid.kernel, table(), arguments...);
  }
  template <class Kernel, class... Arguments>
  bool launch_cooperative(const Grid<Kernel>& grid, Arguments... arguments) {
    return launcher_.launch_cooperative(grid.blocks, kThreads, grid.kernel, table(), arguments...);
  }

  // The sum of each row of partial sums.
  template <class Kernel>
  Tensor finish(const Grid<Kernel>& grid, const Tensor& partial, int num_terms, const std::vector<int64_t>& shape) {
    Tensor result = float64(shape);
    launcher_.launch((num_terms + kWarps - 1) / kWarps, kThreads, finish_kernel, partial.const_data_ptr<double>(),
                     static_cast<int64_t>(grid.blocks), num_terms, result.mutable_data_ptr<double>());
    return result;
  }

 private:
  DeviceTable table() {
    if (!written_) written_ = device_table(packed_, launcher_);
    return written_->table;
  }

  Launcher launcher_;
  PackedTable packed_;
  std::optional<WrittenTable> written_;
};

int checked_terms(int64_t num_terms) {
  STD_TORCH_CHECK(num_terms <= std::numeric_limits<int>::max() / kThreads, "crl_kernels: ", num_terms, " terms");
  return static_cast<int>(num_terms);
}

}  // namespace
}  // namespace crl
