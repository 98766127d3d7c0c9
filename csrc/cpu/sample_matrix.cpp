// The operators over a matrix of per-sample gradients on a CPU. crl_kernels/backends/reference.py defines them.
//
// Blocks of columns are cut by the matrix's shape alone, tasks are runs of blocks, and sums are added block by block
// and then task by task, so results are bitwise the same for any number of threads. A block stays in the second-level
// cache while it is summed by columns and by rows and then projected; meanwhile the next one is fetched.

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/penalty_math.h"
#include "cpu/loops.h"
#include "operands.h"

namespace crl {
namespace {

constexpr int64_t kBlock = 65536;  // elements: 256 KiB of float32 and the prefetched block, in a cache of 512 KiB
// A task has at least kTask elements, and kTaskPerSum for each sum that it keeps, so that the tasks' sums take a small
// part of the matrix's memory.
constexpr int64_t kTask = 16 * kBlock;
constexpr int64_t kTaskPerSum = 16;
// Between these sums of squares, a float32 sum neither overflows nor loses small terms. A block with a row or a vector
// outside of them is summed again in float64.
constexpr double kSmallest = 0x1p-80, kLargest = 0x1p80;

int64_t columns_per_block(int64_t num_rows) {
  return sample_columns(std::clamp<int64_t>(kBlock / num_rows, kLineBytes, 4096));
}

// (N, P) gradients: rows may have any stride; where columns are not contiguous, the matrix is copied.
class Matrix {
 public:
  explicit Matrix(const Tensor& tensor) : tensor_(tensor) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) > 0, "crl_kernels: expected an (N, P) matrix with N > 0");
    if (tensor.size(1) > 1 && tensor.stride(1) != 1) tensor_ = torch::stable::contiguous(tensor);
    num_rows = tensor.size(0), num_columns = tensor.size(1);
    stride = num_rows > 1 ? tensor_.stride(0) : num_columns;
    dtype = dtype_of(tensor);
    data_ = static_cast<char*>(tensor_.data_ptr());
  }

  Pointer at(int64_t row, int64_t column) const { return {data_ + (row * stride + column) * size_of(dtype), dtype}; }

  int64_t num_rows, num_columns, stride;
  DType dtype;

 private:
  Tensor tensor_;
  char* data_;
};

// Blocks of columns and the tasks that they form. Each task keeps `num_sums` sums.
struct Blocks {
  Blocks(const Matrix& matrix, int64_t num_sums)
      : columns(columns_per_block(matrix.num_rows)),
        per_task(std::max<int64_t>(1, std::max(kTask, kTaskPerSum * num_sums) / (columns * matrix.num_rows))),
        end(matrix.num_columns) {}

  int64_t tasks() const { return (end + columns * per_task - 1) / (columns * per_task); }

  // Calls block(first column, number of columns) for each block of a task.
  template <class Block>
  void for_each(int64_t task, const Block& block) const {
    const int64_t stop = std::min(end, (task + 1) * columns * per_task);
    for (int64_t column = task * columns * per_task; column < stop; column += columns) {
      block(column, std::min(columns, stop - column));
    }
  }

  int64_t columns, per_task, end;
};

// Runs task(index, sums) for each task, which has `count` sums of its own, and adds the tasks' sums in order to
// `result`.
template <class Task>
void reduce_tasks(const Blocks& blocks, int64_t count, double* result, const Task& task) {
  std::vector<double> partial(blocks.tasks() * count);
  torch::stable::parallel_for(0, blocks.tasks(), 1, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) task(index, partial.data() + index * count);
  });
  std::fill(result, result + count, 0.0);
  for (int64_t index = 0; index < blocks.tasks(); ++index) {
    for (int64_t i = 0; i < count; ++i) result[i] += partial[index * count + i];
  }
}

// Whether float32 sums over a vector with this sum of squares are accurate: it is in range, or the vector is zero.
bool in_range(double sq_norm, Pointer vector, int64_t n) {
  if (sq_norm >= kSmallest && sq_norm <= kLargest) return true;
  const auto* bytes = static_cast<const char*>(vector.data);
  const int64_t length = n * size_of(vector.dtype);
  return sq_norm == 0.0 && bytes[0] == 0 && std::memcmp(bytes, bytes + 1, length - 1) == 0;
}

