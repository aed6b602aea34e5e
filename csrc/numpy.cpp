// any2point._numpy: the CPU kernels for NumPy arrays, without torch. The public functions are in
// any2point/numpy.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "common/isa.h"
#include "farthest_point_sample/kernel.h"

namespace py = pybind11;

namespace any2point {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
py::tuple farthest_point_sample(const Array<T>& points, int64_t samples, int64_t start) {
  const int64_t count = points.shape(0);
  Array<int64_t> index(samples);
  Array<T> distance(samples);
  const FarthestPointSample<T> run{points.data(),
                                   Rows{1, count, count, nullptr, nullptr},
                                   points.shape(1),
                                   samples,
                                   &start,
                                   false,
                                   index.mutable_data(),
                                   distance.mutable_data()};
  {
    const py::gil_scoped_release release;
    farthest_point_sample_cpu(run, 0, 1);
  }
  return py::make_tuple(index, distance);
}

}  // namespace
}  // namespace any2point

PYBIND11_MODULE(_numpy, m) {
  m.def("simd", [] { return any2point::isa_name(any2point::isa()); });
  m.def("farthest_point_sample", any2point::farthest_point_sample<float>);
  m.def("farthest_point_sample", any2point::farthest_point_sample<double>);
}
