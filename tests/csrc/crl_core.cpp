// csrc/core and the loops of csrc/cpu as a Python module, for the tests beside it. It is never shipped.
//
// A numpy array stands for a Pointer or a double*: its first element and its dtype, with uint16 for bfloat16, and None
// for a null double*; a list of arrays stands for a const Pointer*, five arrays for an AdamWPiece, and four integers
// for a Walk. Nothing here checks lengths, so that AddressSanitizer has something to find.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/adamw_math.h"
#include "core/penalty_math.h"
#include "core/segments.h"
#include "cpu/loops.h"

namespace py = pybind11;

namespace crl {
namespace {

DType dtype_of(const py::dtype& dtype) {
  switch (dtype.char_()) {
    case 'f':
      return DType::kFloat32;
    case 'd':
      return DType::kFloat64;
    case 'H':
      return DType::kBFloat16;
    case 'e':
      return DType::kFloat16;
    default:
      throw py::type_error("expected float32, float64, float16, or uint16 for bfloat16; got " +
                           py::str(py::handle(dtype)).cast<std::string>());
  }
}

Pointer pointer(const py::array& array) { return {const_cast<void*>(array.data()), dtype_of(array.dtype())}; }

// An argument of a loop, from a Python object.
template <class T>
struct Argument {
  using Python = T;
  T value;
};

template <>
struct Argument<Pointer> {
  using Python = py::array;
  Pointer value;
  explicit Argument(const py::array& array) : value(pointer(array)) {}
};

template <>
struct Argument<double*> {
  using Python = std::optional<py::array>;
  double* value;
  explicit Argument(const Python& array) : value(array ? static_cast<double*>(pointer(*array).data) : nullptr) {
    if (array && pointer(*array).dtype != DType::kFloat64) throw py::type_error("expected a float64 array");
  }
};

template <>
struct Argument<const double*> : Argument<double*> {
  using Argument<double*>::Argument;
};

template <>
struct Argument<const Pointer*> {
  using Python = std::vector<py::array>;
  std::vector<Pointer> pointers;
  const Pointer* value;
  explicit Argument(const std::vector<py::array>& arrays) {
    for (const py::array& array : arrays) pointers.push_back(pointer(array));
    value = pointers.data();
  }
};

template <>
struct Argument<AdamWPiece> {
  using Python = std::array<py::array, 6>;
  AdamWPiece value;
  explicit Argument(const Python& arrays)
      : value{pointer(arrays[0]), pointer(arrays[1]), pointer(arrays[2]),
              pointer(arrays[3]), pointer(arrays[4]), Argument<double*>(arrays[5]).value} {}
};

template <class... T>
py::cpp_function loop(void (*function)(T...)) {
  return py::cpp_function(
      [function](typename Argument<T>::Python... arguments) { function(Argument<T>{arguments}.value...); });
}

Walk walk(const std::array<int64_t, 4>& steps) { return {steps[0], steps[1], steps[2], steps[3]}; }

void* data_or_null(const std::optional<py::array>& array) { return array ? pointer(*array).data : nullptr; }

py::dict loops_by_name(const Loops& loops) {
  py::dict dict;
  dict["dequantise"] = py::cpp_function(
      [&loops](const py::array& q, const py::array& scales, int64_t length, int64_t first, const py::array& values) {
        loops.dequantise(static_cast<const int8_t*>(q.data()), {static_cast<const float*>(scales.data()), length},
                         first, values.size(), static_cast<float*>(pointer(values).data));
      });
  dict["dot"] = loop(loops.dot);
  dict["combine"] = loop(loops.combine);
  dict["quadratic"] = loop(loops.quadratic);
  dict["quadratic_gradient"] = loop(loops.quadratic_gradient);
  dict["shrink"] = loop(loops.shrink);
  dict["adamw"] = loop(loops.adamw);
  dict["low_rank_adamw"] = loop(loops.low_rank_adamw);
  dict["diagonal_adamw"] = loop(loops.diagonal_adamw);
  dict["sample_sums"] = loop(loops.sample_sums);
  dict["sample_dots"] = loop(loops.sample_dots);
  dict["divide"] = loop(loops.divide);
  dict["block_columns"] =
      py::cpp_function([&loops](const py::dtype& dtype) { return loops.block_columns(dtype_of(dtype)); });
  dict["correlate"] =
      py::cpp_function([&loops](const py::array& rows, const std::array<int64_t, 4>& row_steps,
                                const py::array& columns, const std::array<int64_t, 4>& column_steps, int64_t height,
                                int64_t width, int64_t ky, int64_t kx, const py::array& block) {
        loops.correlate(pointer(rows).dtype, rows.data(), walk(row_steps), columns.data(), walk(column_steps), height,
                        width, ky, kx, pointer(block).data);
      });
  dict["tile_statistics"] =
      py::cpp_function([&loops](const py::array& rows, int64_t samples, int64_t length, const py::array& sq_norms,
                                const py::array& projections, const std::optional<py::array>& gram,
                                const std::optional<py::array>& directions, int64_t num_directions,
                                const py::array& sum, const std::optional<py::array>& sum_of_squares) {
        const TileStatistics result = {Argument<double*>(sq_norms).value,
                                       Argument<double*>(projections).value,
                                       Argument<double*>(gram).value,
                                       data_or_null(directions),
                                       num_directions,
                                       pointer(sum).data,
                                       data_or_null(sum_of_squares)};
        loops.tile_statistics(pointer(rows).dtype, rows.data(), samples, length, result);
      });
  return dict;
}

// The loops of every instruction set that this processor runs, by name: chosen_loops() is the last of them.
py::dict runnable_loops() {
  std::vector<const Loops*> tables = {&baseline::loops};
#if defined(__x86_64__)
  tables.insert(tables.end(), {&avx2::loops, &avx512::loops});
#endif
  py::dict dict;
  for (const Loops* table : tables) {
    dict[table->name] = loops_by_name(*table);
    if (table == &chosen_loops()) break;
  }
  return dict;
}

// The columns of AdamW's settings, by name.
py::dict settings_columns() {
  py::dict dict;
  dict["factor"] = int64_t{kFactor};
  dict["beta1"] = int64_t{kBeta1};
  dict["beta2"] = int64_t{kBeta2};
  dict["decay"] = int64_t{kDecay};
  dict["step_size"] = int64_t{kStepSize};
  dict["root_scale"] = int64_t{kRootScale};
  dict["eps"] = int64_t{kEps};
  dict["share"] = int64_t{kShare};
  return dict;
}

std::vector<std::tuple<int64_t, int64_t, int64_t>> pieces(const SegmentTable& table, int64_t chunk) {
  std::vector<std::tuple<int64_t, int64_t, int64_t>> result;
  table.for_each_piece(chunk,
                       [&](int64_t segment, int64_t begin, int64_t end) { result.emplace_back(segment, begin, end); });
  return result;
}

FlatView flat_view(const SegmentTable& table, const std::vector<std::pair<uintptr_t, py::dtype>>& tensors) {
  FlatView view(static_cast<int64_t>(tensors.size()));
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& [address, dtype] = tensors[i];
    view.add({reinterpret_cast<void*>(address), dtype_of(dtype)}, table.begin(static_cast<int64_t>(i)));
  }
  return view;
}

}  // namespace

