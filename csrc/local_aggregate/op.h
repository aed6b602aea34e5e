// What the glue of evaluation and training shares.
#pragma once

#include "inverse_list/op.h"
#include "local_aggregate/kernel.h"

namespace any2point {

// The data of a contiguous float32 tensor on the CPU, after a check of its shape.
const float* floats(const char* name, const Tensor& tensor, std::vector<int64_t> shape);

// The checked arguments, with what their pointers point into.
struct From {
  Neighborhoods rows;
  int64_t clouds;
  Tensor center, neighbor;
  std::vector<float> wavelength;
};

// `low`: features are bfloat16, and left to the caller.
From neighborhoods(const Tensor& points, const Tensor& features, const Tensor& center, const Tensor& neighbor,
                   const OptionalTensor& divisor, const Tensor& wavelength, double beta, bool guard,
                   bool low = false);

// A layer packed for the kernels.
struct Packed {
  std::vector<float> room;
  PackedLinear linear;
};

// weight [to, from], bias [to] or null.
Packed pack(const float* weight, const float* bias, int64_t to, int64_t from);

}  // namespace any2point
