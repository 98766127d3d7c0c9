// CUDA implementations of the operators whose schemas and meanings are in crl_kernels/_ops.py.
//
// Reductions have two stages and no atomics: each block writes one sum per chunk, a second kernel adds them in a fixed
// order. Results are bitwise the same from run to run. All arithmetic is float64.

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "core/penalty_math.h"
#include "cuda/device_table.cuh"

namespace crl {
namespace {

// The sum of every thread's value, valid in thread 0.
__device__ double block_sum(double value) {
  __shared__ double values[kThreads];
  __syncthreads();  // the previous use of `values` is over
  values[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  return values[0];
}

// partial[k * gridDim.x + chunk] = u_k . theta over the chunk. The chunk of theta is in L1 after the first term.
__global__ void __launch_bounds__(kThreads)
    projections_kernel(TableView table, StreamView theta, const StreamView* directions, int64_t num_terms,
                       double* partial) {
  for (int64_t k = 0; k < num_terms; ++k) {
    const StreamView direction = directions[k];
    double sum = 0.0;
    table.for_each_piece([&](int64_t segment, int64_t begin, int64_t end) {
      typed(theta.at(segment, 0), [&](const auto* x) {
        typed(direction.at(segment, 0), [&](const auto* u) {
          for_each_element(begin, end, [&](int, int64_t index) { sum = fma(load(x + index), load(u + index), sum); });
        });
      });
    });
    const double total = block_sum(sum);
    if (threadIdx.x == 0) partial[k * gridDim.x + blockIdx.x] = total;
  }
}

// result[k] = sum of partial[k * count ... k * count + count - 1]; one block for each k.
__global__ void __launch_bounds__(kThreads) finish_kernel(const double* partial, int64_t count, double* result) {
  partial += blockIdx.x * count;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) result[blockIdx.x] = total;
}

// targets (+)= sum_k coefficients[k] u_k, rounded once.
template <bool kOverwrite>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(TableView table, StreamView targets, const StreamView* directions, const double* coefficients,
                   int64_t num_terms) {
  double sums[kPerThread] = {};
  for (int64_t k = 0; k < num_terms; ++k) {
    const StreamView direction = directions[k];
    const double c = coefficients[k];
    table.for_each_piece([&](int64_t segment, int64_t begin, int64_t end) {
      typed(direction.at(segment, 0), [&](const auto* u) {
        for_each_element(begin, end, [&](int i, int64_t index) { sums[i] = fma(c, load(u + index), sums[i]); });
      });
    });
  }
  table.for_each_piece([&](int64_t segment, int64_t begin, int64_t end) {
    typed(targets.at(segment, 0), [&](auto* target) {
      for_each_element(begin, end, [&](int i, int64_t index) {
        store(target + index, kOverwrite ? sums[i] : load(target + index) + sums[i]);
      });
    });
  });
}

struct DiagonalState {
  StreamView theta, fisher, anchor;

