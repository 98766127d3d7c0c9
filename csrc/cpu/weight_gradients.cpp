// sample_weight_gradients on a CPU. crl_kernels/backends/reference.py defines it.

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/penalty_math.h"
#include "cpu/loops.h"
#include "cpu/weight_gradients.h"
#include "operands.h"

namespace crl {
namespace {

// The rows of all samples for one tile should fit the second-level cache beside the operands that they come from.
constexpr int64_t kTileBytes = 256 * 1024;
// Partial statistics, added in order at the end, so that results do not depend on the number of threads.
constexpr int64_t kTasks = 16;

struct Shape {
  int64_t samples, groups, in_channels, out_channels;  // channels of one group
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t offsets() const { return kernel_h * kernel_w; }
  int64_t padded_height() const { return height + 2 * padding_h; }
  int64_t padded_width() const { return width + 2 * padding_w; }
};

// A number of elements, checked: a product that overflows int64 would look like a small one.
int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(result, factor, &result), "crl_kernels: more elements than int64 counts");
  }
  return result;
}

// Pixels that a convolution gives along one side of an image; by division, because a product may overflow.
int64_t output_size(int64_t padded, int64_t kernel, int64_t stride, int64_t dilation) {
  if (padded < 1 || kernel - 1 > (padded - 1) / dilation) return 0;
  return (padded - 1 - (kernel - 1) * dilation) / stride + 1;
}

Shape shape_of(const Tensor& input, const Tensor& grad_output, const std::vector<int64_t>& kernel_size,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
               const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.dim() == 4 && grad_output.dim() == 4 && input.size(0) == grad_output.size(0),
                  "crl_kernels: expected an input and a grad_output of shape (N, channels, height, width)");
  for (const auto* pair : {&kernel_size, &stride, &padding, &dilation})
    STD_TORCH_CHECK(pair->size() == 2, "crl_kernels: expected kernel_size, stride, padding and dilation as pairs");
  STD_TORCH_CHECK(groups > 0 && input.size(1) % groups == 0 && grad_output.size(1) % groups == 0,
                  "crl_kernels: channels are no multiple of groups");
  const Shape s = {input.size(0),
                   groups,
                   input.size(1) / groups,
                   grad_output.size(1) / groups,
                   input.size(2),
                   input.size(3),
                   grad_output.size(2),
                   grad_output.size(3),
                   kernel_size[0],
                   kernel_size[1],
                   stride[0],
                   stride[1],
                   padding[0],
                   padding[1],
                   dilation[0],
                   dilation[1]};
  constexpr int64_t largest_padding = int64_t{1} << 32;  // twice that, beside any size, is no overflow
  for (int64_t i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(
        kernel_size[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0 && padding[i] <= largest_padding,
        "crl_kernels: expected kernel_size, stride and dilation above 0, and padding from 0 to ", largest_padding);
  }
  const int64_t height = output_size(s.padded_height(), s.kernel_h, s.stride_h, s.dilation_h);
  const int64_t width = output_size(s.padded_width(), s.kernel_w, s.stride_w, s.dilation_w);
  STD_TORCH_CHECK(s.out_height == height && s.out_width == width, "crl_kernels: grad_output has images of ",
                  s.out_height, " x ", s.out_width, " pixels, but this convolution gives ", height, " x ", width);
  return s;
}

// kCount channels of an image's row, pixel by pixel.
template <int64_t kCount, class T>
void copy_pixels(const T* source, int64_t stride, int64_t width, T* target) {
  for (int64_t x = 0; x < width; ++x) std::memcpy(target + x * kCount, source + x * stride, kCount * sizeof(T));
}

