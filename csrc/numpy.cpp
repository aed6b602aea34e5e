// any2point._numpy: the CPU kernels for NumPy arrays, without torch. The public functions are in
// any2point/numpy.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <limits>

#include "common/isa.h"
#include "farthest_point_sample/kernel.h"
#include "knn/kernel.h"

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

template <typename T>
py::tuple neighbours(const Array<T>& query, const Array<T>& points, int64_t k, T limit, Choice choice) {
  const int64_t queries = query.shape(0), count = points.shape(0);
  Array<int64_t> index({queries, k}), found(queries);
  Array<T> distance({queries, k});
  const Neighbours<T> run{query.data(),
                          Rows{1, queries, queries, nullptr, nullptr},
                          points.data(),
                          Rows{1, count, count, nullptr, nullptr},
                          points.shape(1),
                          k,
                          limit,
                          choice,
                          index.mutable_data(),
                          distance.mutable_data(),
                          found.mutable_data()};
  {
    const py::gil_scoped_release release;
    neighbours_cpu(run, [](int64_t n, const Range& body) { body(0, n); });
  }
  return py::make_tuple(index, distance, found);
}

template <typename T>
py::tuple knn(const Array<T>& query, const Array<T>& points, int64_t k, bool sorted) {
  const T limit = std::numeric_limits<T>::infinity();
  const py::tuple all = neighbours(query, points, k, limit, sorted ? Choice::nearest : Choice::set);
  return py::make_tuple(all[0], all[1]);
}

template <typename T>
py::tuple ball_query(const Array<T>& query, const Array<T>& points, double radius, int64_t k, bool nearest) {
  return neighbours(query, points, k, ball_limit<T>(radius), nearest ? Choice::nearest : Choice::first);
}

}  // namespace
}  // namespace any2point

PYBIND11_MODULE(_numpy, m) {
  m.def("simd", [] { return any2point::isa_name(any2point::isa()); });
  m.def("farthest_point_sample", any2point::farthest_point_sample<float>);
  m.def("farthest_point_sample", any2point::farthest_point_sample<double>);
  m.def("knn", any2point::knn<float>);
  m.def("knn", any2point::knn<double>);
  m.def("ball_query", any2point::ball_query<float>);
  m.def("ball_query", any2point::ball_query<double>);
}
