// csrc/core and the loops of csrc/cpu as a Python module, for the tests beside it. It is never shipped.
//
// A numpy array stands for a Pointer or a double*: its first element and its dtype, with uint16 for bfloat16; a list of
// arrays stands for a const Pointer*. Nothing here checks lengths, so that AddressSanitizer has something to find.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/penalty_math.h"
#include "core/segments.h"
#include "cpu/kernels.h"

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
                           py::str(dtype).cast<std::string>());
  }
}

Pointer pointer(const py::array& array) { return {const_cast<void*>(array.data()), dtype_of(array.dtype())}; }

// An argument of a loop, made from what Python gives.
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
  using Python = py::array;
  double* value;
  explicit Argument(const py::array& array) : value(static_cast<double*>(pointer(array).data)) {
    if (pointer(array).dtype != DType::kFloat64) throw py::type_error("expected a float64 array");
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

template <class... T>
py::cpp_function loop(void (*function)(T...)) {
  return py::cpp_function(
      [function](typename Argument<T>::Python... arguments) { function(Argument<T>{arguments}.value...); });
}

py::dict loops(const Kernels& table) {
  py::dict dict;
  dict["dot"] = loop(table.dot);
  dict["combine"] = loop(table.combine);
  dict["quadratic"] = loop(table.quadratic);
  dict["quadratic_gradient"] = loop(table.quadratic_gradient);
  dict["shrink"] = loop(table.shrink);
  return dict;
}

// The loops of every instruction set that this processor runs, by name: kernels() is the last of them.
py::dict runnable_loops() {
  std::vector<const Kernels*> tables = {&baseline::kernels};
#if defined(__x86_64__)
  tables.insert(tables.end(), {&avx2::kernels, &avx512::kernels});
#endif
  py::dict dict;
  for (const Kernels* table : tables) {
    dict[table->name] = loops(*table);
    if (table == &kernels()) break;
  }
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
  m.attr("LOOPS") = runnable_loops();
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