// An image's `count` channels of one sample as (padded height, padded width, lanes), zeros elsewhere.
template <class T>
void pack(const T* source, const int64_t* strides, int64_t count, int64_t lanes, int64_t height, int64_t width,
          int64_t padding_h, int64_t padding_w, T* target) {
  const int64_t padded_width = width + 2 * padding_w;
  if (count < lanes || padding_h > 0 || padding_w > 0) {
    std::memset(target, 0, (height + 2 * padding_h) * padded_width * lanes * sizeof(T));
  }
  for (int64_t y = 0; y < height; ++y) {
    const T* row = source + y * strides[2];
    T* packed = target + ((y + padding_h) * padded_width + padding_w) * lanes;
    if (strides[1] == 1 && count == lanes && lanes == kBlockRows) {
      copy_pixels<kBlockRows>(row, strides[3], width, packed);
    } else if (strides[1] == 1 && count == lanes && lanes == 16) {  // float32 columns of AVX2
      copy_pixels<16>(row, strides[3], width, packed);
    } else {
      for (int64_t c = 0; c < count; ++c)
        for (int64_t x = 0; x < width; ++x) packed[x * lanes + c] = row[c * strides[1] + x * strides[3]];
    }
  }
}

// All samples of a tensor (N, groups * channels, height, width), packed into blocks of `lanes` channels.
template <class T>
class Packed {
 public:
  Packed(const Tensor& tensor, int64_t groups, int64_t lanes, int64_t padding_h, int64_t padding_w)
      : channels_(tensor.size(1) / groups),
        samples_(tensor.size(0)),
        lanes_(lanes),
        image_(product({tensor.size(2) + 2 * padding_h, tensor.size(3) + 2 * padding_w, lanes})),
        memory_(torch::stable::empty({product({groups, blocks(), samples_, image_})}, tensor.scalar_type())),
        data_(static_cast<T*>(memory_.data_ptr())) {
    const int64_t height = tensor.size(2), width = tensor.size(3);
    const int64_t strides[] = {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
    const auto* source = static_cast<const T*>(tensor.data_ptr());
    torch::stable::parallel_for(0, groups * blocks() * samples_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i % samples_, block = i / samples_ % blocks(), group = i / samples_ / blocks();
        pack(source + sample * strides[0] + (group * channels_ + block * lanes) * strides[1], strides, count(block),
             lanes, height, width, padding_h, padding_w, at(group, block, sample));
      }
    });
  }

  int64_t blocks() const { return (channels_ + lanes_ - 1) / lanes_; }
  // Channels of a block that exist.
  int64_t count(int64_t block) const { return std::min(lanes_, channels_ - block * lanes_); }
  int64_t channel(int64_t block) const { return block * lanes_; }
  T* at(int64_t group, int64_t block, int64_t sample) const {
    return data_ + ((group * blocks() + block) * samples_ + sample) * image_;
  }

 private:
  int64_t channels_, samples_, lanes_, image_;
  Tensor memory_;
  T* data_;
};

