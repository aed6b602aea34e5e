// any2point._numpy: the CPU kernels for NumPy arrays, without torch. The public functions are in
// any2point/numpy.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "common/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_numpy, m) {
  m.def("simd", [] { return any2point::isa_name(any2point::isa()); });
}