DType sum_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape, DType dtype) {
  return torch::stable::new_empty(like, shape, dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
}

Tensors sample_gradient_stats(const Tensor grads, const std::optional<Tensor> direction, bool diagonal) {
  const Matrix matrix(grads);
  const int64_t num_rows = matrix.num_rows;
  const DType dtype = sum_dtype(matrix.dtype);
  const bool by_mean = !direction.has_value();
  STD_TORCH_CHECK(by_mean || (direction->dim() == 2 && direction->size(1) == matrix.num_columns &&
                              dtype_of(*direction) == dtype && device_code_of(*direction) == device_code_of(grads)),
                  "crl_kernels: expected (K, P) directions of the mean's dtype on the device of the gradients");
  const int64_t terms = by_mean ? 1 : direction->size(0);
  Tensor mean = new_empty(grads, {matrix.num_columns}, dtype);
  Tensor squares = new_empty(grads, {diagonal ? matrix.num_columns : 0}, dtype);
  const Tensor weights = by_mean ? mean : torch::stable::contiguous(*direction);
  Tensor sq_norms = new_empty(grads, {num_rows}, DType::kFloat64);
  Tensor projections =
      by_mean ? new_empty(grads, {num_rows}, DType::kFloat64) : new_empty(grads, {num_rows, terms}, DType::kFloat64);
  const auto at = [dtype](const Tensor& tensor, int64_t index) {
    return Pointer{static_cast<char*>(tensor.data_ptr()) + index * size_of(dtype), dtype};
  };

  const Loops& loops = chosen_loops();
  const int64_t count = num_rows * (1 + terms);  // square norms, then projections row by row
  const Blocks blocks(matrix, count);
  std::vector<double> result(count);
  reduce_tasks(blocks, count, result.data(), [&](int64_t task, double* total) {
    std::vector<double> block(count), column_sums(blocks.columns), column_squares(diagonal ? blocks.columns : 0);
    double* const block_norms = block.data();
    double* const block_dots = block.data() + num_rows;
    const auto sum = [&](int64_t column, int64_t n, bool in_float64) {
      std::fill(block.begin(), block.begin() + num_rows, 0.0);
      std::fill(column_sums.begin(), column_sums.end(), 0.0);
      std::fill(column_squares.begin(), column_squares.end(), 0.0);
      loops.sample_sums(matrix.at(0, column), matrix.stride, num_rows, n, blocks.columns, in_float64,
                        column_sums.data(), diagonal ? column_squares.data() : nullptr, block_norms);
    };
    blocks.for_each(task, [&](int64_t column, int64_t n) {
      bool in_float64 = dtype == DType::kFloat64;
      sum(column, n, in_float64);
      for (int64_t i = 0; i < num_rows && !in_float64; ++i) {
        in_float64 = !in_range(block_norms[i], matrix.at(i, column), n);
        if (in_float64) sum(column, n, true);
      }
      loops.divide(at(mean, column), column_sums.data(), static_cast<double>(num_rows), n);
      if (diagonal) {
        loops.divide(at(squares, column), column_squares.data(), static_cast<double>(num_rows), n);
      }
      for (int64_t k = 0; k < terms && !in_float64; ++k) {
        const Pointer weight = at(weights, k * matrix.num_columns + column);
        double sq_norm = 0.0;
        loops.sample_dots(weight, 0, 1, weight, 0, 1, n, 0, false, &sq_norm, 1);
        in_float64 = !in_range(sq_norm, weight, n);
      }
      std::fill(block.begin() + num_rows, block.end(), 0.0);
      loops.sample_dots(matrix.at(0, column), matrix.stride, num_rows, at(weights, column), matrix.num_columns, terms,
                        n, blocks.columns, in_float64, block_dots, terms);
      for (int64_t i = 0; i < count; ++i) total[i] += block[i];
    });
  });
  std::copy_n(result.data(), num_rows, sq_norms.mutable_data_ptr<double>());
  std::copy_n(result.data() + num_rows, num_rows * terms, projections.mutable_data_ptr<double>());
  Tensors results = {mean, sq_norms, projections};
  if (diagonal) results.push_back(squares);
  return results;
}

Tensor sample_gram(const Tensor grads) {
  const Matrix matrix(grads);
  const int64_t num_rows = matrix.num_rows;
  const Blocks blocks(matrix, num_rows * num_rows);
  const DType dtype = sum_dtype(matrix.dtype);
  Tensor gram = new_empty(grads, {num_rows, num_rows}, DType::kFloat64);
  double* const result = gram.mutable_data_ptr<double>();

  const Loops& loops = chosen_loops();
  reduce_tasks(blocks, num_rows * num_rows, result, [&](int64_t task, double* total) {
    std::vector<double> block(num_rows * num_rows);
    std::vector<float> widened(dtype == matrix.dtype ? 0 : num_rows * blocks.columns);
    blocks.for_each(task, [&](int64_t column, int64_t n) {
      Pointer rows = matrix.at(0, column);
      int64_t stride = matrix.stride;
      if (!widened.empty()) {
        const double one = 1.0;
        for (int64_t i = 0; i < num_rows; ++i) {
          const Pointer row = matrix.at(i, column);
          loops.combine({widened.data() + i * blocks.columns, dtype}, &row, &one, 1, n, true);
        }
        rows = {widened.data(), dtype};
        stride = blocks.columns;
      }
      const auto row_at = [&](int64_t i) {
        return Pointer{static_cast<char*>(rows.data) + i * stride * size_of(dtype), dtype};
      };
      // Products of 8 rows with all rows up to them; those above the diagonal are not used.
      const auto dots = [&](bool in_float64) {
        std::fill(block.begin(), block.end(), 0.0);
        for (int64_t i = 0; i < num_rows; i += 8) {
          const int64_t count = std::min<int64_t>(8, num_rows - i);
          loops.sample_dots(row_at(i), stride, count, rows, stride, i + count, n, 0, in_float64,
                            block.data() + i * num_rows, num_rows);
        }
      };
      bool in_float64 = dtype == DType::kFloat64;
      dots(in_float64);
      for (int64_t i = 0; i < num_rows && !in_float64; ++i) {
        in_float64 = !in_range(block[i * num_rows + i], row_at(i), n);
        if (in_float64) dots(true);
      }
      for (size_t i = 0; i < block.size(); ++i) total[i] += block[i];
    });
  });
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t j = 0; j < i; ++j) result[j * num_rows + i] = result[i * num_rows + j];
  }
  return gram;
}

STABLE_TORCH_LIBRARY_IMPL(crl_kernels, CPU, m) {
  m.impl("sample_gradient_stats", TORCH_BOX(&sample_gradient_stats));
  m.impl("sample_gram", TORCH_BOX(&sample_gram));
}

}  // namespace
}  // namespace crl