// Zeros for the channels of a block that do not exist: an infinite factor times their zeros is NaN.
template <class T>
void clear_missing(T* block, int64_t num_rows, int64_t num_columns, int64_t columns) {
  if (num_rows == kBlockRows && num_columns == columns) return;
  for (int64_t r = 0; r < kBlockRows; ++r, block += columns) {
    std::fill(block + (r < num_rows ? num_columns : 0), block + columns, T{});
  }
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Result statistics_of(const Shape& s, const Tensor& input, const Tensor& grad_output,
                     const std::optional<Tensor>& directions, bool with_gram, bool with_squares) {
  const Loops& loops = chosen_loops();
  const DType dtype = dtype_of(input);
  const int64_t columns = loops.block_columns(dtype);
  const int64_t numel = product({s.groups * s.out_channels, s.in_channels, s.kernel_h, s.kernel_w});
  const int64_t num_directions = directions ? directions->size(0) : 1;

  const std::vector<int64_t> weight = {s.groups * s.out_channels, s.in_channels, s.kernel_h, s.kernel_w};
  Tensor sum = torch::stable::empty(weight, input.scalar_type());
  Tensor squares = torch::stable::empty(with_squares ? weight : std::vector<int64_t>{0}, input.scalar_type());
  auto *sum_data = static_cast<T*>(sum.data_ptr()), *squares_data = static_cast<T*>(squares.data_ptr());
  const T* direction_data = directions ? static_cast<const T*>(directions->data_ptr()) : nullptr;

  // Which operand is broadcast and which fills vectors: whichever wastes less of them.
  const auto blocks = [](int64_t channels, int64_t lanes) { return (channels + lanes - 1) / lanes; };
  const bool input_in_rows = blocks(s.in_channels, kBlockRows) * blocks(s.out_channels, columns) <
                             blocks(s.out_channels, kBlockRows) * blocks(s.in_channels, columns);
  const Packed<T> a(input, s.groups, input_in_rows ? kBlockRows : columns, s.padding_h, s.padding_w);
  const Packed<T> b(grad_output, s.groups, input_in_rows ? columns : kBlockRows, 0, 0);
  const Packed<T>&in_rows = input_in_rows ? a : b, &in_columns = input_in_rows ? b : a;
  const Walk walk_a = {s.stride_h * s.padded_width(), s.stride_w, s.dilation_h * s.padded_width(), s.dilation_w};
  const Walk walk_b = {s.out_width, 1, 0, 0};
  const Walk &row_walk = input_in_rows ? walk_a : walk_b, &column_walk = input_in_rows ? walk_b : walk_a;

  // A tile: blocks `first` to `last` of the (block of columns, kernel offset) that go with one block of rows.
  const int64_t block_size = kBlockRows * columns, blocks_per_row = in_columns.blocks() * s.offsets();
  const int64_t fitting = kTileBytes / (std::max<int64_t>(1, s.samples) * block_size * static_cast<int64_t>(sizeof(T)));
  const int64_t tile_blocks = std::max<int64_t>(1, std::min(fitting, blocks_per_row));
  const int64_t tiles_per_row = (blocks_per_row + tile_blocks - 1) / tile_blocks;
  const int64_t tiles = s.groups * in_rows.blocks() * tiles_per_row;
  const int64_t tasks = std::clamp<int64_t>(tiles, 1, kTasks);  // one without tiles: all statistics are zero

  const int64_t values = s.samples * (1 + num_directions + (with_gram ? s.samples : 0));
  std::vector<double> partial(tasks * values);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first_task, int64_t last_task) {
    const int64_t longest = tile_blocks * block_size;
    std::vector<T> rows(s.samples * longest), tile_sum(longest), tile_squares(with_squares ? longest : 0);
    // Not empty for no directions, or data() might be null, which would mean "on the sum".
    std::vector<T> tile_directions(directions ? std::max<int64_t>(1, num_directions * longest) : 0);
    for (int64_t task = first_task; task < last_task; ++task) {
      TileStatistics statistics = {};
      statistics.sq_norms = partial.data() + task * values;
      statistics.projections = statistics.sq_norms + s.samples;
      statistics.gram = with_gram ? statistics.projections + s.samples * num_directions : nullptr;
      statistics.num_directions = num_directions;
      statistics.sum = tile_sum.data();
      statistics.sum_of_squares = with_squares ? tile_squares.data() : nullptr;
      statistics.directions = directions ? tile_directions.data() : nullptr;
      for (int64_t tile = task * tiles / tasks; tile < (task + 1) * tiles / tasks; ++tile) {
        const int64_t group = tile / tiles_per_row / in_rows.blocks();
        const int64_t row_block = tile / tiles_per_row % in_rows.blocks();
        const int64_t first = tile % tiles_per_row * tile_blocks, last = std::min(first + tile_blocks, blocks_per_row);
        const int64_t length = (last - first) * block_size;
        for (int64_t i = 0; i < s.samples; ++i) {
          for (int64_t block = first; block < last; ++block) {
            const int64_t column_block = block / s.offsets(), offset = block % s.offsets();
            T* const gradients = rows.data() + i * length + (block - first) * block_size;
            loops.correlate(dtype, in_rows.at(group, row_block, i), row_walk, in_columns.at(group, column_block, i),
                            column_walk, s.out_height, s.out_width, offset / s.kernel_w, offset % s.kernel_w,
                            gradients);
            clear_missing(gradients, in_rows.count(row_block), in_columns.count(column_block), columns);
          }
        }
        // Calls f(index in the weight, index in a row) for each element that exists.
        const auto for_each = [&](const auto& f) {
          for (int64_t block = first; block < last; ++block) {
            const int64_t column_block = block / s.offsets(), offset = block % s.offsets();
            for (int64_t r = 0; r < in_rows.count(row_block); ++r) {
              for (int64_t c = 0; c < in_columns.count(column_block); ++c) {
                const int64_t row = in_rows.channel(row_block) + r, column = in_columns.channel(column_block) + c;
                const int64_t out = group * s.out_channels + (input_in_rows ? column : row);
                const int64_t in = input_in_rows ? row : column;
                f((out * s.in_channels + in) * s.offsets() + offset, (block - first) * block_size + r * columns + c);
              }
            }
          }
        };
        if (directions) {
          std::fill(tile_directions.begin(), tile_directions.end(), T{});
          for (int64_t k = 0; k < num_directions; ++k) {
            for_each(
                [&](int64_t from, int64_t to) { tile_directions[k * length + to] = direction_data[k * numel + from]; });
          }
        }
        loops.tile_statistics(dtype, rows.data(), s.samples, length, statistics);
        for_each([&](int64_t to, int64_t from) { sum_data[to] = tile_sum[from]; });
        if (with_squares) for_each([&](int64_t to, int64_t from) { squares_data[to] = tile_squares[from]; });
      }
    }
  });

  Tensor sq_norms = torch::stable::empty({s.samples}, ScalarType::Double);
  Tensor projections = torch::stable::empty({s.samples, num_directions}, ScalarType::Double);
  const int64_t gram_side = with_gram ? s.samples : 0;
  Tensor gram = torch::stable::empty({gram_side, gram_side}, ScalarType::Double);
  const auto total = [&](int64_t at) { return ordered_sum(partial.data() + at, tasks, values); };
  for (int64_t i = 0; i < s.samples; ++i) sq_norms.mutable_data_ptr<double>()[i] = total(i);
  for (int64_t i = 0; i < s.samples * num_directions; ++i)
    projections.mutable_data_ptr<double>()[i] = total(s.samples + i);
  double* g = gram.mutable_data_ptr<double>();
  for (int64_t i = 0; i < gram_side; ++i)
    for (int64_t j = 0; j <= i; ++j)
      g[i * gram_side + j] = g[j * gram_side + i] = total(s.samples * (1 + num_directions + i) + j);
  return {sum, sq_norms, projections, gram, squares};
}