PYBIND11_MODULE(crl_core, m) {
  m.attr("CHUNK") = kChunk;
  m.attr("LANES") = kLanes;
  m.attr("BLOCK_ROWS") = kBlockRows;
  m.def("sample_columns", &sample_columns);
  m.attr("LOOPS") = runnable_loops();
  m.attr("SETTINGS") = settings_columns();
  m.attr("NUM_SETTINGS") = int64_t{kSettings};
  m.def("proximal_weight", [](double fisher, double strength) { return proximal_weight(fisher, strength); });
  m.def("ordered_sum", [](const py::array& values, int64_t count, int64_t stride) {
    return ordered_sum(Argument<double*>(values).value, count, stride);
  });
  py::class_<SegmentTable>(m, "SegmentTable")
      .def(py::init<const std::vector<int64_t>&>())
      .def("segments", &SegmentTable::segments)
      .def("numel", &SegmentTable::numel)
      .def("begin", &SegmentTable::begin)
      .def("end", &SegmentTable::end)
      .def("chunks", &SegmentTable::chunks)
      .def("find", &SegmentTable::find)
      .def("pieces", &pieces);
  py::class_<FlatView>(m, "FlatView")
      .def(py::init(&flat_view))
      .def("address", [](const FlatView& view, int64_t segment, int64_t index) {
        return reinterpret_cast<uintptr_t>(view.at(segment, index).data);
      });
}

}  // namespace crl