  // Calls element(theta*, S, m, i, index) for this thread's elements.
  template <class Element>
  __device__ void for_each(const TableView& table, const Element& element) const {
    table.for_each_piece([&](int64_t segment, int64_t begin, int64_t end) {
      const Pointer s = fisher.at(segment, 0), m = anchor.at(segment, 0);
      typed(theta.at(segment, 0), [&](auto* x) {
        for_each_element(begin, end, [&](int, int64_t index) {
          if (s.dtype == DType::kFloat64) {
            element(x + index, static_cast<const double*>(s.data)[index], static_cast<const double*>(m.data)[index],
                    segment, index);
          } else {
            element(x + index, static_cast<const float*>(s.data)[index], static_cast<const float*>(m.data)[index],
                    segment, index);
          }
        });
      });
    });
  }
};

// partial[chunk] = sum S (theta - m)^2
__global__ void __launch_bounds__(kThreads) quadratic_kernel(TableView table, DiagonalState state, double* partial) {
  double sum = 0.0;
  state.for_each(table, [&](const auto* theta, double fisher, double anchor, int64_t, int64_t) {
    const double distance = load(theta) - anchor;
    sum = fma(fisher * distance, distance, sum);
  });
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// The same, and targets (+)= c S (theta - m), in one pass.
template <bool kOverwrite>
__global__ void __launch_bounds__(kThreads)
    quadratic_gradient_kernel(TableView table, DiagonalState state, StreamView targets, const double* coefficient,
                              double* partial) {
  const double c = *coefficient;
  double sum = 0.0;
  state.for_each(table, [&](auto* theta, double fisher, double anchor, int64_t segment, int64_t index) {
    const double distance = load(theta) - anchor;
    const double slope = fisher * distance;
    sum = fma(slope, distance, sum);
    auto* target = static_cast<decltype(theta)>(targets.at(segment, index).data);
    store(target, kOverwrite ? c * slope : fma(c, slope, load(target)));
  });
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// theta <- theta - w (theta - m)
__global__ void __launch_bounds__(kThreads)
    shrink_kernel(TableView table, DiagonalState state, const double* strength) {
  const double eta_lambda = *strength;
  state.for_each(table, [&](auto* theta, double fisher, double anchor, int64_t, int64_t) {
    const double value = load(theta);
    store(theta, value - proximal_weight(fisher, eta_lambda) * (value - anchor));
  });
}

// What every operator needs on the host: the device, its current stream, and the tables there.
class Launch {
 public:
  Launch(const SegmentTable& table, const Tensor& tensor)
      : device_(tensor.device()), guard_(tensor.get_device_index()), chunks_(table.chunks()), tables_(table) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int64_t add(const Stream& stream) { return tables_.add(stream); }
  void copy_tables() { tables_.copy_to(device_); }
  TableView table() const { return tables_.table(); }
  StreamView view(int64_t stream) const { return tables_.view(stream); }

  // Views of K streams that were added one after the other, in device memory.
  const StreamView* views(int64_t first, int64_t count) {
    static_assert(sizeof(StreamView) == 2 * sizeof(int64_t));
    Tensor host = torch::stable::empty({2 * count}, ScalarType::Long);
    auto* views = reinterpret_cast<StreamView*>(host.mutable_data_ptr<int64_t>());
    for (int64_t k = 0; k < count; ++k) views[k] = view(first + k);
    views_ = torch::stable::to(host, device_);
    return reinterpret_cast<const StreamView*>(views_.const_data_ptr<int64_t>());
  }

  Tensor empty_float64(const std::vector<int64_t>& shape) const {
    return torch::stable::empty(shape, ScalarType::Double, std::nullopt, device_);
  }

  // Runs a kernel with one block for each chunk.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), Arguments... arguments) const {
    if (chunks_ == 0) return;
    kernel<<<static_cast<unsigned>(chunks_), kThreads, 0, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // The sums of `rows` rows of one partial sum per chunk.
  Tensor finish(const Tensor& partial, int64_t rows, const std::vector<int64_t>& shape) const {
    Tensor result = empty_float64(shape);
    finish_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream_>>>(partial.const_data_ptr<double>(), chunks_,
                                                                         result.mutable_data_ptr<double>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return result;
  }

  int64_t chunks() const { return chunks_; }

 private:
  torch::stable::Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  int64_t chunks_;
  DeviceTable tables_;
  Tensor views_;
};

Tensor low_rank_projections(const Tensors params, const Tensors directions, int64_t num_terms) {
  const SegmentTable table = segment_table(params);
  const Operand theta(table, params, params[0]);
  const std::vector<Operand> u = directions_of(table, directions, num_terms, params[0]);
  Launch launch(table, params[0]);
  const int64_t theta_stream = launch.add(theta.stream());
  const int64_t first = theta_stream + 1;
  for (const Operand& direction : u) launch.add(direction.stream());
  launch.copy_tables();
  Tensor partial = launch.empty_float64({num_terms, launch.chunks()});
  launch(projections_kernel, launch.table(), launch.view(theta_stream), launch.views(first, num_terms), num_terms,
         partial.mutable_data_ptr<double>());
  return launch.finish(partial, num_terms, {num_terms});
}

void combine_into(Target& target, const SegmentTable& table, const Tensors& directions, const Tensor& coefficients,
                  const Tensor& same_device_as, bool overwrite) {
  const int64_t num_terms = coefficients.numel();
  const std::vector<Operand> u = directions_of(table, directions, num_terms, same_device_as);
  Launch launch(table, same_device_as);
  const int64_t target_stream = launch.add(target.stream());
  const int64_t first = target_stream + 1;
  for (const Operand& direction : u) launch.add(direction.stream());
  launch.copy_tables();
  const Tensor c = coefficients_of(coefficients, same_device_as);
  launch(overwrite ? combine_kernel<true> : combine_kernel<false>, launch.table(), launch.view(target_stream),
         launch.views(first, num_terms), c.const_data_ptr<double>(), num_terms);
  target.write_back();
}

void low_rank_accumulate_(const Tensors targets, const Tensors directions, const Tensor coefficients) {
  const SegmentTable table = segment_table(targets);
  Target target(table, targets);
  combine_into(target, table, directions, coefficients, targets[0], false);
}

Tensors low_rank_combine(const Tensors directions, const Tensor coefficients, const Tensors like) {
  const Tensors result = empty_like_all(like);
  const SegmentTable table = segment_table(result);
  Target target(table, result);
  combine_into(target, table, directions, coefficients, like[0], true);
  return result;
}

// The operands of a diagonal operator, and its launch.
struct Diagonal {
  Diagonal(const SegmentTable& table, const Stream& theta_stream, const Tensors& fisher, const Tensors& anchor,
           const Tensor& same_device_as)
      : s(table, fisher, same_device_as), m(table, anchor, same_device_as), launch(table, same_device_as) {
    check_state_dtypes(fisher, anchor);
    launch.add(theta_stream);
    launch.add(s.stream());
    launch.add(m.stream());
  }

  DiagonalState state() const { return {launch.view(0), launch.view(1), launch.view(2)}; }

  const Operand s, m;
  Launch launch;
};

Tensor diagonal_quadratic(const Tensors params, const Tensors fisher, const Tensors anchor) {
  const SegmentTable table = segment_table(params);
  const Operand theta(table, params, params[0]);
  Diagonal diagonal(table, theta.stream(), fisher, anchor, params[0]);
  Launch& launch = diagonal.launch;
  launch.copy_tables();
  Tensor partial = launch.empty_float64({launch.chunks()});
  launch(quadratic_kernel, launch.table(), diagonal.state(), partial.mutable_data_ptr<double>());
  return launch.finish(partial, 1, {});
}

Tensor gradient_into(const Tensors& targets, const Tensors& params, const Tensors& fisher, const Tensors& anchor,
                     const Tensor& coefficient, bool overwrite) {
  check_targets(targets, params);
  const SegmentTable table = segment_table(params);
  Target target(table, targets);
  const Operand theta(table, params, params[0]);
  Diagonal diagonal(table, theta.stream(), fisher, anchor, params[0]);
  Launch& launch = diagonal.launch;
  const int64_t target_stream = launch.add(target.stream());
  launch.copy_tables();
  const Tensor c = coefficients_of(coefficient, params[0]);
  Tensor partial = launch.empty_float64({launch.chunks()});
  launch(overwrite ? quadratic_gradient_kernel<true> : quadratic_gradient_kernel<false>, launch.table(),
         diagonal.state(), launch.view(target_stream), c.const_data_ptr<double>(), partial.mutable_data_ptr<double>());
  target.write_back();
  return launch.finish(partial, 1, {});
}

Tensor diagonal_accumulate_(const Tensors targets, const Tensors params, const Tensors fisher, const Tensors anchor,
                            const Tensor coefficient) {
  return gradient_into(targets, params, fisher, anchor, coefficient, false);
}

Tensors diagonal_gradient(const Tensors params, const Tensors fisher, const Tensors anchor, const Tensor coefficient) {
  const Tensors result = empty_like_all(params);
  gradient_into(result, params, fisher, anchor, coefficient, true);
  return result;
}

void diagonal_shrink_(const Tensors params, const Tensors fisher, const Tensors anchor, const Tensor strength) {
  const SegmentTable table = segment_table(params);
  Target theta(table, params);
  Diagonal diagonal(table, theta.stream(), fisher, anchor, params[0]);
  Launch& launch = diagonal.launch;
  launch.copy_tables();
  const Tensor eta_lambda = coefficients_of(strength, params[0]);
  launch(shrink_kernel, launch.table(), diagonal.state(), eta_lambda.const_data_ptr<double>());
  theta.write_back();
}

STABLE_TORCH_LIBRARY_IMPL(crl_kernels, CUDA, m) {
  m.impl("low_rank_projections", TORCH_BOX(&low_rank_projections));
  m.impl("low_rank_combine", TORCH_BOX(&low_rank_combine));
  m.impl("low_rank_accumulate_", TORCH_BOX(&low_rank_accumulate_));
  m.impl("diagonal_quadratic", TORCH_BOX(&diagonal_quadratic));
  m.impl("diagonal_gradient", TORCH_BOX(&diagonal_gradient));
  m.impl("diagonal_accumulate_", TORCH_BOX(&diagonal_accumulate_));
  m.impl("diagonal_shrink_", TORCH_BOX(&diagonal_shrink_));
}

}  // namespace
}  // namespace crl