Result sample_weight_gradients(Tensor input, Tensor grad_output, std::vector<int64_t> kernel_size,
                               std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                               int64_t groups, std::optional<Tensor> directions, bool gram, bool squares) {
  const Shape s = shape_of(input, grad_output, kernel_size, stride, padding, dilation, groups);
  DType dtype = dtype_of(input);
  STD_TORCH_CHECK(dtype == dtype_of(grad_output), "crl_kernels: input and grad_output have one dtype");
  if (dtype == DType::kBFloat16 || dtype == DType::kFloat16) {
    input = torch::stable::to(input, ScalarType::Float);
    grad_output = torch::stable::to(grad_output, ScalarType::Float);
    dtype = DType::kFloat32;
  }
  if (directions) {
    STD_TORCH_CHECK(
        dtype_of(*directions) == dtype && directions->dim() == 5 && directions->size(1) == s.groups * s.out_channels &&
            directions->size(2) == s.in_channels && directions->size(3) == s.kernel_h &&
            directions->size(4) == s.kernel_w,
        "crl_kernels: directions have the dtype of the sum and the shape (K, O, C, kernel height, kernel width)");
    directions = torch::stable::contiguous(*directions);
  }
  return dtype == DType::kFloat64 ? statistics_of<double>(s, input, grad_output, directions, gram, squares)
                                  : statistics_of<float>(s, input, grad_output, directions, gram, squares);
}

STABLE_TORCH_LIBRARY_IMPL(crl_kernels, CPU, m) {
  m.impl("sample_weight_gradients", TORCH_BOX(&sample_weight_gradients));
}

}  // namespace
}  // namespace crl
