// What the glue of kernels for sm_90a shares.
#pragma once

#include "inverse_list/op.h"
#include "local_aggregate/hopper.h"

namespace any2point {

// The data of a contiguous tensor on the device of `like`, after a check of its type and shape.
const void* hopper_data(const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& like,
                        std::vector<int64_t> shape);
// The same in the type of `like`, for reads of 16 bytes.
const void* hopper_aligned(const char* name, const Tensor& tensor, const Tensor& like,
                           std::vector<int64_t> shape);

// The checked arguments, with what their pointers point into; without units and out.
struct HopperFrom {
  HopperAggregate args;
  Tensor features, center, neighbor;
  int64_t clouds, groups, neighbors, width;
};
HopperFrom hopper_from(const Tensor& points, const Tensor& features, const Tensor& center,
                       const Tensor& neighbor, const OptionalTensor& divisor, const Tensor& wavelength,
                       double beta, bool guard);

}  // namespace any2point
